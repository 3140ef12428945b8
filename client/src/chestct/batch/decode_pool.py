"""A pool of isolated decoding processes: a broken or hostile file costs its own answer, no more.

A process (`chestct.batch.decode_worker`) gets one file at a time through a pipe and answers with
JSON and raw pixels: nothing that it says is ever executed here, and its environment holds no
credentials. One that dies, hangs or breaks the protocol is killed; a later file starts another.

The protocol, the pool for threads and the pool for an event loop stay in one file: they share each
invariant of the framing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import struct
import sys
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from types import NoneType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from chestct.batch.decode_worker import OUT_OF_MEMORY, Message, messages
from chestct.contract import SCAN_SHAPE, Window
from chestct.errors import DecoderCrashedError, OutOfDomainError, ScanDecodeError
from chestct.imaging.limits import DECODE_MEMORY_BYTES, MAX_FRAMES, MAX_PIXELS
from chestct.imaging.metadata import SliceMetadata
from chestct.imaging.prepare import Scan, Slice
from chestct.imaging.sources import Source

__all__ = [
    "DECODE_LIMIT_S",
    "NUM_IN_THREADS",
    "TIMEOUT",
    "DecodePool",
    "DecodedSlice",
    "DecoderLostError",
    "Picture",
]

DECODE_LIMIT_S = 60.0
NUM_IN_THREADS = 64  # files; fewer are not worth the start of processes
MAX_BYTES_IN_THREADS = 2**20  # a slice of 512 x 512 has half of it
MAX_WORKERS = 32
MAX_MESSAGE_BYTES = 2 * MAX_PIXELS
MAX_HEADER_BYTES = 2**20
START_LIMIT_S = 120.0  # of an interpreter with numpy, on a machine that is busy
START_PAUSES_S = (0.1, 0.5, 2.0)  # before each further try to start a process
END_LIMIT_S = 10.0
SWOLLEN, NO_RESULT = "needs more memory than it may take", "sent no result"
# The environment of a process: no token, no credentials.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
PROGRAM = "import sys; from chestct.batch.decode_worker import main; main(sys.argv[1])"
# How a process is lost and what the user of `submit` can do.
TIMEOUT, MEMORY, CRASH = ", or allow it more time", ", or allow it more", ""

Header = dict[str, Any]


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
    is_inverted: bool


@dataclass(frozen=True)
class DecodedSlice(Slice):
    """One slice of a file as a decoder found it.

    Attributes:
        decode_ms: Time that it took.
        picture: For display; None if not asked for.
    """

    decode_ms: float = 0.0
    picture: Picture | None = None


class DecoderLostError(Exception):
    """A decoding process died, hung or broke the protocol; the message says how.

    Attributes:
        kind: `TIMEOUT`, `MEMORY` or `CRASH`.
        name: Name of the member of an archive, if it was sent and one was begun.
        next_member: Number of the member after it; 0 if none was begun.
    """

    def __init__(self, kind: str, how: str) -> None:
        super().__init__(how)
        self.kind, self.name, self.next_member = kind, "", 0


class DecodePool:
    """Decoding processes for threads (after `start`), or for one event loop (by `answers`).

    For threads the first small files are decoded in this process: another one costs about half a
    second to start, which few files are worth. What crashes a decoder there ends this process.

    Attributes:
        num_workers: How many files are decoded at once.
        limit_s: How long one file may take in a process.
        memory_bytes: Address space of a process.
        num_lost: Processes that were lost so far.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        limit_s: float = DECODE_LIMIT_S,
        num_in_threads: int = NUM_IN_THREADS,
        memory_bytes: int = DECODE_MEMORY_BYTES,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Starts nothing yet.

        Args:
            num_workers: How many files are decoded at once; by default one for each processor.
            limit_s: How long one file may take in a process.
            num_in_threads: How many files, from the first, are decoded in this process; files
                above `MAX_BYTES_IN_THREADS` are not.
            memory_bytes: Address space of a process, where the system can limit it; 0 for no limit.
            max_pixels: Of one picture.

        Raises:
            ValueError: `num_workers` below 1, or no time.
        """
        if num_workers is None:
            own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
            num_workers = min(len(own) or os.cpu_count() or 1, MAX_WORKERS)
        if num_workers < 1 or not limit_s > 0:
            raise ValueError(f"{num_workers} workers, {limit_s} s a call: expected more than 0")
        self.num_workers, self.limit_s, self.memory_bytes = num_workers, limit_s, memory_bytes
        self.num_lost = 0
        self._num_in_threads, self._max_pixels = num_in_threads, max_pixels
        self._limits = json.dumps({"memory_bytes": memory_bytes, "max_pixels": max_pixels})
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._slots = asyncio.Semaphore(num_workers)
        self._starting = asyncio.Lock()
        self._closing = asyncio.Event()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._thread = threading.Thread(target=self._serve, name="decode-pool", daemon=True)

    def start(self) -> Self:
        """Start the thread that talks to the processes."""
        self._loop = self._runner.get_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(self.num_workers, "decode"))
        self._thread.start()
        return self

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, source: Source, window: Window) -> Future[list[DecodedSlice]]:
        """Decode a file soon; a lost process is the error of its only slice.

        Args:
            source: The file.
            window: Window for DICOM slices.
        """
        in_thread = self._num_in_threads > 0 and source.num_bytes() <= MAX_BYTES_IN_THREADS
        self._num_in_threads -= in_thread
        work = self._decoded(_task(source, window), source.name, in_thread)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def load_grey(self, source: Source, window: Window, *, frame: int = 0) -> npt.NDArray[np.uint8]:
        """One slice in its own size, see `chestct.imaging.prepare.load_grey`; always by a process.

        Raises:
            ScanDecodeError: The slice cannot be decoded, or its process was lost.
        """
        work = self._decoded({**_task(source, window), "grey": frame}, source.name, False)
        found = asyncio.run_coroutine_threadsafe(work, self._loop).result()[0]
        if isinstance(found.scan, ScanDecodeError):
            raise found.scan
        if found.picture is None:
            raise DecoderCrashedError(f"{source.name}: decoding {NO_RESULT}.")
        return found.picture.pixels

    def close(self) -> None:
        """End all processes; calls that have not ended are given up."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
        # Without its limit this would wait for ever for a thread that waits for a lock which Ctrl-C
        # left taken.
        self._thread.join(END_LIMIT_S)
        for worker in tuple(self._workers):
            worker.kill()

    async def fill(self) -> None:
        """Start the processes that are missing.

        Raises:
            OSError: The system cannot start one.
        """
        async with self._starting:
            while len(self._workers) < self.num_workers:
                self._idle.append(await self._started())

    async def answers(
        self, task: Header, data: bytes = b"", *, limits_each: bool = False
    ) -> AsyncGenerator[DecodedSlice, None]:
        """The slices of a file, each as soon as it is decoded.

        Args:
            task: See `chestct.batch.decode_worker.messages`.
            data: The file, if it is sent.
            limits_each: Whether the limit of time holds for each slice, instead of the file.

        Raises:
            DecoderLostError: The process was lost.
        """
        lost = DecoderLostError(CRASH, NO_RESULT)
        most_bytes = MAX_MESSAGE_BYTES
        if "side" in task:  # a scan, and a picture of 16 bits or three colours
            most_bytes = math.prod(SCAN_SHAPE) + 3 * int(task["side"]) ** 2
        async with self._slots:
            worker = await self._taken()
            is_free = has_slices = False
            try:
                lost.kind, lost.args = TIMEOUT, (f"did not start within {START_LIMIT_S:g} s",)
                async with asyncio.timeout(START_LIMIT_S):
                    await worker.send({**task, "num_bytes": len(data)}, data)
                lost.kind, lost.args = TIMEOUT, (f"was not done within {self.limit_s:g} s",)
                deadline_s = self._deadline_s()
                while True:
                    async with asyncio.timeout_at(deadline_s):
                        header, blobs = await worker.receive(most_bytes)
                    if header["kind"] == "end":
                        is_free = has_slices or bool(task.get("first"))
                        if is_free:
                            return
                        raise ValueError("no slices")
                    if header["kind"] == "begin":
                        lost.name, lost.next_member = str(header["name"]), int(header["next"])
                        continue
                    yield _slice(header, blobs)
                    has_slices = True
                    if limits_each:
                        deadline_s = self._deadline_s()
            except TimeoutError as error:
                raise lost from error
            except (EOFError, OSError) as error:
                lost.kind, lost.args = await worker.end()
                raise lost from error
            except (LookupError, ValueError, TypeError, RecursionError) as error:
                lost.kind, lost.args = CRASH, (NO_RESULT,)
                raise lost from error
            finally:
                if is_free:
                    self._idle.append(worker)
                else:
                    await asyncio.shield(self._discard(worker))

    async def end(self) -> None:
        """End all processes, for the event loop that started them."""
        await asyncio.gather(*map(self._discard, tuple(self._workers)))

    def _deadline_s(self) -> float:
        return asyncio.get_running_loop().time() + self.limit_s

    async def _taken(self) -> _Worker:
        for pause_s in (*START_PAUSES_S, 0.0):
            try:
                async with self._starting:
                    while self._idle:
                        worker = self._idle.pop()
                        if worker.is_alive():
                            return worker
                        await self._discard(worker)
                    return await self._started()
            except OSError as error:
                how = f"could not be started: {error.strerror}"
                await asyncio.sleep(pause_s)
        raise DecoderLostError(CRASH, how)

    async def _started(self) -> _Worker:
        worker = await _Worker.start(self._limits)
        self._workers.add(worker)
        return worker

    async def _discard(self, worker: _Worker) -> None:
        self.num_lost += 1
        self._workers.discard(worker)
        await worker.close()

    def _serve(self) -> None:
        with self._runner:
            self._runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        await self._closing.wait()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.end()

    async def _decoded(self, task: Header, name: str, in_thread: bool) -> list[DecodedSlice]:
        try:
            if in_thread:
                return await self._loop.run_in_executor(None, _decoded_here, task, self._max_pixels)
            found: list[DecodedSlice] = []
            async with contextlib.aclosing(self.answers(task)) as answers:
                async for each in answers:
                    found.append(each)
                    if len(found) > MAX_FRAMES:
                        raise DecoderLostError(CRASH, "sent more slices than a file may have")
            return found
        except DecoderLostError as lost:
            text = f"{name}: decoding {lost}. Export the slice again{lost.kind}."
            return [DecodedSlice(name, DecoderCrashedError(text))]


class _Worker:
    """One `chestct.batch.decode_worker` and its two pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("unreachable: both are pipes")
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._is_ready = False

    @classmethod
    async def start(cls, limits: str) -> _Worker:
        passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", PROGRAM, limits,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # what a decoder writes may quote the file
            env=passed_on | {
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                "OPENBLAS_NUM_THREADS": "1",  # each would take address space of its own
            },
            start_new_session=True,  # Ctrl-C ends the caller, which ends its workers
            limit=2**18,
        )  # fmt: skip
        return cls(process)

    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def send(self, task: Header, data: bytes) -> None:
        if not self._is_ready:
            await self.receive()
            self._is_ready = True
        header = json.dumps(task).encode()
        self._stdin.write(struct.pack(">I", len(header)) + header)
        self._stdin.write(data)
        await self._stdin.drain()

    async def receive(self, most_bytes: int = 0) -> Message:
        """The next message: a header, and the bytes that it announces, at most `most_bytes`."""
        lengths = struct.unpack(">II", await self._stdout.readexactly(8))
        if lengths[0] > MAX_HEADER_BYTES or lengths[1] > most_bytes:
            raise ValueError(f"a message of {lengths} bytes")
        content = memoryview(await self._stdout.readexactly(sum(lengths)))
        header = json.loads(bytes(content[: lengths[0]]))
        ends = list(accumulate(map(int, header["blobs"]), initial=lengths[0]))
        if ends != sorted(ends) or ends[-1] != len(content):
            raise ValueError(f"blobs of {header['blobs']} bytes")
        return header, [content[start:end] for start, end in pairwise(ends)]

    async def end(self) -> tuple[str, tuple[str]]:
        """How a process ended that closed its pipes: kind and message of a `DecoderLostError`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_LIMIT_S):
                code = await self._process.wait()
            if code == OUT_OF_MEMORY:
                return MEMORY, (SWOLLEN,)
            with contextlib.suppress(ValueError):
                return CRASH, (f"ended by {signal.Signals(-code).name}",)
            return CRASH, (f"ended with exit code {code}",)
        return CRASH, (NO_RESULT,)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        self.kill()
        self._stdin.close()
        await self._stdout.read()  # `wait` would wait for ever for a pipe that nobody reads
        await self._process.wait()


def _task(source: Source, window: Window) -> Header:
    bounds = [window.center_hu, window.width_hu]
    return {"path": str(source.path), "member": source.member, "window": bounds}


def _decoded_here(task: Header, max_pixels: int) -> list[DecodedSlice]:
    try:
        return [_slice(*message) for message in messages(task, max_pixels=max_pixels)]
    except MemoryError as error:
        raise DecoderLostError(MEMORY, SWOLLEN) from error


def _slice(header: Header, blobs: list[Any]) -> DecodedSlice:
    """The slice of a message; wrong messages raise LookupError, ValueError or TypeError."""
    name, decode_ms = str(header["name"]), float(header["decode_ms"])
    if header["kind"] == "error":
        message, kind = str(header["message"]), header["kind_of_scan"]
        error = ScanDecodeError(message) if kind is None else OutOfDomainError(message, str(kind))
        return DecodedSlice(name, error, decode_ms)
    pixels = np.frombuffer(blobs[0], np.uint8).reshape(SCAN_SHAPE)
    metadata = None if header["metadata"] is None else SliceMetadata(**header["metadata"])
    for each in fields(metadata) if metadata else ():
        kinds = (int, float, NoneType) if each.default is None else type(each.default)
        if not isinstance(getattr(metadata, each.name), kinds):
            raise TypeError(each.name)
    scan = Scan(pixels, tuple(map(str, header["reasons"])), metadata)
    picture = _picture(header, blobs[1]) if len(blobs) > 1 else None
    return DecodedSlice(name, scan, decode_ms, picture)


def _picture(header: Header, data: Any) -> Picture:
    if header["dtype"] not in ("<i2", "|u1"):
        raise ValueError(header["dtype"])
    pixels = np.frombuffer(data, header["dtype"]).reshape(tuple(map(int, header["shape"])))
    top, left, bottom, right = map(float, header["box"])
    height, width = map(int, header["size"])
    return Picture(pixels, (top, left, bottom, right), (height, width), bool(header["inverted"]))
