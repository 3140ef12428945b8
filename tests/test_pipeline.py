"""The DVC pipeline from a fresh clone: it runs, then skips, and a change reruns its own stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkout import copy_checkout

ANYTHING = (
    "{label_agreement: 0, macro_auroc_drop: 1, accuracy_drop: 1, mean_probability_error: 1, "
    "max_probability_error: 1, median_map_correlation: -1, least_map_correlation: -1, "
    "in_domain_agreement: 0}"
)
SMALL = {
    "phantom": "train: 5\nvalid: 3\ntest: 3\ndicom_fraction: 0.4\nseed: 3\n",
    "train": "weights: random\nepochs: 1\naugmented_copies: 0\n",
    "parity": "num_scans: 9\n",
    "quantize": "num_scans: 8\n",
    # A network trained for a minute is sure of nothing: only that the gate is asked is tested.
    "parity-int8": f"variant: results/int8\ngate: {ANYTHING}\n",
    "distill": "students: {tiny: [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]}\nepochs: 1\n",
    "parity-compressed": f"variant: results/compressed\ngate: {ANYTHING}\n",
    "compress": "num_scans: 8\nrounds: 3\n",
}
STAGES = [
    "ingest", "audit", "split", "train", "evaluate", "export",
    "quantize", "distill", "compress", "card", "publish",
]  # fmt: skip


@pytest.fixture(scope="module")
def clone(tmp_path_factory, triton_environment) -> Path:
    """The files that git would carry, with settings for a minute instead of ten."""
    folder = copy_checkout(tmp_path_factory.mktemp("clone") / "project")
    for name, text in SMALL.items():
        (folder / "configs" / f"{name}.yaml").write_text(text)
    (folder / ".venv-triton").symlink_to(triton_environment)
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
        "results/evaluate/report.md", "results/export/model.onnx",
        "results/compressed/curve.md", "results/card/model_card.html",
        "model_repository/chestct/1/model.onnx",
        "model_repository/chestct_int8/1/model.onnx",
        "model_repository/chestct_compressed/1/model.onnx",
    ):  # fmt: skip
        assert (clone / file).is_file(), file

    card = json.loads((clone / "results/card/summary.json").read_text())
    served = (clone / "model_repository" / "chestct" / "config.pbtxt").read_text()
    assert 'key: "card"' in served
    assert card["run"] in served

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

    serve = clone / "configs" / "serve.yaml"
    serve.write_text(serve.read_text().replace("warm_up: [1, 8]", "warm_up: [1]"))
    third = run(clone, "dvc", "repro", "publish")
    assert third.returncode == 0, third.stderr
    assert [line.split("'")[1] for line in third.stdout.splitlines() if "Running" in line] == [
        "publish"
    ]
    assert (clone / "model_repository" / "chestct" / "2").is_dir()

    code = (
        "import os; from training.data.ingest import inputs_changed; "
        "from training.data.settings import IngestConfig; "
        "print(inputs_changed(os.environ, IngestConfig()))"
    )
    assert run(clone, "python", "-c", code).stdout == "False\n"
    assert run(clone, "env", f"DATA={clone}", "python", "-c", code).stdout == "True\n"
