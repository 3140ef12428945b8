"""The columns of tables of records, derived from the fields of slices and series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, is_typeddict

from chestct.results.records import Record, SeriesResult, SliceResult, Status, fields_of

__all__ = ["Column", "columns_in", "columns_of", "compare_columns", "flat_record", "nested_record"]

Kind = Literal["text", "texts", "number", "count", "truth", "json"]


@dataclass(frozen=True)
class Column:
    """One column of a table of records.

    Attributes:
        name: Key of the record; `key.inner` for what stands in an object within it.
        kind: What its values are; `texts` is a list of sentences, `json` anything else.
    """

    name: str
    kind: Kind = "text"


def columns_of(labels: Sequence[str]) -> list[Column]:
    """The columns of slices and series of a model with these labels, in order; `notice` is last."""
    columns = {
        column.name: column
        for record in (SliceResult, SeriesResult)
        for field in fields_of(record)
        for column in _columns(field.name, field.hint, labels)
    }
    notice = columns.pop("notice")
    return [*columns.values(), notice]


def flat_record(record: Record, columns: Sequence[Column]) -> list[Any]:
    """The values of a record in the order of the columns; None for what it does not have.

    Raises:
        ValueError: The record holds something that has no column.
    """
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": kept for inner, kept in value.items()})
        else:
            flat[key] = value
    row = [flat.pop(column.name, None) for column in columns]
    if flat:
        raise ValueError(f"no column for {', '.join(flat)} in this output")
    return row


def nested_record(row: Sequence[Any], columns: Sequence[Column]) -> dict[str, Any]:
    """The record that `flat_record` made a row of."""
    record: dict[str, Any] = {}
    for value, column in zip(row, columns, strict=True):
        key, dot, inner = column.name.partition(".")
        if value is None:
            continue
        if dot:
            record.setdefault(key, {})[inner] = value
        else:
            record[key] = value
    return record


def columns_in(names: Sequence[str]) -> list[Column]:
    """The columns of a table by their names.

    Raises:
        ValueError: They are not those of records.
    """
    labels = [name.partition(".")[2] for name in names if name.startswith("probabilities.")]
    columns = columns_of(labels)
    if [column.name for column in columns] != list(names):
        raise ValueError("other columns")
    return columns


def compare_columns(path: Path, columns: Sequence[Column], labels: Sequence[str]) -> None:
    """Compares the columns of a table that is continued with those of a model.

    Raises:
        ValueError: The model has other labels.
    """
    if columns != columns_of(labels):
        names = ", ".join(c.name for c in columns if c.name.startswith("probabilities."))
        raise ValueError(
            f"{path}: holds results of a model with other labels: {names}. Name another file."
        )


def _columns(name: str, hint: Any, labels: Sequence[str]) -> list[Column]:
    if is_typeddict(hint):
        inner = [_columns(f"{name}.{field.name}", field.hint, labels) for field in fields_of(hint)]
        return [column for columns in inner for column in columns]
    if get_origin(hint) is dict:
        return [Column(f"{name}.{label}", "number") for label in labels]
    kinds: dict[Any, Kind] = {
        str: "text", Status: "text", list[str]: "texts", float: "number", int: "count",
        bool: "truth",
    }  # fmt: skip
    return [Column(name, kinds.get(hint, "json"))]
