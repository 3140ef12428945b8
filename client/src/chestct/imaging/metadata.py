"""DICOM attributes of one slice: identifiers, position, plane, and whether it is an axial CT.

A classic CT image describes its one slice at the top of its data set. An enhanced one (PS3.3 A.38)
describes a frame in functional groups, shared ones and one for each frame (C.7.6.16); here both
are brought to the same shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

__all__ = [
    "GROUP_KEYWORDS",
    "SLICE_KEYWORDS",
    "Plane",
    "SliceMetadata",
    "dicom_kind",
    "dicom_reasons",
    "plane_of",
    "slice_attributes",
    "slice_metadata",
    "tag_text",
    "tag_value",
]

# The attributes of one slice, at the top of the data set or in a functional group of a frame.
SLICE_KEYWORDS = (
    "SOPClassUID",
    "Modality",
    "ImageType",
    "ImageOrientationPatient",
    "BodyPartExamined",
    "FrameType",
    "ImagePositionPatient",
    "SliceLocation",
    "SliceThickness",
    "ConvolutionKernel",
    "InstanceNumber",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
    "PhotometricInterpretation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "ModalityLUTSequence",
)
GROUP_KEYWORDS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
MAX_TILT_DEG = 30.0  # how far the gantry of a CT scanner can lean


@dataclass(frozen=True)
class SliceMetadata:
    """Attributes of one slice and its series; none of them identifies the patient by name.

    Missing text is empty, and a missing number is None.

    Attributes:
        study_uid: Study Instance UID (0020,000D).
        series_uid: Series Instance UID (0020,000E).
        sop_uid: SOP Instance UID (0008,0018).
        frame_of_reference_uid: Frame of Reference UID (0020,0052).
        frame: Number of the frame in its file, from 1; 0 in a file of one frame.
        instance: Instance Number (0020,0013).
        position_mm: Place along the axis across the slice, growing toward the head: the product of
            Image Position (0020,0032) and the normal of Image Orientation (0020,0037), PS3.3
            C.7.6.2.1.1; Slice Location (0020,1041) where there is none.
        thickness_mm: Slice Thickness (0018,0050).
        kernel: Convolution Kernel (0018,1210).
        body_part: Body Part Examined (0018,0015).
    """

    study_uid: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    frame_of_reference_uid: str = ""
    frame: int = 0
    instance: int | None = None
    position_mm: float | None = None
    thickness_mm: float | None = None
    kernel: str = ""
    body_part: str = ""


@dataclass(frozen=True)
class Plane:
    """Plane of a slice: x to the patient's left, y to the back, z to the head.

    Attributes:
        along_row: Unit vector in which the column index grows.
        along_column: Unit vector in which the row index grows.
        normal: Unit vector across the slice.
    """

    along_row: npt.NDArray[np.float64]
    along_column: npt.NDArray[np.float64]
    normal: npt.NDArray[np.float64]


def plane_of(dataset: Dataset) -> Plane | None:
    """The plane by Image Orientation (0020,0037; PS3.3 C.7.6.2.1.1); None without a valid one."""
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


def slice_attributes(dataset: Dataset, frame: int) -> Dataset:
    """The `SLICE_KEYWORDS` of one frame, counted from 0.

    The functional groups of the frame take precedence over the shared ones, and these over the top
    of the data set. A Frame Type replaces the Image Type. A file without functional groups is
    returned as it is.
    """
    from pydicom import Dataset
    from pydicom.datadict import tag_for_keyword

    if not any(keyword in dataset for keyword in GROUP_KEYWORDS):
        return dataset
    slice_tags = {tag_for_keyword(keyword) for keyword in SLICE_KEYWORDS}
    merged = Dataset()
    merged.file_meta = dataset.file_meta
    merged.set_original_encoding(*dataset.original_encoding)
    for source in (dataset, *_functional_groups(dataset, frame)):
        for tag in slice_tags.intersection(source.keys()):
            merged[tag] = source.get_item(tag)  # raw: a broken value raises only where it is used
    if tag_text(merged, "FrameType"):
        merged.ImageType = merged.FrameType
    return merged


def _functional_groups(dataset: Dataset, frame: int) -> Iterator[Dataset]:
    """The functional groups of a frame, each an item with attributes, shared ones first."""
    for keyword, place in zip(GROUP_KEYWORDS, (0, frame), strict=True):
        groups = dataset.get(keyword)
        if groups:
            for element in groups[place]:
                if element.VR == "SQ" and element.value:
                    yield element.value[0]


def slice_metadata(attributes: Dataset, frame: int) -> SliceMetadata:
    """The identifiers, position and reconstruction of a slice.

    Args:
        attributes: As from `slice_attributes`.
        frame: Number of the frame in its file, from 1; 0 in a file of one frame.
    """
    instance = _number(attributes, "InstanceNumber")
    return SliceMetadata(
        study_uid=tag_text(attributes, "StudyInstanceUID"),
        series_uid=tag_text(attributes, "SeriesInstanceUID"),
        sop_uid=tag_text(attributes, "SOPInstanceUID"),
        frame_of_reference_uid=tag_text(attributes, "FrameOfReferenceUID"),
        frame=frame,
        instance=None if instance is None else int(instance),
        position_mm=_position_mm(attributes),
        thickness_mm=_number(attributes, "SliceThickness"),
        kernel=tag_text(attributes, "ConvolutionKernel"),
        body_part=tag_text(attributes, "BodyPartExamined"),
    )


def _position_mm(attributes: Dataset) -> float | None:
    plane = plane_of(attributes)
    try:
        position = np.array([float(number) for number in attributes.ImagePositionPatient])
    except Exception:  # what broken values raise depends on what they should have been
        position = np.zeros(0)
    if plane is None or position.shape != (3,) or not np.isfinite(position).all():
        return _number(attributes, "SliceLocation")
    normal = plane.normal if plane.normal[2] >= 0 else -plane.normal
    return float(position @ normal)


def _number(attributes: Dataset, keyword: str) -> float | None:
    try:
        number = float(attributes[keyword].value)
    except Exception:  # what broken values raise depends on what they should have been
        return None
    return number if math.isfinite(number) else None


def dicom_kind(dataset: Dataset) -> str:
    """The kind of a file that `dicom_reasons` refuses, in one or two words.

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
    """Why a DICOM file is not an axial CT slice, by the tags that its scanner wrote.

    Modality and SOP class (PS3.3 C.7.3.1.1.1 and C.12.1), the plane (C.7.6.2.1.1) and value 3 of
    the image type (C.8.2.1.1.1). A tag that is missing, empty or unreadable is no reason, and
    neither is a SOP class that the standard does not know.

    Returns:
        One sentence a reason, without a full stop; none for an axial CT slice.
    """
    return [*_kind_reasons(dataset), *_plane_reasons(dataset)]


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
    return "LOCALIZER" in re.findall("[A-Z0-9]+", tag_text(dataset, "ImageType").upper())
