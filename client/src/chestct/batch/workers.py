"""A pool that outlives what it runs: functions that may crash, hang or fill the memory.

Each thread of the pool keeps one process and hands it one call at a time, so it is known which
call a process died of. The processes are plain interpreters that talk over their standard streams:
they import what they need, never the caller's main module, and end when the caller does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from chestct.imaging.limits import limit_memory

__all__ = ["CallTimeoutError", "WorkerCrashedError", "Workers", "serve"]

START_LIMIT_S = 120.0  # of an interpreter with numpy, on a machine that is busy
WATCH_PERIOD_S = 0.1
CLOSE_LIMIT_S = 10.0
_PROGRAM = "import sys; from chestct.batch.workers import serve; serve(int(sys.argv[1]))"


class WorkerCrashedError(Exception):
    """The process of a call died; the message says how."""


class CallTimeoutError(Exception):
    """A call did not end in its time, and its process was killed."""


class Workers:
    """Calls in processes, the first ones in threads of this process.

    A process costs about half a second to start, which few calls are worth; a crash in one of the
    first calls is a crash of this process.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        limit_s: float,
        num_in_threads: int = 0,
        memory_bytes: int = 0,
    ) -> None:
        """Starts nothing yet.

        Args:
            num_workers: How many calls run at once, each in a process of its own.
            limit_s: How long a call in a process may take.
            num_in_threads: How many calls, from the first, run in threads.
            memory_bytes: Address space of a process, where the system can limit it; 0 for no limit.

        Raises:
            ValueError: No workers, or no time.
        """
        if num_workers < 1 or not limit_s > 0:
            raise ValueError(f"{num_workers} workers, {limit_s} s a call: expected more than 0")
        self.num_workers = num_workers
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._num_in_threads = num_in_threads
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="worker")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._processes: set[_Process] = set()
        self._is_closed = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_threads(self) -> bool:
        """Whether the next call may run in a thread of this process."""
        return self._num_in_threads > 0

    def submit(
        self, function: Callable[..., Any], *arguments: Any, is_heavy: bool = False
    ) -> Future[Any]:
        """Calls a function soon; for a process, function, arguments and result are pickled.

        The future raises what the function raises, `WorkerCrashedError` or `CallTimeoutError`.
        A `MemoryError` ends the process of the call: what is left of its memory is in pieces.

        Args:
            function: What is called, by its name in a module.
            arguments: Of the call.
            is_heavy: Whether it needs a process in any case, for the bounds on time and memory.
        """
        if self.has_threads and not is_heavy:
            self._num_in_threads -= 1
            return self._threads.submit(function, *arguments)
        return self._threads.submit(self._call, function, arguments)

    def close(self) -> None:
        """Ends all processes; calls that have not ended are given up."""
        self._is_closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for process in self._processes:
                process.kill()
        # Without its limit this would wait for ever for a thread that waits for a lock which Ctrl-C
        # left taken.
        end = threading.Thread(target=self._threads.shutdown, daemon=True)
        end.start()
        end.join(CLOSE_LIMIT_S)
        if self._watch is not None:
            self._watch.join()
        for process in self._processes:
            process.close()

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        process: _Process | None = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = self._new_process()
        try:
            return process.call(function, arguments, self._limit_s)
        except (WorkerCrashedError, CallTimeoutError, MemoryError):
            self._own.process = None
            with self._lock:
                self._processes.discard(process)
            process.close()
            raise

    def _new_process(self) -> _Process:
        with self._lock:
            if self._is_closed.is_set():
                raise WorkerCrashedError("the pool was closed")
            process = _Process(self._memory_bytes)
            self._processes.add(process)
            if self._watch is None:
                self._watch = threading.Thread(target=self._kill_late, daemon=True)
                self._watch.start()
        return process

    def _kill_late(self) -> None:
        while not self._is_closed.wait(WATCH_PERIOD_S):
            with self._lock:
                late = [process for process in self._processes if process.is_late()]
            for process in late:
                process.kill()


class _Process:
    """One interpreter and the call that it runs."""

    def __init__(self, memory_bytes: int) -> None:
        paths = [path or os.getcwd() for path in sys.path]
        self._process = subprocess.Popen(
            (sys.executable, "-P", "-c", _PROGRAM, str(memory_bytes)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders write there what they find in a file
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OPENBLAS_NUM_THREADS": "1",  # each would take address space of its own
            },
        )
        self._deadline_s: float | None = None
        self._was_late = False
        self._is_ready = False

    def is_late(self) -> bool:
        """Whether a call runs longer than it may."""
        deadline_s = self._deadline_s
        return deadline_s is not None and time.monotonic() > deadline_s

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], limit_s: float) -> Any:
        """The result of a call; raises what it raises."""
        if not self._is_ready:
            self._exchange(None, START_LIMIT_S)
            self._is_ready = True
        is_result, outcome = self._exchange((function, arguments), limit_s)
        if is_result:
            return outcome
        raise outcome

    def _exchange(self, message: Any, limit_s: float) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("unreachable: both are pipes")
        self._deadline_s = time.monotonic() + limit_s
        try:
            if message is not None:
                pickle.dump(message, stdin, pickle.HIGHEST_PROTOCOL)
                stdin.flush()
            return pickle.load(stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if self._was_late:
                raise CallTimeoutError(f"was not done within {limit_s:g} s") from error
            raise WorkerCrashedError(self._end_in_words()) from error
        finally:
            self._deadline_s = None

    def _end_in_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(10)
            if code < 0:
                with contextlib.suppress(ValueError):
                    return f"ended by {signal.Signals(-code).name}"
            return f"ended with exit code {code}"
        return "sent no result"

    def kill(self) -> None:
        """Ends it at once."""
        self._was_late = self.is_late()
        self._process.kill()

    def close(self) -> None:
        """Ends it and frees what it held; nothing may wait for a call any more."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()


def serve(memory_bytes: int) -> None:
    """What a process of the pool does: answers calls until nobody asks any more.

    Args:
        memory_bytes: Address space that it may take, where the system can limit it; 0 for any.
    """
    if memory_bytes:
        with contextlib.suppress(ImportError, ValueError, OSError):
            limit_memory(memory_bytes)
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller to act on
    # Decoders that print must not print among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _answer(sys.stdin.buffer, answers)


def _answer(calls: BinaryIO, answers: BinaryIO) -> None:
    from chestct.imaging import prepare

    outcome: tuple[bool, Any] = (True, prepare.__name__)  # ready: what takes long is imported
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pickle.dump(outcome, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
            function, arguments = pickle.load(calls)
            try:
                outcome = (True, function(*arguments))
            except Exception as error:  # raised anew where the call came from
                outcome = (False, error)
