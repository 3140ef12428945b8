"""Window Hounsfield units: the grey levels that a slice shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from chestct.contract import Window
from chestct.imaging.dicom import HuSlice

__all__ = ["apply_window", "grey_from_hu"]


def apply_window(
    hu: npt.NDArray[np.floating[Any] | np.integer[Any]], window: Window
) -> npt.NDArray[np.uint8]:
    """Grey values of Hounsfield units seen through a linear window.

    DICOM PS3.3 C.11.2.1.2.1 with an output from 0 to 255: at or below the floor 0, above the
    ceiling 255, between them linear, rounded to the nearest whole number, halves up.

    Args:
        hu: Hounsfield units (any shape), after rescale slope and intercept.
        window: Centre and width in HU.

    Returns:
        uint8, shape of `hu`, 0 = floor of the window, 255 = its ceiling.
    """
    center_hu, width_hu = window.center_hu - 0.5, window.width_hu - 1.0
    if width_hu == 0:
        return np.where(hu > center_hu, 255, 0).astype(np.uint8)
    grey = np.subtract(hu, center_hu - width_hu / 2, dtype=np.float64)
    grey *= 255 / width_hu
    np.clip(grey, 0, 255, out=grey)
    grey += 0.5
    shown: npt.NDArray[np.uint8] = grey.astype(np.uint8)
    return shown


def grey_from_hu(hu_slice: HuSlice, window: Window) -> npt.NDArray[np.uint8]:
    """Grey levels of a slice. Order: window, then MONOCHROME1, then padding.

    Returns:
        uint8 (H, W), 0 = floor of the window or padding, 255 = its ceiling.
    """
    grey = apply_window(hu_slice.levels_hu, window)
    if hu_slice.is_inverted:
        grey = 255 - grey  # the lowest value is shown white: DICOM PS3.3 C.7.6.3.1.2
    grey[hu_slice.is_padding] = 0
    return grey.take(hu_slice.level_index)
