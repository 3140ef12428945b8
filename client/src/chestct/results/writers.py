"""Outputs of results, and the file of JSON lines (others: `chestct.results.formats`).

An output is a small object with the methods of `Output`. Each gets every record, in order, and
what the record was made from; the files of records are written last, so that a record in a file
means that all other outputs have it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chestct.results.records import Record, SeriesResult, SliceResult, json_text
from chestct.results.resume import ResumeIndex

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["DecodedInput", "JsonLines", "Output", "RecordFile", "sync_folder"]

LINE_START = b'{"path": '  # how `records.json_text` begins every record
SYNC_PERIOD_S = 5.0  # a power cut costs at most the records of so long; they are made again


@dataclass(frozen=True)
class DecodedInput:
    """What a record was made from.

    Attributes:
        source: The `chestct.imaging.sources.Source` of the scan.
        pixels: uint8 (224, 224, 1); None where nothing was decoded.
        activation_map: float32 (14, 14, C), class evidence; None unless an output asks for it.
        scan: The decoded `chestct.imaging.prepare.Scan`; None where nothing was decoded.
    """

    source: Any
    pixels: npt.NDArray[np.uint8] | None = None
    activation_map: npt.NDArray[np.float32] | None = None
    scan: Any = None


class Output(Protocol):
    """One place for results.

    Attributes:
        wants_maps: Whether `DecodedInput.activation_map` is to be filled in: 3 KB a scan and class
            more on the wire.
        wants_series: Whether `end_series` is to be given the records and items of the series. They
            are held until the end of the folder: 50 KB a slice, and 3 KB more for each class of a
            map.
    """

    wants_maps: bool
    wants_series: bool

    def add(self, record: SliceResult, item: DecodedInput) -> None:
        """Take the record of one scan, as made by `chestct.results.records`."""

    def end_series(
        self, record: SeriesResult, items: Sequence[tuple[SliceResult, DecodedInput]]
    ) -> None:
        """Take the record of a series after those of its slices.

        Args:
            record: As made by `chestct.results.series.series_record`.
            items: Record and item of each classified slice, in the order of the records; empty
                unless `wants_series`.
        """

    def close(self) -> None:
        """Finish; called once, also when the run was interrupted or failed."""


class RecordFile:
    """A file of records, one line each, that a crash at any moment leaves usable.

    A line goes to the operating system as soon as it is there, so that `kill -9` costs nothing;
    to the disk it goes at least every `SYNC_PERIOD_S` while lines come, and on closing. What a
    crash leaves of a line at the end is cut off by the next run.

    Attributes:
        path: Where it is.
        finished: What it held on opening.
    """

    wants_maps = False
    wants_series = False

    def __init__(
        self, path: Path, *, resume: bool = False, finished: ResumeIndex | None = None
    ) -> None:
        """Opens the file, or makes it.

        Args:
            path: Where.
            resume: Whether the file may be there already, to be continued.
            finished: Takes in what the file holds; one of its own by default.

        Raises:
            FileExistsError: It is there and `resume` is false.
            ValueError: It holds something else, and is left as it is; or another run writes to it.
            OSError: It cannot be read, cut or written.
        """
        self.path = path
        self.finished = ResumeIndex() if finished is None else finished
        is_device = path.exists() and not path.is_file()  # such as a pipe
        mode = "a" if resume or is_device else "x"
        self._file = io.FileIO(path, mode)
        try:
            _lock(self._file, path)
            if not is_device:
                self._take_in()
            self._sync()
            sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def start(self, labels: Sequence[str]) -> None:
        """Tells of which model the records will be; called once, before any is added.

        Raises:
            ValueError: The file holds those of a model with other labels.
            OSError: It cannot be written.
        """

    def encode(self, record: Record) -> bytes:
        """A record as one line."""
        return json_text(record).encode()

    def decode(self, line: bytes) -> Record:
        """The record in a line.

        Raises:
            ValueError: The line holds something else.
        """
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("path"), str):
            raise ValueError("no record")
        return record

    def add(self, record: Record, item: DecodedInput) -> None:
        """Appends a line."""
        self.finished.note_retry(record["path"])
        self._append(record)

    def end_series(self, record: Record, items: Sequence[tuple[Record, DecodedInput]]) -> None:
        """Appends a line."""
        self._append(record)

    def _append(self, record: Record) -> None:
        self._write_all(self.encode(record))
        if time.monotonic() - self._synced_s > SYNC_PERIOD_S:
            self._sync()

    def records(self) -> Iterator[Record]:
        """What the file holds, in order.

        Raises:
            ValueError: It holds something else.
        """
        for _, record in self._lines():
            if record is not None:
                yield record

    def close(self) -> None:
        """Puts all on the disk."""
        if not self._file.closed:
            with self._file:
                self._sync()
            self._finish()

    def _finish(self) -> None:
        """Leaves out the errors that were tried again."""
        if self.finished.retried:
            self._replace(self.finished.without_retried(self.records()))

    def _replace(self, records: Iterable[Record]) -> None:
        unfinished = self.path.with_name(self.path.name + ".tmp")
        with unfinished.open("wb") as file:
            file.write(self._header())
            file.writelines(map(self.encode, records))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)
        sync_folder(self.path.parent)

    def _write_all(self, line: bytes) -> None:
        while line:  # a disk that fills up takes a part first
            line = line[self._file.write(line) or 0 :]

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of pipes and devices
                raise
        self._synced_s = time.monotonic()

    def _take_in(self) -> None:
        """Reads the file, and cuts off what a crash has left of a line at its end."""
        whole_bytes = 0
        for line, record in self._lines():
            if record is not None:
                self.finished.take(record)
            whole_bytes += len(line)
        if whole_bytes < self.path.stat().st_size:
            self._file.truncate(whole_bytes)
            self._file.seek(0, os.SEEK_END)

    def _lines(self) -> Iterator[tuple[bytes, Record | None]]:
        """Whole lines with their records; None for a header."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.endswith(b"\n"):
                        yield line, self._decoded(line, number)
                    # A power cut may leave a hole where the line should be.
                    elif line.strip(b"\0") and not self._may_be_torn(line, number):
                        raise ValueError("neither whole nor torn")
                except (ValueError, TypeError, KeyError):
                    raise ValueError(
                        f"{self.path}: line {number} is not a record of chestct classify"
                    ) from None

    def _decoded(self, line: bytes, number: int) -> Record | None:
        """The record in a line of the file; None for a header."""
        record = self.decode(line)
        if record["status"] not in ("ok", "error"):
            raise ValueError("no record")
        return record

    def _may_be_torn(self, line: bytes, number: int) -> bool:
        return line.startswith(LINE_START) or LINE_START.startswith(line)

    def _header(self) -> bytes:
        return b""


class JsonLines(RecordFile):
    """One JSON object a line, ASCII."""


def sync_folder(folder: Path) -> None:
    """Puts the name of a new file on the disk, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(file: io.FileIO, path: Path) -> None:
    """Keeps a second run from the same file, where the system has locks."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path}: another run is writing to it. Wait for its end.") from None
    except OSError:  # a file system without locks
        return
