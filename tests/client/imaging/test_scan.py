"""Decoding, windowing and resizing; DICOM files are made here with pydicom."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from chestct.contract import LUNG_WINDOW, Window
from chestct.errors import ScanDecodeError
from chestct.imaging import dicom, limits
from chestct.imaging._warnings import without_warnings
from chestct.imaging.prepare import inspect_bytes, load_grey, load_scan, resize_scan
from chestct.imaging.sources import list_scans
from chestct.imaging.window import apply_window

SOFT_WINDOW = Window(40.0, 400.0)


def hu_slice(height: int = 64, width: int = 48) -> np.ndarray:
    """int16 (H, W): a ramp over the lung window with noise, in HU."""
    ramp = np.linspace(-1400, 400, height * width).reshape(height, width)
    noise = np.random.default_rng(5).normal(0, 30, (height, width))
    return np.rint(ramp + noise).astype(np.int16)


def dicom_bytes(stored: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A valid DICOM file around stored values; `elements` replace or add attributes."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Modality = "CT"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.PixelData = stored.tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def picture_bytes(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def grey(tmp_path: Path, grey_slice: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The grey values that `load_grey` gives for the bytes of a file."""

    def load(data: bytes, window: Window = LUNG_WINDOW) -> np.ndarray:
        path = tmp_path / "scan"
        path.write_bytes(data)
        return load_grey(path, window)

    return load


@pytest.mark.parametrize(
    ("hu", "expected"),
    [
        # Centre -600.5 and width 1499 after the corrections of C.11.2.1.2.1:
        # floor -600.5 - 749.5 = -1350, ceiling -600.5 + 749.5 = 149.
        (-3000, 0),
        (-1350, 0),  # the floor
        (-1349, 0),  # 1 * 255 / 1499 = 0.17
        (-1348, 0),  # 2 * 255 / 1499 = 0.34
        (-1347, 1),  # 3 * 255 / 1499 = 0.51
        (-601, 127),  # 749 * 255 / 1499 = 127.41
        (-600, 128),  # 750 * 255 / 1499 = 127.59
        (147, 255),  # 1497 * 255 / 1499 = 254.66
        (146, 254),  # 1496 * 255 / 1499 = 254.49
        (149, 255),  # the ceiling
        (150, 255),
        (3000, 255),
    ],
)
def test_lung_window_by_hand(hu: int, expected: int) -> None:
    for dtype in (np.int16, np.float32, np.float64):
        assert apply_window(np.array([hu], dtype), LUNG_WINDOW)[0] == expected


def test_halves_are_rounded_up() -> None:
    # Centre 0 and width 510: floor -255, so HU x becomes (x + 255) / 2.
    hu = np.array([-255, -254, -253, -252, 254])
    assert apply_window(hu, Window(0.5, 511)).tolist() == [0, 1, 1, 2, 255]


def test_narrowest_window_is_a_threshold() -> None:
    assert apply_window(np.array([39, 40, 41]), Window(40, 1)).tolist() == [0, 255, 255]


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-32768, 65535)),
    st.floats(-2000, 2000),
    st.floats(1, 5000),
)
def test_window_is_monotone_and_reaches_both_ends(
    hu: np.ndarray, center: float, width: float
) -> None:
    hu = np.concatenate([np.sort(hu), [center + width]])
    shown = apply_window(hu, Window(center, width))
    assert shown.dtype == np.uint8
    assert (np.diff(shown.astype(int)) >= 0).all()
    assert shown[-1] == 255
    assert apply_window(np.array([center - width]), Window(center, width))[0] == 0


def test_window_leaves_its_input_alone() -> None:
    hu = hu_slice().astype(np.float64)
    before = hu.copy()
    apply_window(hu, LUNG_WINDOW)
    np.testing.assert_array_equal(hu, before)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("PNG", {}, "0b139cd4167077f4"),
        ("JPEG", {"quality": 90}, "a5ad0db5e3e34998"),
    ],
)
def test_pixels_of_pictures_never_change(kind: str, options: dict[str, Any], expected: str) -> None:
    """What training saw and what a client sends are the same bytes, in every version."""
    rows, columns = np.mgrid[-1:1:200j, -1:1:260j]
    lungs = rows**2 / 0.4 + (np.abs(columns) - 0.4) ** 2 / 0.06 < 1
    waves = 20 * np.sin(9 * rows + 5 * columns) * np.cos(14 * columns)
    grey = np.where(lungs, 40, 170) * (rows**2 + columns**2 < 0.95) + waves
    picture = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    pixels = inspect_bytes(picture_bytes(picture, kind, **options), "scan").pixels
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == expected


def test_resize_averages_when_it_reduces() -> None:
    # Columns 0 and 255 in turn: a resize that only picks pixels gives 0 or 255, a mean 127.5.
    stripes = np.tile(np.array([0, 255], np.uint8), (896, 448))
    resized = resize_scan(stripes)
    assert resized.shape == (224, 224, 1)
    assert resized.dtype == np.uint8
    assert np.abs(resized[:, 4:-4].astype(int) - 127).max() < 12


def test_resize_keeps_a_scan_of_the_right_size(grey_slice: Callable[..., np.ndarray]) -> None:
    whole = grey_slice(100, 224, 224)
    np.testing.assert_array_equal(resize_scan(whole)[..., 0], whole)


@pytest.mark.parametrize("wrong", [np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.int16)])
def test_resize_refuses_other_arrays(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W\)"):
        resize_scan(wrong)


def test_grey_picture_is_taken_as_it_is(
    grey: Callable[..., np.ndarray], grey_slice: Callable[..., np.ndarray]
) -> None:
    values = grey_slice(100)
    picture = Image.fromarray(values)
    for data in (
        picture_bytes(picture),
        picture_bytes(picture.convert("RGB")),
        picture_bytes(picture.convert("RGBA")),
        picture_bytes(picture.convert("LA")),
        picture_bytes(picture.convert("P")),
    ):
        np.testing.assert_array_equal(grey(data), values)


def test_transparent_parts_lie_over_black(
    grey: Callable[..., np.ndarray], grey_slice: Callable[..., np.ndarray]
) -> None:
    values = grey_slice(200)
    alpha = np.full_like(values, 255)
    alpha[:, :20], alpha[:, 20:40] = 0, 51  # 51 / 255 = one fifth
    for mode in ("LA", "RGBA"):
        picture = Image.fromarray(values).convert(mode)
        picture.putalpha(Image.fromarray(alpha))
        shown = grey(picture_bytes(picture))
        assert not shown[:, :20].any()
        np.testing.assert_allclose(shown[:, 20:40], values[:, 20:40] / 5, atol=0.51)
        np.testing.assert_array_equal(shown[:, 40:], values[:, 40:])


def test_transparent_colour_of_a_palette_lies_over_black(grey: Callable[..., np.ndarray]) -> None:
    values = np.tile(np.arange(40, 80, dtype=np.uint8), (40, 1))
    picture = Image.fromarray(values).convert("P")
    shown = grey(picture_bytes(picture, transparency=45))
    assert (shown[values == 45] == 0).all()
    np.testing.assert_array_equal(shown[values != 45], values[values != 45])


def test_colour_is_weighted_as_luma(grey: Callable[..., np.ndarray]) -> None:
    picture = Image.new("RGB", (40, 40), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 20, 40))
    shown = grey(picture_bytes(picture))
    # ITU-R 601: 0.299 * 255 = 76.2 and 0.114 * 255 = 29.1
    assert set(np.unique(shown)) == {76, 29}


def test_16_bit_picture_is_scaled_from_its_full_range(grey: Callable[..., np.ndarray]) -> None:
    samples = np.tile(np.array([0, 128, 129, 257, 32896, 65535], np.uint16), (40, 8))
    shown = grey(picture_bytes(Image.fromarray(samples)))
    # 128 / 257 = 0.498, 129 / 257 = 0.502, 32896 / 257 = 128
    assert shown[0, :6].tolist() == [0, 0, 1, 1, 128, 255]


def test_16_bit_picture_of_stored_values_is_refused(grey: Callable[..., np.ndarray]) -> None:
    samples = (hu_slice() + 1500).astype(np.uint16)
    with pytest.raises(ScanDecodeError, match=r"brightest sample is \d+ of 65535.*Send the DICOM"):
        grey(picture_bytes(Image.fromarray(samples)))


def test_kind_is_told_by_content(tmp_path: Path, grey_slice: Callable[..., np.ndarray]) -> None:
    picture = Image.fromarray(grey_slice(100))
    jpeg = picture_bytes(picture, "JPEG", quality=95)
    named_png = tmp_path / "n7.png"
    named_png.write_bytes(jpeg)
    assert np.abs(load_grey(named_png).astype(int) - np.asarray(picture)).max() < 25
    (tmp_path / "slice.jpg").write_bytes(dicom_bytes(hu_slice()))
    np.testing.assert_array_equal(
        load_grey(tmp_path / "slice.jpg"), apply_window(hu_slice(), LUNG_WINDOW)
    )


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
        ({"PhotometricInterpretation": "RGB"}, "RGB, expected one grey channel"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR, expected one grey"),
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


def test_threads_leave_the_warning_filters_alone() -> None:
    before = list(warnings.filters)
    data = dicom_bytes(hu_slice())
    threads = [
        threading.Thread(target=lambda: [inspect_bytes(data, "slice.dcm") for _ in range(10)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert warnings.filters == before


def test_warnings_are_silent_until_the_last_thread_is_done() -> None:
    def come_and_go() -> None:
        with without_warnings:
            pass

    with without_warnings:
        thread = threading.Thread(target=come_and_go)
        thread.start()
        thread.join(timeout=30)
        warnings.warn("unheard", stacklevel=1)
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_threads_decode_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=30)  # breaks where one would wait for the other
    read, outcomes = pydicom.dcmread, []

    def read_together(*arguments: Any, **options: Any) -> Any:
        together.wait()
        return read(*arguments, **options)

    monkeypatch.setattr(pydicom, "dcmread", read_together)
    data = dicom_bytes(hu_slice())
    threads = [
        threading.Thread(
            target=lambda: outcomes.append(inspect_bytes(data, "slice.dcm").pixels.shape)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert outcomes == [(224, 224, 1)] * 2


def png_header(width: int, height: int) -> bytes:
    """A tiny file that promises a picture of any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8_001, 10_000, 50_000])
def test_decompression_bomb(side: int) -> None:
    # 64.0, 100 (where Pillow warns) and 2,500 million pixels (where it raises).
    with pytest.raises(ScanDecodeError, match=r"^bomb\.png: .*pixels"):
        inspect_bytes(png_header(side, side), "bomb.png")


def test_tiny_picture_is_refused(grey_slice: Callable[..., np.ndarray]) -> None:
    data = picture_bytes(Image.fromarray(grey_slice(100, 31, 400)))
    with pytest.raises(ScanDecodeError, match="400 x 31 pixels, expected at least 32 a side"):
        inspect_bytes(data, "tiny.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "DICOM"])
def test_every_truncation_is_a_decode_error(
    kind: str, grey_slice: Callable[..., np.ndarray]
) -> None:
    if kind == "DICOM":
        data = dicom_bytes(hu_slice())
    else:
        data = picture_bytes(Image.fromarray(grey_slice(100)), kind)
    # A PNG that lacks only its last chunk holds the whole picture.
    whole = len(data) - (12 if kind == "PNG" else 2)
    for length in [*range(0, 200, 7), *range(200, whole, 97)]:
        with pytest.raises(ScanDecodeError, match=r"^torn: "):
            inspect_bytes(data[:length], "torn")


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["png", "jpeg", "dicom", "bare"]))
def test_any_bytes_give_a_decode_error(noise: bytes, kind: str) -> None:
    start = {
        "png": b"\x89PNG\r\n\x1a\n",
        "jpeg": b"\xff\xd8\xff",
        "dicom": b"\0" * 128 + b"DICM",
        "bare": b"\x08\x00",
    }[kind]
    with pytest.raises(ScanDecodeError, match=r"^noise: "):
        inspect_bytes(start + noise, "noise")


def test_file_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.dcm"
    with path.open("wb") as file:
        file.truncate(257 * 2**20)  # a sparse file: nothing is written
    with pytest.raises(ScanDecodeError, match=r"257 MiB, expected at most 256 MiB"):
        load_scan(path)
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ScanDecodeError, match="expected at most"):
        inspect_bytes(dicom_bytes(hu_slice()), "slice.dcm")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    text = tmp_path / "text.png"
    text.write_text("not a picture, whatever its name says")
    for path, message in (
        (tmp_path, "a folder, expected a file"),
        (tmp_path / "missing.png", "cannot be read: no such file"),
        (tmp_path / "empty.png", "the file is empty"),
        (tmp_path / "pipe.png", "not a regular file"),
        (text, "neither PNG, JPEG nor DICOM by its content"),
        ("nul\0.png", "not a file name"),
    ):
        with pytest.raises(ScanDecodeError, match=message):
            load_scan(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind, not root")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(dicom_bytes(hu_slice()))
    path.chmod(0)
    with pytest.raises(ScanDecodeError, match="cannot be read: permission denied"):
        load_scan(path)


def test_other_picture_formats_are_refused(grey_slice: Callable[..., np.ndarray]) -> None:
    for kind in ("GIF", "BMP", "TIFF"):
        data = picture_bytes(Image.fromarray(grey_slice(100)), kind)
        with pytest.raises(ScanDecodeError, match="neither PNG, JPEG nor DICOM"):
            inspect_bytes(data, "picture")


def test_list_scans_walks_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.txt", ".hidden.png", "sub/e.dicom", "sub/.d/f.png", "x.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    for name in ("IM0001", "1.2.840.99", "DICOMDIR", "notes.dat"):
        (tmp_path / "sub" / name).write_bytes(dicom_bytes(hu_slice()))
    (tmp_path / "sub" / "README").write_text("no preamble here")
    (tmp_path / "z.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in list_scans(tmp_path)]
    expected = ["a.jpg", "b.PNG", "sub/1.2.840.99", "sub/IM0001", "sub/e.dicom", "x.jpeg", "z.png"]
    assert names == expected


def test_list_scans_is_lazy(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    found = list_scans(tmp_path)
    assert isinstance(found, Iterator)
    assert next(found) == tmp_path / "a" / "1.png"
    (tmp_path / "b" / "2.png").touch()  # not read yet, so seen
    assert [path.name for path in found] == ["1.png", "2.png"]


def test_list_scans_of_one_file_and_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "odd.name"
    file.touch()
    assert list(list_scans(file)) == [file]
    with pytest.raises(ScanDecodeError, match="no such file or folder"):
        list(list_scans(tmp_path / "missing"))


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


@pytest.mark.real_scans
def test_real_pictures_decode(real_scans: Path) -> None:
    paths = sorted((real_scans / "chest-ct").rglob("*.png"))[::40]
    assert len(paths) > 10
    for path in paths:
        assert load_scan(path).std() > 5
