"""What a DICOM file says of its slices: how they lie, where, and of what kind they are."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    EncapsulatedPDFStorage,
    EnhancedCTImageStorage,
    EnhancedSRStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MRImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    XRayRadiationDoseSRStorage,
)

from chestct.contract import LUNG_WINDOW
from chestct.errors import OutOfDomainError, ScanDecodeError
from chestct.imaging import dicom, metadata
from chestct.imaging.prepare import Scan, inspect_bytes, inspect_scan, inspect_scans, load_scan
from chestct.imaging.sources import list_scans
from chestct.imaging.window import apply_window
from training.data.phantom import Phantom, dicom_from_phantom, make_phantom

SIDE = 128


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom("adenocarcinoma", 4, size=SIDE)


@pytest.fixture
def tags(phantom: Phantom) -> Dataset:
    """An axial slice as DICOM, which tests bend."""
    return dicom_from_phantom(phantom)


def bytes_of(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of what is written here is wrong on purpose
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def saved(dataset: Dataset, path: Path) -> Path:
    path.write_bytes(bytes_of(dataset))
    return path


def scan_of(dataset: Dataset, path: Path) -> Scan:
    return inspect_scan(saved(dataset, path))


# How slices lie

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


@pytest.mark.parametrize(
    ("orientation", "position", "expected"),
    [
        ([1, 0, 0, 0, 1, 0], [-10, -20, 35.5], 35.5),
        ([-1, 0, 0, 0, 1, 0], [-10, -20, 35.5], 35.5),  # its normal points to the feet
        ([-1, 0, 0, 0, -1, 0], [-10, -20, -80.25], -80.25),
        ([1, 0, 0, 0, 0.96, 0.28], [0, 0, 100], 96),  # gantry leans: normal (0, -0.28, 0.96)
        ([1, 0, 0, 0, 0.96, 0.28], [0, 50, 100], 82),
        (None, [0, 0, 100], 7.5),  # no orientation: Slice Location
        ([1, 0, 0, 0, 1, 0], [0, 0], 7.5),
        ([1, 0, 0, 0, 1, 0], None, 7.5),
    ],
)
def test_position_lies_along_the_normal(
    tags: Dataset, tmp_path: Path, orientation: Any, position: Any, expected: float
) -> None:
    tags.ImageOrientationPatient = orientation
    tags.ImagePositionPatient = position
    tags.SliceLocation = 7.5
    found = scan_of(tags, tmp_path / "scan.dcm").metadata
    assert found is not None
    assert found.position_mm == pytest.approx(expected, abs=1e-6)


def test_metadata_hold_the_series_and_nothing_of_the_patient(tags: Dataset, tmp_path: Path) -> None:
    tags.PatientName, tags.PatientID, tags.PatientBirthDate = "Doe^Jane", "MRN-77", "19500203"
    tags.AccessionNumber, tags.InstitutionName = "ACC-1", "General"
    tags.ConvolutionKernel, tags.SliceThickness, tags.InstanceNumber = "B70f", "1.25", 12
    tags.BodyPartExamined = "CHEST"
    found = scan_of(tags, tmp_path / "scan.dcm").metadata
    assert found is not None
    assert (found.study_uid, found.series_uid) == (tags.StudyInstanceUID, tags.SeriesInstanceUID)
    assert found.sop_uid == tags.SOPInstanceUID
    assert found.frame_of_reference_uid == tags.FrameOfReferenceUID
    assert (found.kernel, found.thickness_mm, found.body_part) == ("B70f", 1.25, "CHEST")
    assert (found.instance, found.frame) == (12, 0)
    assert not any(word in repr(found) for word in ("Doe", "MRN", "1950", "ACC", "General"))
    assert pickle.loads(pickle.dumps(found)) == found
    identifying = {"PatientName", "PatientID", "PatientBirthDate", "AccessionNumber"}
    assert not identifying.intersection(dicom.FILE_KEYWORDS)


def test_a_picture_has_no_metadata(phantom: Phantom, tmp_path: Path) -> None:
    Image.fromarray(apply_window(phantom.hu, LUNG_WINDOW)).save(tmp_path / "scan.png")
    (only,) = inspect_scans(tmp_path / "scan.png")
    assert isinstance(only.scan, Scan)
    assert only.scan.metadata is None
    assert only.name == str(tmp_path / "scan.png")


@pytest.mark.parametrize("keyword", metadata.SLICE_KEYWORDS)
def test_broken_attributes_cost_no_slice(tags: Dataset, tmp_path: Path, keyword: str) -> None:
    """Each tag in turn with bytes that its type does not allow."""
    if keyword in ("ModalityLUTSequence", "PhotometricInterpretation"):
        return  # without them a slice cannot be shown
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    tag, kind = Tag(tag_for_keyword(keyword)), dictionary_VR(tag_for_keyword(keyword))
    kind = "US" if " or " in kind else kind
    tags[tag] = RawDataElement(tag, kind, 5, b"\xff\x00\\\xfe?", 0, False, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = bytes_of(tags)
        except Exception:
            pytest.skip("pydicom cannot write it")
    (tmp_path / "scan.dcm").write_bytes(data)
    (only,) = inspect_scans(tmp_path / "scan.dcm")
    if not keyword.startswith(("Rescale", "PixelPadding")):
        assert isinstance(only.scan, Scan | OutOfDomainError), only.scan


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


def test_file_of_wrong_length_or_of_too_many_frames_is_one_error(
    tags: Dataset, tmp_path: Path
) -> None:
    for count, message in (
        (4096, "pixels of 2 frames, expected those of 4096"),
        (4097, "4097 frames, expected at most 4096"),
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


# What is skipped


@pytest.mark.parametrize(
    ("elements", "kind"),
    [
        ({"SOPClassUID": BasicTextSRStorage, "Modality": "SR"}, "structured report"),
        ({"SOPClassUID": EnhancedSRStorage, "Modality": "SR"}, "structured report"),
        ({"SOPClassUID": XRayRadiationDoseSRStorage, "Modality": "SR"}, "structured report"),
        ({"SOPClassUID": "", "Modality": "SR"}, "structured report"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "secondary capture"),
        (
            {"SOPClassUID": MultiFrameGrayscaleWordSecondaryCaptureImageStorage},
            "secondary capture",
        ),
        ({"SOPClassUID": EncapsulatedPDFStorage, "Modality": "DOC"}, "other object"),
        ({"SOPClassUID": MRImageStorage, "Modality": "MR"}, "other modality"),
        ({"Modality": "PT"}, "other modality"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        (
            {
                "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"],
                "ImageOrientationPatient": [1, 0, 0, 0, 0, -1],
            },
            "localizer",
        ),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "coronal"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "sagittal"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.7071, 0.7071]}, "oblique"),
    ],
)
def test_each_kind_of_what_is_skipped_is_told_apart(
    tags: Dataset, tmp_path: Path, elements: dict[str, Any], kind: str
) -> None:
    for keyword, value in elements.items():
        setattr(tags, keyword, value)
    if kind == "structured report":
        for keyword in ("PixelData", "Rows", "Columns"):
            delattr(tags, keyword)
    (only,) = inspect_scans(saved(tags, tmp_path / "scan.dcm"))
    assert isinstance(only.scan, OutOfDomainError)
    assert only.scan.kind == kind
    again = pickle.loads(pickle.dumps(only.scan))
    assert (str(again), again.kind) == (str(only.scan), kind)
    assert "\n" not in str(again)


# The same slice in every clothing


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([8, 12, 16]),
    signed=st.booleans(),
    slope=st.sampled_from([0.5, 1, 2, 1.5]),
    offset=st.integers(-200, 200),
    seed=st.integers(0, 10),
)
def test_a_slice_as_dicom_and_as_windowed_picture_gives_the_same_tensor(
    bits: int, signed: bool, slope: float, offset: int, seed: int
) -> None:
    """Whatever the scanner stores: the HU that come out decide."""
    tags = dicom_from_phantom(phantom := make_phantom("normal", seed, size=SIDE))
    lowest = -(2 ** (bits - 1)) if signed else 0
    slope *= 16 if bits == 8 else 1
    intercept = -1100 + offset - lowest * slope
    stored = np.rint((phantom.hu.astype(float) - intercept) / slope)
    stored = stored.clip(lowest, lowest + 2**bits - 1)
    hu = stored * slope + intercept
    kind = np.dtype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")
    # Bits above the stored ones hold nothing.
    pixels = stored.astype(np.int64) & (2**bits - 1)
    tags.PixelData = pixels.astype(f"u{kind.itemsize}").tobytes()
    tags.BitsAllocated, tags.BitsStored, tags.HighBit = 8 * kind.itemsize, bits, bits - 1
    tags.PixelRepresentation = int(signed)
    tags.RescaleSlope, tags.RescaleIntercept = slope, intercept
    if "PixelPaddingValue" in tags:
        del tags.PixelPaddingValue
    picture = io.BytesIO()
    Image.fromarray(apply_window(hu, LUNG_WINDOW)).save(picture, "PNG")
    from_dicom = inspect_bytes(bytes_of(tags), "scan.dcm").pixels
    assert from_dicom.std() > 20
    np.testing.assert_array_equal(from_dicom, inspect_bytes(picture.getvalue(), "scan.png").pixels)


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
