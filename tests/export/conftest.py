from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class FullWidth:
    """VGG-16 with all its channels: a folder as of a training, and its ONNX file."""

    model: Path
    onnx: Path


@pytest.fixture(scope="session")
def full_width(scan_batch, common_folder, build_once) -> FullWidth:
    """Random convolutions, a random head, and the domain of eight phantoms."""
    folder = common_folder / "full_width"
    full = FullWidth(folder / "train", folder / "export" / "model.onnx")

    def build() -> None:
        import keras
        import numpy as np

        from chestct.contract import LUNG_WINDOW, ModelMetadata
        from export.convert.onnx import OnnxConfig, write_onnx
        from training.common.atomic_io import write_json
        from training.network.calibrate import fit_domain
        from training.network.vgg16 import build_classifier, pooled_features, set_domain

        keras.utils.set_random_seed(7)
        model = build_classifier(4)
        head = model.get_layer("activation_map")
        shape = head.kernel.shape
        head.set_weights([np.random.default_rng(7).normal(0, 1, shape), np.zeros(shape[-1])])
        set_domain(model, fit_domain(pooled_features(model).predict_on_batch(scan_batch[:8])))
        facts = ModelMetadata(("a", "b", "normal", "d"), LUNG_WINDOW, 1.0, 30.0, "run", "hash")
        full.model.mkdir(parents=True)
        model.save(full.model / "model.keras")
        write_json(full.model / "facts.json", facts.to_parameters())
        write_onnx(OnnxConfig(full.model, full.onnx))

    build_once("full_width", build)
    return full
