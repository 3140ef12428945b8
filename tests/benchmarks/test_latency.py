from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.latency import LatencyConfig, Timing, main, markdown
from export.onnx import sha256_of
from export.repository import RepositoryConfig, write_repository

ENGINES = {
    "keras_predict", "keras_compiled", "onnxruntime",
    "triton_grpc", "triton_http", "triton_grpc_shm",
}  # fmt: skip


def test_row_by_hand():
    timing = Timing(
        "triton_grpc",
        "fp32",
        2,
        [10.0, 30.0, 20.0],
        [{"queue": 1.0, "compute": 15.0, "wire": 4.0}] * 3,
    )
    row = timing.row(decode_ms=4.0)
    assert (row["n"], row["p50_ms"], row["min_ms"]) == (3, 20.0, 10.0)
    assert row["scans_per_s"] == 100.0  # 2 scans in 20 ms
    assert row["parts_ms"] == {"decode": 8.0, "queue": 1.0, "compute": 15.0, "wire": 4.0}


def test_engine_without_a_server_has_no_server_parts():
    row = Timing("onnxruntime", "fp32", 1, [5.0], []).row(1.0)
    assert row["parts_ms"] == {"decode": 1.0}


@pytest.mark.parametrize("rounds", [{0: 3}, {1: 0}, {"a": 1}])
def test_rounds_that_measure_nothing_are_refused(rounds):
    with pytest.raises(ValueError, match=r"expected \{batch size: number\}"):
        LatencyConfig(rounds=rounds)


@pytest.mark.server
def test_all_engines_are_measured_in_one_run(
    trained, exported, triton_environment, tmp_path, monkeypatch, capsys
):
    (tmp_path / "parity.json").write_text(
        json.dumps({"holds": True, "onnx_sha256": sha256_of(exported)})
    )
    repository = tmp_path / "model_repository"
    write_repository(
        RepositoryConfig(exported, trained.model, tmp_path / "parity.json", repository)
    )
    (tmp_path / ".venv-triton").symlink_to(triton_environment)
    (tmp_path / "latency.yaml").write_text(
        f"model: {trained.model}\nonnx: {exported}\nrepository: {repository}\n"
        f"scans: {trained.scans}\nrounds: {{1: 3, 2: 2}}\n"
    )
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "results" / "latency.json"
    assert main(["--config", "latency.yaml", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert {(row["engine"], row["batch"]) for row in result["rows"]} == {
        (engine, batch) for engine in ENGINES for batch in (1, 2)
    }
    for row in result["rows"]:
        assert row["variant"] == "fp32"
        assert row["n"] == {1: 3, 2: 2}[row["batch"]]
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert np.isclose(row["scans_per_s"], 1000 * row["batch"] / row["p50_ms"], rtol=0.01)
        server = row["engine"].startswith("triton")
        assert ({"queue", "compute", "wire"} <= set(row["parts_ms"])) == server
        if server:
            parts = row["parts_ms"]
            assert parts["compute"] > 0
            assert parts["queue"] >= 0
            assert parts["wire"] < row["p99_ms"]
        if row["engine"] == "keras_predict":
            assert row["times_faster_than_keras_predict"] == 1
    assert output.with_suffix(".md").read_text() == markdown(result) == capsys.readouterr().out


def test_nothing_trained_is_one_line(tmp_path, capsys):
    (tmp_path / "latency.yaml").write_text(f"model: {tmp_path}\n")
    output = tmp_path / "latency.json"
    assert main(["--config", str(tmp_path / "latency.yaml"), "--output", str(output)]) == 1
    assert "run python -m training.fit" in capsys.readouterr().err
    assert not output.exists()
