"""The slice as stored, for display beside the network's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.imaging.dicom import HuSlice
from chestct.imaging.picture import GreyPicture

__all__ = ["Original", "original_of"]

INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Original:
    """A slice in its own size.

    Attributes:
        pixels: int16 (H, W) in Hounsfield units, uint8 (H, W), or uint8 (H, W, 3) of a coloured
            picture.
        box: First row, row after the last, first column and column after the last of the crop that
            the network sees.
        is_inverted: Low values are shown bright: MONOCHROME1.
    """

    pixels: npt.NDArray[Any]
    box: tuple[int, int, int, int]
    is_inverted: bool = False


def original_of(found: HuSlice | GreyPicture, box: tuple[int, int, int, int]) -> Original:
    """The slice for display, with the crop `box` of `chestct.imaging.body.body_box`."""
    if isinstance(found, GreyPicture):
        return Original(_shown(found), box)
    levels = np.clip(np.rint(found.levels_hu), INT16.min, INT16.max).astype(np.int16)
    return Original(levels.take(found.level_index), box, found.is_inverted)


def _shown(found: GreyPicture) -> npt.NDArray[np.uint8]:
    picture = found.picture
    if picture.mode in ("1", "L", "LA") or picture.mode.startswith("I"):
        return found.grey
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    coloured = np.asarray(picture.convert("RGB"))
    return coloured if np.ptp(coloured, axis=2).any() else found.grey
