"""Find the body in an axial slice, so that margins, couch and borders are cropped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

__all__ = ["THUMBNAIL_PX", "body_box", "body_mask", "otsu_threshold"]

THUMBNAIL_PX = 128  # finer than needed for a box, and a thousandth of a second's work
DARKEST_BODY = 16  # of 255; below it lies air in any window that shows tissue
# Of Otsu's threshold, which falls between lung and muscle: fat is darker than muscle.
BODY_FRACTION = 0.6
SMALLEST_SHARE = 0.3  # of the picture; a box below it holds a bone or an organ, not a body
JOIN_PX = 6  # gaps of twice this, where a narrow window shows fat as black, are closed then

Mask = npt.NDArray[np.bool_]


def body_box(grey: npt.NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Bounding box of the body: the largest bright part of a slice.

    A couch lies apart from the body and stays outside. The box of a blank picture is the whole
    picture.

    Args:
        grey: uint8 (H, W), 0 = floor of the window.

    Returns:
        First row, row after the last, first column, column after the last.
    """
    mask = body_mask(grey)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = grey.shape
    if not len(rows):
        return 0, height, 0, width
    top, bottom = int(rows[0]) * height // THUMBNAIL_PX, int(rows[-1] + 1) * height
    left, right = int(columns[0]) * width // THUMBNAIL_PX, int(columns[-1] + 1) * width
    return top, -(-bottom // THUMBNAIL_PX), left, -(-right // THUMBNAIL_PX)


def body_mask(grey: npt.NDArray[np.uint8]) -> Mask:
    """The largest bright connected part of a slice, lungs left out.

    Args:
        grey: uint8 (H, W), 0 = floor of the window.

    Returns:
        bool (128, 128), over the whole picture whatever its sides; all false in a blank picture.
    """
    small = np.asarray(
        Image.fromarray(grey).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    )
    bright = small > max(DARKEST_BODY, BODY_FRACTION * otsu_threshold(small))
    body = _largest_part(bright)
    rows, columns = np.flatnonzero(body.any(axis=1)), np.flatnonzero(body.any(axis=0))
    if not len(rows):
        return body
    share = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / THUMBNAIL_PX**2
    if share >= SMALLEST_SHARE:
        return body
    grown = Image.fromarray(bright.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * JOIN_PX + 1))
    joined: Mask = _largest_part(np.asarray(grown) > 0) & bright
    return joined


def otsu_threshold(grey: npt.NDArray[np.uint8]) -> int:
    """Otsu's threshold between dark and bright: Otsu 1979, doi 10.1109/TSMC.1979.4310076.

    Args:
        grey: uint8, any shape.
    """
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    below = np.cumsum(share)
    moment = np.cumsum(share * np.arange(256))
    parted = below * (1 - below)
    between = (moment[-1] * below - moment) ** 2 / np.where(parted > 0, parted, np.inf)
    return int(between.argmax())


def _largest_part(mask: Mask) -> Mask:
    """Largest 4-connected component of `mask`; all false if `mask` is empty."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    first = 0  # the first run that may touch the present one from the row above
    for run in range(len(rows)):
        row, start, end = int(rows[run]), int(starts[run]), int(ends[run])
        while (rows[first], ends[first]) <= (row - 1, start):
            first += 1
        other = first
        while rows[other] == row - 1 and starts[other] < end:
            parents[root(other)] = root(run)
            other += 1
    roots = np.array([root(run) for run in range(len(rows))], np.int64)
    part = np.zeros_like(mask)
    if len(roots):
        sizes = np.bincount(roots, weights=ends - starts)
        for member in np.flatnonzero(roots == sizes.argmax()):
            part[rows[member], starts[member] : ends[member]] = True
    return part
