"""The record of one scan, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, is_typeddict

import jsonschema
import numpy as np
import pytest

from chestct.contract import LUNG_WINDOW, NOT_A_MEDICAL_DEVICE, ModelMetadata
from chestct.errors import OutOfDomainError, ScanDecodeError
from chestct.imaging.metadata import SliceMetadata
from chestct.inference.predictions import Predictions
from chestct.results.columns import columns_of
from chestct.results.records import (
    SeriesResult,
    SliceResult,
    error_line,
    fields_of,
    json_text,
    record_schema,
    result_line,
)
from chestct.results.series import SeriesSlice, series_record

README = Path(__file__).resolve().parents[3] / "client" / "README.md"


@pytest.fixture
def predictions() -> Predictions:
    facts = ModelMetadata(("cancer", "normal"), LUNG_WINDOW, 1.2, 5.0, "run-3", "cd" * 32)
    probabilities = np.array([[0.1, 0.9], [0.7, 0.3]], np.float32)
    return Predictions(probabilities, None, np.array([1.5, 7.1], np.float32), facts, "chestct", "4")


def test_result_line_has_the_fields_of_the_design(predictions: Predictions) -> None:
    line = result_line("a/b.dcm", predictions, 1, decode_ms=1.23456, infer_ms=20.0)
    assert line == {
        "path": "a/b.dcm",
        "status": "ok",
        "label": "cancer",
        "probabilities": {"cancer": 0.7, "normal": 0.3},
        "in_domain": False,
        "reasons": ["unlike the training scans: distance 7.1, limit 5.0"],
        "domain_distance": 7.1,
        "model": {"name": "chestct", "version": "4", "run": "run-3"},
        "ms": {"decode": 1.235, "infer": 20.0},
        "notice": NOT_A_MEDICAL_DEVICE,
    }
    assert list(line) == [
        "path",
        "status",
        "label",
        "probabilities",
        "in_domain",
        "reasons",
        "domain_distance",
        "model",
        "ms",
        "notice",
    ]


def test_in_domain_is_no_reason_at_all(predictions: Predictions) -> None:
    def line(index: int, *reasons: str) -> dict[str, Any]:
        return result_line("a", predictions, index, decode_ms=0, infer_ms=0, reasons=reasons)

    assert line(0)["in_domain"] is True
    assert "reasons" not in line(0)
    assert line(0, "small: very")["in_domain"] is False
    assert line(0, "small: very")["reasons"] == ["small: very"]
    assert line(1, "small: very", "blank: yes")["reasons"] == [
        "small: very",
        "blank: yes",
        "unlike the training scans: distance 7.1, limit 5.0",
    ]


def test_numbers_read_back_as_the_same_float32(predictions: Predictions) -> None:
    values = np.random.default_rng(1).random((50, 2), np.float32) * np.float32(1e-6)
    for index, value in enumerate(values):
        answer = Predictions(values, None, values[:, 0], predictions.metadata, "chestct", "4")
        line = json.loads(json_text(result_line("a", answer, index, decode_ms=0, infer_ms=0)))
        assert np.float32(line["probabilities"]["cancer"]) == value[0]
        assert np.float32(line["domain_distance"]) == value[0]


def test_error_line_leaves_out_what_does_not_apply() -> None:
    line = error_line("a.png", ScanDecodeError("a.png: the file is empty"))
    assert line == {
        "path": "a.png",
        "status": "error",
        "error": {"type": "ScanDecodeError", "message": "a.png: the file is empty"},
        "notice": NOT_A_MEDICAL_DEVICE,
    }


def test_json_text_is_one_line_whatever_the_path() -> None:
    path = b"sc\xe9n\n\xff \xc3\xa9.png".decode("utf-8", "surrogateescape")
    text = json_text(error_line(path, ScanDecodeError(f"{path}: broken")))
    assert text.isascii()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert json.loads(text)["path"] == path


def every_kind_of_record(predictions: Predictions) -> Iterator[dict[str, Any]]:
    for index in (0, 1):
        yield result_line("a.dcm", predictions, index, decode_ms=1, infer_ms=2)
    yield error_line("a", ScanDecodeError("a: broken"))
    yield error_line("a", OutOfDomainError("a: a scout", "localizer"))
    facts = SliceMetadata(series_uid="1.2", study_uid="1", position_mm=3.0, kernel="B")
    chest = [
        SeriesSlice(f"f/{index}", {"cancer": 0.2, "normal": 0.8}, True, facts) for index in range(3)
    ]
    yield series_record(chest, num_failed=2, with_uids=True) | {"series": 1}
    yield series_record([SeriesSlice("a", {"x": 1.0}, True, SliceMetadata())])
    yield series_record([SeriesSlice("a", {"x": 1.0}, False, SliceMetadata())])


def test_every_record_fits_the_schema(predictions: Predictions) -> None:
    schema = jsonschema.Draft202012Validator(record_schema())
    records = list(every_kind_of_record(predictions))
    for record in records:
        schema.validate(json.loads(json_text(record)))
        for key in ("notice", "status"):
            assert not schema.is_valid({name: record[name] for name in record if name != key})
    assert not schema.is_valid(records[0] | {"patient": "Doe"})
    assert not schema.is_valid(records[0] | {"status": "error"})
    assert not schema.is_valid(records[0] | {"probabilities": {"cancer": 1.1}})
    assert not schema.is_valid(records[2] | {"label": "cancer"})


def test_fields_come_in_the_order_of_their_declaration(predictions: Predictions) -> None:
    for record in every_kind_of_record(predictions):
        names = list(json.loads(json_text(dict(reversed(record.items())))))
        assert names == list(json.loads(json_text(record)))
        assert (names[0], names[-1]) == ("path", "notice")


def test_columns_stay_those_of_tables_that_are_continued() -> None:
    assert [(column.name, column.kind) for column in columns_of(["x", "y.z"])] == [
        ("path", "text"), ("status", "text"), ("label", "text"), ("probabilities.x", "number"),
        ("probabilities.y.z", "number"), ("in_domain", "truth"), ("reasons", "texts"),
        ("domain_distance", "number"), ("model.name", "text"), ("model.version", "text"),
        ("model.run", "text"), ("ms.decode", "number"), ("ms.infer", "number"),
        ("error.type", "text"), ("error.kind", "text"), ("error.message", "text"),
        ("series", "count"), ("study_uid", "text"), ("series_uid", "text"), ("sop_uid", "text"),
        ("num_slices", "count"), ("num_out_of_domain", "count"), ("num_failed", "count"),
        ("aggregation.rule", "text"), ("aggregation.num_slices", "count"), ("slice.path", "text"),
        ("slice.position_mm", "number"), ("slice.evidence", "number"), ("kernel", "text"),
        ("gaps_mm", "json"), ("warnings", "texts"), ("notice", "text"),
    ]  # fmt: skip


def table_of(record: Any, prefix: str = "", when: str = "") -> Iterator[str]:
    """Rows of a table in Markdown: field, when it is there, meaning."""
    for field in fields_of(record):
        there = field.when or (when or "always" if field.is_required else "sometimes")
        if not is_typeddict(field.hint):
            yield f"| `{prefix}{field.name}` | {there} | {field.meaning} |"
        else:
            yield from table_of(field.hint, f"{field.name}.", there)


@pytest.mark.parametrize("record", [SliceResult, SeriesResult])
def test_readme_holds_the_table_of_all_fields(record: Any) -> None:
    table = "\n".join(["| field | there | meaning |", "| --- | --- | --- |", *table_of(record)])
    assert f"\n{table}\n\n" in README.read_text(), f"expected in {README}:\n{table}"
