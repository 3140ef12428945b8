"""The isolated decoding process: files come by stdin, slices go by stdout as JSON and raw pixels.

`chestct.batch.decode_pool` starts it. The system itself enforces the limits: the process cannot
grow beyond its memory or write into any file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.contract import Window
from chestct.errors import ScanDecodeError
from chestct.imaging import limits
from chestct.imaging._warnings import without_warnings
from chestct.imaging.body import body_box
from chestct.imaging.dicom import (
    hu_from_stored,
    is_dicom,
    is_padding,
    read_dicom,
    slice_attributes,
    stored_values,
    upright,
)
from chestct.imaging.scan import apply_window, inspect_scans, load_grey, resize_scan
from chestct.imaging.sources import Source

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["OUT_OF_MEMORY", "Message", "main", "messages"]

OUT_OF_MEMORY = 77  # exit code; what is left of the memory is in pieces, so the process ends
ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")  # PKWARE APPNOTE, sections 4.3.7 and 4.3.16
READABLE_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others may ask for gigabytes
ENCRYPTED = 0x1  # general purpose bit 0: APPNOTE, section 4.4.4
MAX_UNPACKED_BYTES = 4 * 2**30  # of a whole archive; one member at a time is in memory
INT16 = np.iinfo(np.int16)

Message = tuple[dict[str, Any], list[Any]]  # and what it announces, as bytes


@dataclass(frozen=True)
class _SentSource(Source):
    """A file, or a member of an archive, that never was on a disk, or why it cannot be had."""

    data: bytes | ScanDecodeError = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        return self.member

    def read(self) -> bytes:
        if isinstance(self.data, ScanDecodeError):
            raise self.data
        return self.data


def main(limits_text: str) -> None:
    """Decodes one file after the other until stdin ends.

    Args:
        limits_text: JSON with `memory_bytes` and `max_pixels`; 0 bytes for no limit.
    """
    allowed = json.loads(limits_text)
    _confine(allowed["memory_bytes"])
    limits.MAX_PIXELS = allowed["max_pixels"]
    Image.MAX_IMAGE_PIXELS = None  # ours is checked first, and is the smaller one
    # Decoders that print must not print among the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=2**17)  # the answers to a file of one slice
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _warm_up()
    _write(answers, {"kind": "ready"})
    answers.flush()
    tasks = sys.stdin.buffer
    try:
        while head := tasks.read(4):
            task = json.loads(tasks.read(*struct.unpack(">I", head)))
            for message in messages(task, tasks.read(task["num_bytes"])):
                _write(answers, *message)
                if "name" in task:  # somebody waits for each slice
                    answers.flush()
            _write(answers, {"kind": "end"})
            answers.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def messages(task: dict[str, Any], data: bytes = b"") -> Iterator[Message]:
    """The slices of a file, one message `scan` or `error` for each.

    Args:
        task: Names a file by `path` and `member`, or by `name` if it was sent. With `grey` it asks
            for that frame alone, with its windowed picture in full size. Slices of a file that was
            sent have a picture for display if `side` is not 0, and the members of a zip archive
            come from number `first` on, a message `begin` before each.
        data: The file, if it was sent.
    """
    window = Window(*task["window"])
    if "path" in task:
        source = Source(Path(task["path"]), task["member"])
        is_grey = "grey" in task
        found = _grey(source, window, task["grey"]) if is_grey else _slices(source, window)
        yield from _guarded(source, found)
        return
    for index, source in enumerate(_sources(task["name"], data, task["first"])):
        if index >= task["first"]:
            yield {"kind": "begin", "name": source.name, "next": index + 1}, []
            yield from _guarded(source, _slices(source, window, task["side"]))


def _write(file: BinaryIO, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    sizes = [len(blob) for blob in blobs]
    text = json.dumps({**header, "blobs": sizes}).encode()
    file.write(struct.pack(">II", len(text), sum(sizes)) + text)
    file.writelines(blobs)


def _confine(memory_bytes: int) -> None:
    """Set the limits that this system has: Windows has none of them."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails instead
        if memory_bytes:
            with contextlib.suppress(ValueError, OSError):  # macOS, or a lower limit is set
                limits.limit_memory(memory_bytes)


def _warm_up() -> None:
    """Loads what the first file would wait for."""
    import pydicom.pixels

    Image.preinit()
    del pydicom


def _guarded(source: Source, messages: Iterator[Message]) -> Iterator[Message]:
    """The same messages, with an error as the last one where a file makes the decoder raise."""
    try:
        yield from messages
    except MemoryError:
        raise
    except Exception as error:
        if not isinstance(error, ScanDecodeError):
            text = f"cannot be decoded ({type(error).__name__}). Export the slice again."
            error = ScanDecodeError(f"{source.name}: {text}")
        yield _error_message(source.name, error)


def _slices(source: Source, window: Window, side: int = 0) -> Iterator[Message]:
    if side:  # it is read once, for the network and for display
        source = _SentSource(Path(), source.name, source.read())
    opened: Image.Image | Dataset | None = None
    start = time.perf_counter()
    for found in inspect_scans(source, window):
        decode_ms = 1000 * (time.perf_counter() - start)
        if isinstance(found.scan, ScanDecodeError):
            yield _error_message(found.name, found.scan, decode_ms)
        else:
            facts = found.scan.facts
            header = {"kind": "scan", "name": found.name, "decode_ms": decode_ms}
            header |= {"reasons": found.scan.reasons, "facts": facts and asdict(facts)}
            blobs = [found.scan.pixels.tobytes()]
            if side:
                opened = opened or _opened(source.read(), source.name)
                frame = max(facts.frame - 1, 0) if facts else 0
                shown, box, is_inverted = _original(opened, found.name, frame, window)
                small = _reduced(shown, side)
                header |= _picture_header(small, shown.shape[:2], box, is_inverted)
                blobs.append(small.tobytes())
            yield header, blobs
        start = time.perf_counter()


def _grey(source: Source, window: Window, frame: int) -> Iterator[Message]:
    grey = load_grey(source, window, frame=frame)
    header = {"kind": "scan", "name": source.name, "decode_ms": 0.0, "reasons": (), "facts": None}
    header |= _picture_header(grey, grey.shape, _box(grey))
    yield header, [resize_scan(grey).tobytes(), grey.tobytes()]


def _picture_header(
    picture: npt.NDArray[Any], size: Sequence[int], box: Sequence[float], is_inverted: bool = False
) -> dict[str, Any]:
    header = {"shape": picture.shape, "dtype": picture.dtype.str, "size": size, "box": box}
    return header | {"inverted": is_inverted}


def _error_message(name: str, error: ScanDecodeError, decode_ms: float = 0.0) -> Message:
    header = {"kind": "error", "name": name, "decode_ms": decode_ms, "message": str(error)}
    return header | {"kind_of_scan": getattr(error, "kind", None)}, []


def _sources(name: str, data: bytes, first: int) -> Iterator[Source]:
    """The file itself, or what of a zip archive may be a scan, in the order of the names."""
    if not data.startswith(ZIP_SIGNATURES):
        yield _SentSource(Path(), name, data)
        return
    try:
        archive = zipfile.ZipFile(BytesIO(data))
        infos = sorted(
            (info for info in archive.infolist() if _may_be_scan(info)),
            key=lambda info: info.filename,
        )
        if sum(info.file_size for info in infos) > MAX_UNPACKED_BYTES:
            raise ValueError(f"it would unpack to more than {MAX_UNPACKED_BYTES // 2**30} GiB")
        if not infos:
            raise ValueError("it holds no PNG, JPEG or DICOM file")
    except Exception as error:  # broken archives make zipfile raise nearly anything
        yield _broken(name, f"{name}: no readable zip archive: {error}")
        return
    for index, info in enumerate(infos):
        member = f"{name}!{info.filename}"
        if index < first:
            yield _SentSource(Path(), member)
            continue
        try:
            limits.require_size(info.file_size, member)
            if info.flag_bits & ENCRYPTED or info.compress_type not in READABLE_METHODS:
                raise ValueError("encrypted or compressed in a rare way. Pack it again without")
            with archive.open(info) as file:
                yield _SentSource(Path(), member, file.read(info.file_size + 1))
        except ScanDecodeError as error:
            yield _broken(member, str(error))
        except MemoryError:
            raise
        except Exception as error:  # broken archives make zipfile raise nearly anything
            yield _broken(member, f"{member}: cannot be unpacked: {error}")


def _broken(name: str, message: str) -> Source:
    return _SentSource(Path(), name, ScanDecodeError(" ".join(message.split())[:500]))


def _may_be_scan(info: zipfile.ZipInfo) -> bool:
    place = PurePosixPath(info.filename)
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in place.parts)
    known = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", "")
    is_scan = place.suffix.lower() in known or place.suffix[1:].isdigit()
    return is_scan and not (info.is_dir() or is_hidden or place.name == "DICOMDIR")


def _opened(data: bytes, name: str) -> Image.Image | Dataset:
    with without_warnings:
        if is_dicom(data):
            return read_dicom(data, name)
        return Image.open(BytesIO(data), formats=("PNG", "JPEG"))


def _original(
    opened: Image.Image | Dataset, name: str, frame: int, window: Window
) -> tuple[npt.NDArray[Any], tuple[float, ...], bool]:
    """The slice for display, the box that the network saw, and whether low values are bright.

    Returns:
        int16 (H, W) in Hounsfield units, or uint8 (H, W), or (H, W, 3) of a coloured picture; top,
        left, bottom and right as parts of height and width; and whether it is MONOCHROME1.
    """
    with without_warnings:
        if isinstance(opened, Image.Image):
            return *_picture_original(opened), False
        attributes = slice_attributes(opened, frame)
        stored = stored_values(opened, frame, name)
        hu = hu_from_stored(stored, attributes, name)
        grey = apply_window(hu, window)
        is_inverted = attributes.PhotometricInterpretation == "MONOCHROME1"
        if is_inverted:
            grey = 255 - grey
        padding = is_padding(stored, attributes)
        if padding is not None:
            grey[padding] = 0
        shown: Any = np.clip(np.rint(hu), INT16.min, INT16.max).astype(np.int16)
        return upright(shown, attributes), _box(upright(grey, attributes)), is_inverted


def _picture_original(picture: Image.Image) -> tuple[npt.NDArray[Any], tuple[float, ...]]:
    if picture.mode.startswith("I"):
        grey = ((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return grey, _box(grey)
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    grey = np.asarray(picture.convert("L"))
    if picture.mode in ("1", "L", "LA"):
        return grey, _box(grey)
    coloured = np.asarray(picture.convert("RGB"))
    is_grey = not np.ptp(coloured, axis=2).any()
    return (grey if is_grey else coloured), _box(grey)


def _box(grey: npt.NDArray[np.uint8]) -> tuple[float, float, float, float]:
    height, width = grey.shape
    top, bottom, left, right = body_box(grey)
    return top / height, left / width, bottom / height, right / width


def _reduced(shown: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """The same with its longer side at most `side` pixels, averaged."""
    height, width = shown.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return np.ascontiguousarray(shown)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if shown.dtype == np.int16:
        picture = Image.fromarray(shown.astype(np.float32))
        small = np.asarray(picture.resize(size, Image.Resampling.BOX))
        whole: npt.NDArray[np.int16] = np.rint(small).astype(np.int16)
        return whole
    return np.asarray(Image.fromarray(shown).resize(size, Image.Resampling.BOX))
