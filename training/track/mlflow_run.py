"""Track runs in MLflow: parameters, metrics by epoch, files; no run is left open.

`MLFLOW_TRACKING_URI` names the server (DagsHub or any other; its credentials come from
`MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`). Without it the runs go into the file
`mlflow.db` of the current folder: `mlflow ui --backend-store-uri sqlite:///mlflow.db` shows them.
MLflow's TensorFlow flavour is not used: it does not read Keras 3 models back. The `.keras` and
ONNX files are plain artifacts instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from chestct.inference.proxies import is_loopback, url_proxy
from training.common.cli import run_command

logger = logging.getLogger(__name__)

EXPERIMENT = "chestct"
LOCAL_STORE = "sqlite:///mlflow.db"
LOCAL_DATABASE = Path("mlflow.db")
# Columns of MLflow's database that hold addresses of artifacts.
ARTIFACT_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)
CHECKOUT = Path(__file__).resolve().parents[2]
FOLD_TAG = "fold"  # of the runs that a cross-validation is made of

_tags_of_new_runs: ContextVar[Mapping[str, str] | None] = ContextVar("tags", default=None)


class RunRecord(NamedTuple):
    """Parameters, tags and start time (UTC) of a run."""

    params: dict[str, str]
    tags: dict[str, str]
    begun: datetime


class Run:
    """One open MLflow run.

    Attributes:
        run_id: MLflow's identifier, the `run` that outputs of the served model carry.
    """

    def __init__(self, mlflow: Any, run_id: str) -> None:
        self._mlflow = mlflow
        self.run_id = run_id

    @property
    def git_commit(self) -> str:
        """Commit of the checkout when the run began."""
        return str(self._mlflow.get_run(self.run_id).data.tags.get("git_commit", ""))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; a value that differs from one recorded before is an error."""
        self._mlflow.log_params(dict(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers, by epoch where `step` is given."""
        self._mlflow.log_metrics({key: float(value) for key, value in metrics.items()}, step=step)

    def log_scores(self, protocol: str, scores: Mapping[str, Any]) -> None:
        """Log scores of `training.common.metrics.score` in the form that `training compare` reads.

        `{protocol}.{key}` is the value of a score, `{protocol}.{key}.low` and `.high` its
        interval, and `{protocol}.n` the number of scans. An undefined number is left out.
        """
        numbers = {"n": float(scores["n"])}
        for key, score in scores.items():
            if isinstance(score, Mapping) and "value" in score:
                numbers[key] = score["value"]
                numbers |= {f"{key}.{end}": score[end] for end in ("low", "high")}
        self.log_metrics(
            {f"{protocol}.{key}": value for key, value in numbers.items() if math.isfinite(value)}
        )

    def log_file(self, path: Path, folder: str = "") -> None:
        """Store a file, or a folder with all in it, as an artifact."""
        store = self._mlflow.log_artifacts if path.is_dir() else self._mlflow.log_artifact
        store(str(path), folder or None)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags."""
        self._mlflow.set_tags(dict(tags))

    def recorded(self) -> RunRecord:
        """What the store holds of this run so far."""
        run = self._mlflow.get_run(self.run_id)
        begun = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
        return RunRecord(dict(run.data.params), dict(run.data.tags), begun)


def store_address() -> str:
    """The address of the store: that of the environment, or the local file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or LOCAL_STORE


def shown_address() -> str:
    """The same without a password that somebody wrote into it."""
    return re.sub(r"//[^/@]*@", "//", store_address())


@contextmanager
def connected() -> Iterator[Any]:
    """The module `mlflow`, set to the store of the environment, for the time of the block.

    Raises:
        ValueError: MLflow raised an error within the block; its message is one line and says
            what to do.
    """
    # Nothing is sent to MLflow's makers, an unreachable server is said within seconds, and
    # stdout belongs to the results of the command.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()).lower())
    logging.getLogger("alembic").setLevel(logging.WARNING)
    _reach_loopback_directly()
    if store_address() == LOCAL_STORE:
        relocate_artifacts(LOCAL_DATABASE)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.set_tracking_uri(store_address())
        yield mlflow
    except MlflowException as error:
        raise ValueError(_in_one_line(error)) from error


def relocate_artifacts(database: Path) -> None:
    """Point a local store whose folder was moved or copied to the artifacts that lie beside it.

    MLflow records absolute addresses, `FOLDER/mlruns/EXPERIMENT/...`. Those of another folder than
    the database's own are rewritten in one transaction. Nothing is done where they are right, nor
    to experiments that somebody placed elsewhere.

    Args:
        database: MLflow's SQLite database; it need not exist.

    Raises:
        ValueError: The database cannot be read or rewritten; it is as it was.
    """
    if not database.is_file():
        return
    try:
        _relocate(database, str(database.resolve().parent / "mlruns"))
    except sqlite3.Error as error:
        raise ValueError(f"{database}: no store of MLflow that can be used: {error}") from error


def _relocate(database: Path, here: str) -> None:
    with closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as store:
        if not _former_folders(store, here):
            return
        store.execute("BEGIN IMMEDIATE")  # of two processes the second finds nothing to do
        try:
            tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master")}
            for former in _former_folders(store, here):
                for table, column in ARTIFACT_ADDRESSES:
                    if table in tables:
                        store.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                            f"WHERE substr({column}, 1, ?) = ?",
                            (f"{here}/", len(former) + 2, len(former) + 1, f"{former}/"),
                        )
                logger.info("the artifacts recorded in %s are those in %s now", former, here)
            store.execute("COMMIT")
        except BaseException:
            store.execute("ROLLBACK")
            raise


def _former_folders(store: sqlite3.Connection, here: str) -> set[str]:
    """The folders `mlruns`, other than `here`, of experiments whose artifacts came to `here`."""
    if not store.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
        return set()  # MLflow has not laid out its tables yet
    rows = store.execute("SELECT artifact_location, experiment_id FROM experiments").fetchall()
    found = (re.fullmatch(r"(/.*/mlruns)/(\d+)", location or "") for location, _ in rows)
    matches = zip(found, (number for _, number in rows), strict=True)
    return {
        m[1]
        for m, number in matches
        if m
        and m[2] == str(number)
        and m[1] != here
        # Somebody's own folder with the default's name stays: it is there, and ours is not.
        and (Path(here, m[2]).is_dir() or not Path(m[1]).exists())
    }


def _reach_loopback_directly() -> None:
    """Make requests, which MLflow sends by, take no proxy to a server on this machine."""
    host = urlsplit(store_address()).hostname or ""
    if is_loopback(host):
        known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        if known.strip() != "*" and host not in (entry.strip() for entry in known.split(",")):
            os.environ["no_proxy"] = f"{known},{host}".lstrip(",")


def _in_one_line(error: Any) -> str:
    said = " ".join(str(error).split())
    status = error.get_http_status_code()
    if status in (401, 403):
        user = os.environ.get("MLFLOW_TRACKING_USERNAME")
        who = f"the user {user!r}" if user else "a request without a user"
        return (
            f"MLflow at {shown_address()} refuses {who}: {said}; check MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD"
        )
    if 400 <= status < 500:
        return f"MLflow at {shown_address()}: {said}"
    proxy = url_proxy(store_address())
    if proxy is not None:
        said = f"{said} ({proxy})"
    return (
        f"MLflow at {shown_address()} does not answer as expected: {said}; check "
        "MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or unset "
        "them to use the local store"
    )


@contextmanager
def tagged_runs(tags: Mapping[str, str]) -> Iterator[None]:
    """Every run that begins within the block carries `tags`."""
    token = _tags_of_new_runs.set(tags)
    try:
        yield
    finally:
        _tags_of_new_runs.reset(token)


@contextmanager
def tracked_run(name: str, run_id: str | None = None) -> Iterator[Run]:
    """An MLflow run that ends FINISHED, FAILED after an error, or KILLED after Ctrl-C.

    A run that was FINISHED stays so, whatever fails while more is added to it. Its tag
    `git_commit` is that of the checkout when the run began.

    Args:
        name: Name of a new run.
        run_id: A run to go on with; where the store does not know it, a new run is begun.

    Raises:
        ValueError: The tracking server cannot be reached or refuses.
    """
    with connected() as mlflow:
        from mlflow.exceptions import MlflowException

        mlflow.set_experiment(EXPERIMENT)
        finished = False
        if run_id is not None:
            try:
                finished = mlflow.get_run(run_id).info.status == "FINISHED"
            except MlflowException as error:
                if error.get_http_status_code() >= 500:
                    raise
                logger.warning("run %s is not in %s: a new one begins", run_id, shown_address())
                run_id = None
        begun = {} if run_id else {**_commit_tags(), **(_tags_of_new_runs.get() or {})}
        # A run that goes on keeps the name that it began with.
        active = mlflow.start_run(run_id=run_id, run_name=None if run_id else name, tags=begun)
        status = "FAILED"
        try:
            yield Run(mlflow, active.info.run_id)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            mlflow.end_run("FINISHED" if finished else status)


def git_commit() -> str:
    """The commit of this checkout, with `-dirty` where files differ from it, or `unknown`.

    A download without `.git` has no commit, even where it lies inside another repository.
    """
    if not (CHECKOUT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40"]
    command.append("--exclude=*")
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _commit_tags() -> dict[str, str]:
    commit = git_commit()
    if commit == "unknown":
        # MLflow's own tag would hold the commit of a repository that the folder happens to lie in.
        return {"git_commit": commit, "mlflow.source.git.commit": commit}
    return {"git_commit": commit}


def main(argv: list[str] | None = None) -> int:
    """Store files in the run that a training wrote down."""
    parser = argparse.ArgumentParser(prog="python -m training track", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files or folders to store")
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("results/train/run.json"),
        help="run.json of a training or facts.json of a variant; default: %(default)s",
    )
    parser.add_argument("--folder", default="", help="folder among the artifacts")
    arguments = parser.parse_args(argv)

    def work() -> None:
        missing = [str(path) for path in (arguments.run, *arguments.files) if not path.exists()]
        if missing:
            raise ValueError(f"no such file: {', '.join(missing)}")
        record = json.loads(arguments.run.read_text())
        run_id = record.get("run") or record.get("training_run")
        if not run_id:
            raise ValueError(f"{arguments.run}: names no run; expected the key run or training_run")
        with tracked_run("artifacts", run_id) as run:
            for file in arguments.files:
                run.log_file(file, arguments.folder)

    return run_command(work)
