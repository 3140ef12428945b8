"""Plausibility checks: why an image may not be an axial chest-CT slice.

A reason is a sentence: its kind, a colon, and the finding. The checks only flag, because they
guess from the pixels and from the body part, which people choose. `chestct.imaging.dicom` refuses
a file for tags that its scanner wrote. The limits were set on the train and validation pictures of
the public chest-CT set and on pictures of other things: none of those 685 pictures is flagged.
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.contract import Window
from chestct.imaging.body import otsu_threshold

__all__ = ["picture_reasons", "slice_reasons"]

Cells = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# Defined terms of DICOM PS3.16 annex L, and common spellings of them, for parts without lungs.
PARTS_WITHOUT_LUNGS = {
    "HEAD", "HEADNECK", "BRAIN", "SKULL", "FACE", "SINUS", "SINUSES", "ORBIT", "ORBITS", "EAR",
    "IAC", "JAW", "MAXILLA", "MANDIBLE", "TMJ", "TEETH", "NECK", "CSPINE", "LARYNX",
    "ABDOMEN", "ABD", "ABDOMENPELVIS", "ABDPEL", "PELVIS", "PEL", "LIVER", "KIDNEY", "KIDNEYS",
    "PANCREAS", "SPLEEN", "COLON", "BLADDER", "PROSTATE", "UTERUS", "RECTUM", "LSPINE", "LSSPINE",
    "SSPINE", "COCCYX", "HIP", "FEMUR", "THIGH", "KNEE", "PATELLA", "LEG", "CALF", "ANKLE", "FOOT",
    "TOE", "FOREARM", "ELBOW", "WRIST", "HAND", "FINGER", "THUMB", "EXTREMITY",
}  # fmt: skip

MIN_CHROMA = 32  # of 255, between the strongest and the weakest of red, green and blue
MAX_COLOURED = 0.03  # part of the picture; scribbles and boxes on slices reach 0.008
MIN_GREY_RANGE = 32  # grey levels between the darkest and brightest 2 %; slices have at least 79
MIN_ASPECT, MAX_ASPECT = 0.75, 2.75  # width over height; slices cut to the body: 1.0 to 2.6
SMALL_SIDE_PX = 96  # the shortest side of a slice is 110
MAX_LINES = 4  # rows of marks with empty rows between them; slices have at most 2
MAX_LINE_HEIGHT = 0.3  # part of the picture; the body on a slice takes at least 0.52
CELLS = 128  # a side of the raster on which shapes are looked at
MAX_BORDERS = 20.0  # between dark and bright along a line, on average; slices have at most 13
MIN_ENCLOSED = 0.05  # part of the picture within bright tissue; slices have at least 0.35
MIN_BODY_ASPECT = 0.95  # width over height; slices have at least 1.07, heads at most 0.91
LUNG_HU = (-940.0, -400.0)  # from emphysema to ground glass, without gas in bowel or stomach
TISSUE_HU = -300.0  # what is above is fat, muscle or bone
MIN_LUNG = 0.005  # part of the body


def picture_reasons(picture: Image.Image, grey: npt.NDArray[np.uint8]) -> list[str]:
    """Why a picture (PNG, JPEG) does not look like an axial chest-CT slice.

    Args:
        picture: As stored in the file, of any mode.
        grey: uint8 (H, W), the same picture in grey.

    Returns:
        One sentence a reason, without a full stop; none for what looks like one.
    """
    shown = Image.fromarray(grey)
    return [*_colour_reasons(picture), *_grey_reasons(shown, _raster(shown))]


def slice_reasons(
    grey: npt.NDArray[np.uint8], window: Window, *, body_part: str, is_inverted: bool
) -> list[str]:
    """Why a DICOM slice of a CT does not look like one of the chest.

    Args:
        grey: uint8 (H, W), the slice seen through `window`.
        window: In HU. The lungs are looked for if it shows them apart from air and from tissue.
        body_part: Body Part Examined (0018,0015); empty if unknown.
        is_inverted: Whether low values are bright in `grey`; then no lungs are looked for.

    Returns:
        One sentence a reason, without a full stop; none for what looks like one.
    """
    shown = Image.fromarray(grey)
    cells = _raster(shown)
    reasons = [*_body_part_reasons(body_part), *_grey_reasons(shown, cells)]
    return reasons if is_inverted else [*reasons, *_lung_reasons(cells, window)]


def _body_part_reasons(part: str) -> list[str]:
    # Wrong in 15 % of the images of one hospital, because it comes with the protocol (Gueld et
    # al. 2002, doi 10.1117/12.467017): enough for a flag, not for a refusal.
    words = re.findall("[A-Z0-9]+", part.upper())
    if words and PARTS_WITHOUT_LUNGS.issuperset(words):
        return [f"another body part: Body Part Examined (0018,0015) is {part}, expected the chest"]
    return []


def _colour_reasons(picture: Image.Image) -> list[str]:
    if picture.mode in ("1", "L", "LA") or picture.mode.startswith(("I", "F")):
        return []
    # Picked, not averaged: a thin coloured line would stain its surroundings.
    sample = picture.resize((CELLS, CELLS), Image.Resampling.NEAREST).convert("RGB")
    channels = np.array(sample.split())
    coloured = float(np.mean(channels.max(axis=0) - channels.min(axis=0) > MIN_CHROMA))
    if coloured <= MAX_COLOURED:
        return []
    return [
        f"coloured: {coloured:.0%} of the picture is strongly coloured, "
        f"expected at most {MAX_COLOURED:.0%}"
    ]


def _grey_reasons(grey: Image.Image, cells: Cells) -> list[str]:
    reasons = []
    width, height = grey.size
    if min(width, height) < SMALL_SIDE_PX:
        reasons.append(
            f"small: {width} x {height} pixels, expected at least {SMALL_SIDE_PX} a side"
        )
    if not MIN_ASPECT <= width / height <= MAX_ASPECT:
        reasons.append(
            f"elongated: {width} x {height} pixels, "
            f"expected {MIN_ASPECT:g} to {MAX_ASPECT:g} times as wide as tall"
        )
    darkest, brightest = np.percentile(cells, (2, 98))
    if brightest - darkest < MIN_GREY_RANGE:
        return [
            *reasons,
            f"blank: nearly all of it lies within {brightest - darkest:.0f} of 255 grey levels, "
            f"expected at least {MIN_GREY_RANGE}",
        ]
    heights = _line_heights(grey)
    if len(heights) > MAX_LINES and heights.max() < MAX_LINE_HEIGHT:
        reasons.append(
            f"lines of text: {len(heights)} rows of marks with empty rows between them, "
            f"expected at most {MAX_LINES}"
        )
    return [*reasons, *_shape_reasons(cells > otsu_threshold(cells), width / height)]


def _shape_reasons(bright: Mask, aspect: float) -> list[str]:
    borders = max(np.count_nonzero(np.diff(bright, axis=axis)) for axis in (0, 1)) / CELLS
    if borders > MAX_BORDERS:
        return [
            f"fine pattern: a line across meets {borders:.0f} borders between dark and bright, "
            f"expected at most {MAX_BORDERS:.0f}"
        ]
    enclosed = float(_enclosed(bright).mean())
    if enclosed < MIN_ENCLOSED:
        return [
            f"no body: bright tissue encloses {enclosed:.0%} of the picture, "
            f"expected at least {MIN_ENCLOSED:.0%}"
        ]
    body = _enclosed(_eroded(bright))  # without the table, cushions and lettering
    sides = [np.ptp(np.flatnonzero(body.any(axis=axis))) + 1 for axis in (0, 1) if body.any()]
    body_aspect = aspect * sides[0] / sides[1] if sides else math.inf
    if body_aspect < MIN_BODY_ASPECT:
        return [
            f"taller than wide: the body is {body_aspect:.2f} times as wide as tall, expected at "
            f"least {MIN_BODY_ASPECT:g}"
        ]
    return []


def _lung_reasons(cells: Cells, window: Window) -> list[str]:
    hu_per_level = (window.width_hu - 1) / 255  # DICOM PS3.3 C.11.2.1.2.1, from grey back to HU
    floor_hu = window.center_hu - window.width_hu / 2
    if floor_hu > LUNG_HU[0] or floor_hu + 255 * hu_per_level < TISSUE_HU:
        return []
    hu = floor_hu + hu_per_level * cells
    body = _enclosed(_eroded(hu > TISSUE_HU))
    # The rims of air and gas, where they are averaged with tissue, are a cell thin.
    lung = _eroded((hu > LUNG_HU[0]) & (hu < LUNG_HU[1]) & body)
    share = float(lung.sum() / max(body.sum(), 1))
    if share >= MIN_LUNG:
        return []
    return [
        f"no lung in view: {share:.1%} of the body is as dense as lung ({LUNG_HU[0]:.0f} to "
        f"{LUNG_HU[1]:.0f} HU), expected at least {MIN_LUNG:.1%}"
    ]


def _raster(grey: Image.Image) -> Cells:
    """The mean of each cell, uint8 (128, 128)."""
    box = Image.Resampling.BOX
    return np.asarray(grey.resize((CELLS, CELLS), box, reducing_gap=1.0))


def _line_heights(grey: Image.Image) -> npt.NDArray[np.float64]:
    """Heights, in parts of the picture, of the bands of marks that empty rows keep apart."""
    size = (min(grey.width, 2 * CELLS), min(grey.height, 4 * CELLS))
    sample = np.asarray(grey.resize(size, Image.Resampling.NEAREST)).astype(np.int16)
    change = np.abs(np.diff(sample, axis=1)).mean(axis=1)
    usual = np.percentile(change, 75)  # that of the body, if lettering stands beside it
    is_full, is_empty = change > 0.5 * usual, change < 0.2 * usual
    # A row that is neither goes with the last one that is.
    decided = np.where(is_full | is_empty, np.arange(len(change)), 0)
    in_band = is_full[np.maximum.accumulate(decided)]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], in_band, [False]])))
    heights: npt.NDArray[np.float64] = (edges[1::2] - edges[::2]) / len(change)
    return heights


def _enclosed(mask: Mask) -> Mask:
    """Cells in the mask, or with the mask on all four sides."""
    return _between(mask) & _between(mask.T).T


def _between(mask: Mask) -> Mask:
    """Each row from its first to its last cell of the mask."""
    column = np.arange(mask.shape[1])
    first = mask.argmax(axis=1)
    last = column[-1] - mask[:, ::-1].argmax(axis=1)
    between: Mask = (column >= first[:, np.newaxis]) & (column <= last[:, np.newaxis])
    return between & mask.any(axis=1, keepdims=True)


def _eroded(mask: Mask) -> Mask:
    """The mask without its rim of one cell, and without the rim of the picture."""
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = (
        mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    )
    return inner
