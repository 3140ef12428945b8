from __future__ import annotations

import json
import os
import socket
import time

import mlflow
import pytest

from training.tracking import main, tracked_run


def status(run_id: str) -> str:
    return mlflow.get_run(run_id).info.status


def test_run_holds_params_metrics_by_epoch_and_files(tmp_path):
    (tmp_path / "facts.json").write_text("{}")
    with tracked_run("one") as run:
        run.log_params({"block": 5})
        for epoch, loss in enumerate([0.9, 0.5]):
            run.log_metrics({"loss": loss}, step=epoch)
        run.log_file(tmp_path / "facts.json", "model")
    stored = mlflow.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"block": "5"}
    history = mlflow.MlflowClient().get_metric_history(run.run_id, "loss")
    assert [(item.step, item.value) for item in history] == [(0, 0.9), (1, 0.5)]
    assert [item.path for item in mlflow.artifacts.list_artifacts(run_id=run.run_id)] == ["model"]
    assert len(stored.data.tags["git_commit"].removesuffix("-dirty")) in (7, 40)


@pytest.mark.parametrize(
    ("error", "expected"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_no_run_stays_open_after_a_failure(error, expected):
    with pytest.raises(error), tracked_run("broken") as run:
        raise error
    assert status(run.run_id) == expected
    assert mlflow.active_run() is None


def test_killed_run_goes_on():
    with pytest.raises(KeyboardInterrupt), tracked_run("resumed") as first:
        raise KeyboardInterrupt
    with tracked_run("resumed", first.run_id) as second:
        pass
    assert second.run_id == first.run_id
    assert status(first.run_id) == "FINISHED"


def test_unknown_run_begins_anew():
    with tracked_run("new", "0" * 32) as run:
        assert run.run_id != "0" * 32


def test_unreachable_server_is_said_with_its_address(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", address)
        monkeypatch.setitem(os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        started = time.monotonic()
        refused = pytest.raises(ValueError, match=f"MLflow at {address} does not answer")
        with refused, tracked_run("x"):
            pass
        assert time.monotonic() - started < 60


def test_files_are_stored_in_the_run_of_a_training(tmp_path, capsys):
    with tracked_run("train") as run:
        pass
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"run": run.run_id}))
    (tmp_path / "model.onnx").write_bytes(b"graph")
    assert main([str(tmp_path / "model.onnx"), "--run", str(record), "--folder", "onnx"]) == 0
    files = mlflow.artifacts.list_artifacts(run_id=run.run_id, artifact_path="onnx")
    assert [item.path for item in files] == ["onnx/model.onnx"]
    assert main(["nowhere.onnx", "--run", str(record)]) == 1
    assert "no such file: nowhere.onnx" in capsys.readouterr().err
