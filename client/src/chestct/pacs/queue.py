"""Durable queue of series on disk: survives kill -9 and power loss, without duplicates.

    incoming/SERIES/OBJECT.dcm      received, the series may still grow
    classifying/SERIES/             taken by the classifier; goes back to incoming after a crash
    sending/SERIES.ID/results/      objects to deliver; NAME.dcm becomes NAME.sent when accepted
    failed/SERIES.ID/               given up, with the reason in reason.txt; kept for a person
    kept/SERIES.ID/                 done, only if asked for
    tmp/                            half-written; emptied at every start

A state is the folder that a series lies in, so it changes by one rename. Files are written into
`tmp`, synchronised, and renamed; a name never stands for a half of anything. Names are keyed
digests: neither a path nor a log line holds a UID or a patient's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path

from chestct.errors import SpoolError, SpoolFullError

__all__ = ["STATES", "Spool", "spool_status"]

STATES = ("incoming", "classifying", "sending", "failed", "kept")
TRIES_FILE, REASON_FILE, RESULTS = "tries", "reason.txt", "results"


@dataclass
class _Growing:
    """A series in `incoming`.

    Attributes:
        changed_s: Monotonic time of its last object.
        senders: Associations that sent to it and are open.
        is_released: All of them ended as they should.
    """

    changed_s: float
    senders: set[int]
    is_released: bool = False


class Spool:
    """The queue in one folder, of one process at a time; its methods may be called by any thread.

    Attributes:
        folder: Where it lies.
        num_bytes: What it holds now, files that are given up or kept included.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Opens the queue and takes up what an earlier process left.

        Args:
            folder: Made if it is not there, for the owner alone.
            max_bytes: What it may hold; `put` refuses more.

        Raises:
            SpoolError: Another process has it open, or the folder cannot be used.
        """
        self.folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._growing: dict[str, _Growing] = {}
        self.num_bytes = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = _locked(folder / "lock")
            shutil.rmtree(folder / "tmp", ignore_errors=True)
            for name in (*STATES, "tmp"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
            self._key = self._own_key()
            for path in _folders(folder / "classifying"):
                self._merge_back(path.name)
        except OSError as error:
            raise SpoolError(
                f"{folder}: cannot be used as a queue: {error.strerror or error}"
            ) from error
        now_s = time.monotonic()
        for path in _folders(folder / "incoming"):
            self._growing[path.name] = _Growing(now_s, set())
        self.num_bytes = sum(_size_of(folder / state) for state in STATES)

    def close(self) -> None:
        """Lets another process open the queue."""
        with self._lock:
            if self._lock_file >= 0:
                os.close(self._lock_file)
            self._lock_file = -1

    def put(self, series: str, instance: str, data: bytes, sender: int) -> str:
        """Stores one object; when this returns, it is on the disk.

        An object that is sent again takes the place of the first.

        Args:
            series: Series Instance UID.
            instance: SOP Instance UID.
            data: The file.
            sender: The association that it came by.

        Returns:
            The name of the series in this queue.

        Raises:
            SpoolFullError: It would be more than `max_bytes`.
            OSError: The disk is full, or failed.
        """
        name, file = self._digest(series), f"{self._digest(instance)}.dcm"
        with self._lock:
            if self.num_bytes + len(data) > self._max_bytes:
                raise SpoolFullError(
                    f"{self.num_bytes + len(data)} bytes, expected at most {self._max_bytes}"
                )
            self.num_bytes += len(data)
        new = self._new_path()
        try:
            _write(new, data)
            with self._lock:
                target = self.folder / "incoming" / name
                if not target.is_dir():
                    target.mkdir(mode=0o700)
                    _sync(target.parent)
                replaced = _size_of(target / file)
                os.replace(new, target / file)
                _sync(target)
                self.num_bytes -= replaced
                growing = self._growing.setdefault(name, _Growing(0, set()))
                growing.changed_s = time.monotonic()
                growing.senders.add(sender)
                growing.is_released = False
        except BaseException:
            new.unlink(missing_ok=True)
            with self._lock:
                self.num_bytes -= len(data)
            raise
        return name

    def end_sender(self, sender: int, *, is_release: bool) -> None:
        """Notes that an association ended; a series that it alone sent is released with it.

        Args:
            sender: The association.
            is_release: Whether it was released, not aborted or lost.
        """
        with self._lock:
            for growing in self._growing.values():
                if sender in growing.senders:
                    growing.senders.discard(sender)
                    growing.is_released = is_release and not growing.senders

    def complete(self, quiet_s: float, *, at_release: bool) -> str | None:
        """The series that waits longest of those that have all their objects; None if none has.

        Args:
            quiet_s: A series is complete when nothing came for so long.
            at_release: It is also complete when the association that sent it was released.
        """
        now_s = time.monotonic()
        with self._lock:
            ready = [
                (growing.changed_s, name)
                for name, growing in self._growing.items()
                if (at_release and growing.is_released) or now_s - growing.changed_s >= quiet_s
            ]
        return min(ready)[1] if ready else None

    def claim(self, name: str) -> tuple[Path, int]:
        """Moves a complete series to `classifying`; what comes after that is another part.

        Returns:
            Its folder, and how often it was claimed without an end, this time included: a series
            that ends the process comes back at every start.
        """
        with self._lock:
            source = self.folder / "incoming" / name
            tries = _tries(source) + 1
            self._replace(source / TRIES_FILE, str(tries).encode())
            claimed = self._move(source, "classifying", name)
            del self._growing[name]
            return claimed, tries

    def give_back(self, name: str, *, counts: bool = False) -> None:
        """Moves a claimed series back to `incoming`, where it is complete as before.

        Args:
            name: The series.
            counts: Whether the claim still counts as a try.
        """
        with self._lock:
            tries = self.folder / "classifying" / name / TRIES_FILE
            if not counts:
                with contextlib.suppress(OSError):  # a full disk must not hold the series here
                    self._replace(tries, str(max(_tries(tries.parent) - 1, 0)).encode())
            self._merge_back(name)
            self._growing.setdefault(name, _Growing(-math.inf, set()))

    def answer(self, name: str, results: Mapping[str, bytes]) -> Path:
        """Moves a claimed series to `sending`, with the objects to deliver.

        Args:
            name: The series.
            results: Files by name, without suffix.

        Returns:
            The folder of the series.
        """
        with self._lock:
            source = self.folder / "classifying" / name
            shutil.rmtree(source / RESULTS, ignore_errors=True)
            new = self._new_path()
            try:
                new.mkdir(mode=0o700)
                for result, data in results.items():
                    _write(new / f"{result}.dcm", data)
                _sync(new)
                os.rename(new, source / RESULTS)
            except OSError:
                shutil.rmtree(new, ignore_errors=True)
                raise
            _sync(source)
            self.num_bytes += sum(map(len, results.values()))
            return self._move(source, "sending", f"{name}.{secrets.token_hex(4)}")

    def unsent(self) -> list[tuple[Path, list[Path]]]:
        """Folders in `sending`, the oldest first, each with the objects not yet delivered."""
        found = _folders(self.folder / "sending")
        return [
            (path, sorted((path / RESULTS).glob("*.dcm")))
            for path in sorted(found, key=lambda path: path.stat().st_mtime)
        ]

    def mark_sent(self, result: Path) -> None:
        """Notes on the disk that an object was accepted, so that it is not sent again."""
        os.rename(result, result.with_suffix(".sent"))
        _sync(result.parent)

    def fail(self, folder: Path, reason: str) -> None:
        """Moves a series to `failed` and writes down why."""
        with self._lock:
            with contextlib.suppress(OSError):
                self._replace(folder / REASON_FILE, (reason + "\n").encode())
            name = folder.name.partition(".")[0]
            self._move(folder, "failed", f"{name}.{secrets.token_hex(4)}")

    def finish(self, folder: Path, *, keep: bool) -> None:
        """Ends a series: its files are deleted, or moved to `kept`."""
        with self._lock:
            if keep:
                name = folder.name.partition(".")[0]
                self._move(folder, "kept", f"{name}.{secrets.token_hex(4)}")
                return
            size = _size_of(folder)
            gone = self._new_path()
            # First out of its state at once, then file by file.
            os.rename(folder, gone)
            _sync(folder.parent)
            shutil.rmtree(gone)
            self.num_bytes -= size

    def _own_key(self) -> bytes:
        path = self.folder / "key"
        if not path.is_file():
            self._replace(path, secrets.token_bytes(32))
        return path.read_bytes()

    def _digest(self, uid: str) -> str:
        return hashlib.blake2b(uid.encode(), key=self._key, digest_size=10).hexdigest()

    def _new_path(self) -> Path:
        return self.folder / "tmp" / secrets.token_hex(8)

    def _replace(self, path: Path, data: bytes) -> None:
        new = self._new_path()
        _write(new, data)
        os.replace(new, path)
        _sync(path.parent)

    def _move(self, source: Path, state: str, name: str) -> Path:
        target = self.folder / state / name
        os.rename(source, target)
        _sync(target.parent)
        _sync(source.parent)
        return target

    def _merge_back(self, name: str) -> None:
        source, target = (self.folder / state / name for state in ("classifying", "incoming"))
        shutil.rmtree(source / RESULTS, ignore_errors=True)
        if not target.is_dir():
            self._move(source, "incoming", name)
            return
        for path in sorted(source.iterdir()):
            if (target / path.name).exists():  # sent again meanwhile
                self.num_bytes -= _size_of(path)
                path.unlink()
            else:
                os.rename(path, target / path.name)
        _sync(target)
        source.rmdir()


def spool_status(folder: Path) -> dict[str, int]:
    """What a queue holds, read from the disk; no lock is taken, so it may be asked any time.

    Returns:
        Number of series in each of `STATES`, `objects` received and not yet answered, `unsent`
        results, and `bytes`.
    """
    status = {state: len(list(_folders(folder / state))) for state in STATES}
    # Folders may be moved meanwhile, which `Path.glob` does not bear.
    waiting = (
        glob(f"{escape(str(folder))}/{state}/*/*.dcm") for state in ("incoming", "classifying")
    )
    status["objects"] = sum(map(len, waiting))
    status["unsent"] = len(glob(f"{escape(str(folder))}/sending/*/{RESULTS}/*.dcm"))
    status["bytes"] = sum(_size_of(folder / state) for state in STATES)
    return status


def _locked(path: Path) -> int:
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise SpoolError(
            f"{path.parent}: another process has this queue open. Stop it, or name another folder."
        ) from None
    return file


def _write(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    finally:
        os.close(file)


def _sync(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _folders(path: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from [found for found in path.iterdir() if found.is_dir()]


def _tries(folder: Path) -> int:
    try:
        return int((folder / TRIES_FILE).read_text())
    except (OSError, ValueError):
        return 0


def _size_of(path: Path) -> int:
    """Bytes of a file or of all `.dcm` and `.sent` files below a folder; what goes counts 0."""
    inside = (Path(place, name) for place, _, names in os.walk(path) for name in names)
    total = 0
    for found in [path] if path.is_file() else inside:
        if found.suffix in (".dcm", ".sent"):
            with contextlib.suppress(FileNotFoundError):
                total += found.stat().st_size
    return total
