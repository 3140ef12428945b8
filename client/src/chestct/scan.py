"""A scan file becomes the uint8 picture that the network eats: decode, window, crop, resize.

This is the one implementation of these steps; training, evaluation and every client call it.
Pictures (PNG, JPEG) are already windowed and are taken as they are; DICOM slices are rescaled
to Hounsfield units first and shown in a window after that.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.body import body_box
from chestct.contract import LUNG_WINDOW, SCAN_SIZE, Window
from chestct.domain import DOMAIN_KEYWORDS, dicom_reasons, picture_reasons, slice_reasons
from chestct.errors import OutOfDomainError, ScanDecodeError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "SCAN_SUFFIXES",
    "Scan",
    "apply_window",
    "decode_scan",
    "inspect_bytes",
    "inspect_scan",
    "list_scans",
    "load_grey",
    "load_scan",
    "resize_scan",
]

SCAN_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 64 * 10**6  # below the limit at which Pillow itself begins to warn
MIN_SIDE_PX = 32
MIN_PEAK_16_BIT = 4096  # a 12-bit scanner value never reaches it, a picture of full range does

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"  # PNG specification, section 5.2
JPEG_SIGNATURE = b"\xff\xd8\xff"  # start of image, then a marker; ITU-T T.81, annex B
# Without a preamble a DICOM file begins with group 0002 or 0008, little-endian.
BARE_DICOM_SIGNATURES = (b"\x02\x00\x00\x00", b"\x02\x00\x01\x00", b"\x08\x00")
# Element (0002,0010), Deflated Explicit VR Little Endian: DICOM PS3.5 A.5
DEFLATED_TRANSFER_SYNTAX = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
ACCEPTED = "expected an axial slice as PNG, JPEG or DICOM"

# All that is read of a DICOM file: what it is, how to decode its pixels, and how to show them.
DICOM_KEYWORDS = (
    *DOMAIN_KEYWORDS,
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "ModalityLUTSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "PixelData",
)


@dataclass(frozen=True)
class Scan:
    """One scan and what speaks against it.

    Attributes:
        pixels: uint8 (224, 224, 1), 0 = floor of the window, 255 = its ceiling.
        reasons: Why it does not look like an axial chest-CT slice, a sentence each; empty for one
            that does.
    """

    pixels: npt.NDArray[np.uint8]
    reasons: tuple[str, ...]


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


def resize_scan(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The body in a grey picture, stretched to the input of the network.

    The picture is cropped to `chestct.body.body_box`: how wide a margin a scanner or a screen
    grab leaves says nothing of the patient. Then Pillow's BILINEAR, whose support grows when it
    reduces: it antialiases.

    Args:
        grey: uint8 (H, W), 0 = floor of the window.

    Returns:
        uint8 (224, 224, 1).

    Raises:
        ValueError: Another dtype or number of axes.
    """
    if grey.dtype != np.uint8 or grey.ndim != 2:
        raise ValueError(f"grey is {grey.dtype} {grey.shape}: expected uint8 (H, W)")
    return _resized(Image.fromarray(grey))


def _resized(picture: Image.Image) -> npt.NDArray[np.uint8]:
    top, bottom, left, right = body_box(np.asarray(picture))
    resized = picture.resize(
        (SCAN_SIZE, SCAN_SIZE), Image.Resampling.BILINEAR, (left, top, right, bottom)
    )
    return np.array(resized)[:, :, np.newaxis]


def decode_scan(data: bytes, name: str, window: Window = LUNG_WINDOW) -> npt.NDArray[np.uint8]:
    """The tensor of one scan from the bytes of its file.

    Args:
        data: The whole file; its kind is told by its content, not by its name.
        name: Name for error messages.
        window: Window for DICOM slices; pictures are windowed already.

    Returns:
        uint8 (224, 224, 1), 0 = floor of the window, 255 = its ceiling.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The bytes are no readable single grey slice.
    """
    return _resized(_decode_grey(data, name, window))


def load_scan(path: str | os.PathLike[str], window: Window = LUNG_WINDOW) -> npt.NDArray[np.uint8]:
    """The tensor of one scan file.

    Args:
        path: A PNG, JPEG or DICOM file.
        window: Window for DICOM slices; pictures are windowed already.

    Returns:
        uint8 (224, 224, 1), 0 = floor of the window, 255 = its ceiling.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The file cannot be read or is no single grey slice.
    """
    return decode_scan(_read_file(path), os.fspath(path), window)


def inspect_scan(path: str | os.PathLike[str], window: Window = LUNG_WINDOW) -> Scan:
    """The tensor of one scan file, as `load_scan` gives it, and why to doubt it.

    Args:
        path: A PNG, JPEG or DICOM file.
        window: Window for DICOM slices; pictures are windowed already.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The file cannot be read or is no single grey slice.
    """
    return inspect_bytes(_read_file(path), os.fspath(path), window)


def inspect_bytes(data: bytes, name: str, window: Window = LUNG_WINDOW) -> Scan:
    """What `inspect_scan` gives, from the bytes of the file.

    Args:
        data: The whole file; its kind is told by its content, not by its name.
        name: Name for error messages.
        window: Window for DICOM slices; pictures are windowed already.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The bytes are no readable single grey slice.
    """
    grey, source = _decode(data, name, window)
    with _without_warnings:
        if isinstance(source, Image.Image):
            reasons = picture_reasons(source, grey)
        else:
            reasons = slice_reasons(source, grey, window)
    return Scan(_resized(grey), tuple(reasons))


def load_grey(path: str | os.PathLike[str], window: Window = LUNG_WINDOW) -> npt.NDArray[np.uint8]:
    """One scan file in its own size, decoded and windowed but neither cropped nor resized.

    Args:
        path: A PNG, JPEG or DICOM file.
        window: Window for DICOM slices; pictures are windowed already.

    Returns:
        uint8 (H, W), 0 = floor of the window, 255 = its ceiling.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The file cannot be read or is no single grey slice.
    """
    return np.array(_decode_grey(_read_file(path), os.fspath(path), window))


def list_scans(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Scan files under a path, one after the other, sorted within each folder.

    A file yields itself, whatever its name. A folder is walked recursively and yields files
    with one of `SCAN_SUFFIXES`, and files without a suffix (or with a number for one, as in
    names made from UIDs) that carry the DICOM preamble. Hidden files and links to folders are
    passed over. A folder that may not be read yields itself, so that loading it tells why.

    Raises:
        ScanDecodeError: Nothing is at `path`.
    """
    root = Path(path)
    if not root.exists():
        raise ScanDecodeError(f"{path}: no such file or folder")
    yield from _walk(root) if root.is_dir() else [root]


def _walk(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError:
        yield folder
        return
    for name, is_folder in found:
        path = folder / name
        if name.startswith(".") or name == "DICOMDIR":
            continue
        if is_folder:
            yield from _walk(path)
        elif path.suffix.lower() in SCAN_SUFFIXES or _is_unnamed_dicom(path):
            yield path


def _is_unnamed_dicom(path: Path) -> bool:
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _read_file(path: str | os.PathLike[str]) -> bytes:
    name = os.fspath(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()
            raise ScanDecodeError(f"{name}: a folder, expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise ScanDecodeError(f"{name}: not a regular file, {ACCEPTED}")
        _require_size(status.st_size, name)
        return Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ScanDecodeError(f"{name}: cannot be read: {reason}") from error
    except ValueError as error:  # a null character in the name
        raise ScanDecodeError(f"{name!r}: not a file name: {error}") from error


def _require_size(num_bytes: int, name: str) -> None:
    if num_bytes == 0:
        raise ScanDecodeError(f"{name}: the file is empty, {ACCEPTED}")
    if num_bytes > MAX_FILE_BYTES:
        raise ScanDecodeError(
            f"{name}: {num_bytes / 2**20:.0f} MiB, expected at most {MAX_FILE_BYTES // 2**20} MiB"
        )


def _require_sides(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise ScanDecodeError(
            f"{name}: {width} x {height} pixels, expected at most {MAX_PIXELS // 10**6} million"
        )
    if min(width, height) < MIN_SIDE_PX:
        raise ScanDecodeError(
            f"{name}: {width} x {height} pixels, expected at least {MIN_SIDE_PX} a side"
        )


def _decode_grey(data: bytes, name: str, window: Window) -> Image.Image:
    """A picture of mode L, in the size of the file."""
    return _decode(data, name, window)[0]


def _decode(data: bytes, name: str, window: Window) -> tuple[Image.Image, Image.Image | Dataset]:
    """A picture of mode L, in the size of the file, and what it was made from."""
    _require_size(len(data), name)
    is_dicom = data[128:132] == b"DICM" or data.startswith(BARE_DICOM_SIGNATURES)
    if not is_dicom and not data.startswith((PNG_SIGNATURE, JPEG_SIGNATURE)):
        raise ScanDecodeError(f"{name}: neither PNG, JPEG nor DICOM by its content, {ACCEPTED}")
    try:
        with _without_warnings:
            if is_dicom:
                dataset = _read_dicom(data, name)
                return Image.fromarray(_grey_from_dicom(dataset, name, window)), dataset
            picture = _open_picture(data, name)
            return _grey_from_picture(picture, name), picture
    except ScanDecodeError:
        raise
    except Exception as error:  # broken files make the decoders raise nearly anything
        kind = "DICOM" if is_dicom else "PNG or JPEG"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ScanDecodeError(
            f"{name}: broken or unsupported {kind} file ({reason}). Export the slice again."
        ) from error


class _WithoutWarnings:
    """Silence of `warnings` as long as any thread is inside.

    `warnings.catch_warnings` changes the whole process: threads that overlap would restore each
    other's filters, and one at a time could not decode side by side.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._caught.__exit__(None, None, None)


_without_warnings = _WithoutWarnings()


def _open_picture(data: bytes, name: str) -> Image.Image:
    picture = Image.open(BytesIO(data), formats=("PNG", "JPEG"))
    _require_sides(picture.width, picture.height, name)
    return picture


def _grey_from_picture(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode.startswith("I"):
        return Image.fromarray(_grey_from_16_bit(np.asarray(picture), name))
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA") if picture.mode != "RGBA" else picture
        opacity = coloured.getchannel("A")
        if opacity.getextrema() != (255, 255):
            black = Image.new("L", picture.size)
            return Image.composite(coloured.convert("L"), black, opacity)
        picture = coloured
    return picture.convert("L")


def _grey_from_16_bit(samples: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """Samples scaled so that 65535 becomes 255 (PNG specification, section 13.12)."""
    peak = int(samples.max())
    if peak < MIN_PEAK_16_BIT:
        raise ScanDecodeError(
            f"{name}: a 16-bit picture whose brightest sample is {peak} of 65535: this looks like "
            "stored scanner values. Send the DICOM file, or a windowed 8-bit picture."
        )
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _read_dicom(data: bytes, name: str) -> Dataset:
    from pydicom import dcmread

    _require_honest_deflation(data, name)
    dataset = dcmread(BytesIO(data), force=True, specific_tags=list(DICOM_KEYWORDS))
    if reasons := dicom_reasons(dataset):
        raise OutOfDomainError(
            f"{name}: no axial CT slice: {'; '.join(reasons)}. Send an axial slice of a chest CT."
        )
    _require_one_grey_frame(dataset, name)
    return dataset


def _grey_from_dicom(dataset: Dataset, name: str, window: Window) -> npt.NDArray[np.uint8]:
    """Order: stored values, rescale to HU, window, then MONOCHROME1 and padding."""
    stored = _stored_values(dataset, name)
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize > 2:
        return _grey_from_stored(stored, dataset, name, window)
    # Each step looks at one value alone, so a table of the values that may occur says the same.
    values = np.arange(int(stored.min()), int(stored.max()) + 1).astype(stored.dtype)
    unsigned = f"u{stored.dtype.itemsize}"
    table = np.zeros(1 << (8 * stored.dtype.itemsize), np.uint8)
    table[values.view(unsigned)] = _grey_from_stored(values, dataset, name, window)
    return table.take(stored.view(unsigned))


def _grey_from_stored(
    stored: npt.NDArray[Any], dataset: Dataset, name: str, window: Window
) -> npt.NDArray[np.uint8]:
    from pydicom.pixels import apply_modality_lut

    hu = apply_modality_lut(stored, dataset)
    if not np.isfinite(hu).all():
        raise ScanDecodeError(f"{name}: pixel values that are not finite, expected numbers")
    grey = apply_window(hu, window)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey  # the lowest value is shown white: DICOM PS3.3 C.7.6.3.1.2
    padding = _padding(dataset, stored)
    if padding is not None:
        grey[padding] = 0
    return grey


def _require_honest_deflation(data: bytes, name: str) -> None:
    """Refuse a deflated data set that would fill the memory: pydicom inflates it in one go."""
    if DEFLATED_TRANSFER_SYNTAX not in data[:4096]:
        return
    # The length of group 0002 stands in its first element: DICOM PS3.10, section 7.1.
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], MAX_FILE_BYTES + 1)
    _require_size(len(inflated), name)


def _require_one_grey_frame(dataset: Dataset, name: str) -> None:
    if "Rows" not in dataset or "Columns" not in dataset:
        modality = dataset.get("Modality") or "unknown modality"
        raise ScanDecodeError(f"{name}: DICOM without a picture ({modality}), {ACCEPTED}")
    _require_sides(int(dataset.Columns), int(dataset.Rows), name)
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    if num_frames != 1:
        raise ScanDecodeError(
            f"{name}: {num_frames} frames, expected one. Export each slice as a file of its own."
        )
    interpretation = dataset.get("PhotometricInterpretation")
    if interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ScanDecodeError(
            f"{name}: photometric interpretation {interpretation}, expected one grey channel "
            "(MONOCHROME1 or MONOCHROME2). Send the original CT slice."
        )


def _stored_values(dataset: Dataset, name: str) -> npt.NDArray[Any]:
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
        stored, _ = get_decoder(syntax).as_array(dataset, raw=True, view_only=whole)
    except Exception as error:
        if not syntax.is_compressed:
            raise
        try:
            lacking = get_decoder(syntax).missing_dependencies
        except NotImplementedError:
            lacking = []
        remedy = "Store the slice uncompressed"
        if lacking:
            remedy += ', or install the decoders: pip install "chestct[dicom]"'
        raise ScanDecodeError(
            f"{name}: pixels compressed as {syntax.name} cannot be decoded here. {remedy}."
        ) from error
    return stored


def _padding(dataset: Dataset, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    """Where nothing was measured: DICOM PS3.3 C.7.5.1.1.2; bool (H, W), None without padding."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = np.array([value, value if limit is None else limit], np.int64).astype(stored.dtype)
    padding: npt.NDArray[np.bool_] = (stored >= ends.min()) & (stored <= ends.max())
    return padding
