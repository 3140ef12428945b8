"""Tiny models that keep the contract's names, and one real Triton that serves them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from serving.local import LocalTriton, find_installation
from tests.support.triton import SMALL_FACTS, config_parameters, serve

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment(triton_environment: Path) -> Path:
    """Its short name here."""
    return triton_environment


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """Every kind of model that the shared server serves."""
    folder = tmp_path_factory.mktemp("repository")
    threads = 'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{}" }} }}'
    waiting = "dynamic_batching { max_queue_delay_microseconds: 100000 }"
    openvino = 'cpu_execution_accelerator [{ name: "openvino" }]'
    write_model(folder, "chestct", waiting + threads.format(1))
    write_model(folder, "threads", threads.format(4))
    write_model(folder, "openvino", f"optimization {{ execution_accelerators {{ {openvino} }} }}")
    write_model(folder, "unbatched", replace=("max_batch_size: 8", ""), batch=1)
    config = folder / "unbatched" / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [", "dims: [1, "))
    write_model(folder, "text", "dynamic_batching { }")
    parameters = config_parameters(SMALL_FACTS)
    write_model(folder, "whole", parameters)
    # It leaves whoever gives up sooner the time to do so.
    patient = "dynamic_batching { max_queue_delay_microseconds: 500000 }"
    write_model(folder, "whole_patient", parameters + patient)
    return folder


@pytest.fixture(scope="session")
def server(repository: Path, environment: Path) -> Iterator[LocalTriton]:
    """One real Triton for all tests that leave it as it is."""
    with serve(repository, environment) as running:
        yield running


@pytest.fixture(scope="session")
def backend(environment: Path) -> ModuleType:
    """The backend's module, beside the `triton_python_backend_utils` of the wheel."""
    folder = find_installation(environment).server / "backends" / "python"
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("serving.backends.onnxruntime.model")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def model_config() -> dict[str, Any]:
    """The config of `scan_model` as Triton hands it to the backend."""
    outputs = {"probabilities": [3], "activation_map": [14, 14, 3], "domain_distance": [1]}
    config = {
        "name": "chestct",
        "max_batch_size": 8,
        "default_model_filename": "model.onnx",
        "input": [{"name": "scan", "data_type": "TYPE_UINT8", "dims": [224, 224, 1]}],
        "output": [
            {"name": name, "data_type": "TYPE_FP32", "dims": dims} for name, dims in outputs.items()
        ],
        "parameters": {},
        "optimization": {},
    }
    return json.loads(json.dumps(config))


@pytest.fixture
def scans() -> np.ndarray:
    """Eight textured scans, uint8 (8, 224, 224, 1), all different."""
    noise = np.random.default_rng(1).integers(0, 60, (8, 224, 224, 1))
    slope = np.linspace(0, 150, 224)[:, None, None] * np.linspace(0.3, 1, 8)[:, None, None, None]
    return (noise + slope).astype(np.uint8)
