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
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.contract import Window
from chestct.errors import ScanDecodeError
from chestct.imaging.archives import (
    ZIP_SIGNATURES,
    has_known_method,
    is_encrypted,
    is_hidden,
    read_member,
)
from chestct.imaging.body import body_box
from chestct.imaging.limits import MAX_PIXELS, limit_memory, require_size
from chestct.imaging.prepare import inspect_scans, load_grey, resize_scan
from chestct.imaging.sources import INDEX_NAME, Source, has_scan_name

__all__ = ["OUT_OF_MEMORY", "Message", "main", "messages"]

OUT_OF_MEMORY = 77  # exit code; what is left of the memory is in pieces, so the process ends
MAX_UNPACKED_BYTES = 4 * 2**30  # of a whole archive; one member at a time is in memory

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
            data = tasks.read(task["num_bytes"])
            for message in messages(task, data, max_pixels=allowed["max_pixels"]):
                _write(answers, *message)
                if "name" in task:  # somebody waits for each slice
                    answers.flush()
            _write(answers, {"kind": "end"})
            answers.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def messages(
    task: dict[str, Any], data: bytes = b"", *, max_pixels: int = MAX_PIXELS
) -> Iterator[Message]:
    """The slices of a file, one message `scan` or `error` for each.

    Args:
        task: Names a file by `path` and `member`, or by `name` if it was sent. With `grey` it asks
            for that frame alone, with its windowed picture in full size. Slices of a file that was
            sent have a picture for display if `side` is not 0, and the members of a zip archive
            come from number `first` on, a message `begin` before each.
        data: The file, if it was sent.
        max_pixels: Of one picture.
    """
    window = Window(*task["window"])
    if "path" in task:
        source = Source(Path(task["path"]), task["member"])
        if "grey" in task:
            yield from _guarded(source, _grey(source, window, task["grey"]))
        else:
            yield from _guarded(source, _slices(source, window, max_pixels))
        return
    for index, source in enumerate(_sources(task["name"], data, task["first"])):
        if index >= task["first"]:
            yield {"kind": "begin", "name": source.name, "next": index + 1}, []
            yield from _guarded(source, _slices(source, window, max_pixels, task["side"]))


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
                limit_memory(memory_bytes)


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


def _slices(source: Source, window: Window, max_pixels: int, side: int = 0) -> Iterator[Message]:
    start = time.perf_counter()
    for found in inspect_scans(source, window, max_pixels=max_pixels, with_original=side > 0):
        decode_ms = 1000 * (time.perf_counter() - start)
        if isinstance(found.scan, ScanDecodeError):
            yield _error_message(found.name, found.scan, decode_ms)
        else:
            metadata, original = found.scan.metadata, found.scan.original
            header = {"kind": "scan", "name": found.name, "decode_ms": decode_ms}
            header |= {"reasons": found.scan.reasons, "metadata": metadata and asdict(metadata)}
            blobs = [found.scan.pixels.tobytes()]
            if original:
                small = _reduced(original.pixels, side)
                size = original.pixels.shape[:2]
                header |= _picture_header(small, size, original.box, original.is_inverted)
                blobs.append(small.tobytes())
            yield header, blobs
        start = time.perf_counter()


def _grey(source: Source, window: Window, frame: int) -> Iterator[Message]:
    grey = load_grey(source, window, frame=frame)
    header = {"kind": "scan", "name": source.name, "decode_ms": 0.0, "reasons": ()}
    header |= {"metadata": None} | _picture_header(grey, grey.shape, body_box(grey))
    yield header, [resize_scan(grey).tobytes(), grey.tobytes()]


def _picture_header(
    picture: npt.NDArray[Any],
    size: Sequence[int],
    box: tuple[int, int, int, int],
    is_inverted: bool = False,
) -> dict[str, Any]:
    (height, width), (top, bottom, left, right) = size, box
    return {
        "shape": picture.shape,
        "dtype": picture.dtype.str,
        "size": size,
        "box": (top / height, left / width, bottom / height, right / width),
        "inverted": is_inverted,
    }


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
            require_size(info.file_size, member)
            if is_encrypted(info) or not has_known_method(info):
                raise ValueError("encrypted or compressed in a rare way. Pack it again without")
            yield _SentSource(Path(), member, read_member(archive, info))
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
    is_left_out = info.is_dir() or is_hidden(info.filename) or place.name == INDEX_NAME
    return has_scan_name(info.filename) and not is_left_out


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
