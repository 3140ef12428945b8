from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chestct.contract import LUNG_WINDOW, ModelMetadata
from tests.support.triton import ended_at_once

HERE = Path(__file__).parent
CHECKOUT = Path(__file__).resolve().parents[2]
CLASSES = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")
FACTS = ModelMetadata(CLASSES, LUNG_WINDOW, 1.0, 30.0, "a-run", "0" * 64)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses `published`, or measures, runs in one worker, which builds it once."""
    for item in items:
        if item.path.is_relative_to(HERE) and "published" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("timing"))


@pytest.fixture(scope="module", autouse=True)
def _ended_at_once() -> Iterator[None]:
    with ended_at_once():
        yield


@dataclass(frozen=True)
class Published:
    """A folder as the pipeline leaves it, with a network that answers in a millisecond.

    Under it are `results/train`, `results/export`, `results/int8` (the same network, called INT8),
    `model_repository` with `chestct_fp32`, `chestct_int8`, `chestct` and `chestct_encoded`, and
    scans with a split.
    """

    folder: Path
    scans: Path
    split: Path


def tiny_classifier():
    """The contract's outputs by 8 random 3x3 filters on a scan reduced to 14 x 14."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(5)
    scan = keras.Input((224, 224, 1), dtype="uint8", name="scan")
    small = layers.AveragePooling2D(16)(layers.Rescaling(1 / 255)(scan))
    features = layers.Conv2D(8, 3, padding="same", activation="relu")(small)
    evidence = layers.Conv2D(len(CLASSES), 1, name="activation_map")(features)
    logits = layers.GlobalAveragePooling2D()(evidence)
    pooled = layers.GlobalAveragePooling2D()(features)
    outputs = {
        "probabilities": layers.Softmax(name="probabilities")(logits),
        "activation_map": evidence,
        "domain_distance": keras.ops.norm(pooled, axis=-1, keepdims=True),
    }
    return keras.Model(scan, outputs)


@pytest.fixture(scope="session")
def published(phantoms, tmp_path_factory) -> Published:
    from export.convert.onnx import OnnxConfig, write_onnx
    from export.publish.repository import write_encoded, write_repository
    from export.publish.settings import RepositoryConfig
    from training.common.atomic_io import sha256_of

    folder = tmp_path_factory.mktemp("published")
    results = folder / "results"
    (results / "train").mkdir(parents=True)
    tiny_classifier().save(results / "train" / "model.keras")
    (results / "train" / "facts.json").write_text(json.dumps(FACTS.to_parameters()))
    onnx = write_onnx(OnnxConfig(results / "train", results / "export" / "model.onnx"))
    for variant, precision, engine in (
        ("export", "fp32", "onnxruntime"),
        ("int8", "int8", "openvino"),
    ):
        target = results / variant
        target.mkdir(exist_ok=True)
        if not (target / "model.onnx").exists():
            shutil.copy(onnx, target)
        facts = dataclasses.replace(FACTS, precision=precision)
        (target / "facts.json").write_text(json.dumps(facts.to_parameters()))
        report = {"holds": True, "onnx_sha256": sha256_of(onnx)}
        (target / "parity.json").write_text(json.dumps(report))
        for name in [f"chestct_{precision}"] + ["chestct"] * (precision == "int8"):
            write_repository(
                RepositoryConfig(
                    onnx=target / "model.onnx",
                    model=target,
                    parity=target / "parity.json",
                    repository=folder / "model_repository",
                    name=name,
                    engine=engine,
                )
            )
    write_encoded(folder / "model_repository")
    (folder / ".venv-triton").symlink_to(CHECKOUT / ".venv-triton")
    return Published(folder, phantoms.scans, phantoms.split)
