"""Decode an image file into the network's uint8 input: the one entry point of `chestct.imaging`.

A slice passes each module once: `sources` reads its bytes, `dicom` or `picture` decodes them,
`window` shows Hounsfield units as grey levels, `body` finds the body, which is cropped and resized
here, and `plausibility` checks the slice. Training, evaluation and every client call this.
Pictures (PNG, JPEG) are windowed already and are taken as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.contract import LUNG_WINDOW, SCAN_SIZE, Window
from chestct.errors import ScanDecodeError
from chestct.imaging._warnings import decoding
from chestct.imaging.body import body_box
from chestct.imaging.dicom import DicomFile, HuSlice, is_dicom
from chestct.imaging.limits import ACCEPTED, MAX_PIXELS, require_size
from chestct.imaging.metadata import SliceMetadata
from chestct.imaging.original import Original, original_of
from chestct.imaging.picture import GreyPicture, PictureFile, is_picture
from chestct.imaging.plausibility import picture_reasons, slice_reasons
from chestct.imaging.sources import Source
from chestct.imaging.window import grey_from_hu

__all__ = [
    "Scan",
    "Slice",
    "inspect_bytes",
    "inspect_scan",
    "inspect_scans",
    "load_grey",
    "load_scan",
    "resize_scan",
]


@dataclass(frozen=True)
class Scan:
    """The network's input for one slice, with metadata and reasons for doubt.

    Attributes:
        pixels: uint8 (224, 224, 1), 0 = floor of the window, 255 = its ceiling.
        reasons: Why it does not look like an axial chest-CT slice, a sentence each; empty for one
            that does.
        metadata: Of the slice and its series in a DICOM file; None for a picture.
        original: The slice for display; None unless asked for.
    """

    pixels: npt.NDArray[np.uint8]
    reasons: tuple[str, ...]
    metadata: SliceMetadata | None = None
    original: Original | None = None


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


def load_scan(path: str | os.PathLike[str], window: Window = LUNG_WINDOW) -> npt.NDArray[np.uint8]:
    """The network's input for one scan file.

    Args:
        path: A PNG, JPEG or DICOM file.
        window: Window for DICOM slices; pictures are windowed already.

    Returns:
        uint8 (224, 224, 1), 0 = floor of the window, 255 = its ceiling.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The file cannot be read or is no single grey slice.
    """
    return resize_scan(load_grey(path, window))


def inspect_scan(path: str | os.PathLike[str], window: Window = LUNG_WINDOW) -> Scan:
    """The network's input for one scan file, as `load_scan` gives it, and why to doubt it.

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
    """As `inspect_scan`, from the bytes of the file.

    Args:
        data: The whole file; its kind is told by its content, not by its name.
        name: Name for error messages.
        window: Window for DICOM slices; pictures are windowed already.

    Raises:
        OutOfDomainError: A DICOM file that is no axial CT slice by its tags.
        ScanDecodeError: The bytes are no readable single grey slice.
    """
    file = _opened(data, name)
    _require_one_frame(file, name)
    return _inspected(file, 0, name, window)


def inspect_scans(
    source: Source | str | os.PathLike[str],
    window: Window = LUNG_WINDOW,
    *,
    max_pixels: int = MAX_PIXELS,
    with_original: bool = False,
) -> Iterator[Slice]:
    """The slices of one file, one after the other: one for each frame of a multi-frame DICOM file.

    A frame that is broken or no axial slice costs its own entry only. The file and one frame are
    in memory at a time.

    Args:
        source: A PNG, JPEG or DICOM file, on disk or in a zip archive.
        window: Window for DICOM slices; pictures are windowed already.
        max_pixels: Refuse larger pictures and slices.
        with_original: Give each slice in its own size, too.

    Yields:
        At least one slice; one with an error for a file that cannot be read.

    Raises:
        MemoryError: Decoding needs more than the process may take, see
            `chestct.imaging.limits.limit_memory`.
    """
    source = source if isinstance(source, Source) else Source(Path(source))
    name = source.name
    try:
        file = _opened(source.read(), name, max_pixels)
        with decoding(file.file_format, name):
            frames = file.frames()
    except ScanDecodeError as error:
        yield Slice(name, error)
        return
    for index in frames:
        slice_name = name if len(frames) == 1 else f"{name}#{index + 1}"
        try:
            scan = _inspected(file, index, slice_name, window, with_original)
            yield Slice(slice_name, scan)
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
    file = _opened(source.read(), source.name)
    if not frame:
        _require_one_frame(file, source.name)
    with decoding(file.file_format, source.name):
        return _grey(file.frame(max(frame - 1, 0), source.name), window)


def resize_scan(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The body in a grey picture, resized to the network's input.

    The picture is cropped to `chestct.imaging.body.body_box`, because the margin that a scanner or
    a screenshot leaves says nothing of the patient. Then Pillow's BILINEAR, whose support grows
    when it reduces: it antialiases.

    Args:
        grey: uint8 (H, W), 0 = floor of the window.

    Returns:
        uint8 (224, 224, 1).

    Raises:
        ValueError: Another dtype or number of axes.
    """
    if grey.dtype != np.uint8 or grey.ndim != 2:
        raise ValueError(f"grey is {grey.dtype} {grey.shape}: expected uint8 (H, W)")
    return _resized(grey, body_box(grey))


def _resized(grey: npt.NDArray[np.uint8], box: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
    top, bottom, left, right = box
    resized = Image.fromarray(grey).resize(
        (SCAN_SIZE, SCAN_SIZE), Image.Resampling.BILINEAR, (left, top, right, bottom)
    )
    return np.array(resized)[:, :, np.newaxis]


def _opened(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> DicomFile | PictureFile:
    """A file whose head is read and fit, and whose pixels are not decoded yet."""
    require_size(len(data), name)
    if not is_dicom(data) and not is_picture(data):
        raise ScanDecodeError(f"{name}: neither PNG, JPEG nor DICOM by its content, {ACCEPTED}")
    kind = DicomFile if is_dicom(data) else PictureFile
    with decoding(kind.file_format, name):
        return kind(data, name, max_pixels)


def _require_one_frame(file: DicomFile | PictureFile, name: str) -> None:
    if file.num_frames != 1:
        raise ScanDecodeError(
            f"{name}: {file.num_frames} frames, expected one. Export each slice as a file of its "
            "own."
        )


def _inspected(
    file: DicomFile | PictureFile,
    index: int,
    name: str,
    window: Window,
    with_original: bool = False,
) -> Scan:
    with decoding(file.file_format, name):
        found = file.frame(index, name)
        grey = _grey(found, window)
        box = body_box(grey)
        pixels = _resized(grey, box)
        original = original_of(found, box) if with_original else None
        if isinstance(found, GreyPicture):
            return Scan(pixels, tuple(picture_reasons(found.picture, grey)), None, original)
        reasons = slice_reasons(
            grey, window, body_part=found.metadata.body_part, is_inverted=found.is_inverted
        )
        return Scan(pixels, tuple(reasons), found.metadata, original)


def _grey(found: HuSlice | GreyPicture, window: Window) -> npt.NDArray[np.uint8]:
    return found.grey if isinstance(found, GreyPicture) else grey_from_hu(found, window)
