"""Random augmentation of chest-CT slices: geometry, contrast and brightness."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field, NonNegativeFloat

from training.common.config import Share, config_class

Scan = npt.NDArray[np.uint8]


@config_class
class Augmentation:
    """How far a scan may be changed; each value is drawn uniformly within its limits.

    Slices are mirrored left to right, though a heart lies on the left: which lung a tumour grows in
    tells the patients of a small set apart, not the class. Upside down is no patient position.

    Attributes:
        rotation_deg: Rotation either way, in degrees; tilt on the table is rarely more than 10.
        shift: Shift along each axis either way, as a fraction of the side.
        scale: Zoom in or out, as a fraction.
        contrast: Factor on the grey values, 1 +- this. This and the next are wide on purpose:
            screen grabs come in many windows, and the grey level must not tell the class.
        brightness: Offset on the grey values, as a fraction of 255.
        mirror: Probability of a left-to-right mirror image.
    """

    rotation_deg: NonNegativeFloat = 10.0
    shift: Share = 0.06
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.15
    contrast: Share = 0.40
    brightness: Share = 0.20
    mirror: Share = 0.5


def augment(scan: Scan, limits: Augmentation, rng: np.random.Generator) -> Scan:
    """One random variant of `scan`, uint8 (H, W, 1), same shape; what comes in from outside is 0.

    Geometry first (one bilinear resampling), then intensity.
    """
    height, width = scan.shape[:2]
    angle = math.radians(rng.uniform(-limits.rotation_deg, limits.rotation_deg))
    zoom = 1.0 + rng.uniform(-limits.scale, limits.scale)
    shift_y, shift_x = rng.uniform(-limits.shift, limits.shift, 2) * (height, width)
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    center_x, center_y = (width - 1) / 2, (height - 1) / 2
    # Pillow maps output to input pixels: rotate and zoom about the centre, after the shift.
    offset_x = center_x - cosine * (center_x + shift_x) + sine * (center_y + shift_y)
    offset_y = center_y - sine * (center_x + shift_x) - cosine * (center_y + shift_y)
    seen = scan[:, ::-1, 0] if rng.random() < limits.mirror else scan[..., 0]
    moved = Image.fromarray(np.ascontiguousarray(seen)).transform(
        (width, height),
        Image.Transform.AFFINE,
        (cosine, -sine, offset_x, sine, cosine, offset_y),
        Image.Resampling.BILINEAR,
    )
    gain = 1.0 + rng.uniform(-limits.contrast, limits.contrast)
    offset = 255.0 * rng.uniform(-limits.brightness, limits.brightness)
    grey = np.asarray(moved, np.float32) * gain + offset
    changed: Scan = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return changed[..., np.newaxis]
