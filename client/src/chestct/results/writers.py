"""Where results go: JSON lines, CSV or Parquet, and whatever else is made from them.

An output is a small object with the methods of `Output`. Each gets every record, in order, and
what the record was made from; the files of records are written last, so that a record in a file
means that all other outputs have it.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chestct.results.records import (
    Column,
    columns_of,
    flat_record,
    json_text,
    nested_record,
    plain_text,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "FORMATS",
    "CsvFile",
    "Finished",
    "Item",
    "JsonLines",
    "Output",
    "ParquetFile",
    "Record",
    "RecordFile",
    "folder_of",
    "format_of",
    "journal_of",
    "open_records",
]

FORMATS = ("jsonl", "csv", "parquet")
LINE_START = b'{"path": '  # how `report.json_text` begins every record
SYNC_PERIOD_S = 5.0  # a power cut costs at most the records of so long; they are made again
ROW_GROUP_ROWS = 10_000  # bounds the memory of writing and of reading Parquet
JOURNAL_SUFFIX = ".journal"
_FRAME = re.compile(r"#\d+$")  # of a slice in a file of several frames

Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
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
        wants_maps: Whether `Item.activation_map` is to be filled in: 3 KB a scan and class more
            on the wire.
        wants_series: Whether `end_series` is to be given the records and items of the series. They
            are held until the end of the folder: 50 KB a slice, and 3 KB more for each class of a
            map.
    """

    wants_maps: bool
    wants_series: bool

    def add(self, record: Record, item: Item) -> None:
        """Take the record of one scan, as made by `chestct.results.records`."""

    def end_series(self, record: Record, items: Sequence[tuple[Record, Item]]) -> None:
        """Take the record of a series after those of its slices.

        Args:
            record: As made by `chestct.results.series.series_record`.
            items: Record and item of each classified slice, in the order of the records; empty
                unless `wants_series`.
        """

    def close(self) -> None:
        """Finish; called once, also when the run was interrupted or failed."""


class Finished:
    """What an earlier run has written: a digest of 16 bytes for each record, not the records.

    Attributes:
        pending: Records of slices, by path, whose series had no record yet when the run ended.
    """

    def __init__(self) -> None:
        """Starts with nothing."""
        self._digests: set[bytes] = set()
        self.pending: dict[str, Record] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, path: str) -> bool:
        return _digest(path) in self._digests

    def has_series(self, folder: str, number: int) -> bool:
        """Whether the series of a folder has its record."""
        return _digest(f"{folder}\0{number}") in self._digests

    def take(self, record: Record) -> None:
        """Takes in one record, in the order of the run."""
        path, number = record["path"], record.get("series")
        if "num_slices" in record:
            self._digests.add(_digest(f"{path}\0{number}"))
            done = [
                kept
                for kept, slice_record in self.pending.items()
                if slice_record["series"] == number and folder_of(kept) == path
            ]
            for kept in done:
                del self.pending[kept]
            return
        self._digests.add(_digest(path))
        if number is not None:
            self.pending[path] = record

    def has_record(self, record: Record) -> bool:
        """Whether a record of the same slice or series was taken in."""
        if "num_slices" in record:
            return self.has_series(record["path"], record["series"])
        return record["path"] in self

    def update(self, other: Finished) -> None:
        """Takes in all that another one has, from later in the run."""
        self._digests |= other._digests
        self.pending = {
            path: record
            for path, record in (self.pending | other.pending).items()
            if not self.has_series(folder_of(path), record["series"])
        }


def folder_of(path: str) -> str:
    """The folder or archive that holds the scan of a record, by the `path` of the record."""
    file = _FRAME.sub("", path)
    archive, mark, _ = file.partition(".zip!") if ".zip!" in file else file.partition(".ZIP!")
    if mark:
        return archive + mark[:-1]
    return os.path.dirname(file) or "."


def _digest(text: str) -> bytes:
    return hashlib.blake2b(plain_text(text).encode(), digest_size=16).digest()


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
    _has_header = False

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """Opens the file, or makes it.

        Args:
            path: Where.
            resume: Whether the file may be there already, to be continued.

        Raises:
            FileExistsError: It is there and `resume` is false.
            ValueError: It holds something else, and is left as it is; or another run writes to it.
            OSError: It cannot be read, cut or written.
        """
        self.path = path
        is_device = path.exists() and not path.is_file()  # such as a pipe
        mode = "a" if resume or is_device else "x"
        self._file = io.FileIO(path, mode)
        try:
            _lock(self._file, path)
            self.finished = Finished() if is_device else self._read_finished()
            self._sync()
            _sync_folder(path.parent)
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

    def add(self, record: Record, item: Item) -> None:
        """Appends a line."""
        self._append(record)

    def end_series(self, record: Record, items: Sequence[tuple[Record, Item]]) -> None:
        """Appends a line."""
        self._append(record)

    def close(self) -> None:
        """Puts all on the disk."""
        if not self._file.closed:
            with self._file:
                self._sync()

    def _append(self, record: Record) -> None:
        self._write_all(self.encode(record))
        if time.monotonic() - self._synced_s > SYNC_PERIOD_S:
            self._sync()

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

    def _read_finished(self) -> Finished:
        finished = Finished()
        whole_bytes = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    # A power cut may leave a hole where the line should be.
                    if line.strip(b"\0") and not self._may_be_torn(line, number):
                        raise _foreign(self.path, number)
                    break
                if number == 1 and self._has_header:
                    self._read_header(line)
                else:
                    finished.take(self._decoded(line, number))
                whole_bytes += len(line)
        if whole_bytes < self.path.stat().st_size:
            self._file.truncate(whole_bytes)
            self._file.seek(0, os.SEEK_END)
        return finished

    def _decoded(self, line: bytes, number: int) -> Record:
        try:
            record = self.decode(line)
            if record["status"] not in ("ok", "error"):
                raise ValueError("no record")
        except (ValueError, TypeError, KeyError):
            raise _foreign(self.path, number) from None
        return record

    def _may_be_torn(self, line: bytes, number: int) -> bool:
        return line.startswith(LINE_START) or LINE_START.startswith(line)

    def _read_header(self, line: bytes) -> None:
        """Takes in the first line of a table."""


class JsonLines(RecordFile):
    """One JSON object a line, ASCII."""


class CsvFile(RecordFile):
    """Rows of the columns of `chestct.results.records.columns_of`, UTF-8, one line each.

    Control characters and undecodable bytes of file names become escapes; lists of sentences are
    joined by `; `.
    """

    _has_header = True
    _columns: Sequence[Column] = ()

    def start(self, labels: Sequence[str]) -> None:
        """Writes the names of the columns, or compares them with those that are there."""
        columns = columns_of(labels)
        if not self._columns:
            self._columns = columns
            self._write_all(_csv_line([column.name for column in columns]))
        elif self._columns != columns:
            raise _other_model(self.path, self._columns)

    def _read_header(self, line: bytes) -> None:
        try:
            (names,) = csv.reader([line.decode()], strict=True)
            self._columns = _columns_named(names)
        except (ValueError, csv.Error):
            raise _foreign(self.path, 1) from None

    def encode(self, record: Record) -> bytes:
        """A record as one line."""
        row = flat_record(record, self._columns)
        return _csv_line(
            [_cell(value, column) for value, column in zip(row, self._columns, strict=True)]
        )

    def decode(self, line: bytes) -> Record:
        """The record in a line.

        Raises:
            ValueError: The line holds something else.
        """
        (cells,) = csv.reader([line.decode()], strict=True)
        values = [_value(cell, column) for cell, column in zip(cells, self._columns, strict=True)]
        return nested_record(values, self._columns)

    def _may_be_torn(self, line: bytes, number: int) -> bool:
        start = _csv_line([column.name for column in columns_of(())][:3])[:-1]
        return number > 1 or line.startswith(start) or start.startswith(line)


class ParquetFile:
    """Parquet with the columns of `chestct.results.records.columns_of`, in bounded row groups.

    Parquet cannot be appended to, so records go to JSON lines in `FILE.journal` beside it, and
    become Parquet on closing: rows that were there before come first, then the new ones, in a
    temporary file that is renamed. A run that was killed leaves the journal for the next one.

    Attributes:
        path: Where it is.
        finished: What file and journal held on opening.
    """

    wants_maps = False
    wants_series = False

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """As `RecordFile`.

        Raises:
            FileExistsError: It is there and `resume` is false.
            ValueError: It is no such file, or pyarrow is missing.
            OSError: It cannot be read or written.
        """
        self.path = path
        self._columns: Sequence[Column] = ()
        self._parquet = _pyarrow_parquet()
        if path.exists() and not resume:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self._stored = Finished()
        if path.exists():
            for record in self._stored_records():
                self._stored.take(record)
        self._journal = JsonLines(journal_of(path), resume=resume)
        self.finished = Finished()
        self.finished.update(self._stored)
        self.finished.update(self._journal.finished)

    def start(self, labels: Sequence[str]) -> None:
        """Tells of which model the records will be: see `RecordFile.start`."""
        if self._columns and self._columns != columns_of(labels):
            raise _other_model(self.path, self._columns)
        self._columns = columns_of(labels)

    def add(self, record: Record, item: Item) -> None:
        """Appends a record."""
        self._journal.add(record, item)

    def end_series(self, record: Record, items: Sequence[tuple[Record, Item]]) -> None:
        """Appends a record."""
        self._journal.end_series(record, items)

    def close(self) -> None:
        """Writes the Parquet file from the journal."""
        self._journal.close()
        journal, unfinished = self._journal.path, self.path.with_name(self.path.name + ".tmp")
        if not journal.exists():  # closed already
            return
        is_empty = not journal.stat().st_size
        if not self._columns or (is_empty and self.path.exists()):  # or never started
            if is_empty:
                journal.unlink()
            return
        try:
            with self._parquet.ParquetWriter(unfinished, self._schema()) as writer:
                for rows in _grouped(self._all_records(journal), ROW_GROUP_ROWS):
                    writer.write_batch(self._batch(rows))
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)
        journal.unlink()

    def _all_records(self, journal: Path) -> Iterator[Record]:
        if self.path.exists():
            yield from self._stored_records()
        with journal.open("rb") as file:
            for line in file:
                record = self._journal.decode(line)
                # A run killed after the rename and before the end of its journal wrote it already.
                if not self._stored.has_record(record):
                    yield record

    def _schema(self) -> Any:
        import pyarrow as pa

        types = {
            "text": pa.string(),
            "texts": pa.list_(pa.string()),
            "number": pa.float64(),
            "count": pa.int64(),
            "truth": pa.bool_(),
            "json": pa.string(),
        }
        return pa.schema([(column.name, types[column.kind]) for column in self._columns])

    def _batch(self, records: Iterable[Record]) -> Any:
        import pyarrow as pa

        rows = [flat_record(record, self._columns) for record in records]
        columns = list(zip(*rows, strict=True))
        for index, column in enumerate(self._columns):
            if column.kind in ("text", "json"):
                to_text = plain_text if column.kind == "text" else json.dumps
                columns[index] = tuple(v if v is None else to_text(v) for v in columns[index])
        schema = self._schema()
        arrays = [
            pa.array(values, type=field.type) for values, field in zip(columns, schema, strict=True)
        ]
        return pa.record_batch(arrays, schema=schema)

    def _stored_records(self) -> Iterator[Record]:
        import pyarrow as pa

        try:
            with self._parquet.ParquetFile(self.path) as file:
                self._columns = self._columns or _columns_named(file.schema_arrow.names)
                for batch in file.iter_batches(ROW_GROUP_ROWS):
                    for row in batch.to_pylist():
                        values = [
                            json.loads(value) if value and column.kind == "json" else value
                            for value, column in zip(row.values(), self._columns, strict=True)
                        ]
                        yield nested_record(values, self._columns)
        except (pa.ArrowInvalid, _ForeignColumnsError) as error:
            raise ValueError(f"{self.path}: no Parquet file of chestct classify") from error


def format_of(path: Path, chosen: str | None = None) -> str:
    """`jsonl`, `csv` or `parquet`: what was chosen, or by the suffix of the file."""
    by_suffix = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}
    return chosen or by_suffix.get(path.suffix.lower(), "jsonl")


def journal_of(path: Path) -> Path:
    """Where the records of a Parquet file are until the end of the run."""
    return path.with_name(path.name + JOURNAL_SUFFIX)


def open_records(path: Path, form: str, *, resume: bool = False) -> RecordFile | ParquetFile:
    """The file of records in one of `FORMATS`; see `RecordFile` for the errors."""
    if form == "parquet":
        return ParquetFile(path, resume=resume)
    return (CsvFile if form == "csv" else JsonLines)(path, resume=resume)


class _ForeignColumnsError(ValueError):
    """A table of something else."""


def _columns_named(names: Sequence[str]) -> list[Column]:
    labels = [name.partition(".")[2] for name in names if name.startswith("probabilities.")]
    columns = columns_of(labels)
    if [column.name for column in columns] != list(names):
        raise _ForeignColumnsError("other columns")
    return columns


def _other_model(path: Path, columns: Sequence[Column]) -> ValueError:
    names = ", ".join(c.name for c in columns if c.name.startswith("probabilities."))
    return ValueError(
        f"{path}: holds results of a model with other labels: {names}. Name another file."
    )


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            'Parquet needs pyarrow, which is not installed: pip install "chestct[parquet]"'
        ) from error
    return pyarrow.parquet


def _foreign(output: Path, number: int) -> ValueError:
    return ValueError(f"{output}: line {number} is not a record of chestct classify")


def _grouped(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    coming = iter(records)
    while group := list(islice(coming, size)):
        yield group


def _csv_line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cell(value: Any, column: Column) -> str:
    if value is None:
        return ""
    if column.kind == "texts":
        return plain_text("; ".join(value))
    if column.kind == "json":
        return json.dumps(value)
    if column.kind == "truth":
        return "true" if value else "false"
    return plain_text(value) if column.kind == "text" else repr(value)


def _value(cell: str, column: Column) -> Any:
    if not cell:
        return None
    if column.kind == "texts":
        return cell.split("; ")
    if column.kind == "json":
        return json.loads(cell)
    if column.kind == "truth":
        return cell == "true"
    return {"text": str, "number": float, "count": int}[column.kind](cell)


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


def _sync_folder(folder: Path) -> None:
    """Puts the name of a new file on the disk, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
