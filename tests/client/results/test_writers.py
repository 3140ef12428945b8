"""Files of results: what a crash leaves of them can be continued, whatever their format."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chestct.contract import LUNG_WINDOW, ModelMetadata
from chestct.errors import ScanDecodeError
from chestct.inference.predictions import Predictions
from chestct.results.csv_file import CsvFile
from chestct.results.formats import format_of, open_records
from chestct.results.parquet import ParquetFile
from chestct.results.records import error_line, json_text, result_line
from chestct.results.resume import ResumeIndex, folder_of
from chestct.results.writers import DecodedInput, JsonLines, RecordFile

LABELS = ("large.cell", "normal")
NOTHING = DecodedInput(None)


def ok(path: str, *reasons: str) -> dict[str, Any]:
    facts = ModelMetadata(LABELS, LUNG_WINDOW, 1.0, 5.0, "run-3", "cd" * 32)
    values = np.array([[0.1, 0.9]], np.float32)
    predictions = Predictions(values, None, np.array([1.5], np.float32), facts, "chestct", "4")
    return result_line(path, predictions, 0, decode_ms=1.5, infer_ms=2.25, reasons=reasons)


def error(path: str) -> dict[str, Any]:
    return error_line(path, ScanDecodeError(f'{path}: broken, "very"\nmuch'))


def series(folder: str, number: int) -> dict[str, Any]:
    return {
        "path": folder,
        "status": "ok",
        "label": "normal",
        "probabilities": {"large.cell": 0.1, "normal": 0.9},
        "series": number,
        "num_slices": 12,
        "num_out_of_domain": 0,
        "num_failed": 0,
        "aggregation": {"rule": "mean", "num_slices": 3},
        "slice": {"path": f"{folder}/1.dcm", "evidence": 0.1},
        "gaps_mm": [[1.0, 3.5]],
        "warnings": ["gaps: 1", "few slices: 12"],
        "notice": "no",
    }


def in_series(path: str, number: int) -> dict[str, Any]:
    return ok(path) | {"series": number}


def written(output: Any, *records: dict[str, Any]) -> None:
    output.start(LABELS)
    for record in records:
        output.add(record, NOTHING)
    output.close()


def read_back(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(params=["out.jsonl", "out.csv", "out.parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param.endswith("parquet"):
        pytest.importorskip("pyarrow")
    return tmp_path / request.param


def opened(path: Path, *, resume: bool = False, retry_errors: bool = False) -> Any:
    return open_records(path, format_of(path), resume=resume, retry_errors=retry_errors)


def finished_in(path: Path) -> ResumeIndex:
    output = opened(path, resume=True)
    output.close()
    return output.finished


@pytest.mark.parametrize(
    ("name", "chosen", "form"),
    [("a.csv", None, "csv"), ("a.PARQUET", None, "parquet"), ("a.pq", None, "parquet"),
     ("a", None, "jsonl"), ("a.json", None, "jsonl"), ("a.csv", "jsonl", "jsonl")],
)  # fmt: skip
def test_format_is_chosen_or_told_by_the_suffix(name: str, chosen: str | None, form: str) -> None:
    assert format_of(Path(name), chosen) == form


def test_a_second_run_continues_the_first(path: Path) -> None:
    written(opened(path), ok("a", "small: very", "blank: yes"), error("b"))
    again = opened(path, resume=True)
    assert [name in again.finished for name in ("a", "b", "c")] == [True, True, False]
    assert len(again.finished) == 2
    written(again, ok("c"))
    assert [row["path"] for row in read_back(path)] == ["a", "b", "c"]
    assert len(finished_in(path)) == 3


def test_nothing_is_overwritten_without_being_asked(path: Path) -> None:
    written(opened(path), ok("a"))
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        opened(path)
    assert path.read_bytes() == before


def test_two_runs_do_not_write_to_one_file(path: Path) -> None:
    first = opened(path)
    with pytest.raises(ValueError, match="another run is writing to it"):
        opened(path, resume=True)
    written(first, ok("a"))
    assert len(finished_in(path)) == 1


def test_file_of_another_model_is_left_alone(path: Path) -> None:
    written(opened(path), ok("a"))
    before = path.read_bytes()
    again = opened(path, resume=True)
    if path.suffix == ".jsonl":
        again.start(("x", "y"))  # its lines say for themselves which model made them
    else:
        with pytest.raises(ValueError, match=r"with other labels: .*another file"):
            again.start(("x", "y"))
    again.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", [JsonLines, CsvFile])
def test_every_cut_can_be_continued(tmp_path: Path, make: Callable[..., RecordFile]) -> None:
    """Wherever the line was torn: what is whole stays, and the rest is made again."""
    path = tmp_path / "out"
    written(make(path), ok("a"), error("b"), ok("c"))
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    num_header = len(ends) - 3
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        again = make(path, resume=True)
        num_whole = max(sum(end <= length for end in ends) - num_header, 0)
        assert len(again.finished) == num_whole
        written(again, *[ok("a"), error("b"), ok("c")][num_whole:])
        assert path.read_bytes() == whole


def test_hole_that_a_power_cut_leaves_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(JsonLines(path), ok("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(5000))
    assert len(finished_in(path)) == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "foreign",
    ["path,label\n1.png,normal\n", "no newline", "[1]\n", '{"path": "a"}\n', "\n", "3\n",
     '{"path": 3, "status": "ok"}\n', '{"path": "a", "status": "no"}\n'],
)  # fmt: skip
def test_foreign_file_is_left_alone(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(json_text(ok("a")) + foreign)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2 is not a record of chestct classify"):
        JsonLines(path, resume=True)
    assert path.read_bytes() == before


def test_no_parquet_at_all(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "out.parquet"
    path.write_text("precious")
    with pytest.raises(ValueError, match="no Parquet file"):
        ParquetFile(path, resume=True)
    assert path.read_text() == "precious"


def test_rows_hold_what_the_json_line_holds(path: Path) -> None:
    name = b'sc\xe9n\n\xff,".png'.decode("utf-8", "surrogateescape")
    records = [ok(name, "small: a; b"), ok("b"), error("c")]
    written(opened(path), *records)
    rows = read_back(path)
    if path.suffix == ".jsonl":
        assert rows == records
        return
    if path.suffix == ".csv":
        assert len(path.read_text().splitlines()) == 4
    escaped = 'sc\\udce9n\\n\\udcff,".png'
    assert [row["path"] for row in rows] == [escaped, "b", "c"]
    assert [float(row["probabilities.large.cell"] or 0) for row in rows] == [0.1, 0.1, 0]
    assert [row["error.type"] or None for row in rows] == [None, None, "ScanDecodeError"]
    assert name in finished_in(path)


def test_csv_record_reads_back(tmp_path: Path) -> None:
    output = CsvFile(tmp_path / "out.csv")
    output.start(LABELS)
    for record in (ok("a", "small: very"), ok("b"), series("c", 2)):
        assert output.decode(output.encode(record)) == record
    output.close()


def test_parquet_has_bounded_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("chestct.results.parquet.ROW_GROUP_ROWS", 4)
    path = tmp_path / "out.parquet"
    written(ParquetFile(path), *(ok(str(index)) for index in range(10)))
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(index).num_rows for index in range(3)] == [4, 4, 2]
    assert pq.read_schema(path).field("probabilities.normal").type == "double"
    assert sorted(os.listdir(tmp_path)) == ["out.parquet"]


def test_parquet_killed_at_each_step_of_closing(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "out.parquet"
    journal = tmp_path / "out.parquet.journal"
    first = ParquetFile(path)
    first.start(LABELS)
    first.add(ok("a"), NOTHING)
    kept = journal.read_bytes()
    first.close()
    # Killed after the rename, before the journal went: its records are in the file already.
    journal.write_bytes(kept + json_text(ok("b")).encode()[:30])
    again = ParquetFile(path, resume=True)
    assert len(again.finished) == 1
    written(again, ok("b"))
    assert [row["path"] for row in read_back(path)] == ["a", "b"]
    # Killed while the new file was being written.
    (tmp_path / "out.parquet.tmp").write_bytes(b"half")
    journal.write_text(json_text(ok("c")))
    written(ParquetFile(path, resume=True), ok("d"))
    assert [row["path"] for row in read_back(path)] == ["a", "b", "c", "d"]
    assert sorted(os.listdir(tmp_path)) == ["out.parquet"]


def test_missing_pyarrow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r'pip install "chestct\[parquet\]"'):
        ParquetFile(tmp_path / "out.parquet")


def test_slices_whose_series_has_no_record_are_pending(path: Path) -> None:
    slices = [in_series("f/1.dcm", 1), in_series("f/2.dcm", 2), in_series("f/g/3.dcm#4", 1)]
    written(opened(path), ok("p.png"), *slices)
    assert set(finished_in(path).pending) == {"f/1.dcm", "f/2.dcm", "f/g/3.dcm#4"}
    assert finished_in(path).pending["f/1.dcm"] == slices[0]
    written(opened(path, resume=True), series("f", 1), series("f/g", 1))
    finished = finished_in(path)
    assert set(finished.pending) == {"f/2.dcm"}
    assert [finished.has_series("f", number) for number in (1, 2)] == [True, False]
    assert [bool(row["num_slices"]) for row in read_back(path) if "num_slices" in row][-2:] == [
        True,
        True,
    ]


def outcomes(path: Path) -> list[tuple[str, str]]:
    return [(row["path"], row["status"]) for row in read_back(path)]


def test_errors_that_are_tried_again_give_way_to_the_new_record(path: Path) -> None:
    written(opened(path), ok("a"), error("b"), error("c"), error("d"))
    again = opened(path, resume=True, retry_errors=True)
    assert [name in again.finished for name in "abcd"] == [True, False, False, False]
    written(again, ok("b"), error("c"), ok("e"))  # and "d" was not among the scans of this run
    expected = [("a", "ok"), ("d", "error"), ("b", "ok"), ("c", "error"), ("e", "ok")]
    assert outcomes(path) == expected
    assert sorted(os.listdir(path.parent)) == [path.name]
    assert len(finished_in(path)) == 5
    assert outcomes(path) == expected


def test_error_of_a_file_gives_way_to_the_records_of_its_frames(path: Path) -> None:
    written(opened(path), error("run.dcm"), error("study.zip"), error("other.zip"))
    names = ("run.dcm#1", "run.dcm#2", "study.zip!a.dcm")
    written(opened(path, resume=True, retry_errors=True), *map(ok, names))
    assert outcomes(path) == [("other.zip", "error"), *((name, "ok") for name in names)]


def test_killed_while_errors_are_tried_again(path: Path) -> None:
    """The error stays beside the new record, and neither is lost nor made again."""
    written(opened(path), ok("a"), error("b"))
    killed = opened(path, resume=True, retry_errors=True)
    killed.start(LABELS)
    killed.add(ok("b"), NOTHING)
    kept = {file: file.read_bytes() for file in path.parent.iterdir()}
    killed.close()
    for file in path.parent.iterdir():
        file.unlink()
    for file, content in kept.items():
        file.write_bytes(content)
    after = opened(path, resume=True)
    assert "b" in after.finished
    written(after, ok("c"))
    assert outcomes(path) == [("a", "ok"), ("b", "error"), ("b", "ok"), ("c", "ok")]


@pytest.mark.parametrize(
    ("path", "folder"),
    [("a/b.dcm", "a"), ("b.dcm", "."), ("a/b.dcm#12", "a"), ("a/s.zip!x/y.dcm", "a/s.zip"),
     ("a/s.ZIP!y", "a/s.ZIP"), ("/b", "/"), ("a!b/c", "a!b")],
)  # fmt: skip
def test_folder_of_a_record(path: str, folder: str) -> None:
    assert folder_of(path) == folder
