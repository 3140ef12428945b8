from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import yaml

import training.track.compare
from tests.support.ports import free_port
from training.track.mlflow_run import main, shown_address, tagged_runs, tracked_run

pytestmark = pytest.mark.xdist_group("tracking")  # its fixtures are made once


def status(run_id: str) -> str:
    return mlflow.get_run(run_id).info.status


def test_run_holds_params_metrics_by_epoch_and_files(tmp_path):
    (tmp_path / "facts.json").write_text("{}")
    with tracked_run("one") as run:
        run.log_params({"block": 5})
        for epoch, loss in enumerate([0.9, 0.5]):
            run.log_metrics({"loss": loss}, step=epoch)
        run.log_file(tmp_path / "facts.json", "model")
        known = run.recorded()
    stored = mlflow.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"block": "5"} == known.params
    assert known.tags["git_commit"] == stored.data.tags["git_commit"]
    assert known.begun.timestamp() * 1000 == pytest.approx(stored.info.start_time)
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_finished_run_stays_finished_when_more_cannot_be_added(error):
    with tracked_run("trained") as run:
        pass
    with pytest.raises(error), tracked_run("card", run.run_id):
        raise error
    assert status(run.run_id) == "FINISHED"
    assert mlflow.active_run() is None


def test_unknown_run_begins_anew():
    with tracked_run("new", "0" * 32) as run:
        assert run.run_id != "0" * 32


def test_tags_of_a_block_and_the_commit_of_the_beginning_stay(monkeypatch):
    monkeypatch.setattr("training.track.mlflow_run.git_commit", lambda: "first")
    with tagged_runs({"sweep": "name"}), tracked_run("tagged") as run:
        pass
    monkeypatch.setattr("training.track.mlflow_run.git_commit", lambda: "second")
    with tracked_run("evaluate", run.run_id):
        pass
    tags = mlflow.get_run(run.run_id).data.tags
    assert (tags["sweep"], tags["git_commit"]) == ("name", "first")
    with tracked_run("other") as run:
        pass
    tags = mlflow.get_run(run.run_id).data.tags
    assert "sweep" not in tags
    assert tags["git_commit"] == "second"


def test_scores_are_recorded_with_interval_and_n():
    scores = {
        "n": 12, "groups": 3,
        "accuracy": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12},
        "macro_auroc": {"value": float("nan"), "low": float("nan"), "high": float("nan")},
        "classes": {"normal": {"auroc": 0.5}}, "confusion": [[6, 6]],
    }  # fmt: skip
    with tracked_run("scores") as run:
        run.log_scores("grouped", scores)
    assert mlflow.get_run(run.run_id).data.metrics == {
        "grouped.n": 12, "grouped.accuracy": 0.5, "grouped.accuracy.low": 0.25,
        "grouped.accuracy.high": 0.75,
    }  # fmt: skip


def test_what_mlflow_refuses_within_a_run_is_one_line():
    started: list[str] = []

    def change_a_parameter() -> None:
        with tracked_run("twice") as run:
            started.append(run.run_id)
            run.log_params({"block": 5})
            run.log_params({"block": 4})

    with pytest.raises(ValueError, match=r"MLflow at sqlite:.*value") as raised:
        change_a_parameter()
    assert "\n" not in str(raised.value)
    assert status(started[0]) == "FAILED"


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
    record.write_text(json.dumps({"training_run": run.run_id}))
    assert main([str(tmp_path / "model.onnx"), "--run", str(record)]) == 0
    files = mlflow.artifacts.list_artifacts(run_id=run.run_id)
    assert "model.onnx" in [item.path for item in files]
    record.write_text("{}")
    assert main([str(tmp_path / "model.onnx"), "--run", str(record)]) == 1
    assert "names no run; expected the key run or training_run" in capsys.readouterr().err


def test_password_in_the_address_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@dagshub.com/a/b.mlflow")
    assert shown_address() == "https://dagshub.com/a/b.mlflow"


@dataclass(frozen=True)
class Server:
    """A running MLflow server: its address, and the folder where it keeps files."""

    address: str
    artifacts: Path


USER, PASSWORD = "admin", "twelve letters or more"
START_LIMIT_S = 240


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """`mlflow server` with a user and a password, on a free port of 127.0.0.1."""
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("no flask_wtf, which MLflow's basic-auth needs: make environments")
    folder = tmp_path_factory.mktemp("server")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{folder / 'auth.db'}\n"
        f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.urandom(16).hex(),
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1",
        "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    before = os.environ["MLFLOW_TRACKING_URI"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield Server(f"http://127.0.0.1:{port}", folder / "artifacts")
    finally:
        end(process)
        mlflow.set_tracking_uri(before)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"the MLflow server did not answer:\n{log.read_text()[-3000:]}")


def end(process: subprocess.Popen) -> None:
    """End the server with all its workers, which are in its process group."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, name)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def log_in(monkeypatch, server: Server, user: str | None, password: str | None) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    for name, value in (("USERNAME", user), ("PASSWORD", password)):
        if value is None:
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
        else:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("user", "password", "who"),
    [(USER, "wrong", "the user 'admin'"), (None, None, "a request without a user")],
)
def test_wrong_password_is_one_line_that_does_not_repeat_it(
    server, monkeypatch, capsys, user, password, who
):
    log_in(monkeypatch, server, user, password)
    assert training.track.compare.main([]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: MLflow at {server.address} refuses {who}: ")
    assert said[0].endswith("check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    assert "wrong" not in said[0]
    with pytest.raises(ValueError, match=f"refuses {who}"), tracked_run("x"):
        pass


@pytest.mark.slow
def test_training_to_export_on_a_server_with_a_password(
    server, phantoms, monkeypatch, tmp_path, capsys
):
    """What DagsHub is used for, by the same three variables: train, score, compare, export."""
    import export.convert.onnx
    import training.learn.fit
    import training.score.evaluate

    log_in(monkeypatch, server, USER, PASSWORD)
    monkeypatch.chdir(tmp_path)
    settings = {
        "scans": str(phantoms.scans), "split": str(phantoms.split),
        "cache": str(tmp_path / "cache"), "weights": "random", "epochs": 0, "augmented_copies": 0,
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    assert training.learn.fit.main(["--config", "train.yaml"]) == 0
    of_evaluate = {
        "scans": str(phantoms.scans), "split": str(phantoms.split),
        "protocol": str(phantoms.split.with_name("split.json")),
    }  # fmt: skip
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(of_evaluate))
    assert training.score.evaluate.main(["--config", "evaluate.yaml"]) == 0
    run = json.loads((tmp_path / "results/train/run.json").read_text())["run"]
    [stored] = server.artifacts.rglob(f"{run}/artifacts/model/model.keras")
    assert stored.read_bytes() == (tmp_path / "results/train/model.keras").read_bytes()
    capsys.readouterr()

    official = ["--protocol", "official", "--metric", "macro_auroc", "--json"]
    assert training.track.compare.main(official) == 0
    [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (row["run"], row["n"]) == (run, 12)
    assert training.track.compare.main(["--promote", "--output", "compare"]) == 0
    assert capsys.readouterr().out.endswith("chestct@champion: none -> version 1\n")
    assert (tmp_path / "compare" / "compare.html").is_file()

    (tmp_path / "export.yaml").write_text("model: models:/chestct@champion\n")
    (tmp_path / "results" / "train").rename(tmp_path / "results" / "elsewhere")
    assert export.convert.onnx.main(["--config", "export.yaml"]) == 0
    facts = json.loads((tmp_path / "results/export/facts.json").read_text())
    assert facts["training_run"] == run
    log_in(monkeypatch, server, USER, "wrong")
    assert export.convert.onnx.main(["--config", "export.yaml"]) == 1
    assert "refuses the user 'admin'" in capsys.readouterr().err
