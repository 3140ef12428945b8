"""Stored values of DICOM files as Hounsfield units: rescale, tables, padding, transfer syntaxes."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from chestct.contract import LUNG_WINDOW, Window
from chestct.errors import ScanDecodeError
from chestct.imaging import dicom, limits
from chestct.imaging.prepare import inspect_bytes, load_scan
from chestct.imaging.window import apply_window
from tests.support.scan_files import (
    SIDE,
    SOFT_WINDOW,
    bytes_of,
    dicom_bytes,
    hu_slice,
    picture_bytes,
)
from training.data.phantom import dicom_from_phantom, make_phantom


def test_dicom_and_its_windowed_picture_give_the_same_tensor() -> None:
    hu = hu_slice(300, 280)
    picture = Image.fromarray(apply_window(hu, LUNG_WINDOW))
    stored = (hu + 1024).astype(np.int16)
    from_dicom = inspect_bytes(dicom_bytes(stored, RescaleIntercept=-1024), "slice.dcm").pixels
    assert from_dicom.shape == (224, 224, 1)
    assert from_dicom.std() > 30
    np.testing.assert_array_equal(
        from_dicom, inspect_bytes(picture_bytes(picture), "slice.png").pixels
    )


@pytest.mark.parametrize("window", [LUNG_WINDOW, SOFT_WINDOW])
@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1, -1024, np.uint16), (1, 0, np.int16), (0.5, -2000, np.uint16), (2, -1000, np.int16)],
)
def test_rescale_comes_before_the_window(
    grey: Callable[..., np.ndarray],
    window: Window,
    slope: float,
    intercept: float,
    dtype: type,
) -> None:
    stored = np.rint((hu_slice() - intercept) / slope).clip(min=0 if dtype is np.uint16 else None)
    data = dicom_bytes(stored.astype(dtype), RescaleSlope=slope, RescaleIntercept=intercept)
    expected = apply_window(stored * slope + intercept, window)
    np.testing.assert_array_equal(grey(data, window), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32])
def test_every_stored_value_is_shown_as_the_formula_says(
    grey: Callable[..., np.ndarray], dtype: type
) -> None:
    ends = np.iinfo(dtype)
    values = np.linspace(ends.min, ends.max, 65536).astype(dtype)
    stored = np.random.default_rng(3).permutation(values).reshape(256, 256)
    slope, intercept = 1500 / (int(ends.max) - int(ends.min)), -600.25
    elements = {"RescaleSlope": f"{slope:.10g}", "RescaleIntercept": intercept}
    hu = stored.astype(np.float64) * float(elements["RescaleSlope"]) + intercept
    expected = apply_window(hu, LUNG_WINDOW)
    assert len(np.unique(expected)) > 100
    np.testing.assert_array_equal(grey(dicom_bytes(stored, **elements)), expected)
    inverted = grey(dicom_bytes(stored, PhotometricInterpretation="MONOCHROME1", **elements))
    np.testing.assert_array_equal(inverted, 255 - expected)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32])
def test_byte_order_of_the_file_makes_no_difference(
    grey: Callable[..., np.ndarray], dtype: type
) -> None:
    stored = np.random.default_rng(6).integers(0, 1400, (64, 48)).astype(dtype)
    elements = {"RescaleIntercept": -1300, "PixelPaddingValue": int(stored[0, 0])}
    expected = grey(dicom_bytes(stored, **elements))
    swapped = stored.astype(np.dtype(dtype).newbyteorder(">"))
    dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(swapped, **elements)))
    dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    file = io.BytesIO()
    pydicom.dcmwrite(
        file, dataset, implicit_vr=False, little_endian=False, enforce_file_format=True
    )
    assert expected.std() > 30
    np.testing.assert_array_equal(grey(file.getvalue()), expected)


def test_modality_table_of_the_file_is_used(grey: Callable[..., np.ndarray]) -> None:
    table = np.random.default_rng(4).integers(0, 900, 200)
    entry = pydicom.Dataset()
    entry.LUTDescriptor = [200, 10, 16]  # entries, the first stored value mapped, bits
    entry.ModalityLUTType = "HU"
    entry.add_new("LUTData", "US", table.tolist())
    stored = np.random.default_rng(5).integers(0, 256, (64, 48)).astype(np.uint16)
    data = dicom_bytes(
        stored, RescaleSlope=None, RescaleIntercept=None, ModalityLUTSequence=[entry]
    )
    # Values before the first take the first entry, those behind the last the last: PS3.3 C.11.1.1.
    hu = table[np.clip(stored.astype(int) - 10, 0, 199)]
    np.testing.assert_array_equal(grey(data, SOFT_WINDOW), apply_window(hu, SOFT_WINDOW))


def test_12_bits_stored_in_16(grey: Callable[..., np.ndarray]) -> None:
    stored = (hu_slice() + 1500).astype(np.uint16)
    data = dicom_bytes(stored, BitsStored=12, HighBit=11, RescaleIntercept=-1500)
    np.testing.assert_array_equal(grey(data), apply_window(hu_slice(), LUNG_WINDOW))


def test_slice_without_rescale_is_taken_as_hounsfield_units(
    grey: Callable[..., np.ndarray],
) -> None:
    data = dicom_bytes(hu_slice(), RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_array_equal(grey(data), apply_window(hu_slice(), LUNG_WINDOW))


def test_window_of_the_file_is_not_used(grey: Callable[..., np.ndarray]) -> None:
    data = dicom_bytes(hu_slice(), WindowCenter=40, WindowWidth=400)
    np.testing.assert_array_equal(grey(data), apply_window(hu_slice(), LUNG_WINDOW))


def test_monochrome1_is_inverted_after_the_window(grey: Callable[..., np.ndarray]) -> None:
    data = dicom_bytes(hu_slice(), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(grey(data), 255 - apply_window(hu_slice(), LUNG_WINDOW))


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("value", "limit"), [(-2000, None), (3000, None), (3000, 3010)])
def test_padding_becomes_the_floor(
    grey: Callable[..., np.ndarray], interpretation: str, value: int, limit: int | None
) -> None:
    stored = hu_slice()
    plain = grey(dicom_bytes(stored, PhotometricInterpretation=interpretation))
    stored[:5] = value
    stored[5:8] = limit or value
    elements: dict[str, Any] = {"PixelPaddingValue": value}
    if limit is not None:
        elements["PixelPaddingRangeLimit"] = limit
    data = dicom_bytes(stored, PhotometricInterpretation=interpretation, **elements)
    shown = grey(data)
    assert not shown[:8].any()
    np.testing.assert_array_equal(shown[8:], plain[8:])
    assert plain[8:].any()


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian]
)
def test_uncompressed_transfer_syntaxes_agree(grey: Callable[..., np.ndarray], syntax: str) -> None:
    np.testing.assert_array_equal(
        grey(dicom_bytes(hu_slice(), syntax)), apply_window(hu_slice(), LUNG_WINDOW)
    )


def test_rle_needs_no_plugin(grey: Callable[..., np.ndarray]) -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(hu_slice())))
    dataset.compress(RLELossless)
    file = io.BytesIO()
    dataset.save_as(file)
    np.testing.assert_array_equal(grey(file.getvalue()), apply_window(hu_slice(), LUNG_WINDOW))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("keeps_meta", [True, False])
def test_dicom_without_preamble(
    grey: Callable[..., np.ndarray], syntax: str, keeps_meta: bool
) -> None:
    data = dicom_bytes(hu_slice(), syntax)
    meta_end = 144 + struct.unpack_from("<I", data, 140)[0]
    np.testing.assert_array_equal(
        grey(data[132 if keeps_meta else meta_end :]), apply_window(hu_slice(), LUNG_WINDOW)
    )


def test_missing_codec_names_the_extra() -> None:
    if pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
        pytest.skip("a JPEG-LS plug-in is installed: needs an environment without pylibjpeg")
    stored = hu_slice()
    data = dicom_bytes(stored, JPEGLSLossless, PixelData=encapsulate([b"\xff\xd8\xff\xf7 no"]))
    with pytest.raises(ScanDecodeError, match=r'JPEG-LS.*pip install "chestct\[dicom\]"'):
        inspect_bytes(data, "slice.dcm")


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"NumberOfFrames": 2}, "2 frames, expected one"),
        ({"PhotometricInterpretation": "RGB"}, "'RGB', expected one grey channel"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "'PALETTE COLOR', expected one grey"),
        ({"Rows": None}, r"DICOM without a picture \(CT\)"),
        ({"PixelData": None}, "broken or unsupported DICOM"),
        ({"PixelData": b"\0" * 10}, "broken or unsupported DICOM"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels, expected at most 64 million"),
        ({"Rows": 20}, "48 x 20 pixels, expected at least 32 a side"),
    ],
)
def test_dicom_that_is_no_single_grey_slice(elements: dict[str, Any], message: str) -> None:
    with pytest.raises(ScanDecodeError, match=rf"^slice\.dcm: .*{message}"):
        inspect_bytes(dicom_bytes(hu_slice(), **elements), "slice.dcm")


def test_deflated_bomb_is_refused_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (limits, dicom):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 100_000)
    data = dicom_bytes(np.zeros((600, 600), np.int16), DeflatedExplicitVRLittleEndian)
    assert len(data) < 100_000
    with pytest.raises(ScanDecodeError, match="expected at most"):
        inspect_bytes(data, "bomb.dcm")


def test_sloppy_dicom_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dicom_bytes(hu_slice()).replace(b"CS\x02\x00CT", b"CS\x02\x00ct")
        sloppy = dicom_bytes(hu_slice(), PixelData=hu_slice().tobytes() + b"\0" * 64)
    assert b"CS\x02\x00ct" in data
    for content in (data, sloppy):
        inspect_bytes(content, "sloppy.dcm")
    assert not recwarn.list


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


@pytest.mark.real_scans
@pytest.mark.parametrize("folder", ["dicom/transfer-syntaxes", "dicom/malformed", "ood/dicom"])
def test_real_dicom_decodes_or_tells_why(real_scans: Path, folder: str) -> None:
    def outcome(path: Path) -> np.ndarray | str:
        try:
            return load_scan(path)
        except ScanDecodeError as error:
            return str(error)

    outcomes = {str(path): outcome(path) for path in (real_scans / folder).glob("*.dcm")}
    reasons = {path: found for path, found in outcomes.items() if isinstance(found, str)}
    assert all(reason.startswith(path) for path, reason in reasons.items())
    assert not any("\n" in reason for reason in reasons.values())
    assert 0 < len(reasons) < len(outcomes)


@pytest.mark.real_scans
def test_one_real_slice_is_the_same_in_every_lossless_syntax(real_scans: Path) -> None:
    folder = real_scans / "dicom/transfer-syntaxes"
    names = ("BigEndianExplicit", "LittleEndianImplicit", "Deflated", "RLELossless", "JPEG2000Loss")
    reference = load_scan(next(folder.glob("CTImage_LittleEndianExplicit*")))
    assert reference.std() > 30
    for name in names:
        (path,) = folder.glob(f"CTImage_{name}*")
        np.testing.assert_array_equal(load_scan(path), reference)
