"""What the Python `onnxruntime` backend reads, refuses and merges, without a server.

The expected refusals are those of NVIDIA's native backend, word for word.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

pytestmark = pytest.mark.server

INPUTS = {"scan": ("TYPE_UINT8", [-1, 224, 224, 1])}
OUTPUTS = {
    "probabilities": ("TYPE_FP32", [-1, 3]),
    "activation_map": ("TYPE_FP32", [-1, 14, 14, 3]),
    "domain_distance": ("TYPE_FP32", [-1, 1]),
}
FIXED_BATCH = (
    "model 'chestct', tensor 'scan': for the model to support batching the shape should have at "
    "least 1 dimension and the first dimension must be -1; but shape expected by the model is "
    "[1,224,224,1]"
)
WRONG_DIMS = (
    "model 'chestct', tensor 'probabilities': the model expects 2 dimensions (shape [-1,3]) but "
    "the model configuration specifies 2 dimensions (an initial batch dimension because "
    "max_batch_size > 0 followed by the explicit tensor shape, making complete shape [-1,4])"
)
WRONG_RANK = (
    "model 'chestct', tensor 'scan': the model expects 4 dimensions (shape [-1,224,224,1]) but "
    "the model configuration specifies 3 dimensions (shape [224,224,1])"
)


def message(call: Callable[..., Any], *arguments: Any) -> str:
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    pytest.fail("accepted")


def with_parameter(config: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    return {**config, "parameters": {key: {"string_value": value}}}


def with_accelerator(config: dict[str, Any], device: str, *entries: Any) -> dict[str, Any]:
    listed = {f"{device}_execution_accelerator": list(entries)}
    return {**config, "optimization": {"execution_accelerators": listed}}


def test_matching_config_is_accepted(backend: ModuleType, model_config: dict[str, Any]) -> None:
    backend.check_tensors(model_config, INPUTS, OUTPUTS)
    model_config["output"].pop()  # a config may serve fewer outputs than the model has
    backend.check_tensors(model_config, INPUTS, OUTPUTS)


def test_fixed_batch_is_refused(backend: ModuleType, model_config: dict[str, Any]) -> None:
    inputs = {"scan": ("TYPE_UINT8", [1, 224, 224, 1])}
    assert message(backend.check_tensors, model_config, inputs, OUTPUTS) == FIXED_BATCH


def test_wrong_dims_are_refused(backend: ModuleType, model_config: dict[str, Any]) -> None:
    model_config["output"][0]["dims"] = [4]
    assert message(backend.check_tensors, model_config, INPUTS, OUTPUTS) == WRONG_DIMS


def test_wrong_rank_without_batching_is_refused(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    model_config["max_batch_size"] = 0
    assert message(backend.check_tensors, model_config, INPUTS, OUTPUTS) == WRONG_RANK


def test_open_dims_may_be_fixed_for_inputs_only(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    inputs = {"scan": ("TYPE_UINT8", [-1, -1, -1, 1])}
    backend.check_tensors(model_config, inputs, OUTPUTS)
    outputs = {**OUTPUTS, "probabilities": ("TYPE_FP32", [-1, -1])}
    assert "making complete shape [-1,3])" in message(
        backend.check_tensors, model_config, inputs, outputs
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("input", "unexpected inference input 'image', allowed inputs are: scan"),
        (
            "output",
            "unexpected inference output 'image', allowed outputs are: activation_map, "
            "domain_distance, probabilities",
        ),
    ],
)
def test_wrong_name_is_refused(
    backend: ModuleType, model_config: dict[str, Any], kind: str, expected: str
) -> None:
    model_config[kind][0]["name"] = "image"
    assert message(backend.check_tensors, model_config, INPUTS, OUTPUTS) == expected


@pytest.mark.parametrize(
    ("kind", "name", "provided"),
    [("input", "scan", "TYPE_UINT8"), ("output", "probabilities", "TYPE_FP32")],
)
def test_wrong_datatype_is_refused(
    backend: ModuleType, model_config: dict[str, Any], kind: str, name: str, provided: str
) -> None:
    model_config[kind][0]["data_type"] = "TYPE_INT64"
    assert message(backend.check_tensors, model_config, INPUTS, OUTPUTS) == (
        f"unable to load model 'chestct', configuration expects datatype TYPE_INT64 for {kind} "
        f"'{name}', model provides {provided}"
    )


def test_number_of_inputs_must_agree(backend: ModuleType, model_config: dict[str, Any]) -> None:
    inputs = {**INPUTS, "mask": ("TYPE_UINT8", [-1, 224, 224, 1])}
    assert message(backend.check_tensors, model_config, inputs, OUTPUTS) == (
        "unable to load model 'chestct', configuration expects 1 inputs, model provides 2"
    )


def test_unsupported_features_are_refused_not_ignored(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    model_config["input"][0]["allow_ragged_batch"] = True
    assert "allow_ragged_batch is not supported by this backend" in message(
        backend.check_tensors, model_config, INPUTS, OUTPUTS
    )


def test_session_settings_have_the_native_meaning(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    assert backend.session_settings(model_config) == {
        "graph_optimization_level": "ORT_ENABLE_ALL",
        "execution_mode": "ORT_SEQUENTIAL",
    }
    values = {
        "intra_op_thread_count": "3",
        "inter_op_thread_count": "0",  # not above 0: onnxruntime's own choice
        "execution_mode": "1",
        "enable_mem_arena": "off",
        "enable_mem_pattern": "True",
    }
    model_config["parameters"] = {key: {"string_value": value} for key, value in values.items()}
    model_config["optimization"] = {"graph": {"level": 1}}
    assert backend.session_settings(model_config) == {
        "graph_optimization_level": "ORT_ENABLE_EXTENDED",
        "execution_mode": "ORT_PARALLEL",
        "intra_op_num_threads": 3,
        "enable_cpu_mem_arena": False,
        "enable_mem_pattern": True,
    }


@pytest.mark.parametrize(
    ("level", "expected"),
    [(-1, "ORT_ENABLE_BASIC"), (0, "ORT_ENABLE_ALL"), (2, "ORT_DISABLE_ALL")],
)
def test_graph_level_has_the_native_meaning(
    backend: ModuleType, model_config: dict[str, Any], level: int, expected: str
) -> None:
    model_config["optimization"] = {"graph": {"level": level}}
    assert backend.session_settings(model_config)["graph_optimization_level"] == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "execution_mode",
            "3",
            "Invalid configuration value provided. Expected values for  execution_mode are 0 or 1 "
            "but got 3 .",
        ),
        ("intra_op_thread_count", "two", "failed to convert 'two' to integral number"),
        ("enable_mem_arena", "maybe", "failed to convert 'maybe' to boolean"),
    ],
)
def test_bad_parameter_is_refused(
    backend: ModuleType, model_config: dict[str, Any], key: str, value: str, expected: str
) -> None:
    config = with_parameter(model_config, key, value)
    assert message(backend.session_settings, config) == expected


def test_settings_reach_onnxruntime(
    backend: ModuleType, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    settings = {
        "graph_optimization_level": "ORT_ENABLE_BASIC",
        "execution_mode": "ORT_PARALLEL",
        "intra_op_num_threads": 2,
        "enable_cpu_mem_arena": False,
    }
    path = write_model(tmp_path, "chestct")
    session = backend.open_onnxruntime(path, settings, [("CPUExecutionProvider", {})])
    options = session.get_session_options()
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
    assert options.intra_op_num_threads == 2
    assert options.enable_cpu_mem_arena is False
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert backend.tensor_facts(session.get_inputs()) == INPUTS
    assert backend.tensor_facts(session.get_outputs()) == OUTPUTS


def test_unknown_cpu_accelerator_is_refused(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    config = with_accelerator(model_config, "cpu", {"name": "warp"})
    expected = "unknown Execution Accelerator 'warp' is requested"
    assert message(backend.uses_openvino, config) == expected
    assert not backend.uses_openvino(model_config)


def test_openvino_without_its_package_is_refused(
    backend: ModuleType, model_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_accelerator(model_config, "cpu", {"name": "openvino"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = "unknown Execution Accelerator 'openvino' is requested"
    assert message(backend.uses_openvino, config) == expected


def test_parameters_that_the_native_backend_passes_over_are_refused(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    entry = {"name": "openvino", "parameters": {"num_threads": "2"}}
    config = with_accelerator(model_config, "cpu", entry)
    expected = "unknown parameter 'num_threads' is provided for OpenVINO Execution Accelerator"
    assert message(backend.uses_openvino, config) == expected


@pytest.fixture(params=[1, 3])
def batch(request: pytest.FixtureRequest, scans: np.ndarray) -> dict[str, np.ndarray]:
    return {"scan": scans[: request.param]}


def test_both_engines_see_and_calculate_the_same(
    backend: ModuleType,
    tmp_path: Path,
    write_model: Callable[..., Path],
    batch: dict[str, np.ndarray],
) -> None:
    pytest.importorskip("openvino", reason="needs the package openvino")
    path = write_model(tmp_path, "chestct")
    settings = {"intra_op_num_threads": 1}
    expected, *facts = backend.onnxruntime_engine(path, settings, [("CPUExecutionProvider", {})])
    found, *openvino_facts = backend.openvino_engine(path, settings)
    assert facts == openvino_facts == [INPUTS, OUTPUTS]
    names = list(OUTPUTS)
    first, answers = found(names, batch), expected(names, batch)
    found(names, {"scan": 255 - batch["scan"]})  # must not overwrite the answer before
    for name in names:
        np.testing.assert_allclose(first[name], answers[name], rtol=1e-5, atol=1e-6)


def test_openvino_takes_the_threads_it_is_given_and_then_pins_none(
    backend: ModuleType, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    """Two instances that pin their one thread each would share a core."""
    pytest.importorskip("openvino", reason="needs the package openvino")
    path = write_model(tmp_path, "chestct")
    run, *_ = backend.openvino_engine(path, {"intra_op_num_threads": 1})
    compiled = inspect.getclosurevars(run).nonlocals["request"].get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False


def test_cpu_instance_ignores_gpu_accelerators(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    config = with_accelerator(model_config, "gpu", {"name": "tensorrt"})
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    providers = backend.execution_providers(config, "CPU", 0, available)
    assert providers == [("CPUExecutionProvider", {})]


def test_gpu_instance_uses_cuda_and_the_tensorrt_that_is_asked_for(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    cuda = ("CUDAExecutionProvider", {"device_id": "1"})
    cpu = ("CPUExecutionProvider", {})
    assert backend.execution_providers(model_config, "GPU", 1, available) == [cuda, cpu]
    parameters = {"precision_mode": "FP16", "max_workspace_size_bytes": "1000"}
    entry = {"name": "tensorrt", "parameters": parameters}
    config = with_accelerator(model_config, "gpu", entry)
    options = {"device_id": "1", "trt_fp16_enable": "1", "trt_max_workspace_size": "1000"}
    tensorrt = ("TensorrtExecutionProvider", options)
    assert backend.execution_providers(config, "GPU", 1, available) == [tensorrt, cuda, cpu]


def test_gpu_instance_without_cuda_in_onnxruntime_is_refused(
    backend: ModuleType, model_config: dict[str, Any]
) -> None:
    assert "install onnxruntime-gpu" in message(
        backend.execution_providers, model_config, "GPU", 0, ["CPUExecutionProvider"]
    )


def test_gpu_instance_does_not_run_the_accelerator_of_cpus(
    backend: ModuleType,
    tmp_path: Path,
    write_model: Callable[..., Path],
    model_config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version_folder = write_model(tmp_path, "chestct").parent
    config = with_accelerator(model_config, "cpu", {"name": "openvino"})
    arguments = {
        "model_config": json.dumps(config),
        "model_repository": str(version_folder.parent),
        "model_version": version_folder.name,
        "model_instance_kind": "GPU",
        "model_instance_device_id": "0",
    }
    # An onnxruntime without GPUs is missed, which OpenVINO would not do.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has a GPU instance" in message(backend.TritonPythonModel()._open, arguments)
    backend.TritonPythonModel()._open(arguments | {"model_instance_kind": "CPU"})


def test_tensorrt_refuses_unknown_precision_and_parameter(backend: ModuleType) -> None:
    assert message(backend.tensorrt_options, {"precision_mode": "FP4"}, 0) == (
        "unsupported precision mode 'FP4' is requested"
    )
    assert message(backend.tensorrt_options, {"speed": "11"}, 0) == (
        "unknown parameter 'speed' is provided for TensorRT Execution Accelerator"
    )


def test_numpy_2_is_refused(backend: ModuleType) -> None:
    backend.check_numpy("1.26.4")
    assert "empty outputs" in message(backend.check_numpy, "2.0.0")


def test_model_path_follows_the_config(
    backend: ModuleType, tmp_path: Path, model_config: dict[str, Any]
) -> None:
    assert message(backend.model_path, model_config, tmp_path) == (
        f"unable to find '{tmp_path}/model.onnx' for model instance 'chestct'"
    )
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"")
    model_config["default_model_filename"] = "folder.onnx"
    assert backend.model_path(model_config, tmp_path) == folder / "model.onnx"


def test_requests_are_merged_and_split_again(backend: ModuleType) -> None:
    calls = []

    def double_and_sum(names: list[str], inputs: dict[str, Any]) -> dict[str, Any]:
        calls.append((names, len(inputs["scan"])))
        answers = {"double": inputs["scan"] * 2, "sum": inputs["scan"].sum(axis=1)}
        return {name: answers[name] for name in names}

    inputs = [{"scan": np.arange(4.0).reshape(2, 2)}, {"scan": np.full((1, 2), 7.0)}]
    first, second = backend.run_merged(double_and_sum, [["double"], ["sum", "double"]], inputs)
    assert calls == [(["double", "sum"], 3)]
    assert first.keys() == {"double"}
    np.testing.assert_array_equal(first["double"], [[0, 2], [4, 6]])
    np.testing.assert_array_equal(second["double"], [[14, 14]])
    np.testing.assert_array_equal(second["sum"], [14])


def test_output_without_the_batch_axis_is_refused(backend: ModuleType) -> None:
    inputs = [{"scan": np.ones((2, 2))}, {"scan": np.ones((1, 2))}]
    expected = r"output 'total' has shape \(\) for a batch of 3 rows"
    with pytest.raises(ValueError, match=expected):
        backend.run_merged(
            lambda names, tensors: {"total": tensors["scan"].sum()}, [["total"], ["total"]], inputs
        )


def test_auto_complete_fills_in_the_model(
    backend: ModuleType,
    tmp_path: Path,
    write_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_model(tmp_path, "chestct")
    # The stub adds this function to the module; all the rest here is the wheel's own.
    monkeypatch.setattr(backend.pb, "get_model_dir", lambda: str(path.parent), raising=False)
    bare = {"name": "chestct", "max_batch_size": 0, "input": [], "output": []}
    config = backend.pb.ModelConfig(json.dumps(bare))
    filled = backend.TritonPythonModel.auto_complete_config(config).as_dict()
    assert filled["max_batch_size"] == 4
    assert "dynamic_batching" in filled
    assert filled["input"] == [{"name": "scan", "data_type": "TYPE_UINT8", "dims": [224, 224, 1]}]
    assert [entry["dims"] for entry in filled["output"]] == [[3], [14, 14, 3], [1]]
    backend.check_tensors(filled, INPUTS, OUTPUTS)


def test_auto_complete_refuses_batching_for_a_fixed_batch(
    backend: ModuleType,
    tmp_path: Path,
    write_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_model(tmp_path, "chestct", batch=1)
    monkeypatch.setattr(backend.pb, "get_model_dir", lambda: str(path.parent), raising=False)
    bare = {"name": "chestct", "max_batch_size": 8, "input": [], "output": []}
    config = backend.pb.ModelConfig(json.dumps(bare))
    assert message(backend.TritonPythonModel.auto_complete_config, config) == (
        "autofill failed for model 'chestct': model does not support batching while non-zero "
        "max_batch_size is specified"
    )
