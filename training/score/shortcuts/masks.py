"""Masks of a prepared scan: body outline and lungs, and their share of each map cell."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull

from chestct.contract import MAP_SIZE, SCAN_SIZE
from chestct.imaging.body import body_mask
from training.common.metrics import Floats

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

CELL_PX = SCAN_SIZE // MAP_SIZE  # side in the scan of one place of the activation map

# The outline, in pixels of the mask of `chestct.imaging.body`, which has 128 a side.
CRACK_PX = 6  # a scribble or a thin wall seen as dark is closed up to twice this
# Of its convex hull; chests reach 0.9 (957 scans), a window that shows bones alone 0.2 to 0.8.
SMALLEST_SOLIDITY = 0.85

# The lungs, in pixels of the scan.
RIM_PX = 8  # thinner than most chest walls, thicker than a couch or the gap between two breasts
# Of the edge of an air-filled part within RIM_PX of the outline: lungs 0.05 at most in 95 of 100
# scans, the air between body and couch or breasts and fat shown as black from 0.3 up.
MOST_RIM = 0.3
CORNER_PX = 18  # no lung reaches so far into the corner of a scan that is cropped to its body
SMALLEST_AIR_PX = 25  # a bronchus; below it noise
LARGEST_VESSEL = 0.02  # of the scan; a hole of the lung above it is no vessel or nodule
VESSEL_PX = 5  # half the width of a vessel that the mask closes over


def body_outline(scan: Pixels) -> Mask:
    """Where the body lies in a prepared scan, lungs and all.

    The largest bright part, cracks closed and holes filled. Where that is no solid shape, the
    window shows bones alone and the skin cannot be told.

    Args:
        scan: uint8 (224, 224, 1), as from `chestct.imaging.prepare.load_scan`.

    Returns:
        bool (224, 224); all false where no body stands out.
    """
    part = body_mask(scan[:, :, 0])
    if not part.any():
        return np.zeros((SCAN_SIZE, SCAN_SIZE), bool)
    room = CRACK_PX + 1  # so that what lies beyond the picture counts as outside
    closed = ndimage.binary_closing(np.pad(part, room), _disk(CRACK_PX))
    filled = ndimage.binary_fill_holes(closed)[room:-room, room:-room]
    corners = [np.argwhere(part) + offset for offset in ((0, 0), (0, 1), (1, 0), (1, 1))]
    if filled.sum() < SMALLEST_SOLIDITY * ConvexHull(np.concatenate(corners)).volume:
        return np.zeros((SCAN_SIZE, SCAN_SIZE), bool)
    smooth = Image.fromarray(filled.astype(np.uint8) * 255).resize(
        (SCAN_SIZE, SCAN_SIZE), Image.Resampling.BILINEAR
    )
    return np.asarray(smooth) >= 128


def lung_mask(scan: Pixels) -> Mask:
    """The air-filled parts of the body with what lies inside them: vessels, bronchi, nodules.

    Inside the outline all that is darker than half way between air and tissue (the threshold of
    Hu et al. 2001, IEEE TMI 20(6), section II-A), but for parts along the skin or in a corner of
    the scan: the air between breasts, or between body and couch. A tumour that touches the chest
    wall or the mediastinum stays outside, gas in stomach and bowel counts as lung.

    Args:
        scan: uint8 (224, 224, 1), as from `chestct.imaging.prepare.load_scan`.

    Returns:
        bool (224, 224), within `body_outline`; all false where that is, or where no air is seen.
    """
    grey, outline = scan[:, :, 0], body_outline(scan)
    if not outline.any():
        return outline
    around = ndimage.binary_dilation(outline, _disk(RIM_PX))  # shows how dark air is
    dark = outline & (grey <= _halfway(grey[around]))
    parts, count = ndimage.label(dark)
    depth = ndimage.distance_transform_edt(np.pad(outline, 1))[1:-1, 1:-1]
    edge = dark & ~ndimage.binary_erosion(dark)

    def in_parts(pixels: Mask) -> npt.NDArray[np.int64]:
        return np.bincount(parts[pixels], minlength=count + 1)

    kept = in_parts(dark) >= SMALLEST_AIR_PX
    kept &= in_parts(edge & (depth <= RIM_PX)) <= MOST_RIM * in_parts(edge)
    kept &= in_parts(dark & _corners()) == 0
    lungs: Mask = kept[parts] & dark
    holes, _ = ndimage.label(ndimage.binary_fill_holes(lungs) & ~lungs)
    sizes = np.bincount(holes.ravel())
    lungs |= (holes > 0) & (sizes <= LARGEST_VESSEL * grey.size)[holes]
    closed = ndimage.binary_closing(np.pad(lungs, VESSEL_PX + 1), _disk(VESSEL_PX))
    lungs |= closed[VESSEL_PX + 1 : -VESSEL_PX - 1, VESSEL_PX + 1 : -VESSEL_PX - 1]
    # Pixels that are part lung, part wall would draw the lung's outline where it is blanked.
    grown: Mask = ndimage.binary_dilation(lungs) & outline
    return grown


def _disk(radius: int) -> Mask:
    at = np.arange(-radius, radius + 1)
    disk: Mask = at[:, np.newaxis] ** 2 + at**2 <= radius * (radius + 1)
    return disk


def _corners() -> Mask:
    near = np.minimum(np.arange(SCAN_SIZE), np.arange(SCAN_SIZE)[::-1]) < CORNER_PX
    return near[:, np.newaxis] & near


def _halfway(grey: Pixels) -> float:
    """The grey level half way between the means of what is darker and of what is brighter."""
    share = np.bincount(grey, minlength=256)
    level, before = float(grey.mean()), math.nan
    while level != before:
        dark = np.arange(256) <= level
        if not share[dark].any() or not share[~dark].any():
            break
        means = [np.average(np.arange(256)[side], weights=share[side]) for side in (dark, ~dark)]
        level, before = float(sum(means) / 2), level
    return level


def covered_cells(mask: Mask) -> Floats:
    """The share of each cell of the activation map that a mask covers, float32 (14, 14)."""
    cells = mask.reshape(MAP_SIZE, CELL_PX, MAP_SIZE, CELL_PX)
    covered: Floats = cells.mean(axis=(1, 3), dtype=np.float32)
    return covered
