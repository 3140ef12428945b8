"""Parquet files of results, written from a journal of JSON lines at the end of a run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from chestct.results.columns import (
    Column,
    columns_in,
    columns_of,
    compare_columns,
    flat_record,
    nested_record,
)
from chestct.results.records import Record, plain_text
from chestct.results.resume import ResumeIndex
from chestct.results.writers import JsonLines, sync_folder

__all__ = ["ParquetFile", "journal_of"]

ROW_GROUP_ROWS = 10_000  # bounds the memory of writing and of reading
JOURNAL_SUFFIX = ".journal"


class ParquetFile(JsonLines):
    """Parquet with the columns of `chestct.results.columns.columns_of`, in bounded row groups.

    Parquet cannot be appended to, so records go to JSON lines in `FILE.journal` beside it, and
    become Parquet on closing: rows that were there before come first, then the new ones, in a
    temporary file that is renamed. A run that was killed leaves the journal for the next one.

    Attributes:
        path: Where the journal is.
        table: Where the Parquet file is.
        finished: What both held on opening.
    """

    def __init__(
        self, path: Path, *, resume: bool = False, finished: ResumeIndex | None = None
    ) -> None:
        """As `RecordFile`.

        Raises:
            FileExistsError: It is there and `resume` is false.
            ValueError: It is no such file, or pyarrow is missing.
            OSError: It cannot be read or written.
        """
        self.table = path
        self._columns: Sequence[Column] = ()
        self._parquet = _pyarrow_parquet()
        if path.exists() and not resume:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        finished = ResumeIndex() if finished is None else finished
        for record in self._stored_records():
            finished.take(record)
        super().__init__(journal_of(path), resume=resume, finished=finished)

    def start(self, labels: Sequence[str]) -> None:
        """Tells of which model the records will be: see `RecordFile.start`."""
        if self._columns:
            compare_columns(self.table, self._columns, labels)
        self._columns = columns_of(labels)

    def _finish(self) -> None:
        """Writes the table from the journal."""
        unfinished = self.table.with_name(self.table.name + ".tmp")
        is_empty = not self.path.stat().st_size
        if not self._columns or (is_empty and self.table.exists()):  # or never started
            if is_empty:
                self.path.unlink()
            return
        try:
            with self._parquet.ParquetWriter(unfinished, self._schema()) as writer:
                for rows in _grouped(self._all_records(), ROW_GROUP_ROWS):
                    writer.write_batch(self._batch(rows))
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.table)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(self.table.parent)
        self.path.unlink()

    def _all_records(self) -> Iterator[Record]:
        written = ResumeIndex(retry_errors=True)
        for record in self.finished.without_retried(self._stored_records()):
            written.take(record)
            yield record
        for record in self.finished.without_retried(self.records()):
            # A run killed after the rename and before the end of its journal wrote it already.
            if not written.has_record(record):
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
        if not self.table.exists():
            return
        try:
            with self._parquet.ParquetFile(self.table) as file:
                self._columns = self._columns or columns_in(file.schema_arrow.names)
                for batch in file.iter_batches(ROW_GROUP_ROWS):
                    for row in batch.to_pylist():
                        values = [
                            json.loads(value) if value and column.kind == "json" else value
                            for value, column in zip(row.values(), self._columns, strict=True)
                        ]
                        yield nested_record(values, self._columns)
        except ValueError as error:  # pyarrow's ArrowInvalid among them
            raise ValueError(f"{self.table}: no Parquet file of chestct classify") from error


def journal_of(path: Path) -> Path:
    """Where the records of a Parquet file are until the end of the run."""
    return path.with_name(path.name + JOURNAL_SUFFIX)


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            'Parquet needs pyarrow, which is not installed: pip install "chestct[parquet]"'
        ) from error
    return pyarrow.parquet


def _grouped(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    coming = iter(records)
    while group := list(islice(coming, size)):
        yield group
