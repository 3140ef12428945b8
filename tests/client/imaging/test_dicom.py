"""DICOM files: how slices lie, frames, damage, and real files."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage, RLELossless

from chestct.errors import ScanDecodeError
from chestct.imaging import dicom
from chestct.imaging.prepare import Scan, inspect_bytes, inspect_scan, inspect_scans, load_scan
from chestct.imaging.sources import list_scans
from tests.support.scan_files import SIDE, bytes_of, saved, scan_of
from training.data.phantom import Phantom, dicom_from_phantom, make_phantom

LEFT, BACK, HEAD = np.eye(3)


# What the scanner tells of a picture that was turned about: direction of its rows, of its columns.
TURNS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, np.ndarray]] = {
    "HFS": (lambda a: a, LEFT, BACK),
    "FFS, rows flipped": (np.fliplr, -LEFT, BACK),
    "columns flipped": (np.flipud, LEFT, -BACK),
    "HFP": (lambda a: np.rot90(a, 2), -LEFT, -BACK),
    "HFDL": (lambda a: np.rot90(a, 1), BACK, -LEFT),
    "HFDR": (lambda a: np.rot90(a, 3), -BACK, LEFT),
    "transposed": (np.transpose, BACK, LEFT),
    "transposed and turned": (lambda a: np.rot90(a.T, 2), -BACK, -LEFT),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("tilt_deg", [0, 20])
def test_every_orientation_gives_the_same_tensor(
    tags: Dataset, phantom: Phantom, tmp_path: Path, turn: str, tilt_deg: int
) -> None:
    expected = scan_of(tags, tmp_path / "upright.dcm").pixels
    turned, along_row, along_column = TURNS[turn]
    lean = np.radians(tilt_deg)
    tilt = np.array([[1, 0, 0], [0, np.cos(lean), -np.sin(lean)], [0, np.sin(lean), np.cos(lean)]])
    stored = np.frombuffer(tags.PixelData, np.int16).reshape(SIDE, SIDE)
    tags.PixelData = np.ascontiguousarray(turned(stored)).tobytes()
    tags.ImageOrientationPatient = [
        f"{part:.6f}" for part in (*tilt @ along_row, *tilt @ along_column)
    ]
    tags.PatientPosition = turn[:3] if turn[:2] in ("HF", "FF") else "FFS"
    np.testing.assert_array_equal(scan_of(tags, tmp_path / "turned.dcm").pixels, expected)
    del tags.ImageOrientationPatient
    as_stored = scan_of(tags, tmp_path / "unknown.dcm").pixels
    assert np.array_equal(as_stored, expected) == (turn == "HFS")


def test_slice_that_is_not_square_is_turned(tmp_path: Path, tags: Dataset) -> None:
    stored = np.frombuffer(tags.PixelData, np.int16).reshape(SIDE, SIDE)[10:-10]
    tags.Rows, tags.Columns, tags.PixelData = *stored.shape, stored.tobytes()
    expected = scan_of(tags, tmp_path / "upright.dcm").pixels
    tags.Rows, tags.Columns, tags.PixelData = *stored.T.shape, stored.T.tobytes()
    tags.ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
    np.testing.assert_array_equal(scan_of(tags, tmp_path / "turned.dcm").pixels, expected)


# Frames


def enhanced(tags: Dataset, num_frames: int, sop_class: str = EnhancedCTImageStorage) -> Dataset:
    """The slice as frames of an enhanced CT, each 5 mm above the last and turned another way.

    Each frame has its own orientation, position, rescale and type; all share kernel and thickness.
    """
    dataset = copy.deepcopy(tags)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    for keyword in (
        "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept",
        "SliceThickness", "SliceLocation", "ConvolutionKernel",
    ):  # fmt: skip
        if keyword in dataset:
            delattr(dataset, keyword)
    shared = Dataset()
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].SliceThickness = "5"
    shared.CTReconstructionSequence = [Dataset()]
    shared.CTReconstructionSequence[0].ConvolutionKernel = "B40f"
    dataset.SharedFunctionalGroupsSequence = [shared]
    stored = np.frombuffer(tags.PixelData, np.int16).reshape(SIDE, SIDE)
    hu = stored.astype(int) + int(tags.RescaleIntercept)
    frames, groups = [], []
    for index in range(num_frames):
        turned, along_row, along_column = list(TURNS.values())[index % len(TURNS)]
        group = Dataset()
        group.PlaneOrientationSequence = [Dataset()]
        group.PlaneOrientationSequence[0].ImageOrientationPatient = [*along_row, *along_column]
        group.PlanePositionSequence = [Dataset()]
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 5 * index]
        group.PixelValueTransformationSequence = [Dataset()]
        group.PixelValueTransformationSequence[0].RescaleSlope = 1
        group.PixelValueTransformationSequence[0].RescaleIntercept = -1000 - index
        group.CTImageFrameTypeSequence = [Dataset()]
        group.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        groups.append(group)
        frames.append(np.ascontiguousarray(turned(hu + 1000 + index)).astype(np.int16))
    dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.NumberOfFrames = num_frames
    dataset.PixelData = b"".join(frame.tobytes() for frame in frames)
    return dataset


@pytest.mark.parametrize(
    "sop_class", [EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_frames_are_slices_each_by_its_own_groups(
    tags: Dataset, tmp_path: Path, sop_class: str, compressed: bool
) -> None:
    expected = scan_of(tags, tmp_path / "one.dcm").pixels
    dataset = enhanced(tags, 6, sop_class)
    if compressed:
        dataset.compress(RLELossless)
    path = saved(dataset, tmp_path / "run.dcm")
    found = list(inspect_scans(path))
    assert [item.name for item in found] == [f"{path}#{number}" for number in range(1, 7)]
    for number, item in enumerate(found, start=1):
        assert isinstance(item.scan, Scan), item.scan
        np.testing.assert_array_equal(item.scan.pixels, expected)
        own = item.scan.metadata
        assert own is not None
        assert own.frame == number
        assert own.position_mm == pytest.approx(5 * (number - 1))
        assert (own.kernel, own.thickness_mm) == ("B40f", 5.0)
    with pytest.raises(ScanDecodeError, match="6 frames, expected one"):
        load_scan(path)


def test_enhanced_ct_of_one_frame_is_a_slice(tags: Dataset, tmp_path: Path) -> None:
    expected = scan_of(tags, tmp_path / "one.dcm")
    path = saved(enhanced(tags, 1), tmp_path / "enhanced.dcm")
    scan = inspect_scan(path)
    np.testing.assert_array_equal(scan.pixels, expected.pixels)
    assert scan.reasons == expected.reasons
    (only,) = inspect_scans(path)
    assert only.name == str(path)
    assert isinstance(only.scan, Scan)
    assert only.scan.metadata is not None
    assert only.scan.metadata.frame == 0


def test_attributes_of_a_frame_that_no_standard_group_holds(tags: Dataset, tmp_path: Path) -> None:
    """A legacy converted object keeps what fits nowhere in groups of unassigned attributes."""
    dataset = enhanced(tags, 2, LegacyConvertedEnhancedCTImageStorage)
    for number, group in enumerate(dataset.PerFrameFunctionalGroupsSequence, start=1):
        group.UnassignedPerFrameConvertedAttributesSequence = [Dataset()]
        group.UnassignedPerFrameConvertedAttributesSequence[0].InstanceNumber = 40 + number
    found = list(inspect_scans(saved(dataset, tmp_path / "run.dcm")))
    assert [item.scan.metadata.instance for item in found] == [41, 42]


def test_a_bad_frame_costs_itself_only(tags: Dataset, tmp_path: Path) -> None:
    dataset = enhanced(tags, 5)
    groups = dataset.PerFrameFunctionalGroupsSequence
    groups[0].CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    groups[2].PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    groups[3].PixelValueTransformationSequence[0].RescaleSlope = None
    del groups[4]  # nothing is told of the last one
    found = [item.scan for item in inspect_scans(saved(dataset, tmp_path / "run.dcm"))]
    assert [type(item).__name__ for item in found] == [
        "OutOfDomainError", "Scan", "OutOfDomainError", "ScanDecodeError", "ScanDecodeError",
    ]  # fmt: skip
    assert [found[0].kind, found[2].kind] == ["localizer", "coronal"]
    assert str(found[0]).startswith(f"{tmp_path}/run.dcm#1: no axial CT slice: a localizer")


def test_frames_without_groups_are_read_by_the_top_of_the_file(
    tags: Dataset, tmp_path: Path
) -> None:
    expected = scan_of(tags, tmp_path / "one.dcm").pixels
    tags.NumberOfFrames, tags.PixelData = 3, tags.PixelData * 3
    found = list(inspect_scans(saved(tags, tmp_path / "run.dcm")))
    assert len(found) == 3
    assert all(np.array_equal(item.scan.pixels, expected) for item in found)


def test_compressed_file_that_promises_more_frames_gives_those_that_it_has(
    tags: Dataset, tmp_path: Path
) -> None:
    tags.NumberOfFrames, tags.PixelData = 2, tags.PixelData * 2
    tags.compress(RLELossless)
    tags.NumberOfFrames = 4096
    found = inspect_scans(saved(tags, tmp_path / "run.dcm"))
    kinds = [type(next(found).scan) for _ in range(3)]
    assert kinds == [Scan, Scan, ScanDecodeError]


def test_file_of_wrong_length_or_of_a_wrong_number_of_frames_is_one_error(
    tags: Dataset, tmp_path: Path
) -> None:
    for count, message in (
        (4096, "pixels of 2 frames, expected those of 4096"),
        (4097, "4097 frames, expected 1 to 4096"),
        (-1, "-1 frames, expected 1 to 4096"),
    ):
        tags.NumberOfFrames, tags.PixelData = count, bytes(2 * 2 * SIDE * SIDE)
        (only,) = inspect_scans(saved(tags, tmp_path / "run.dcm"))
        assert message in str(only.scan)


def test_panic_of_a_codec_is_a_decode_error(tags: Dataset, tmp_path: Path) -> None:
    """The RLE decoder is written in Rust; what it raises at some broken runs is no Exception."""
    tags.compress(RLELossless)
    data = bytearray(bytes_of(tags))
    start = data.index(b"\xfe\xff\x00\xe0", data.index(b"\xe0\x7f\x10\x00") + 20) + 8 + 64
    outcomes = set()
    for place in range(start, start + 600):
        broken = data[:place] + b"\x81" + data[place + 1 :]  # 128 times the next
        try:
            inspect_bytes(bytes(broken), "scan")
        except ScanDecodeError as error:
            outcomes.add(type(error.__cause__).__name__)
    if importlib.util.find_spec("rle") is not None:  # pylibjpeg-rle
        assert "PanicException" in outcomes


def test_bomb_of_items_is_refused(tags: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    tags.SharedFunctionalGroupsSequence = [Dataset() for _ in range(200)]
    data = bytes_of(tags)
    assert inspect_bytes(data, "scan").pixels.shape == (224, 224, 1)
    monkeypatch.setattr(dicom, "MAX_ITEMS", 100)
    with pytest.raises(ScanDecodeError, match="200 items, expected at most 100"):
        inspect_bytes(data, "scan")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_damage_to_the_head_gives_a_slice_or_a_decode_error(data: st.DataObject) -> None:
    whole = HEAD_SAMPLE
    start = data.draw(st.integers(132, len(whole) - 2 * SIDE * SIDE))
    damage = data.draw(st.binary(min_size=1, max_size=12))
    damaged = whole[:start] + damage + whole[start + len(damage) :]
    outcome: np.ndarray | str
    try:
        outcome = inspect_bytes(damaged, "scan").pixels
    except ScanDecodeError as error:
        outcome = str(error)
    if isinstance(outcome, str):
        assert outcome.startswith("scan: ")
        assert "\n" not in outcome
    else:
        assert outcome.shape == (224, 224, 1)


HEAD_SAMPLE = bytes_of(dicom_from_phantom(make_phantom("normal", 1, size=SIDE)))


# Real files

UNREADABLE = ("1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55")


LOSSY = ("4.50", "4.51", "4.81", "4.91")


@pytest.mark.real_scans
def test_every_transfer_syntax_but_two_decodes(real_scans: Path) -> None:
    folder = real_scans / "dicom/transfer-syntaxes"
    paths = sorted(folder.glob("CTImage_*.dcm"))
    reference = load_scan(next(folder.glob("CTImage_LittleEndianExplicit*")))
    assert len(paths) == 15
    for path in paths:
        (only,) = inspect_scans(path)
        if path.stem.endswith(UNREADABLE):
            assert isinstance(only.scan, ScanDecodeError)
            assert "cannot be decoded here. Store the slice uncompressed." in str(only.scan)
            continue
        assert isinstance(only.scan, Scan), only.scan
        error = np.abs(only.scan.pixels.astype(int) - reference)
        if not path.stem.endswith(LOSSY):
            assert error.max() == 0, path.name
    samples = [load_scan(path) for path in sorted(folder.glob("nema-chest-CT1_*.dcm"))]
    assert len(samples) == 5


@pytest.mark.real_scans
def test_malformed_files_answer_each_for_itself(real_scans: Path) -> None:
    outcomes = {
        path.stem: only.scan
        for path in sorted((real_scans / "dicom/malformed").glob("*.dcm"))
        for only in inspect_scans(path)
    }
    assert len(outcomes) >= 6
    for name, outcome in outcomes.items():
        if name == "pydicom-CT_small":
            assert isinstance(outcome, Scan)
        else:
            assert isinstance(outcome, ScanDecodeError), name


@pytest.mark.real_scans
def test_real_series_have_their_metadata(real_scans: Path) -> None:
    folder = real_scans / "dicom/lung-pet-ct-dx"
    for name, kernel, count, distance in (
        ("A0002-series3-B40f", "B40f", 30, 8),
        ("A0002-series2-B70f", "B70f", 6, 16),
    ):
        found = [
            item.scan.metadata for path in list_scans(folder / name) for item in inspect_scans(path)
        ]
        assert len(found) == count
        assert {item.kernel for item in found} == {kernel}
        assert len({item.series_uid for item in found}) == 1
        positions = sorted(item.position_mm for item in found)
        assert np.median(np.diff(positions)) == pytest.approx(distance, rel=0.3)
