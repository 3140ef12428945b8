"""The DVC pipeline from a fresh clone: it runs, then skips, and a change reruns its own stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SMALL = {
    "phantom": "train: 5\nvalid: 3\ntest: 3\ndicom_fraction: 0.4\nseed: 3\n",
    "train": "weights: random\nepochs: 1\naugmented_copies: 0\n",
    "latency": "rounds: {1: 2}\n",
    "parity": "num_scans: 9\n",
}
STAGES = ["ingest", "audit", "split", "train", "evaluate", "export", "publish", "benchmark"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, triton_environment) -> Path:
    """The files that git would carry, with settings for a minute instead of ten."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)
    for name, text in SMALL.items():
        (folder / "configs" / f"{name}.yaml").write_text(text)
    (folder / ".venv-triton").symlink_to(triton_environment)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True, timeout=60)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
@pytest.mark.server
def test_pipeline_runs_once_and_then_has_nothing_to_do(clone):
    first = run(clone, "dvc", "repro")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert [line.split("'")[1] for line in first.stdout.splitlines() if "Running" in line] == STAGES
    for file in (
        "results/audit/audit.json", "results/split/split.csv", "results/train/model.keras",
        "results/evaluate/report.md", "results/export/model.onnx", "results/benchmark/latency.json",
        "model_repository/chestct/1/model.onnx",
    ):  # fmt: skip
        assert (clone / file).is_file(), file

    status = run(clone, "git", "status", "--short").stdout
    second = run(clone, "dvc", "repro")
    assert second.returncode == 0, second.stderr
    assert "Running" not in second.stdout
    assert second.stdout.count("didn't change, skipping") == len(STAGES)
    assert run(clone, "git", "status", "--short").stdout == status
    assert (clone / "model_repository" / "chestct" / "1").is_dir()
    assert not (clone / "model_repository" / "chestct" / "2").exists()

    shown = run(clone, "dvc", "metrics", "show", "--json")
    metrics = json.loads(shown.stdout)[""]["data"]["results/evaluate/scores.json"]["data"]
    assert metrics["official"]["n"] == 12

    (clone / "configs" / "publish.yaml").write_text("max_batch_size: 16\nwarm_up: [1]\n")
    third = run(clone, "dvc", "repro", "publish")
    assert third.returncode == 0, third.stderr
    assert [line.split("'")[1] for line in third.stdout.splitlines() if "Running" in line] == [
        "publish"
    ]
    assert (clone / "model_repository" / "chestct" / "2").is_dir()

    unchanged = run(clone, "python", "-m", "training.ingest", "--changed")
    assert unchanged.stdout == "unchanged\n"
    other = run(clone, "python", "-m", "training.ingest", "--changed", "--source", str(clone))
    assert other.stdout == "changed\n"
