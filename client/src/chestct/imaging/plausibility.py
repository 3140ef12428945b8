"""What is no axial chest-CT slice, each reason in words: its kind, a colon, what was found.

What a scanner writes into a DICOM file of the file itself is knowledge: `chestct.imaging.scan`
refuses a file for `dicom_reasons`. What a picture looks like is a guess, and so is the body part,
which people choose: `picture_reasons` and `slice_reasons` only flag. Their limits were set on the
train and validation pictures of the public chest-CT set and on pictures of other things, and lie
where none of those 685 pictures is flagged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.contract import Window
from chestct.imaging.body import otsu_threshold

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

__all__ = [
    "DOMAIN_KEYWORDS",
    "Plane",
    "dicom_kind",
    "dicom_reasons",
    "picture_reasons",
    "plane_of",
    "slice_reasons",
    "tag_text",
    "tag_value",
]

Cells = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# What of a DICOM file tells whether it is an axial chest-CT slice.
DOMAIN_KEYWORDS = (
    "SOPClassUID",
    "Modality",
    "ImageType",
    "ImageOrientationPatient",
    "BodyPartExamined",
)
MAX_TILT_DEG = 30.0  # how far the gantry of a CT scanner can lean
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


@dataclass(frozen=True)
class Plane:
    """How a slice lies: x to the patient's left, y to the back, z to the head.

    Attributes:
        along_row: Unit vector in which the column index grows.
        along_column: Unit vector in which the row index grows.
        normal: Unit vector across the slice.
    """

    along_row: npt.NDArray[np.float64]
    along_column: npt.NDArray[np.float64]
    normal: npt.NDArray[np.float64]


def plane_of(dataset: Dataset) -> Plane | None:
    """The plane by Image Orientation (0020,0037; PS3.3 C.7.6.2.1.1) if it tells one."""
    try:
        cosines = np.array([float(part) for part in tag_value(dataset, "ImageOrientationPatient")])
    except (TypeError, ValueError):
        return None
    if cosines.shape != (6,) or not np.isfinite(cosines).all():
        return None
    normal: npt.NDArray[np.float64] = np.cross(cosines[:3], cosines[3:])
    length = np.linalg.norm(normal)
    # Of a row and a column that are unit vectors at right angles it is 1.
    return Plane(cosines[:3], cosines[3:], normal / length) if abs(length - 1) < 0.1 else None


def tag_value(dataset: Dataset, keyword: str) -> Any:
    """The value of a tag; None if it is missing or broken."""
    try:
        return dataset.get(keyword)
    except Exception:  # what broken values raise depends on what they should have been
        return None


def tag_text(dataset: Dataset, keyword: str) -> str:
    """The values of a tag in one short line; empty if it is missing or holds no text."""
    value = tag_value(dataset, keyword)
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    words = (word for part in values if isinstance(part, str) for word in part.split())
    return " ".join(words)[:100]  # three values of 16 characters decide


def dicom_kind(dataset: Dataset) -> str:
    """What a file that `dicom_reasons` speaks against is, in one or two words.

    Returns:
        `structured report`, `secondary capture`, `other object` (a PDF, a dose, a segmentation),
        `other modality`, `localizer`, `coronal`, `sagittal` or `oblique`: the first that holds;
        empty for what may be an axial CT slice.
    """
    from pydicom.uid import UID

    sop_class = UID(tag_text(dataset, "SOPClassUID"))
    name = sop_class.name if _is_other_object(sop_class) else ""
    modality = tag_text(dataset, "Modality").upper()
    if " SR " in name or modality == "SR":
        return "structured report"
    if "Secondary Capture" in name:
        return "secondary capture"
    if name and "Image Storage" not in name:
        return "other object"
    if modality not in ("", "CT"):
        return "other modality"
    if name:
        return "other object"
    if _is_localizer(dataset):
        return "localizer"
    plane = plane_of(dataset)
    name = "axial" if plane is None else _plane_name(plane)
    return "" if name == "axial" else name


def dicom_reasons(dataset: Dataset) -> list[str]:
    """Why a DICOM file is no axial CT slice, by the tags that its scanner wrote.

    Modality and SOP class (PS3.3 C.7.3.1.1.1 and C.12.1), the plane (C.7.6.2.1.1) and value 3 of
    the image type (C.8.2.1.1.1). A tag that is missing, empty or unreadable is no reason, and
    neither is a SOP class that the standard does not know.

    Args:
        dataset: Holds those of `DOMAIN_KEYWORDS` that the file has.

    Returns:
        One sentence a reason, without a full stop; none for an axial CT slice.
    """
    return [*_kind_reasons(dataset), *_plane_reasons(dataset)]


def picture_reasons(picture: Image.Image, grey: Image.Image) -> list[str]:
    """Why a picture (PNG, JPEG) does not look like an axial chest-CT slice.

    Args:
        picture: As it stands in the file, of any mode.
        grey: Mode L, of the same size.

    Returns:
        One sentence a reason, without a full stop; none for what looks like one.
    """
    return [*_colour_reasons(picture), *_grey_reasons(grey, _raster(grey))]


def slice_reasons(dataset: Dataset, grey: Image.Image, window: Window) -> list[str]:
    """Why a DICOM slice of a CT does not look like one of the chest.

    Args:
        dataset: Holds those of `DOMAIN_KEYWORDS` that the file has, and PhotometricInterpretation.
        grey: Mode L, its pixels seen through `window`. Lungs are looked for if the window shows
            them apart from air and from tissue, and not inverted.
        window: In HU.

    Returns:
        One sentence a reason, without a full stop; none for what looks like one.
    """
    cells = _raster(grey)
    reasons = [*_body_part_reasons(dataset), *_grey_reasons(grey, cells)]
    if tag_value(dataset, "PhotometricInterpretation") == "MONOCHROME2":
        reasons += _lung_reasons(cells, window)
    return reasons


def _kind_reasons(dataset: Dataset) -> list[str]:
    from pydicom.uid import UID, CTImageStorage

    reasons = []
    modality = tag_text(dataset, "Modality")
    if modality and modality.upper() != "CT":
        reasons.append(f"another modality: Modality (0008,0060) is {modality}, expected CT")
    sop_class = UID(tag_text(dataset, "SOPClassUID"))
    if _is_other_object(sop_class):
        reasons.append(
            f"another kind of object: SOP Class (0008,0016) is {sop_class.name}, "
            f"expected {CTImageStorage.name}"
        )
    return reasons


def _is_other_object(sop_class: UID) -> bool:
    from pydicom.uid import (
        CTImageStorage,
        EnhancedCTImageStorage,
        LegacyConvertedEnhancedCTImageStorage,
    )

    return sop_class.type == "SOP Class" and sop_class not in (
        CTImageStorage,
        EnhancedCTImageStorage,
        LegacyConvertedEnhancedCTImageStorage,
    )


def _plane_reasons(dataset: Dataset) -> list[str]:
    reasons = []
    image_type = tag_text(dataset, "ImageType")
    if _is_localizer(dataset):
        reasons.append(f"a localizer: Image Type (0008,0008) is {image_type}, expected a slice")
    plane = plane_of(dataset)
    if plane is not None and (plane_name := _plane_name(plane)) != "axial":
        tilt_deg = math.degrees(math.acos(min(abs(plane.normal[2]), 1.0)))
        reasons.append(
            f"not axial: by Image Orientation (0020,0037) the plane is {plane_name}, "
            f"{tilt_deg:.0f} degrees from axial, expected at most {MAX_TILT_DEG:.0f}"
        )
    return reasons


def _plane_name(plane: Plane) -> str:
    """`axial`, `coronal`, `sagittal` or `oblique`, within what the gantry of a scanner can lean."""
    straight = math.cos(math.radians(MAX_TILT_DEG))
    for name, part in zip(("sagittal", "coronal", "axial"), abs(plane.normal), strict=True):
        if part >= straight:
            return name
    return "oblique"


def _is_localizer(dataset: Dataset) -> bool:
    return "LOCALIZER" in _words(tag_text(dataset, "ImageType"))


def _body_part_reasons(dataset: Dataset) -> list[str]:
    # Wrong in 15 % of the images of one hospital, because it comes with the protocol (Gueld et
    # al. 2002, doi 10.1117/12.467017): enough for a flag, not for a refusal.
    part = tag_text(dataset, "BodyPartExamined")
    words = _words(part)
    if words and PARTS_WITHOUT_LUNGS.issuperset(words):
        return [f"another body part: Body Part Examined (0018,0015) is {part}, expected the chest"]
    return []


def _words(text: str) -> list[str]:
    return re.findall("[A-Z0-9]+", text.upper())


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
    """What has the mask on it or on all four sides."""
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
