from __future__ import annotations

import pytest

from benchmarks.perf_analyzer import find_perf_analyzer, perf_analyzer_rows, rows_of_table
from serving.local import LocalTriton

# What perf_analyzer 2.60.0 wrote for two requests in flight to a tiny model.
TABLE = """\
Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,\
Server Compute Input,Server Compute Infer,Server Compute Output,Client Recv,\
p50 latency,p90 latency,p95 latency,p99 latency
2,861.168,10,954,352,19,725,177,1,1970,3220,3979,5603
"""


def test_microseconds_become_milliseconds():
    assert rows_of_table(TABLE) == [
        {
            "concurrency": 2,
            "scans_per_s": 861.17,
            "p50_ms": 1.97,
            "p99_ms": 5.603,
            "parts_ms": {"queue": 0.352, "compute": 0.921},  # 19 + 725 + 177 us
        }
    ]


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


@pytest.mark.server
@pytest.mark.usefixtures("triton_environment")
def test_the_real_one_measures_a_served_model(published):
    command = find_perf_analyzer()
    if command is None:
        pytest.skip("no perf_analyzer on PATH: name it with PERF_ANALYZER")
    environment = published.folder / ".venv-triton"
    repository = published.folder / "model_repository"
    with LocalTriton(repository, environment=environment, models=("chestct_int8",)) as server:
        (row,) = perf_analyzer_rows(command, server.grpc_url, "chestct_int8", [2], 0.3)
        with pytest.raises(ValueError, match="perf_analyzer exited with"):
            perf_analyzer_rows(command, server.grpc_url, "nobody", [1], 0.3)
    assert row["concurrency"] == 2
    assert row["scans_per_s"] > 0
    assert 0 < row["p50_ms"] <= row["p99_ms"]
