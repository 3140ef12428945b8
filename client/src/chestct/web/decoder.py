"""Decoding in processes of their own: a broken or hostile file costs its own answer, no more.

A worker gets one file at a time through a pipe and answers with JSON and raw pixels: nothing that
it says is ever executed here. One that dies, hangs or babbles is killed and replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from chestct import errors
from chestct.contract import SCAN_SHAPE, Window
from chestct.errors import ChestCTError, ScanDecodeError
from chestct.web.settings import WebSettings
from chestct.web.uploads import Upload

__all__ = ["Decoded", "Decoder", "Failed", "Picture"]

MAX_HEADER_BYTES = 2**20
MAX_PICTURE_SIDE = 512
START_TIMEOUT_S = 60.0  # a busy machine imports slowly
# What a worker may be told of its surroundings: no token, no credentials.
PASSED_ON = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Picture:
    """A slice for display.

    Attributes:
        pixels: int16 (H, W) in Hounsfield units, or uint8 (H, W) or (H, W, 3) of a picture; the
            longer side is at most what was asked for.
        box: What of it the network saw: top, left, bottom and right as parts of height and width.
        size: Height and width of the file's own picture.
        is_inverted: Whether low values are bright.
    """

    pixels: npt.NDArray[Any]
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    is_inverted: bool = False


@dataclass(frozen=True)
class Decoded:
    """A slice ready for the network.

    Attributes:
        name: As the user named it.
        pixels: uint8 (224, 224, 1).
        reasons: What its file tells against it.
        decode_ms: Time that the worker took.
        picture: For display; None if not asked for.
        series: Stands for the Series Instance UID of a DICOM slice within this answer's server;
            empty for pictures.
        position_mm: Place of the slice across its series, growing toward the head; None if unknown.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    reasons: tuple[str, ...]
    decode_ms: float
    picture: Picture | None = None
    series: str = ""
    position_mm: float | None = None


@dataclass(frozen=True)
class Failed:
    """A file, or a member of an archive, that is no scan, and why."""

    name: str
    error: ChestCTError


class _WorkerLostError(Exception):
    """It died, hung or broke the rules; the message says which."""


@dataclass
class Decoder:
    """A handful of worker processes, each with one file at a time.

    Attributes:
        settings: Limits.
        num_replaced: Workers that were lost so far.
    """

    settings: WebSettings
    num_replaced: int = 0
    _idle: asyncio.Queue[_Worker] = field(default_factory=asyncio.Queue)
    _all: set[_Worker] = field(default_factory=set)
    _key: str = field(default_factory=lambda: os.urandom(16).hex(), repr=False)

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """The workers, as long as the context lasts."""
        try:
            for _ in range(self.settings.workers):
                await self._hire()
            yield
        finally:
            await asyncio.gather(*(worker.kill() for worker in self._all))

    async def scans(
        self, upload: Upload, window: Window, picture_side: int = 0
    ) -> AsyncGenerator[Decoded | Failed, None]:
        """The slices of one file: one, or those of its frames, or of the members of a zip archive.

        Args:
            upload: A PNG, JPEG, DICOM or zip file, told by its content.
            window: Window for DICOM slices.
            picture_side: Longest side of the pictures for display in pixels, at most 512; 0 for no
                picture.
        """
        task = {
            "name": upload.name,
            "window": [window.center_hu, window.width_hu],
            "side": min(picture_side, MAX_PICTURE_SIDE),
            "key": self._key,
        }
        first = 0  # members before it are done
        while True:
            name = upload.name
            worker = await self._idle.get()
            is_free = False
            try:
                async with asyncio.timeout(START_TIMEOUT_S + self.settings.decode_timeout_s):
                    await worker.send({**task, "first": first}, upload.data)
                while True:
                    async with asyncio.timeout(self.settings.decode_timeout_s):
                        header, blobs = await worker.receive()
                    if header["kind"] == "end":
                        is_free = True
                        return
                    if header["kind"] == "begin":
                        name, first = str(header["name"]), int(header["index"]) + 1
                    elif header["kind"] == "error":
                        yield Failed(str(header["name"]), _decode_error(header))
                    else:
                        yield _decoded(header, blobs)
            except TimeoutError:
                limit_s = self.settings.decode_timeout_s
                yield _lost(name, f"it took longer than {limit_s:g} s to decode and was given up")
            except (_WorkerLostError, KeyError, ValueError, TypeError):
                limit = self.settings.worker_memory_bytes
                yield _lost(
                    name,
                    "its decoder broke down. It may be damaged, or need more than "
                    f"{limit / 2**30:.2g} GiB of memory",
                )
            finally:
                if is_free:
                    self._idle.put_nowait(worker)
                else:
                    await self._replace(worker)
            if first == 0:  # not even its first slice was begun
                return

    async def _hire(self) -> None:
        worker = await _Worker.start(self.settings)
        self._all.add(worker)
        self._idle.put_nowait(worker)

    async def _replace(self, worker: _Worker) -> None:
        self.num_replaced += 1
        self._all.discard(worker)
        await asyncio.shield(asyncio.gather(worker.kill(), self._hire()))


def _lost(name: str, why: str) -> Failed:
    return Failed(name, ScanDecodeError(f"{name}: {why}. Export the slice again."))


def _decode_error(header: dict[str, Any]) -> ScanDecodeError:
    kind = getattr(errors, str(header["type"]), ScanDecodeError)
    is_known = isinstance(kind, type) and issubclass(kind, ScanDecodeError)
    error: ScanDecodeError = (kind if is_known else ScanDecodeError)(str(header["message"]))
    if isinstance(error, errors.OutOfDomainError):
        error.kind = str(header["kind_of_file"])
    return error


def _decoded(header: dict[str, Any], blobs: list[bytes]) -> Decoded:
    pixels = np.frombuffer(blobs[0], np.uint8).reshape(SCAN_SHAPE)
    picture = None
    if len(blobs) > 1:
        shape, dtype = tuple(map(int, header["shape"])), header["dtype"]
        if dtype not in ("<i2", "|u1") or max(shape) > MAX_PICTURE_SIDE:
            raise ValueError(f"picture {dtype} {shape}")
        top, left, bottom, right = map(float, header["box"])
        height, width = map(int, header["size"])
        picture = Picture(
            np.frombuffer(blobs[1], dtype).reshape(shape),
            (top, left, bottom, right),
            (height, width),
            bool(header["inverted"]),
        )
    position = header.get("position_mm")
    return Decoded(
        str(header["name"]),
        pixels,
        tuple(map(str, header["reasons"])),
        float(header["decode_ms"]),
        picture,
        str(header.get("series", "")),
        None if position is None else float(position),
    )


class _Worker:
    """One `chestct.web.worker` and its two pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, settings: WebSettings) -> _Worker:
        limits = {"memory_bytes": settings.worker_memory_bytes, "max_pixels": settings.max_pixels}
        limits |= {"max_scans": settings.max_scans}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "chestct.web.worker", json.dumps(limits),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # what a decoder writes may quote the file
            cwd="/",
            env={
                **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
                "OPENBLAS_NUM_THREADS": "1",
            },
            start_new_session=True,  # Ctrl-C ends the page, which ends its workers
            limit=2**18,
        )  # fmt: skip
        return cls(process)

    async def send(self, task: dict[str, Any], data: bytes) -> None:
        header = json.dumps({**task, "num_bytes": len(data)}).encode()
        stdin = self._process.stdin
        if stdin is None:
            raise _WorkerLostError("no pipe")
        try:
            stdin.write(struct.pack(">I", len(header)) + header)
            stdin.write(data)
            await stdin.drain()
        except OSError as error:
            raise _WorkerLostError(str(error)) from error

    async def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        """The next message: a header and the bytes that it announces."""
        stdout = self._process.stdout
        if stdout is None:
            raise _WorkerLostError("no pipe")
        try:
            (length,) = struct.unpack(">I", await stdout.readexactly(4))
            if length > MAX_HEADER_BYTES:
                raise _WorkerLostError(f"a header of {length} bytes")
            header = json.loads(await stdout.readexactly(length))
            sizes = [int(size) for size in header.get("blobs", ())]
            if len(sizes) > 2 or any(not 0 < size <= 3 * MAX_PICTURE_SIDE**2 for size in sizes):
                raise _WorkerLostError(f"blobs of {sizes} bytes")
            return header, [await stdout.readexactly(size) for size in sizes]
        except (asyncio.IncompleteReadError, OSError) as error:
            raise _WorkerLostError(str(error)) from error

    async def kill(self) -> None:
        """Ends it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()
