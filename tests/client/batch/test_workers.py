"""Processes that crash, hang, print and outlive nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chestct.batch.workers import CallTimeoutError, WorkerCrashedError, Workers
from tests.support.waiting import until


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(2, limit_s=60) as pool:
        yield pool


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_calls_run_in_other_processes(workers: Workers) -> None:
    pids = {workers.submit(os.getpid).result() for _ in range(8)}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2


def test_what_a_call_raises_is_raised_here(workers: Workers) -> None:
    with pytest.raises(ZeroDivisionError):
        workers.submit(divmod, 1, 0).result()
    assert workers.submit(divmod, 7, 2).result() == (3, 1)


@pytest.mark.parametrize(
    ("function", "arguments", "how"),
    [(os.abort, (), "SIGABRT"), (ctypes.string_at, (0,), "SIGSEGV"), (os._exit, (3,), "code 3"),
     (signal.raise_signal, (signal.SIGKILL,), "SIGKILL")],
)  # fmt: skip
def test_crash_costs_the_one_call_that_crashed(
    workers: Workers, function: object, arguments: tuple[object, ...], how: str
) -> None:
    calls = [workers.submit(abs, -index) for index in range(5)]
    crashed = workers.submit(function, *arguments)  # type: ignore[arg-type]
    calls += [workers.submit(abs, -index) for index in range(5)]
    with pytest.raises(WorkerCrashedError, match=how):
        crashed.result()
    assert [call.result() for call in calls] == [*range(5), *range(5)]


def test_call_that_hangs_is_ended() -> None:
    with Workers(1, limit_s=1.0) as pool:
        before, hangs, after = (
            pool.submit(os.getpid),
            pool.submit(time.sleep, 600),
            pool.submit(os.getpid),
        )
        with pytest.raises(CallTimeoutError, match="not done within 1 s"):
            hangs.result()
        assert not is_alive(before.result())
        assert after.result() != before.result()


def test_start_of_the_process_does_not_count_as_time_of_the_call() -> None:
    with Workers(1, limit_s=0.05) as pool:  # far less than importing numpy takes
        assert pool.submit(abs, -3).result() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_call_may_not_fill_the_memory() -> None:
    with Workers(1, limit_s=60, memory_bytes=400 * 2**20) as pool:
        before = pool.submit(os.getpid).result()
        with pytest.raises(MemoryError):
            pool.submit(bytes, 400 * 2**20).result()
        assert not is_alive(before)  # what is left of its memory is in pieces
        assert len(pool.submit(bytes, 20 * 2**20).result()) == 20 * 2**20


def test_heavy_call_runs_in_a_process_among_the_first() -> None:
    with Workers(1, limit_s=60, num_in_threads=2) as pool:
        heavy = pool.submit(os.getpid, is_heavy=True)
        assert [pool.submit(os.getpid).result() for _ in range(2)] == [os.getpid()] * 2
        assert heavy.result() != os.getpid()


def test_printing_decoders_do_not_disturb(workers: Workers) -> None:
    assert workers.submit(os.write, 1, b"\x80 noise").result() == 7
    assert workers.submit(os.write, 2, b"noise").result() == 5
    assert workers.submit(abs, -3).result() == 3


def test_first_calls_stay_in_this_process() -> None:
    with Workers(2, limit_s=60, num_in_threads=3) as pool:
        pids = [pool.submit(os.getpid).result() for _ in range(4)]
    assert pids[:3] == [os.getpid()] * 3
    assert pids[3] != os.getpid()


def test_closing_does_not_wait_for_a_call(workers: Workers) -> None:
    pid = workers.submit(os.getpid).result()
    hangs = [workers.submit(time.sleep, 600) for _ in range(5)]
    time.sleep(0.3)
    workers.close()
    assert all(call.done() for call in hangs)
    assert not is_alive(pid)


def test_closing_does_not_wait_for_a_lock_that_an_interrupt_left_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGINT between taking a lock and noting that it has to be released: its owner keeps it."""
    monkeypatch.setattr("chestct.batch.workers.CLOSE_LIMIT_S", 0.5)
    workers = Workers(1, limit_s=60, num_in_threads=1)
    future = workers.submit(time.sleep, 0.2)
    with future._condition:
        started = time.monotonic()
        workers.close()
        assert time.monotonic() - started < 30
        assert not future.done()


def test_processes_end_with_a_killed_caller() -> None:
    program = (
        "import os, sys, time\n"
        "from chestct.batch.workers import Workers\n"
        "pool = Workers(1, limit_s=600)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        pid = int(caller.stdout.readline())
        assert is_alive(pid)
        caller.kill()
    until(lambda: not is_alive(pid), "the end of the process")


def test_callers_main_module_is_not_run_again(tmp_path: Path) -> None:
    """As `multiprocessing` would, for a script without the guard around its main part."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom chestct.batch.workers import Workers\nprint('once')\n"
        "with Workers(1, limit_s=60) as pool:\n    print(pool.submit(abs, -3).result())\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["once", "3"]


def test_no_threads_are_left() -> None:
    before = threading.active_count()
    with Workers(2, limit_s=60) as pool:
        pool.submit(abs, -1).result()
    assert threading.active_count() == before


@pytest.mark.parametrize(("number", "limit_s"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_pools_that_do_nothing(number: int, limit_s: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0"):
        Workers(number, limit_s=limit_s)
