from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
LABELS = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")


@dataclass(frozen=True)
class Workspace:
    """A folder with phantoms, their split, and a model trained on them for one epoch."""

    folder: Path
    scans: Path
    split: Path
    model: Path
    cache: Path


@pytest.fixture(scope="session")
def real_scans() -> Path:
    folder = Path(os.environ.get("CHESTCT_REAL_SCANS", CHECKOUT.parent / "shared" / "data"))
    if not (folder / "chest-ct").is_dir():
        pytest.skip("no real scans: name their folder with CHESTCT_REAL_SCANS")
    return folder


@pytest.fixture(scope="session")
def triton_environment() -> Path:
    environment = CHECKOUT / ".venv-triton"
    if not environment.is_dir():
        pytest.skip("no .venv-triton: make environments")
    return environment


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and their children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_tracking_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test writes into the checkout's MLflow store, nor into a server of the environment."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    from training.tracking import EXPERIMENT

    store = tmp_path_factory.mktemp("mlflow")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store / 'mlflow.db'}"
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    mlflow.create_experiment(EXPERIMENT, artifact_location=(store / "artifacts").as_uri())
    os.environ.pop("DATA", None)


def write_split(scans: Path, file: Path) -> None:
    """The split file of a folder train|valid|test/CLASS/*, every scan its own group."""
    paths = sorted(path for path in scans.rglob("*") if path.is_file())
    rows = ["path,label,split,group"]
    for group, path in enumerate(paths):
        split, label = path.relative_to(scans).parts[:2]
        rows.append(f"{path.relative_to(scans).as_posix()},{label},{split},{group}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + "\n")
    (file.parent / "split.json").write_text(json.dumps({"protocol": "official"}))


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Phantoms and their split; `model` is where a training would go."""
    from training.phantom import write_phantoms

    folder = tmp_path_factory.mktemp("workspace")
    scans = folder / "data" / "scans"
    write_phantoms(scans, per_class={"train": 5, "valid": 3, "test": 3}, seed=3, dicom_fraction=0.4)
    split = folder / "results" / "split" / "split.csv"
    write_split(scans, split)
    return Workspace(folder, scans, split, folder / "results" / "train", folder / ".cache")


@pytest.fixture(scope="session")
def trained(phantoms: Workspace) -> Workspace:
    """The same with a trained model: random convolutions, a fitted head, one epoch of block 5."""
    from training.fit import FitConfig, fit

    fit(
        FitConfig(
            scans=phantoms.scans,
            split=phantoms.split,
            output=phantoms.model,
            cache=phantoms.cache,
            weights="random",
            epochs=1,
            augmented_copies=1,
        )
    )
    return phantoms


@pytest.fixture(scope="session")
def scan_batch(phantoms: Workspace) -> np.ndarray:
    """The test phantoms, uint8 (12, 224, 224, 1)."""
    from chestct.scan import list_scans, load_scan

    return np.stack([load_scan(path) for path in list_scans(phantoms.scans / "test")])


@pytest.fixture(scope="session")
def exported(trained: Workspace) -> Path:
    """The ONNX file of the trained phantom model."""
    from export.onnx import OnnxConfig, write_onnx

    return write_onnx(OnnxConfig(trained.model, trained.folder / "results/export/model.onnx"))
