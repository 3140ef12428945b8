"""PNG and JPEG files as grey levels."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chestct.errors import ScanDecodeError
from chestct.imaging.prepare import inspect_bytes
from tests.support.scan_files import hu_slice, picture_bytes


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


def test_other_picture_formats_are_refused(grey_slice: Callable[..., np.ndarray]) -> None:
    for kind in ("GIF", "BMP", "TIFF"):
        data = picture_bytes(Image.fromarray(grey_slice(100)), kind)
        with pytest.raises(ScanDecodeError, match="neither PNG, JPEG nor DICOM"):
            inspect_bytes(data, "picture")
