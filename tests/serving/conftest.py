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
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from chestct.contract import LUNG_WINDOW, ModelFacts
from serving.local import LocalTriton, LocalTritonError, find_installation

CHECKOUT = Path(__file__).parents[2]
CONFIG = """
name: "NAME"
backend: "onnxruntime"
max_batch_size: 8
input [{ name: "scan" data_type: TYPE_UINT8 dims: [224, 224, 1] }]
output [
  { name: "probabilities" data_type: TYPE_FP32 dims: [3] },
  { name: "activation_map" data_type: TYPE_FP32 dims: [14, 14, 3] },
  { name: "domain_distance" data_type: TYPE_FP32 dims: [1] }
]
instance_group [{ kind: KIND_CPU count: 1 }]
"""
TEXT_CONFIG = """
name: "NAME"
backend: "onnxruntime"
max_batch_size: 4
input [{ name: "text" data_type: TYPE_STRING dims: [2] }]
output [{ name: "result" data_type: RESULT_TYPE dims: [2] }]
"""
TEXT_OUTPUTS = {
    "text": ("TYPE_STRING", TensorProto.STRING),
    "number": ("TYPE_FP32", TensorProto.FLOAT),  # fails on text that is not a number
}


def scan_model(batch: str | int) -> onnx.ModelProto:
    """Block means of the scan, times a kernel: a few operations, the outputs of the contract."""
    kernel = np.random.default_rng(0).normal(0, 0.05, (1, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["scan"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["grey"], ["channels_first"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool", ["channels_first"], ["means"], kernel_shape=[16, 16], strides=[16, 16]
        ),
        helper.make_node("Transpose", ["means"], ["places"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["places", "kernel"], ["activation_map"]),
        helper.make_node("ReduceMean", ["activation_map", "place_axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ReduceL2", ["logits", "class_axis"], ["domain_distance"], keepdims=1),
    ]
    outputs = {"probabilities": [3], "activation_map": [14, 14, 3], "domain_distance": [1]}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("scan", TensorProto.UINT8, [batch, 224, 224, 1])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *dims])
            for name, dims in outputs.items()
        ],
        [
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(np.array([1, 2]), "place_axes"),
            numpy_helper.from_array(np.array([1]), "class_axis"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def text_model(output_type: int) -> onnx.ModelProto:
    """Gives back its strings as another type."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["text"], ["result"], to=output_type)],
        "text",
        [helper.make_tensor_value_info("text", TensorProto.STRING, ["N", 2])],
        [helper.make_tensor_value_info("result", output_type, ["N", 2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Writes a tiny model and its config into a repository; gives the path of the ONNX file."""

    def write(
        repository: Path,
        name: str,
        extra: str = "",
        *,
        replace: tuple[str, str] = ("", ""),
        batch: str | int = "N",
    ) -> Path:
        path = repository / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        if name in TEXT_OUTPUTS:
            type_name, output_type = TEXT_OUTPUTS[name]
            model, config = text_model(output_type), TEXT_CONFIG.replace("RESULT_TYPE", type_name)
        else:
            model, config = scan_model(batch), CONFIG
        onnx.save(model, path)
        config = config.replace("NAME", name)
        if replace[0]:
            config = config.replace(*replace)
        (repository / name / "config.pbtxt").write_text(config + extra)
        return path

    return write


@pytest.fixture(scope="session")
def environment() -> Path:
    """Triton's own environment; without it the test is skipped."""
    folder = CHECKOUT / ".venv-triton"
    try:
        find_installation(folder)
    except LocalTritonError as error:
        pytest.skip(str(error))
    return folder


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
    facts = ModelFacts(("a", "b", "c"), LUNG_WINDOW, 1.0, 10.0, "run-7", "ab" * 32)
    quoted = {key: json.dumps(value) for key, value in facts.to_parameters().items()}
    parameters = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {value} }} }}\n'
        for key, value in quoted.items()
    )
    write_model(folder, "whole", parameters)
    # It leaves whoever gives up sooner the time to do so.
    patient = "dynamic_batching { max_queue_delay_microseconds: 500000 }"
    write_model(folder, "whole_patient", parameters + patient)
    return folder


@pytest.fixture(scope="session")
def server(repository: Path, environment: Path) -> Iterator[LocalTriton]:
    """One real Triton for all tests that leave it as it is."""
    with LocalTriton(repository, environment=environment, exit_timeout_s=5) as running:
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
