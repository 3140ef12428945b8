"""The text of `config.pbtxt`: of a published model, and of the ensemble that takes whole files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chestct.contract import INPUT_NAME, MODEL_NAME, ModelMetadata, input_spec, output_specs
from export.convert.engine import profile_shape
from export.publish.settings import DECODE, ENCODED, GPU_ENGINES, RepositoryConfig

# triton-inference-server/onnxruntime_backend, README, "Parameter mapping".
PRECISION_MODES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def config_pbtxt(
    config: RepositoryConfig, facts: ModelMetadata, *, version: int, onnx_sha256: str = ""
) -> str:
    """The text of `config.pbtxt`: tensors from the contract, parameters from the metadata.

    The version policy names one version, so that replacing this one file switches the version.

    Args:
        config: How the model is published.
        facts: Its metadata.
        version: The version that is served.
        onnx_sha256: Hash of the ONNX file, by which the cached engines of TensorRT are kept apart.

    Raises:
        ValueError: A precision that the engine does not have.
    """
    scan = {key: value for key, value in _scan().items() if key != "name"}
    outputs = _outputs(facts)
    outputs[0]["label_filename"] = f"{version}/labels.txt"
    parameters = facts.to_parameters()
    if config.engine in GPU_ENGINES:
        kind = "KIND_GPU"
        if config.engine != "tensorrt-plan":
            # 1 is HEURISTIC; the default tries all algorithms at each new batch size, in service.
            parameters["cudnn_conv_algo_search"] = "1"
    else:
        # KIND_AUTO is a GPU where there is one, else the CPU.
        kind = "KIND_CPU" if config.engine == "openvino" else "KIND_AUTO"
        if config.threads:
            parameters["intra_op_thread_count"] = str(config.threads)
    settings: dict[str, Any] = {
        "name": config.name,
        "backend": "tensorrt" if config.engine == "tensorrt-plan" else "onnxruntime",
        "max_batch_size": config.max_batch_size,
        "input": [_scan()],
        "output": outputs,
        "version_policy": {"specific": {"versions": [version]}},
        "instance_group": [{"count": config.instances, "kind": kind}],
        "model_warmup": [
            {
                "name": f"batch {size}",
                "batch_size": size,
                "inputs": {INPUT_NAME: {**scan, "random_data": True}},
            }
            for size in config.warm_up
        ],
        "parameters": _parameters(parameters),
    }
    optimization = _optimization(config, facts, onnx_sha256)
    if optimization:
        settings["optimization"] = optimization
    if config.max_queue_delay_us is not None:
        settings["dynamic_batching"] = {"max_queue_delay_microseconds": config.max_queue_delay_us}
    return config_text(_message(settings))


def _optimization(
    config: RepositoryConfig, facts: ModelMetadata, onnx_sha256: str
) -> dict[str, Any]:
    if config.engine == "openvino":
        accelerators: dict[str, Any] = {"cpu_execution_accelerator": [{"name": "openvino"}]}
    elif config.engine == "onnxruntime-cuda":
        # TF32 keeps ten bits of the FP32 head and of the domain distance.
        cuda = {"name": "cuda", "parameters": {"use_tf32": "0"}}
        accelerators = {"gpu_execution_accelerator": [cuda]}
    elif config.engine == "onnxruntime-tensorrt":
        tensorrt = {
            "name": "tensorrt",
            "parameters": tensorrt_parameters(config, facts, onnx_sha256),
        }
        accelerators = {"gpu_execution_accelerator": [tensorrt]}
    elif config.engine == "tensorrt-plan" and config.cuda_graphs:
        shape = {INPUT_NAME: {"dim": input_spec().shape[1:]}}
        graphs = [{"batch_size": size, "input": shape} for size in config.warm_up]
        return {"cuda": {"graphs": True, "graph_spec": graphs}}
    else:
        return {}
    return {"execution_accelerators": accelerators}


def tensorrt_parameters(
    config: RepositoryConfig, facts: ModelMetadata, onnx_sha256: str
) -> dict[str, str]:
    """Parameters of the native backend's TensorRT accelerator, by its own names.

    ONNX Runtime names a cached engine after the graph without its weights: with one folder for all
    models, a new version would be answered by the engine of the old one.

    Raises:
        ValueError: A precision that the accelerator does not have.
    """
    if facts.precision not in PRECISION_MODES:
        raise ValueError(
            f"precision is {facts.precision!r}; onnxruntime-tensorrt takes {list(PRECISION_MODES)}"
        )
    best = max(config.warm_up, default=config.max_batch_size)
    return {
        "precision_mode": PRECISION_MODES[facts.precision],
        "max_workspace_size_bytes": str(config.workspace_mb * 1024 * 1024),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(config.tensorrt_cache / onnx_sha256[:16]),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(config.tensorrt_cache),
        "trt_profile_min_shapes": profile_shape(1),
        "trt_profile_opt_shapes": profile_shape(best),
        "trt_profile_max_shapes": profile_shape(config.max_batch_size),
    }


def encoded_configs(model: Any) -> tuple[Any, Any]:
    """The `ModelConfig` of `chestct_decode` and of the ensemble `chestct_encoded`.

    Neither names a version yet. Labels, window and threshold are those of the served model, as
    parameters.

    Args:
        model: The `ModelConfig` of `chestct`.
    """
    facts = facts_of_config(model)
    file = {"name": "file", "data_type": "TYPE_STRING", "dims": [1]}
    answers = _outputs(facts)
    extras = [
        {"name": "reasons", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "labels", "data_type": "TYPE_STRING", "dims": [len(facts.class_names)]},
        {"name": "domain_threshold", "data_type": "TYPE_FP32", "dims": [1]},
        {"name": "notice", "data_type": "TYPE_STRING", "dims": [1]},
    ]
    common = {
        "max_batch_size": model.max_batch_size,
        "parameters": _parameters(facts.to_parameters()),
        "input": [file],
    }
    decode = {
        "name": DECODE,
        "backend": "chestct_scan",
        "output": [_scan(), *extras],
        # Each instance decodes on one core, and the network wants them too.
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
    }
    steps = [
        {
            "model_name": DECODE,
            "model_version": -1,
            "input_map": {"file": "file"},
            "output_map": _same([_scan(), *extras]),
        },
        {
            "model_name": MODEL_NAME,
            "model_version": -1,
            "input_map": _same([_scan()]),
            "output_map": _same(answers),
        },
    ]
    ensemble = {
        "name": ENCODED,
        "platform": "ensemble",
        "output": [*answers, *extras],
        "ensemble_scheduling": {"step": steps},
    }
    return _message(common | decode), _message(common | ensemble)


def parsed_config(text: str) -> Any:
    """The protobuf message of a `config.pbtxt`, as Triton's own schema reads it.

    Raises:
        ValueError: The text does not fit the schema.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(f"config.pbtxt does not parse: {error}") from error


def config_text(message: Any, version: int | None = None) -> str:
    """The text of a `ModelConfig`; `version` becomes the one that is served."""
    from google.protobuf import text_format

    if version is not None:
        message.version_policy.specific.versions[:] = [version]
    text: str = text_format.MessageToString(message, as_utf8=True)
    return text


def facts_of_config(message: Any) -> ModelMetadata:
    """The metadata among the parameters of a `ModelConfig`."""
    return ModelMetadata.from_parameters(
        {key: value.string_value for key, value in message.parameters.items()}
    )


def engine_of(message: Any) -> str:
    """The engine of a `ModelConfig`, by the names of `export.publish.settings.ENGINES`."""
    if message.backend == "tensorrt":
        return "tensorrt-plan"
    listed = message.optimization.execution_accelerators
    for item in listed.gpu_execution_accelerator:
        return f"onnxruntime-{item.name}"
    names = [item.name for item in listed.cpu_execution_accelerator]
    return "openvino" if "openvino" in names else "onnxruntime"


def _message(settings: dict[str, Any]) -> Any:
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2

    return json_format.ParseDict(settings, model_config_pb2.ModelConfig())


def _scan() -> dict[str, Any]:
    spec = input_spec()
    return {"name": spec.name, "data_type": f"TYPE_{spec.dtype}", "dims": spec.shape[1:]}


def _outputs(facts: ModelMetadata) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "data_type": f"TYPE_{spec.dtype}", "dims": spec.shape[1:]}
        for spec in output_specs(len(facts.class_names))
    ]


def _parameters(values: Mapping[str, str]) -> dict[str, Any]:
    return {key: {"string_value": value} for key, value in values.items()}


def _same(tensors: list[dict[str, Any]]) -> dict[str, str]:
    """The map of an ensemble's step for tensors whose name stays."""
    return {tensor["name"]: tensor["name"] for tensor in tensors}
