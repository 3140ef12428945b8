"""A DICOM file becomes Hounsfield units: its frames, their attributes, and how they lie.

What a classic CT image says of its one slice stands at the top of its data set. What an enhanced
one (PS3.3 A.38) says of a frame stands in functional groups, shared ones and one for each frame
(C.7.6.16); here they are brought to the same shape.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chestct.errors import ScanDecodeError
from chestct.imaging import limits
from chestct.imaging.limits import (
    ACCEPTED,
    MAX_FRAMES,
    MAX_SLICE_PIXELS,
    require_sides,
    require_size,
)
from chestct.imaging.plausibility import DOMAIN_KEYWORDS, plane_of, tag_text, tag_value

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "SliceFacts",
    "hu_from_stored",
    "is_dicom",
    "is_padding",
    "num_frames",
    "read_dicom",
    "require_grey",
    "require_whole_frames",
    "slice_attributes",
    "slice_facts",
    "stored_values",
    "upright",
]

# Without a preamble a DICOM file begins with group 0002 or 0008, little-endian.
BARE_SIGNATURES = (b"\x02\x00\x00\x00", b"\x02\x00\x01\x00", b"\x08\x00")
# Element (0002,0010), Deflated Explicit VR Little Endian: DICOM PS3.5 A.5
DEFLATED_TRANSFER_SYNTAX = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # PS3.5, section 7.5, both byte orders
ITEM_BYTES = 8  # at least
MAX_ITEMS = 200_000  # some 50 for each frame; an item of 8 bytes becomes one of a kilobyte

# What holds for one slice, be it at the top of the data set or in a functional group of a frame.
SLICE_KEYWORDS = (
    *DOMAIN_KEYWORDS,
    "FrameType",
    "PatientPosition",
    "ImagePositionPatient",
    "SliceLocation",
    "SliceThickness",
    "SpacingBetweenSlices",
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
# All that is read of a DICOM file: what it is, how to decode its pixels, and how to show them.
# Nothing that names a patient is.
FILE_KEYWORDS = (
    *SLICE_KEYWORDS,
    *GROUP_KEYWORDS,
    "SamplesPerPixel",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "PixelData",
)


@dataclass(frozen=True)
class SliceFacts:
    """What a DICOM file says of one slice and its series; nothing in it names a patient.

    Text is empty and a number None where the file is silent.

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
        spacing_mm: Spacing Between Slices (0018,0088), as the scanner tells it.
        kernel: Convolution Kernel (0018,1210).
        patient_position: Patient Position (0018,5100), such as HFS.
    """

    study_uid: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    frame_of_reference_uid: str = ""
    frame: int = 0
    instance: int | None = None
    position_mm: float | None = None
    thickness_mm: float | None = None
    spacing_mm: float | None = None
    kernel: str = ""
    patient_position: str = ""


def is_dicom(data: bytes) -> bool:
    """Whether the bytes begin as a DICOM file does, with or without a preamble."""
    return data[128:132] == b"DICM" or data.startswith(BARE_SIGNATURES)


def read_dicom(data: bytes, name: str) -> Dataset:
    """Those of `FILE_KEYWORDS` that a file has.

    Raises:
        ScanDecodeError: It would fill the memory.
        Exception: Whatever pydicom raises at a broken file.
    """
    from pydicom import dcmread

    _require_honest_deflation(data, name)
    _require_few_items(data, name)
    return dcmread(BytesIO(data), force=True, specific_tags=list(FILE_KEYWORDS))


def num_frames(dataset: Dataset) -> int:
    """Number of Frames (0028,0008), 1 where it is not told."""
    return int(dataset.get("NumberOfFrames") or 1)


def slice_attributes(dataset: Dataset, frame: int) -> Dataset:
    """The `SLICE_KEYWORDS` of one frame, counted from 0.

    Those of its own functional groups count before the shared ones, and these before the top of
    the data set. Image Type is the Frame Type of the frame where there is one. A file without
    functional groups is what it is at the top.
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
            merged[tag] = source.get_item(tag)  # as it stands: a broken value harms nobody yet
    if tag_text(merged, "FrameType"):
        merged.ImageType = merged.FrameType
    return merged


def _functional_groups(dataset: Dataset, frame: int) -> Iterator[Dataset]:
    """The macros that hold for a frame, each an item with attributes, shared ones first."""
    for keyword, place in zip(GROUP_KEYWORDS, (0, frame), strict=True):
        groups = dataset.get(keyword)
        if groups:
            for element in groups[place]:
                if element.VR == "SQ" and element.value:
                    yield element.value[0]


def slice_facts(attributes: Dataset, frame: int) -> SliceFacts:
    """What a series needs to know of a slice.

    Args:
        attributes: As from `slice_attributes`.
        frame: Number of the frame in its file, from 1; 0 in a file of one frame.
    """
    instance = _number(attributes, "InstanceNumber")
    return SliceFacts(
        study_uid=tag_text(attributes, "StudyInstanceUID"),
        series_uid=tag_text(attributes, "SeriesInstanceUID"),
        sop_uid=tag_text(attributes, "SOPInstanceUID"),
        frame_of_reference_uid=tag_text(attributes, "FrameOfReferenceUID"),
        frame=frame,
        instance=None if instance is None else int(instance),
        position_mm=_position_mm(attributes),
        thickness_mm=_number(attributes, "SliceThickness"),
        spacing_mm=_number(attributes, "SpacingBetweenSlices"),
        kernel=tag_text(attributes, "ConvolutionKernel"),
        patient_position=tag_text(attributes, "PatientPosition"),
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


def upright(picture: npt.NDArray[np.uint8], attributes: Dataset) -> npt.NDArray[np.uint8]:
    """An axial slice with the front of the body at the top and its right side at the left.

    Rows and columns of Image Orientation (0020,0037; PS3.3 C.7.6.2.1.1) are exchanged and turned
    about until columns run toward the patient's left (+x) and rows toward the back (+y), to the
    nearest quarter turn. Without an orientation the picture stays as it is.

    Args:
        picture: (H, W), as stored.
        attributes: As from `slice_attributes`.
    """
    plane = plane_of(attributes)
    if plane is None:
        return picture
    along_row, along_column = plane.along_row, plane.along_column
    if abs(along_row[1]) > abs(along_row[0]):
        picture, along_row, along_column = picture.T, along_column, along_row
    if along_row[0] < 0:
        picture = picture[:, ::-1]
    if along_column[1] < 0:
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def require_grey(dataset: Dataset, name: str) -> None:
    """Refuse what holds no grey picture of bearable size.

    Raises:
        ScanDecodeError: No rows or columns, too large, too small, coloured, or too many frames.
    """
    if "Rows" not in dataset or "Columns" not in dataset:
        modality = tag_text(dataset, "Modality") or "unknown modality"
        raise ScanDecodeError(f"{name}: DICOM without a picture ({modality}), {ACCEPTED}")
    width, height = int(dataset.Columns), int(dataset.Rows)
    require_sides(width, height, name)
    if width * height > MAX_SLICE_PIXELS:
        raise ScanDecodeError(
            f"{name}: a slice of {width} x {height} pixels, expected at most 4096 x 4096"
        )
    if num_frames(dataset) > MAX_FRAMES:
        raise ScanDecodeError(
            f"{name}: {num_frames(dataset)} frames, expected at most {MAX_FRAMES}"
        )
    interpretation = dataset.get("PhotometricInterpretation")
    if interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ScanDecodeError(
            f"{name}: photometric interpretation {interpretation}, expected one grey channel "
            "(MONOCHROME1 or MONOCHROME2). Send the original CT slice."
        )


def require_whole_frames(dataset: Dataset, name: str) -> None:
    """Refuse a torn file of several frames: one error, not one for each of them.

    Raises:
        ScanDecodeError: It is not compressed and holds less than it promises.
    """
    if num_frames(dataset) == 1 or dataset.get("PixelData") is None:
        return
    if dataset["PixelData"].is_undefined_length:  # compressed
        return
    frame_bytes = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8
    num_bytes = len(dataset.PixelData)
    if num_bytes < num_frames(dataset) * frame_bytes:
        raise ScanDecodeError(
            f"{name}: pixels of {num_bytes // max(frame_bytes, 1)} frames, expected those of "
            f"{num_frames(dataset)}. Export the file again."
        )


def stored_values(dataset: Dataset, frame: int, name: str) -> npt.NDArray[Any]:
    """One frame, counted from 0, as stored: (H, W), of any number type.

    Raises:
        ScanDecodeError: No decoder here reads its compression.
        Exception: Whatever pydicom raises at broken pixels.
    """
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, _ = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
        )
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        stored: npt.NDArray[Any]
        # pydicom warns where a view cannot be had.
        whole = dataset.get("BitsStored") == dataset.get("BitsAllocated")
        index = frame if num_frames(dataset) > 1 else None
        stored, _ = get_decoder(syntax).as_array(dataset, raw=True, view_only=whole, index=index)
    except Exception as error:
        if not syntax.is_compressed:
            raise
        try:
            lacks_decoder = not get_decoder(syntax).is_available
        except NotImplementedError:  # nothing that could be installed reads it
            lacks_decoder = False
        remedy = "Store the slice uncompressed"
        if lacks_decoder:
            remedy += ', or install the decoders: pip install "chestct[dicom]"'
        raise ScanDecodeError(
            f"{name}: pixels compressed as {syntax.name} cannot be decoded here. {remedy}."
        ) from error
    return stored


def hu_from_stored(stored: npt.NDArray[Any], attributes: Dataset, name: str) -> npt.NDArray[Any]:
    """Hounsfield units by the slice's table or rescale: DICOM PS3.3 C.11.1.

    Raises:
        ScanDecodeError: Values that are not finite.
        Exception: Whatever pydicom raises at a broken table.
    """
    from pydicom.pixels import apply_modality_lut

    hu: npt.NDArray[Any] = apply_modality_lut(stored, attributes)
    if not np.isfinite(hu).all():
        raise ScanDecodeError(f"{name}: pixel values that are not finite, expected numbers")
    return hu


def is_padding(stored: npt.NDArray[Any], attributes: Dataset) -> npt.NDArray[np.bool_] | None:
    """Where nothing was measured: DICOM PS3.3 C.7.5.1.1.2.

    Returns:
        bool, shape of `stored`; None for a slice without padding.
    """
    value = tag_value(attributes, "PixelPaddingValue")
    if value is None:
        return None
    limit = tag_value(attributes, "PixelPaddingRangeLimit")
    ends = np.array([value, value if limit is None else limit], np.int64).astype(stored.dtype)
    padding: npt.NDArray[np.bool_] = (stored >= ends.min()) & (stored <= ends.max())
    return padding


def _require_honest_deflation(data: bytes, name: str) -> None:
    """Refuse a deflated data set that would fill the memory: pydicom inflates it in one go."""
    if DEFLATED_TRANSFER_SYNTAX not in data[:4096]:
        return
    # The length of group 0002 stands in its first element: DICOM PS3.10, section 7.1.
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    most = limits.MAX_FILE_BYTES + 1
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], most)
    require_size(len(inflated), name)
    _require_few_items(inflated, name)


def _require_few_items(data: bytes, name: str) -> None:
    if len(data) < ITEM_BYTES * MAX_ITEMS:
        return
    num_items = sum(data.count(tag) for tag in ITEM_TAGS)
    if num_items > MAX_ITEMS:
        raise ScanDecodeError(f"{name}: {num_items} items, expected at most {MAX_ITEMS}")
