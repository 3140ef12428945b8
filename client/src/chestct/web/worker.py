"""The decoding process: files come in by stdin, slices go out by stdout, nothing else is touched.

Run by `chestct.web.decoder` as `python -m chestct.web.worker LIMITS`. The system itself holds it to
its limits: it may not grow beyond its memory, and it cannot write a byte into any file.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from chestct.imaging.limits import limit_memory, require_size
from chestct.imaging.prepare import Scan, inspect_scans
from chestct.imaging.sources import INDEX_NAME, Source, has_scan_name

MAX_UNPACKED_BYTES = 4 * 2**30  # of a whole archive; one member at a time is in memory


@dataclass(frozen=True)
class _Sent(Source):
    """A file that never was on a disk."""

    data: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        return self.member

    def read(self) -> bytes:
        return self.data


def main(limits_text: str) -> None:
    """Answers files until stdin ends.

    Args:
        limits_text: JSON with `memory_bytes`, `max_pixels` and `max_scans`.
    """
    allowed = json.loads(limits_text)
    _confine(allowed["memory_bytes"])
    Image.MAX_IMAGE_PIXELS = None  # ours is checked first, and is the smaller one
    # Whatever prints must not break into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _warm_up()
    while head := sys.stdin.buffer.read(4):
        (length,) = struct.unpack(">I", head)
        task = allowed | json.loads(sys.stdin.buffer.read(length))
        data = sys.stdin.buffer.read(task["num_bytes"])
        num_scans = 0
        for message, blobs in _messages(task, data):
            num_scans += message["kind"] != "begin"
            if num_scans > allowed["max_scans"]:
                text = f"{task['name']}: more than {allowed['max_scans']} slices. Send fewer."
                _answer(answers, *_error_message(task["name"], ScanDecodeError(text)))
                break
            _answer(answers, message, blobs)
        del data
        _answer(answers, {"kind": "end"}, [])


def _confine(memory_bytes: int) -> None:
    import resource

    limit_memory(memory_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails instead


def _warm_up() -> None:
    """Loads what the first file would wait for."""
    import pydicom.pixels

    Image.init()
    del pydicom


def _answer(answers: BinaryIO, header: dict[str, Any], blobs: list[bytes]) -> None:
    text = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    answers.write(struct.pack(">I", len(text)) + text)
    for blob in blobs:
        answers.write(blob)
    answers.flush()


def _messages(task: dict[str, Any], data: bytes) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    for index, source in enumerate(_sources(task["name"], data, task["first"])):
        if index < task["first"]:
            continue
        yield {"kind": "begin", "name": source.member, "index": index}, []
        yield from _file_messages(task, source)


def _file_messages(
    task: dict[str, Any], source: Source
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    window = Window(*task["window"])
    try:
        start = time.perf_counter()
        for found in inspect_scans(
            source, window, max_pixels=task["max_pixels"], with_original=bool(task["side"])
        ):
            if not isinstance(found.scan, Scan):
                yield _error_message(found.name, found.scan)
            else:
                decode_ms = 1000 * (time.perf_counter() - start)
                metadata, original = found.scan.metadata, found.scan.original
                header = {
                    "kind": "scan",
                    "name": found.name,
                    "reasons": found.scan.reasons,
                    "decode_ms": decode_ms,
                    "series": _alias(metadata.series_uid if metadata else "", task["key"]),
                    "position_mm": metadata.position_mm if metadata else None,
                }
                blobs = [found.scan.pixels.tobytes()]
                if original:
                    height, width = size = original.pixels.shape[:2]
                    top, bottom, left, right = original.box
                    box = top / height, left / width, bottom / height, right / width
                    small = _reduced(original.pixels, task["side"])
                    header |= {"shape": small.shape, "dtype": small.dtype.str}
                    header |= {"size": size, "box": box, "inverted": original.is_inverted}
                    blobs.append(small.tobytes())
                yield header, blobs
            start = time.perf_counter()
    except ScanDecodeError as error:
        yield _error_message(source.name, error)
    except MemoryError:
        text = f"{source.name}: decoding it needs more memory than is allowed. Export it again."
        yield _error_message(source.name, ScanDecodeError(text))


def _error_message(name: str, error: Exception) -> tuple[dict[str, Any], list[bytes]]:
    return {
        "kind": "error", "name": name, "type": type(error).__name__, "message": str(error),
        "kind_of_file": getattr(error, "kind", ""),
    }, []  # fmt: skip


def _alias(uid: str, key: str) -> str:
    """Tells series apart without telling which they are: the UID leads to the patient."""
    return hmac.digest(key.encode(), uid.encode(), hashlib.sha256).hex()[:16] if uid else ""


def _sources(name: str, data: bytes, first: int) -> Iterator[Source]:
    """The file itself, or what of a zip archive may be a scan, in the order of the names."""
    if not data.startswith(ZIP_SIGNATURES):
        yield _Sent(Path(), name, data)
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
        yield _Broken(Path(), name, f"{name}: no readable zip archive: {error}")
        return
    for index, info in enumerate(infos):
        member = f"{name}!{info.filename}"
        if index < first:
            yield _Sent(Path(), member)
            continue
        try:
            require_size(info.file_size, member)
            if is_encrypted(info) or not has_known_method(info):
                raise ValueError("encrypted or compressed in a rare way. Pack it again without")
            content = read_member(archive, info)
        except ScanDecodeError as error:
            yield _Broken(Path(), member, str(error))
        except Exception as error:  # broken archives make zipfile raise nearly anything
            yield _Broken(Path(), member, f"{member}: cannot be unpacked: {error}")
        else:
            yield _Sent(Path(), member, content)


@dataclass(frozen=True)
class _Broken(Source):
    message: str = ""

    @property
    def name(self) -> str:
        return self.member

    def read(self) -> bytes:
        raise ScanDecodeError(" ".join(self.message.split())[:500])


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


if __name__ == "__main__":
    main(sys.argv[1])
