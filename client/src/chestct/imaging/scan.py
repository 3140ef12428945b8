"""A scan file becomes the uint8 picture that the network eats: decode, window, crop, resize.

This is the one implementation of these steps; training, evaluation and every client call it.
Pictures (PNG, JPEG) are already windowed and are taken as they are; DICOM slices are rescaled
to Hounsfield units first and shown in a window after that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.contract import LUNG_WINDOW, SCAN_SIZE, Window
from chestct.errors import OutOfDomainError, ScanDecodeError
from chestct.imaging._warnings import without_warnings
from chestct.imaging.body import body_box
from chestct.imaging.dicom import (
    SliceFacts,
    hu_from_stored,
    is_dicom,
    is_padding,
    num_frames,
    read_dicom,
    require_grey,
    require_whole_frames,
    slice_attributes,
    slice_facts,
    stored_values,
    upright,
)
from chestct.imaging.limits import ACCEPTED, require_sides, require_size
from chestct.imaging.plausibility import dicom_kind, dicom_reasons, picture_reasons, slice_reasons
from chestct.imaging.sources import SCAN_SUFFIXES, Source, list_scans

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "SCAN_SUFFIXES",
    "Scan",
    "Slice",
    "SliceFacts",
    "apply_window",
    "decode_scan",
    "inspect_bytes",
    "inspect_scan",
    "inspect_scans",
    "list_scans",
    "load_grey",
    "load_scan",
    "resize_scan",
]

MIN_PEAK_16_BIT = 4096  # a 12-bit scanner value never reaches it, a picture of full range does
CHUNK_PIXELS = 2**20  # of values too many for a table, in float64 and some copies of it

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"  # PNG specification, section 5.2
JPEG_SIGNATURE = b"\xff\xd8\xff"  # start of image, then a marker; ITU-T T.81, annex B


@dataclass(frozen=True)
class Scan:
    """One scan and what speaks against it.

    Attributes:
        pixels: uint8 (224, 224, 1), 0 = floor of the window, 255 = its ceiling.
        reasons: Why it does not look like an axial chest-CT slice, a sentence each; empty for one
            that does.
        facts: What its DICOM file says of it and its series; None for a picture.
    """

    pixels: npt.NDArray[np.uint8]
    reasons: tuple[str, ...]
    facts: SliceFacts | None = None


@dataclass(frozen=True)
class Slice:
    """One slice of a file, or why there is none.

    Attributes:
        name: `Source.name` of the file; with `#` and the number of the frame, from 1, behind it
            for a file of several frames: `run.dcm#3`.
        scan: The scan; an `OutOfDomainError` for what is no axial CT slice by its tags, another
            `ScanDecodeError` for what cannot be read.
    """

    name: str
    scan: Scan | ScanDecodeError


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

    The picture is cropped to `chestct.imaging.body.body_box`: how wide a margin a scanner or a
    screen grab leaves says nothing of the patient. Then Pillow's BILINEAR, whose support grows
    when it
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
    source = Source(Path(path))
    return decode_scan(source.read(), source.name, window)


def inspect_scan(path: str | os.PathLike[str], window: Window = LUNG_WINDOW) -> Scan:
    """The tensor of one scan file, as `load_scan` gives it, and why to doubt it.

    Args:
        path: A PNG, JPEG or DICOM file.
        window: Window for DICOM slices; pictures are windowed already.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The file cannot be read or is no single grey slice.
    """
    source = Source(Path(path))
    return inspect_bytes(source.read(), source.name, window)


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
    opened = _opened(data, name)
    _require_one_frame(opened, name)
    return _inspected(opened, 0, name, window)


def inspect_scans(
    source: Source | str | os.PathLike[str], window: Window = LUNG_WINDOW
) -> Iterator[Slice]:
    """The slices of one file, one after the other: of a multi-frame DICOM file one a frame.

    A frame that is broken or no axial slice costs its own entry only. The file and one frame are
    in memory at a time.

    Args:
        source: A PNG, JPEG or DICOM file, on disk or in a zip archive.
        window: Window for DICOM slices; pictures are windowed already.

    Yields:
        At least one slice; one with an error for a file that cannot be read.

    Raises:
        MemoryError: Decoding needs more than the process may take, see `chestct.batch.decode_pool`.
    """
    source = source if isinstance(source, Source) else Source(Path(source))
    name = source.name
    try:
        opened = _opened(source.read(), name)
        if not isinstance(opened, Image.Image):
            with _decoding("DICOM", name):
                require_whole_frames(opened, name)
    except ScanDecodeError as error:
        yield Slice(name, error)
        return
    count = 1 if isinstance(opened, Image.Image) else num_frames(opened)
    for frame in range(count):
        slice_name = name if count == 1 else f"{name}#{frame + 1}"
        try:
            yield Slice(slice_name, _inspected(opened, frame, slice_name, window))
        except ScanDecodeError as error:
            yield Slice(slice_name, error)


def load_grey(
    path: Source | str | os.PathLike[str], window: Window = LUNG_WINDOW, *, frame: int = 0
) -> npt.NDArray[np.uint8]:
    """One scan file in its own size, decoded and windowed but neither cropped nor resized.

    Args:
        path: A PNG, JPEG or DICOM file.
        window: Window for DICOM slices; pictures are windowed already.
        frame: Which of several frames, from 1; 0 for a file of one.

    Returns:
        uint8 (H, W), 0 = floor of the window, 255 = its ceiling.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The file cannot be read or is no single grey slice.
    """
    source = path if isinstance(path, Source) else Source(Path(path))
    opened = _opened(source.read(), source.name)
    if not frame:
        _require_one_frame(opened, source.name)
    return np.array(_decoded(opened, max(frame - 1, 0), source.name, window)[0])


def _decode_grey(data: bytes, name: str, window: Window) -> Image.Image:
    """A picture of mode L, in the size of the file."""
    opened = _opened(data, name)
    _require_one_frame(opened, name)
    return _decoded(opened, 0, name, window)[0]


@contextmanager
def _decoding(kind: str, name: str) -> Iterator[None]:
    """Silent, and with no error but ours: broken files make the decoders raise nearly anything."""
    try:
        with without_warnings:
            yield
    except (ScanDecodeError, MemoryError):
        raise
    except BaseException as error:
        # A codec written in Rust panics with an exception that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ScanDecodeError(
            f"{name}: broken or unsupported {kind} file ({reason}). Export the slice again."
        ) from error


def _opened(data: bytes, name: str) -> Image.Image | Dataset:
    """A file whose head is read and fit, and whose pixels are not decoded yet."""
    require_size(len(data), name)
    if is_dicom(data):
        with _decoding("DICOM", name):
            dataset = read_dicom(data, name)
            _require_slice(dataset, name)
            require_grey(dataset, name)
            return dataset
    if not data.startswith((PNG_SIGNATURE, JPEG_SIGNATURE)):
        raise ScanDecodeError(f"{name}: neither PNG, JPEG nor DICOM by its content, {ACCEPTED}")
    with _decoding("PNG or JPEG", name):
        picture = Image.open(BytesIO(data), formats=("PNG", "JPEG"))
        require_sides(picture.width, picture.height, name)
        return picture


def _require_slice(dataset: Dataset, name: str) -> None:
    if reasons := dicom_reasons(dataset):
        raise OutOfDomainError(
            f"{name}: no axial CT slice: {'; '.join(reasons)}. Send an axial slice of a chest CT.",
            dicom_kind(dataset),
        )


def _require_one_frame(opened: Image.Image | Dataset, name: str) -> None:
    count = 1 if isinstance(opened, Image.Image) else num_frames(opened)
    if count != 1:
        raise ScanDecodeError(
            f"{name}: {count} frames, expected one. Export each slice as a file of its own."
        )


def _inspected(opened: Image.Image | Dataset, frame: int, name: str, window: Window) -> Scan:
    grey, source = _decoded(opened, frame, name, window)
    if isinstance(source, Image.Image):
        with _decoding("PNG or JPEG", name):
            return Scan(_resized(grey), tuple(picture_reasons(source, grey)))
    with _decoding("DICOM", name):
        reasons = tuple(slice_reasons(source, grey, window))
        number = frame + 1 if num_frames(opened) > 1 else 0
        return Scan(_resized(grey), reasons, slice_facts(source, number))


def _decoded(
    opened: Image.Image | Dataset, frame: int, name: str, window: Window
) -> tuple[Image.Image, Image.Image | Dataset]:
    """A picture of mode L, in the size of the file, and the picture or attributes it is from."""
    if isinstance(opened, Image.Image):
        with _decoding("PNG or JPEG", name):
            return _grey_from_picture(opened, name), opened
    with _decoding("DICOM", name):
        attributes = slice_attributes(opened, frame)
        if attributes is not opened:
            _require_slice(attributes, name)
        stored = stored_values(opened, frame, name)
        grey = _grey_from_dicom(stored, attributes, name, window)
        return Image.fromarray(upright(grey, attributes)), attributes


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


def _grey_from_dicom(
    stored: npt.NDArray[Any], attributes: Dataset, name: str, window: Window
) -> npt.NDArray[np.uint8]:
    """Order: stored values, rescale to HU, window, then MONOCHROME1 and padding."""
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize > 2:
        num_chunks = -(-stored.size // CHUNK_PIXELS)
        chunks = np.array_split(stored, min(num_chunks, len(stored)))
        return np.concatenate(
            [_grey_from_stored(chunk, attributes, name, window) for chunk in chunks]
        )
    # Each step looks at one value alone, so a table of the values that may occur says the same.
    values = np.arange(int(stored.min()), int(stored.max()) + 1).astype(stored.dtype)
    unsigned = f"u{stored.dtype.itemsize}"
    table = np.zeros(1 << (8 * stored.dtype.itemsize), np.uint8)
    table[values.view(unsigned)] = _grey_from_stored(values, attributes, name, window)
    return table.take(stored.view(unsigned))


def _grey_from_stored(
    stored: npt.NDArray[Any], attributes: Dataset, name: str, window: Window
) -> npt.NDArray[np.uint8]:
    grey = apply_window(hu_from_stored(stored, attributes, name), window)
    if attributes.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey  # the lowest value is shown white: DICOM PS3.3 C.7.6.3.1.2
    padding = is_padding(stored, attributes)
    if padding is not None:
        grey[padding] = 0
    return grey
