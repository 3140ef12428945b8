"""Decode a DICOM file into Hounsfield units and metadata, frame by frame."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chestct.errors import OutOfDomainError, ScanDecodeError
from chestct.imaging.limits import (
    ACCEPTED,
    MAX_FILE_BYTES,
    MAX_FRAMES,
    MAX_PIXELS,
    MAX_SLICE_PIXELS,
    require_sides,
    require_size,
)
from chestct.imaging.metadata import (
    GROUP_KEYWORDS,
    SLICE_KEYWORDS,
    Plane,
    SliceMetadata,
    dicom_kind,
    dicom_reasons,
    plane_of,
    slice_attributes,
    slice_metadata,
    tag_text,
    tag_value,
)

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["DicomFile", "HuSlice", "is_dicom"]

# Without a preamble a DICOM file begins with group 0002 or 0008, little-endian.
BARE_SIGNATURES = (b"\x02\x00\x00\x00", b"\x02\x00\x01\x00", b"\x08\x00")
# Element (0002,0010), Deflated Explicit VR Little Endian: DICOM PS3.5 A.5
DEFLATED_TRANSFER_SYNTAX = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # PS3.5, section 7.5, both byte orders
ITEM_BYTES = 8  # at least
MAX_ITEMS = 200_000  # some 50 for each frame; an item of 8 bytes becomes one of a kilobyte

# Only these attributes are read; none of them names a patient.
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
class HuSlice:
    """One slice in Hounsfield units: `levels_hu[level_index]`.

    A slice has a few thousand levels. Rescale, window and padding depend on the level alone, so
    they are computed for each level and looked up for each pixel.

    Attributes:
        levels_hu: Float or int (K,), HU of each level. Stored values of more than 16 bits have a
            level for each pixel.
        is_padding: bool (K,), levels where nothing was measured.
        level_index: Int (H, W); the front of the body is at the top, its right side at the left.
        is_inverted: Low values are shown bright: MONOCHROME1.
        metadata: Of the slice and its series.
    """

    levels_hu: npt.NDArray[Any]
    is_padding: npt.NDArray[np.bool_]
    level_index: npt.NDArray[np.intp]
    is_inverted: bool
    metadata: SliceMetadata


class DicomFile:
    """A parsed DICOM file, which decodes a frame when asked.

    Args:
        data: The whole file.
        name: Name for error messages.
        max_pixels: Refuse larger slices.

    Raises:
        OutOfDomainError: It is no axial CT slice by its tags.
        ScanDecodeError: It holds no grey picture of bearable size, or would fill the memory.
        Exception: Whatever pydicom raises at a broken file.

    Attributes:
        num_frames: Number of Frames (0028,0008), 1 where it is missing.
    """

    file_format = "DICOM"

    def __init__(self, data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> None:
        from pydicom import dcmread

        _require_honest_deflation(data, name)
        _require_few_items(data, name)
        self._dataset = dcmread(BytesIO(data), force=True, specific_tags=list(FILE_KEYWORDS))
        self._name = name
        _require_axial_ct(self._dataset, name)
        _require_grey(self._dataset, name, max_pixels)
        self.num_frames = _num_frames(self._dataset)

    def frames(self) -> range:
        """Indices of the frames.

        Raises:
            ScanDecodeError: A torn file of several frames: it is not compressed and holds less
                than it promises. One error, not one for each frame.
        """
        dataset = self._dataset
        is_single = self.num_frames == 1 or dataset.get("PixelData") is None
        if not is_single and not dataset["PixelData"].is_undefined_length:  # else compressed
            frame_bytes = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8
            num_bytes = len(dataset.PixelData)
            if num_bytes < self.num_frames * frame_bytes:
                raise ScanDecodeError(
                    f"{self._name}: pixels of {num_bytes // max(frame_bytes, 1)} frames, expected "
                    f"those of {self.num_frames}. Export the file again."
                )
        return range(self.num_frames)

    def frame(self, index: int, name: str) -> HuSlice:
        """One frame in Hounsfield units, upright, with its metadata.

        Args:
            index: From 0.
            name: Name for error messages.

        Raises:
            OutOfDomainError: It is no axial CT slice by the attributes of its own.
            ScanDecodeError: No decoder here reads its compression, or values are not finite.
            Exception: Whatever pydicom raises at broken pixels.
        """
        attributes = slice_attributes(self._dataset, index)
        if attributes is not self._dataset:
            _require_axial_ct(attributes, name)
        stored = _stored_values(self._dataset, index if self.num_frames > 1 else None, name)
        levels, level_index = _levels(stored)
        return HuSlice(
            _hu_from_stored(levels, attributes, name),
            _is_padding(levels, attributes),
            _upright(level_index, plane_of(attributes)),
            attributes.PhotometricInterpretation == "MONOCHROME1",
            slice_metadata(attributes, index + 1 if self.num_frames > 1 else 0),
        )


def is_dicom(data: bytes) -> bool:
    """Whether the bytes begin as a DICOM file does, with or without a preamble."""
    return data[128:132] == b"DICM" or data.startswith(BARE_SIGNATURES)


def _require_axial_ct(attributes: Dataset, name: str) -> None:
    if reasons := dicom_reasons(attributes):
        raise OutOfDomainError(
            f"{name}: no axial CT slice: {'; '.join(reasons)}. Send an axial slice of a chest CT.",
            dicom_kind(attributes),
        )


def _require_grey(dataset: Dataset, name: str, max_pixels: int) -> None:
    if "Rows" not in dataset or "Columns" not in dataset:
        modality = tag_text(dataset, "Modality") or "unknown modality"
        raise ScanDecodeError(f"{name}: DICOM without a picture ({modality}), {ACCEPTED}")
    width, height = int(dataset.Columns), int(dataset.Rows)
    require_sides(width, height, name, max_pixels)
    if width * height > MAX_SLICE_PIXELS:
        raise ScanDecodeError(
            f"{name}: a slice of {width} x {height} pixels, expected at most 4096 x 4096"
        )
    num_frames = _num_frames(dataset)
    if not 1 <= num_frames <= MAX_FRAMES:
        raise ScanDecodeError(f"{name}: {num_frames} frames, expected 1 to {MAX_FRAMES}")
    interpretation = dataset.get("PhotometricInterpretation")
    if interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ScanDecodeError(
            f"{name}: photometric interpretation {interpretation!r}, expected one grey channel "
            "(MONOCHROME1 or MONOCHROME2). Send the original CT slice."
        )


def _num_frames(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _stored_values(dataset: Dataset, index: int | None, name: str) -> npt.NDArray[Any]:
    """One frame as stored: (H, W), of any number type; index None for the only one."""
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


def _levels(stored: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.intp]]:
    """Stored values that may occur, and the index of each pixel among them."""
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize > 2:
        return stored.ravel(), np.arange(stored.size, dtype=np.intp).reshape(stored.shape)
    lowest, highest = int(stored.min()), int(stored.max())
    levels = np.arange(lowest, highest + 1).astype(stored.dtype)
    return levels, np.subtract(stored, lowest, dtype=np.intp)


def _hu_from_stored(levels: npt.NDArray[Any], attributes: Dataset, name: str) -> npt.NDArray[Any]:
    """Hounsfield units by the slice's table or rescale: DICOM PS3.3 C.11.1."""
    from pydicom.pixels import apply_modality_lut

    hu: npt.NDArray[Any] = apply_modality_lut(levels, attributes)
    if not np.isfinite(hu).all():
        raise ScanDecodeError(f"{name}: pixel values that are not finite, expected numbers")
    return hu


def _is_padding(levels: npt.NDArray[Any], attributes: Dataset) -> npt.NDArray[np.bool_]:
    """Where nothing was measured: DICOM PS3.3 C.7.5.1.1.2."""
    value = tag_value(attributes, "PixelPaddingValue")
    if value is None:
        return np.zeros(levels.shape, np.bool_)
    limit = tag_value(attributes, "PixelPaddingRangeLimit")
    ends = np.array([value, value if limit is None else limit], np.int64).astype(levels.dtype)
    padding: npt.NDArray[np.bool_] = (levels >= ends.min()) & (levels <= ends.max())
    return padding


def _upright(picture: npt.NDArray[Any], plane: Plane | None) -> npt.NDArray[Any]:
    """An axial slice with the front of the body at the top and its right side at the left.

    Rows and columns of Image Orientation (0020,0037; PS3.3 C.7.6.2.1.1) are exchanged and turned
    about until columns run toward the patient's left (+x) and rows toward the back (+y), to the
    nearest quarter turn. Without an orientation the picture stays as it is.
    """
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


def _require_honest_deflation(data: bytes, name: str) -> None:
    """Refuse a deflated data set that would fill the memory: pydicom inflates it in one go."""
    if DEFLATED_TRANSFER_SYNTAX not in data[:4096]:
        return
    # The length of group 0002 stands in its first element: DICOM PS3.10, section 7.1.
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    most = MAX_FILE_BYTES + 1
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], most)
    require_size(len(inflated), name)
    _require_few_items(inflated, name)


def _require_few_items(data: bytes, name: str) -> None:
    if len(data) < ITEM_BYTES * MAX_ITEMS:
        return
    num_items = sum(data.count(tag) for tag in ITEM_TAGS)
    if num_items > MAX_ITEMS:
        raise ScanDecodeError(f"{name}: {num_items} items, expected at most {MAX_ITEMS}")
