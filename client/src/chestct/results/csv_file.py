"""CSV files of results."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
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
from chestct.results.writers import RecordFile

__all__ = ["CsvFile"]


class CsvFile(RecordFile):
    """Rows of the columns of `chestct.results.columns.columns_of`, UTF-8, one line each.

    Control characters and undecodable bytes of file names become escapes; lists of sentences are
    joined by `; `.
    """

    _columns: Sequence[Column] = ()

    def start(self, labels: Sequence[str]) -> None:
        """Writes the names of the columns, or compares them with those that are there."""
        if self._columns:
            compare_columns(self.path, self._columns, labels)
        else:
            self._columns = columns_of(labels)
            self._write_all(self._header())

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
        values = [
            _value(cell, column) for cell, column in zip(_cells(line), self._columns, strict=True)
        ]
        return nested_record(values, self._columns)

    def _decoded(self, line: bytes, number: int) -> Record | None:
        if number > 1:
            return super()._decoded(line, number)
        self._columns = columns_in(_cells(line))
        return None

    def _may_be_torn(self, line: bytes, number: int) -> bool:
        start = _csv_line([column.name for column in columns_of(())][:3])[:-1]
        return number > 1 or line.startswith(start) or start.startswith(line)

    def _header(self) -> bytes:
        return _csv_line([column.name for column in self._columns])


def _csv_line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cells(line: bytes) -> list[str]:
    try:
        (cells,) = csv.reader([line.decode()], strict=True)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return cells


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
