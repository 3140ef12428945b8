from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import perf_analyzer
from benchmarks.perf_analyzer import find_perf_analyzer, perf_analyzer_rows, rows_of_table
from benchmarks.throughput import by_perf_analyzer
from benchmarks.variants import Variant
from tests.support.triton import serve

# What perf_analyzer 2.60.0 wrote for two requests in flight to a tiny model.
TABLE = """\
Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,\
Server Compute Input,Server Compute Infer,Server Compute Output,Client Recv,\
p50 latency,p90 latency,p95 latency,p99 latency
2,861.168,10,954,352,19,725,177,1,1970,3220,3979,5603
"""
FIGURES = {
    "concurrency": 2,
    "scans_per_s": 861.17,
    "p50_ms": 1.97,
    "p99_ms": 5.603,
    "parts_ms": {"queue": 0.352, "compute": 0.921},  # 19 + 725 + 177 us
}
# Behaves as perf_analyzer 2.60.0 does: what it exits with, and that a table is written on success
# alone.
STAND_IN = f"""
import pathlib, sys, time
if sys.argv[1:] == ["--version"]:
    sys.exit("Perf Analyzer Version 0.0.0")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["-m"] == "chestct_unstable":
    sys.exit(2)
if options["-m"] == "chestct_unknown":
    sys.stderr.write("error: failed to get model metadata")
    sys.exit(99)
if options["-m"] == "chestct_slow":
    time.sleep(60)
assert options["-u"] == "127.0.0.1:1"
assert options["--measurement-mode"] == "count_windows"
concurrency = options["--concurrency-range"].split(":")[0]
assert int(options["--measurement-request-count"]) >= 4 * int(concurrency)
pathlib.Path(options["-f"]).write_text({TABLE!r})
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> list[str]:
    script = tmp_path / "perf_analyzer.py"
    script.write_text(STAND_IN)
    monkeypatch.setenv("PERF_ANALYZER", f"{sys.executable} {script}")
    return [sys.executable, str(script)]


def test_microseconds_become_milliseconds():
    assert rows_of_table(TABLE) == [FIGURES]


def test_missing_column_is_named():
    with pytest.raises(ValueError, match="'p99 latency'"):
        rows_of_table(TABLE.replace("p99", "p100"))


@pytest.mark.parametrize("command", ["no-such-command", "true", "python --help"])
def test_something_else_of_that_name_is_not_taken_for_it(command, monkeypatch):
    monkeypatch.setenv("PERF_ANALYZER", command)
    assert find_perf_analyzer() is None


def test_nothing_on_the_path_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.delenv("PERF_ANALYZER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_perf_analyzer() is None
    rows, failures = by_perf_analyzer([], (1,), "grpc://127.0.0.1:1")
    assert rows == []
    assert failures == {"perf_analyzer": "not installed; name it with PERF_ANALYZER"}


def test_windows_that_never_agree_are_a_row_without_figures(stand_in):
    found = perf_analyzer_rows(stand_in, "grpc://127.0.0.1:1", "chestct_unstable", [1, 100])
    assert found == [
        {"model": "chestct_unstable", "concurrency": number, "stable": False} for number in (1, 100)
    ]


def test_one_that_hangs_is_an_error(stand_in, monkeypatch):
    monkeypatch.setattr(perf_analyzer, "TIMEOUT_S", 0.5)
    with pytest.raises(ValueError, match=r"did not end within 0\.5 s at concurrency 1"):
        perf_analyzer_rows(stand_in, "grpc://127.0.0.1:1", "chestct_slow", [1])


@pytest.mark.usefixtures("stand_in")
def test_model_that_fails_costs_no_other_its_rows():
    variants = [Variant(name, Path(), Path(), None) for name in ("unknown", "int8")]
    rows, failures = by_perf_analyzer(variants, (2,), "grpc://127.0.0.1:1")
    assert rows == [FIGURES | {"model": "chestct_int8", "stable": True}]
    assert failures == {
        "perf_analyzer on chestct_unknown": "perf_analyzer exited with 99: error: failed to get "
        "model metadata"
    }


@pytest.mark.server
@pytest.mark.usefixtures("triton_environment")
def test_the_real_one_measures_a_served_model(published):
    command = find_perf_analyzer()
    if command is None:
        pytest.skip("no perf_analyzer on PATH: name it with PERF_ANALYZER")
    environment = published.folder / ".venv-triton"
    repository = published.folder / "model_repository"
    with serve(repository, environment, models=("chestct_int8",)) as server:
        (row,) = perf_analyzer_rows(command, server.grpc_url, "chestct_int8", [2])
        with pytest.raises(ValueError, match="perf_analyzer exited with"):
            perf_analyzer_rows(command, server.grpc_url, "nobody", [1])
    assert (row["model"], row["concurrency"]) == ("chestct_int8", 2)
    if row["stable"]:  # on a machine with other work it need not be
        assert row["scans_per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
