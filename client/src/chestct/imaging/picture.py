"""Decode a PNG or JPEG file into grey levels."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.errors import ScanDecodeError
from chestct.imaging.limits import MAX_PIXELS, require_sides

__all__ = ["GreyPicture", "PictureFile", "is_picture"]

MIN_PEAK_16_BIT = 4096  # a 12-bit scanner value never reaches it, a picture of full range does
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"  # PNG specification, section 5.2
JPEG_SIGNATURE = b"\xff\xd8\xff"  # start of image, then a marker; ITU-T T.81, annex B


@dataclass(frozen=True)
class GreyPicture:
    """One slice that its sender has windowed already.

    Attributes:
        grey: uint8 (H, W), 0 = floor of the window, 255 = its ceiling.
        picture: As stored, of any mode.
    """

    grey: npt.NDArray[np.uint8]
    picture: Image.Image


class PictureFile:
    """A PNG or JPEG file whose header is read; `chestct.imaging.dicom.DicomFile` for pictures.

    Args:
        data: The whole file.
        name: Name for error messages.
        max_pixels: Refuse larger pictures.

    Raises:
        ScanDecodeError: The picture is too large or too small.
        Exception: Whatever Pillow raises at a broken header.
    """

    file_format = "PNG or JPEG"
    num_frames = 1

    def __init__(self, data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> None:
        self._picture = Image.open(BytesIO(data), formats=("PNG", "JPEG"))
        require_sides(self._picture.width, self._picture.height, name, max_pixels)

    def frames(self) -> range:
        """Indices of the frames."""
        return range(1)

    def frame(self, index: int, name: str) -> GreyPicture:
        """The picture in grey; `index` is 0.

        Raises:
            ScanDecodeError: 16-bit samples that look like stored scanner values.
            Exception: Whatever Pillow raises at broken pixels.
        """
        return GreyPicture(_grey_levels(self._picture, name), self._picture)


def is_picture(data: bytes) -> bool:
    """Whether the bytes begin as a PNG or JPEG file does."""
    return data.startswith((PNG_SIGNATURE, JPEG_SIGNATURE))


def _grey_levels(picture: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    if picture.mode.startswith("I"):
        return _grey_from_16_bit(np.asarray(picture), name)
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA") if picture.mode != "RGBA" else picture
        opacity = coloured.getchannel("A")
        if opacity.getextrema() != (255, 255):
            black = Image.new("L", picture.size)
            return np.array(Image.composite(coloured.convert("L"), black, opacity))
        picture = coloured
    return np.array(picture.convert("L"))


def _grey_from_16_bit(samples: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """Samples scaled so that 65535 becomes 255 (PNG specification, section 13.12)."""
    peak = int(samples.max())
    if peak < MIN_PEAK_16_BIT:
        raise ScanDecodeError(
            f"{name}: a 16-bit picture whose brightest sample is {peak} of 65535: this looks like "
            "stored scanner values. Send the DICOM file, or a windowed 8-bit picture."
        )
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
