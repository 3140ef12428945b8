from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.regression_check import OTHER_ENVIRONMENT, main

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks/results/chest-ct/latency.json"
PLACE = {
    "cpu": "A CPU",
    "cores": 2,
    "gpu": None,
    "packages": {"tensorflow": "2", "keras": "3", "onnxruntime": "1", "openvino": "6"},
    "server": {"nvidia-pytriton": "0", "onnxruntime": "1", "openvino": "6"},
    "date": "2026-01-01",
}


def result(path: Path, ratios: dict[tuple[str, str, int], float], **place) -> str:
    rows = [
        {
            "engine": engine,
            "variant": variant,
            "batch": batch,
            "p50_ms": 70 / ratio,
            "times_faster_than_keras_compiled": ratio,
        }
        for (engine, variant, batch), ratio in ratios.items()
    ]
    path.write_text(json.dumps({"environment": PLACE | place, "rows": rows}))
    return str(path)


BEFORE = {
    ("keras_compiled", "fp32", 1): 1.0,
    ("triton_grpc", "fp32", 1): 1.1,
    ("triton_grpc", "int8", 1): 3.5,
    ("triton_grpc", "int8", 8): 3.0,
}


@pytest.fixture
def guard(tmp_path):
    def run(now: dict, *options: str, **place) -> int:
        baseline = result(tmp_path / "baseline.json", BEFORE)
        new = result(tmp_path / "new.json", now, **place)
        return main([new, "--baseline", baseline, *options])

    return run


def test_as_fast_within_noise_passes_and_says_how_many_were_compared(guard, capsys):
    assert guard(BEFORE | {("triton_grpc", "int8", 1): 3.0}, date="2027-01-01") == 0
    assert capsys.readouterr().out.startswith("3 ratios of ")


def test_what_fell_is_listed_and_nothing_else(guard, capsys):
    assert guard(BEFORE | {("triton_grpc", "int8", 8): 2.4}) == 1  # 20 % less
    out = capsys.readouterr().out
    assert "| triton_grpc int8 8 | 3.00 x | 2.40 x | -20 % |" in out
    assert "int8 1" not in out
    assert guard(BEFORE | {("triton_grpc", "int8", 8): 2.4}, "--allowed", "0.25") == 0


def test_faster_is_no_failure(guard):
    assert guard({key: 2 * ratio for key, ratio in BEFORE.items()}) == 0


def test_row_that_is_gone_fails(guard, capsys):
    now = dict(BEFORE)
    del now["triton_grpc", "int8", 1]
    assert guard(now) == 1
    assert "| triton_grpc int8 1 | 3.50 x | not measured | |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"cores": 4}, "cores is 4, was 2"),
        ({"cpu": "Another"}, "cpu is Another, was A CPU"),
        (
            {"packages": PLACE["packages"] | {"onnxruntime": "2"}},
            "onnxruntime is 2, was 1",
        ),
        (
            {"server": PLACE["server"] | {"openvino": "7"}},
            "openvino of the server is 7, was 6",
        ),
    ],
)
def test_another_environment_is_refused_with_what_differs(guard, capsys, place, words):
    assert guard({("triton_grpc", "int8", 1): 0.1}, **place) == OTHER_ENVIRONMENT
    out = capsys.readouterr().out
    assert words in out
    assert out.count("\n") == 1
    assert "|" not in out


def test_nothing_in_common_has_failed(guard, capsys):
    assert guard({("openvino", "fp16", 1): 3.0}) == 1
    assert "nothing was compared" in capsys.readouterr().err


def test_files_that_are_no_results_are_one_line(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    for name, words in (
        ("list.json", "no result of"),
        ("absent.json", "no such file; `make bench` writes"),
    ):
        assert main([str(tmp_path / name), "--baseline", str(COMMITTED)]) == 1
        assert words in capsys.readouterr().err


def test_real_committed_result_against_itself_and_a_slower_twin(tmp_path, capsys):
    assert main([str(COMMITTED), "--baseline", str(COMMITTED)]) == 0
    found = json.loads(COMMITTED.read_text())
    for row in found["rows"]:
        if row["engine"] == "triton_grpc":
            row["times_faster_than_keras_compiled"] *= 0.7
    (tmp_path / "slower.json").write_text(json.dumps(found))
    capsys.readouterr()
    assert main([str(tmp_path / "slower.json"), "--baseline", str(COMMITTED)]) == 1
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines
    assert all(line.startswith("| triton_grpc ") for line in lines)


def test_files_to_lines_of_throughput_are_compared_too(tmp_path, capsys):
    def written(name: str, ratio: float) -> str:
        rows = [{"way": "int8", "times_faster_than_keras_compiled": ratio}]
        content = {"environment": PLACE, "rows": [], "files": {"rows": rows}}
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    assert main([written("new.json", 4.0), "--baseline", written("old.json", 6.0)]) == 1
    assert "| int8 | 6.00 x | 4.00 x | -33 % |" in capsys.readouterr().out
