"""Decoding processes that crash, hang, print and outlive nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chestct.batch import decode_pool
from chestct.batch.decode_pool import DecodedSlice, DecodePool, DecoderLostError
from chestct.contract import LUNG_WINDOW
from chestct.errors import DecoderCrashedError, ScanDecodeError
from chestct.imaging.prepare import Scan, inspect_scans, load_grey
from chestct.imaging.sources import Source
from tests.client.batch.faults import faulty, install
from tests.client.swelling import dicom_that_swells
from tests.support.waiting import until
from training.data.phantom import dicom_from_phantom, make_phantom


@pytest.fixture(autouse=True)
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files with faults."""
    install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def good(tmp_path: Path) -> Source:
    dicom_from_phantom(make_phantom("normal", 1, size=128)).save_as(
        tmp_path / "good.dcm", enforce_file_format=True
    )
    return Source(tmp_path / "good.dcm")


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    with DecodePool(2, limit_s=60, num_in_threads=0) as running:
        yield running


_of_other_tests: set[int] = set()


@pytest.fixture(autouse=True)
def _own_children() -> None:
    """Pages of other tests may run in this process, with decoders of their own."""
    _of_other_tests.clear()
    _of_other_tests.update(children())


def children() -> set[int]:
    """The decoding processes of this test."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    found = {int(child) for task in tasks for child in task.read_text().split()}
    return {child for child in found if b"decode_worker" in command_line(child)} - _of_other_tests


def command_line(pid: int) -> bytes:
    """Empty once the process has ended, and for a moment while its program is loaded."""
    while is_alive(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if text := Path(f"/proc/{pid}/cmdline").read_bytes():
                return text
    return b""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def decoded(call: Future[list[DecodedSlice]]) -> Scan:
    (only,) = call.result()
    assert isinstance(only.scan, Scan), only.scan
    return only.scan


def failed(call: Future[list[DecodedSlice]]) -> ScanDecodeError:
    (only,) = call.result()
    assert isinstance(only.scan, ScanDecodeError)
    return only.scan


@pytest.mark.parametrize("num_in_threads", [0, 9])
def test_slices_are_those_of_this_process(
    tmp_path: Path, good: Source, num_in_threads: int
) -> None:
    scout = dicom_from_phantom(make_phantom("normal", 1, size=128))
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.save_as(tmp_path / "scout.dcm", enforce_file_format=True)
    (tmp_path / "torn.dcm").write_bytes(good.read()[:-3000])
    sources = [good, *(Source(tmp_path / name) for name in ("scout.dcm", "torn.dcm", "none"))]
    with DecodePool(2, num_in_threads=num_in_threads) as pool:
        for source in sources:
            for mine, other in zip(
                inspect_scans(source, LUNG_WINDOW),
                pool.submit(source, LUNG_WINDOW).result(),
                strict=True,
            ):
                assert other.name == mine.name
                if isinstance(mine.scan, Scan):
                    assert isinstance(other.scan, Scan)
                    np.testing.assert_array_equal(other.scan.pixels, mine.scan.pixels)
                    assert other.scan.metadata == mine.scan.metadata
                    assert other.scan.reasons == mine.scan.reasons
                    assert other.decode_ms > 0
                else:
                    assert type(other.scan) is type(mine.scan)
                    assert str(other.scan) == str(mine.scan)
        errors = [failed(pool.submit(each, LUNG_WINDOW)) for each in sources[1:]]
    assert [getattr(error, "kind", "") for error in errors] == ["localizer", "", ""]


def test_one_slice_in_its_own_size(pool: DecodePool, good: Source, tmp_path: Path) -> None:
    grey = pool.load_grey(good, LUNG_WINDOW)
    np.testing.assert_array_equal(grey, load_grey(good, LUNG_WINDOW))
    several, other = (dicom_from_phantom(make_phantom("normal", n, size=128)) for n in (1, 2))
    several.NumberOfFrames = 3
    several.PixelData = several.PixelData + other.PixelData + several.PixelData
    several.save_as(tmp_path / "several.dcm", enforce_file_format=True)
    source = Source(tmp_path / "several.dcm")
    frames = [pool.load_grey(source, LUNG_WINDOW, frame=number) for number in (1, 2, 3)]
    np.testing.assert_array_equal(frames[0], frames[2])
    np.testing.assert_array_equal(frames[0], grey)
    np.testing.assert_array_equal(frames[1], load_grey(source, LUNG_WINDOW, frame=2))
    assert (frames[0] != frames[1]).any()
    with pytest.raises(ScanDecodeError, match="no such file"):
        pool.load_grey(Source(tmp_path / "none"), LUNG_WINDOW)
    with pytest.raises(DecoderCrashedError, match="SIGABRT"):
        pool.load_grey(faulty(tmp_path / "bad", "os.abort()"), LUNG_WINDOW)


@pytest.mark.parametrize(
    ("code", "how"),
    [("os.abort()", "ended by SIGABRT"), ("ctypes.string_at(0)", "ended by SIGSEGV"),
     ("os._exit(3)", "ended with exit code 3"), ("signal.raise_signal(9)", "ended by SIGKILL")],
)  # fmt: skip
def test_crash_costs_the_one_file_that_crashed(
    pool: DecodePool, good: Source, tmp_path: Path, code: str, how: str
) -> None:
    calls = [pool.submit(good, LUNG_WINDOW) for _ in range(5)]
    crashed = pool.submit(faulty(tmp_path / "bad", code), LUNG_WINDOW)
    calls += [pool.submit(good, LUNG_WINDOW) for _ in range(5)]
    error = failed(crashed)
    assert isinstance(error, DecoderCrashedError)
    assert str(error) == f"{tmp_path / 'bad'}: decoding {how}. Export the slice again."
    expected = decoded(calls[0]).pixels
    for call in calls:
        np.testing.assert_array_equal(decoded(call).pixels, expected)


@pytest.mark.parametrize("num_in_threads", [0, 9])
def test_bug_of_a_decoder_costs_its_file(
    good: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_in_threads: int
) -> None:
    bad = faulty(tmp_path / "bad", "1 / 0")
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda self: 1 // 0 if self == bad else read(self))
    with DecodePool(1, num_in_threads=num_in_threads) as pool:
        error = failed(pool.submit(bad, LUNG_WINDOW))
        assert "cannot be decoded (ZeroDivisionError)" in str(error)
        decoded(pool.submit(good, LUNG_WINDOW))


def test_call_that_hangs_is_ended_and_no_other(good: Source, tmp_path: Path) -> None:
    with DecodePool(1, limit_s=1.0, num_in_threads=0) as pool:
        decoded(pool.submit(good, LUNG_WINDOW))
        (before,) = children()
        bad = faulty(tmp_path / "bad", "time.sleep(600)")
        hangs, after = pool.submit(bad, LUNG_WINDOW), pool.submit(good, LUNG_WINDOW)
        assert str(failed(hangs)).endswith(
            "decoding was not done within 1 s. Export the slice again, or allow it more time."
        )
        decoded(after)
        assert not is_alive(before)
        (now,) = children()
        assert now != before
        # Together they take longer than the limit, each alone does not.
        slow = faulty(tmp_path / "slow", "time.sleep(0.4)")
        calls = [pool.submit(slow, LUNG_WINDOW) for _ in range(4)]
        assert all("neither PNG" in str(failed(call)) for call in calls)
        assert children() == {now}


def test_start_of_the_process_does_not_count_as_time_of_the_call(good: Source) -> None:
    with DecodePool(1, limit_s=0.2, num_in_threads=0) as pool:  # less than the imports take
        decoded(pool.submit(good, LUNG_WINDOW))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_call_may_not_fill_the_memory(good: Source, tmp_path: Path) -> None:
    limit = 400 * 2**20
    with DecodePool(1, limit_s=60, num_in_threads=0, memory_bytes=limit) as pool:
        decoded(pool.submit(good, LUNG_WINDOW))
        (before,) = children()
        bad = faulty(tmp_path / "bad", f"bytes({limit})")
        assert str(failed(pool.submit(bad, LUNG_WINDOW))).endswith(
            "decoding needs more memory than it may take. Export the slice again, or allow it more."
        )
        decoded(pool.submit(good, LUNG_WINDOW))
        assert not is_alive(before)  # what is left of its memory is in pieces


def test_first_small_files_stay_in_this_process(good: Source, tmp_path: Path) -> None:
    large = tmp_path / "large.dcm"
    large.write_bytes(dicom_that_swells(140_000))
    with DecodePool(2, num_in_threads=3) as pool:
        for _ in range(3):
            decoded(pool.submit(good, LUNG_WINDOW))
        assert not children()
        decoded(pool.submit(good, LUNG_WINDOW))
        assert len(children()) == 1
    with DecodePool(2, num_in_threads=3) as pool:
        assert "without a picture" in str(failed(pool.submit(Source(large), LUNG_WINDOW)))
        assert len(children()) == 1


def test_printing_decoders_do_not_disturb(pool: DecodePool, good: Source, tmp_path: Path) -> None:
    noisy = faulty(tmp_path / "noisy", r"os.write(1, b'\x80 noise'); os.write(2, b'noise')")
    assert "neither PNG" in str(failed(pool.submit(noisy, LUNG_WINDOW)))
    decoded(pool.submit(good, LUNG_WINDOW))


@pytest.mark.parametrize(
    "answer",
    [b"\xff" * 8, b"[]", b"{", b"null", b"[" * 99_999, {"kind": "scan", "name": "x", "blobs": [2]},
     {"kind": "scan", "name": "x", "blobs": [5, -2]}, {"kind": "scan", "name": "x", "blobs": [3]},
     {"kind": "scan", "name": "x", "decode_ms": 1, "reasons": [], "blobs": [3], "metadata": {}},
     {"kind": "end", "blobs": [3]}],
)  # fmt: skip
def test_answers_that_break_the_protocol_are_crashes(
    pool: DecodePool, good: Source, tmp_path: Path, answer: bytes | dict[str, Any]
) -> None:
    """As a decoder that runs the code of a hostile file would send them."""
    text = json.dumps(answer).encode() if isinstance(answer, dict) else answer
    if answer != b"\xff" * 8:
        answer = struct.pack(">II", len(text), 3) + text + bytes(3)
    # The pipe of the answers is the only writable one.
    code = (
        "import stat\nfor fd in range(3, 20):\n"
        "  try:\n    os.write(fd, ANSWER) if stat.S_ISFIFO(os.fstat(fd).st_mode) else 0\n"
        "  except OSError: pass\ntime.sleep(600)"
    ).replace("ANSWER", repr(answer))
    error = failed(pool.submit(faulty(tmp_path / "bad", code), LUNG_WINDOW))
    assert isinstance(error, DecoderCrashedError)
    assert "sent no result" in str(error)
    decoded(pool.submit(good, LUNG_WINDOW))


@pytest.mark.parametrize("lengths", [(2, 101), (2**20 + 1, 0)])
def test_more_than_was_asked_for_is_refused_before_it_is_read(lengths: tuple[int, int]) -> None:
    async def run() -> None:
        worker = object.__new__(decode_pool._Worker)
        worker._stdout = asyncio.StreamReader()
        worker._stdout.feed_data(struct.pack(">II", *lengths))  # and no more
        with pytest.raises(ValueError, match="a message of"):
            await asyncio.wait_for(worker.receive(100), 60)

    asyncio.run(run())


def test_process_holds_no_credentials_and_can_write_no_file(
    pool: DecodePool, good: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHESTCT_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    decoded(pool.submit(good, LUNG_WINDOW))
    (process,) = children()
    assert b"secret" not in Path(f"/proc/{process}/environ").read_bytes()
    limits = Path(f"/proc/{process}/limits").read_text().splitlines()
    hard = {line[:26].strip(): line.split()[-2] for line in limits}
    assert (hard["Max file size"], hard["Max core file size"]) == ("0", "0")
    assert hard["Max address space"] == str(2 * 2**30)
    new = tmp_path / "new"
    code = f"os.write(os.open({str(new)!r}, os.O_CREAT | os.O_WRONLY), b'x')"
    writes = faulty(tmp_path / "writes", code)
    assert "cannot be decoded (OSError)" in str(failed(pool.submit(writes, LUNG_WINDOW)))
    assert not new.read_bytes()


def test_pool_recovers_when_processes_could_not_be_started(
    good: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chestct.batch.decode_pool.START_PAUSES_S", (0.01,))
    with DecodePool(2, num_in_threads=0) as pool:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", str(tmp_path / "none"))
            calls = [pool.submit(good, LUNG_WINDOW) for _ in range(6)]
            assert all("could not be started: No such file" in str(failed(each)) for each in calls)
        calls = [pool.submit(good, LUNG_WINDOW) for _ in range(6)]
        assert [decoded(call).pixels.max() > 0 for call in calls] == [True] * 6
        assert len(children()) == 2


def test_killed_idle_processes_cost_nothing(pool: DecodePool, good: Source) -> None:
    for call in [pool.submit(good, LUNG_WINDOW) for _ in range(8)]:
        decoded(call)
    for process in children():
        os.kill(process, signal.SIGKILL)
    until(lambda: not any(each.is_alive() for each in pool._idle), "the end of the processes")
    for call in [pool.submit(good, LUNG_WINDOW) for _ in range(8)]:
        decoded(call)


def test_from_an_event_loop(good: Source) -> None:
    data = good.read()
    task = {"name": "sent.dcm", "window": [-600, 1500], "side": 32, "first": 0}

    async def run() -> None:
        pool = DecodePool(2)
        await pool.fill()
        assert len(children()) == 2
        for _ in range(3):
            (found,) = [each async for each in pool.answers(task, data)]
            assert found.picture is not None
            assert found.picture.pixels.shape == (32, 32)
        for process in children():
            os.kill(process, signal.SIGSTOP)
        pool.limit_s = 0.2
        with pytest.raises(DecoderLostError, match="not done within"):
            [each async for each in pool.answers(task, data)]
        # A user that goes away leaves no process that is busy for nobody.
        pool.limit_s = 60
        waiting = asyncio.create_task(anext(pool.answers(task, data)))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await pool.fill()
        assert len(children()) == 2
        assert [each.name async for each in pool.answers(task, data)] == ["sent.dcm"]
        await pool.end()
        assert not children()

    asyncio.run(run())


def test_closing_does_not_wait_for_a_call(pool: DecodePool, tmp_path: Path) -> None:
    bad = faulty(tmp_path / "bad", "time.sleep(600)")
    hangs = [pool.submit(bad, LUNG_WINDOW) for _ in range(5)]
    until(lambda: len(children()) == 2, "the start of the processes")
    time.sleep(0.3)
    processes = children()
    pool.close()
    assert all(call.done() for call in hangs)
    assert not any(map(is_alive, processes))


def test_closing_does_not_wait_for_a_lock_that_an_interrupt_left_taken(
    good: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT between taking a lock and noting that it has to be released: its owner keeps it."""
    monkeypatch.setattr("chestct.batch.decode_pool.END_LIMIT_S", 0.5)
    pool = DecodePool(1, num_in_threads=1).start()
    future = pool.submit(good, LUNG_WINDOW)
    with future._condition:
        started = time.monotonic()
        pool.close()
        assert time.monotonic() - started < 30
        assert not future.done()
    pool._thread.join(30)
    assert not pool._thread.is_alive()


def test_processes_end_with_a_killed_caller(good: Source) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from chestct.batch.decode_pool import DecodePool\n"
        "from chestct.contract import LUNG_WINDOW\nfrom chestct.imaging.sources import Source\n"
        "pool = DecodePool(1, num_in_threads=0).start()\n"
        f"pool.submit(Source(Path({str(good.path)!r})), LUNG_WINDOW).result()\n"
        "print(*[c for t in Path('/proc/self/task').iterdir()"
        " for c in (t / 'children').read_text().split()], flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        pid = int(caller.stdout.readline())
        assert is_alive(pid)
        caller.kill()
    until(lambda: not is_alive(pid), "the end of the process")


def test_callers_main_module_is_not_run_again(good: Source, tmp_path: Path) -> None:
    """As `multiprocessing` would, for a script without the guard around its main part."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom chestct.batch.decode_pool import DecodePool\n"
        "from chestct.contract import LUNG_WINDOW\nfrom chestct.imaging.sources import Source\n"
        "print('once')\nwith DecodePool(1, num_in_threads=0) as pool:\n"
        f"    print(len(pool.submit(Source(Path({str(good.path)!r})), LUNG_WINDOW).result()))\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["once", "1"]
    assert not done.stderr


@pytest.mark.parametrize("num_in_threads", [0, 1])
def test_no_threads_are_left(good: Source, num_in_threads: int) -> None:
    before = threading.active_count()
    with DecodePool(2, num_in_threads=num_in_threads) as pool:
        decoded(pool.submit(good, LUNG_WINDOW))
    until(lambda: threading.active_count() == before, "the end of the threads")


@pytest.mark.parametrize(("number", "limit_s"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_pools_that_do_nothing(number: int, limit_s: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0"):
        DecodePool(number, limit_s=limit_s)
