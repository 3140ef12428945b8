"""The local MLflow store after its folder was moved or copied."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from training.track.mlflow_run import relocate_artifacts

CHECKOUT = Path(__file__).resolve().parents[3]
TRAIN = """
import json, sys
from pathlib import Path
import mlflow
from training.track.registry import promote
from training.track.mlflow_run import tracked_run
model = Path("model")
model.mkdir()
(model / "model.keras").write_text("weights")
(model / "facts.json").write_text("{}")
with tracked_run("first") as run:
    run.log_file(model, "model")
    mlflow.create_external_model(name="logged")
promote(run.run_id, {})
elsewhere = mlflow.create_experiment("elsewhere", str(Path.cwd() / "kept" / "here"))
with mlflow.start_span("span"):
    pass
mlflow.flush_trace_async_logging()
print(json.dumps({"run": run.run_id}))
"""
GO_ON = """
import json
from pathlib import Path
import mlflow
from training.track.registry import model_folder
from training.track.mlflow_run import tracked_run
champion = (model_folder("models:/chestct@champion") / "model.keras").read_text()
Path("more.txt").write_text("more")
with tracked_run("second") as run:
    run.log_file(Path("more.txt"))
print(json.dumps({"run": run.run_id, "champion": champion}))
"""


def python(folder: Path, code: str) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts(database: Path) -> str:
    with closing(sqlite3.connect(database)) as store:
        return "\n".join(store.iterdump())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a champion, a logged model, a trace and an experiment placed elsewhere."""
    folder = tmp_path_factory.mktemp("Prüf stand") / "first one"
    folder.mkdir()
    python(folder, TRAIN)
    return folder


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "a côpy of it")


def test_copy_uses_its_own_artifacts_and_leaves_the_original_alone(original, copied):
    before = files_below(original)
    found = python(copied, GO_ON)
    assert found["champion"] == "weights"
    (logged,) = copied.glob(f"mlruns/*/{found['run']}/artifacts/more.txt")
    assert logged.read_text() == "more"
    assert files_below(original) == before


def test_no_address_of_the_former_folder_stays(original, copied):
    assert f"'{original}/mlruns/" in texts(original / "mlflow.db")
    elsewhere = f"{original}/kept/here"
    relocate_artifacts(copied / "mlflow.db")
    text = texts(copied / "mlflow.db")
    assert elsewhere in text  # chosen by a user, and no part of the store
    assert str(original) not in text.replace(elsewhere, "")
    rows = [line for line in text.splitlines() if f"'{copied}/mlruns/" in line]
    for table in ("experiments", "runs", "logged_models", "model_versions", "trace_tags"):
        assert any(line.startswith(f'INSERT INTO "{table}"') for line in rows), table


def test_store_in_its_place_is_not_written_to(original):
    os.chmod(original / "mlflow.db", 0o444)
    before = (original / "mlflow.db").stat().st_mtime_ns
    relocate_artifacts(original / "mlflow.db")
    os.chmod(original / "mlflow.db", 0o644)
    assert (original / "mlflow.db").stat().st_mtime_ns == before


def test_processes_at_once_rewrite_once(copied):
    failures: list[BaseException] = []

    def relocate() -> None:
        try:
            relocate_artifacts(copied / "mlflow.db")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=relocate) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert "mlruns/mlruns" not in texts(copied / "mlflow.db")
    assert f"'{copied}/mlruns/" in texts(copied / "mlflow.db")


def test_failure_on_the_way_changes_nothing(copied):
    with closing(sqlite3.connect(copied / "mlflow.db")) as store:
        store.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON model_versions "
            "BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )
    before = texts(copied / "mlflow.db")
    with pytest.raises(ValueError, match="disk is full"):
        relocate_artifacts(copied / "mlflow.db")
    assert texts(copied / "mlflow.db") == before


def test_absent_and_empty_databases_are_let_be(tmp_path):
    relocate_artifacts(tmp_path / "mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()
    (tmp_path / "mlflow.db").touch()
    relocate_artifacts(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").stat().st_size == 0


def test_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_text("something else altogether, and long enough to be read")
    with pytest.raises(ValueError, match=r"mlflow\.db: no store of MLflow"):
        relocate_artifacts(tmp_path / "mlflow.db")
