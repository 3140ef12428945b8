"""Triton backend called `onnxruntime`, in Python, for machines that cannot run NVIDIA's container.

It reads the same `config.pbtxt` as NVIDIA's native onnxruntime backend and refuses what that one
refuses, in its words (triton-inference-server/onnxruntime_backend, `onnxruntime.cc` and
`onnxruntime_utils.cc`), so that a repository that loads here also loads there. Not supported are
ragged batches, `batch_input`, `batch_output` and implicit sequence state. It is one file of more
than 400 lines, because Triton loads `model.py` of a backend by its path, outside of any package.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

Tensors = dict[str, np.ndarray]
RunModel = Callable[[Sequence[str], Tensors], Tensors]
# Tensor name -> (Triton type, dims), -1 where the model leaves a dimension open.
TensorFacts = dict[str, tuple[str, list[int]]]
Engine = tuple[RunModel, TensorFacts, TensorFacts]  # with the facts of inputs and outputs

DEFAULT_MAX_BATCH_SIZE = 4  # Triton's own --backend-config=default-max-batch-size
# Triton's type by the names of onnxruntime, then by those of OpenVINO.
TRITON_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
    "boolean": "TYPE_BOOL",
    "u8": "TYPE_UINT8",
    "u16": "TYPE_UINT16",
    "u32": "TYPE_UINT32",
    "u64": "TYPE_UINT64",
    "i8": "TYPE_INT8",
    "i16": "TYPE_INT16",
    "i32": "TYPE_INT32",
    "i64": "TYPE_INT64",
    "f16": "TYPE_FP16",
    "f32": "TYPE_FP32",
    "f64": "TYPE_FP64",
    "string": "TYPE_STRING",
}


def check_numpy(version: str) -> None:
    """Refuse numpy 2, with which Triton's stub answers with empty tensors and no error.

    Raises:
        ValueError: `version` is 2 or newer.
    """
    if int(version.split(".")[0]) >= 2:
        raise ValueError(
            f"numpy {version} in the server's environment: Triton 2.51 returns empty outputs with "
            "it; expected numpy < 2. Install serving/requirements.txt there"
        )


def model_path(config: Mapping[str, Any], version_folder: Path) -> Path:
    """The ONNX file of one model version.

    Raises:
        ValueError: There is no such file.
    """
    path = version_folder / (config.get("default_model_filename") or "model.onnx")
    if path.is_dir():
        path /= "model.onnx"
    if not path.exists():
        raise ValueError(f"unable to find '{path}' for model instance '{config['name']}'")
    return path


def parameter(config: Mapping[str, Any], key: str) -> str | None:
    """The string value of one entry of `parameters`, None without it."""
    entry = config.get("parameters", {}).get(key)
    return None if entry is None else entry["string_value"]


def integer_parameter(config: Mapping[str, Any], key: str) -> int:
    """An entry of `parameters` as a number, 0 without it.

    Raises:
        ValueError: The entry is not a whole number.
    """
    value = parameter(config, key)
    try:
        return int(value or 0)
    except ValueError as error:
        raise ValueError(f"failed to convert '{value}' to integral number") from error


def boolean_parameter(config: Mapping[str, Any], key: str) -> bool | None:
    """An entry of `parameters` as a truth value, None without it.

    Raises:
        ValueError: The entry is none of true, on, 1, false, off, 0.
    """
    value = parameter(config, key)
    if value is None:
        return None
    if value.lower() not in ("true", "on", "1", "false", "off", "0"):
        raise ValueError(f"failed to convert '{value}' to boolean")
    return value.lower() in ("true", "on", "1")


def session_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of `onnxruntime.SessionOptions` asked for by a model config.

    `graph_optimization_level` and `execution_mode` are given as the names of onnxruntime's enums.

    Raises:
        ValueError: An entry of `parameters` has a value that the native backend refuses.
    """
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    mode = integer_parameter(config, "execution_mode")
    if mode not in (0, 1):
        # The two spaces and the space before the full stop are the native backend's.
        raise ValueError(
            "Invalid configuration value provided. Expected values for  execution_mode are 0 or 1 "
            f"but got {mode} ."
        )
    settings: dict[str, Any] = {
        "graph_optimization_level": {
            -1: "ORT_ENABLE_BASIC",
            1: "ORT_ENABLE_EXTENDED",
            2: "ORT_DISABLE_ALL",
        }.get(level, "ORT_ENABLE_ALL"),
        "execution_mode": ("ORT_SEQUENTIAL", "ORT_PARALLEL")[mode],
    }
    for key, attribute in (
        ("intra_op_thread_count", "intra_op_num_threads"),
        ("inter_op_thread_count", "inter_op_num_threads"),
    ):
        count = integer_parameter(config, key)
        if count > 0:
            settings[attribute] = count
    for key, attribute in (
        ("enable_mem_arena", "enable_cpu_mem_arena"),
        ("enable_mem_pattern", "enable_mem_pattern"),
    ):
        enabled = boolean_parameter(config, key)
        if enabled is not None:
            settings[attribute] = enabled
    return settings


def accelerators(config: Mapping[str, Any], device: str) -> list[tuple[str, dict[str, str]]]:
    """Name and parameters of each `cpu_` or `gpu_execution_accelerator`."""
    listed = config.get("optimization", {}).get("execution_accelerators", {})
    return [
        (entry["name"], entry.get("parameters", {}))
        for entry in listed.get(f"{device}_execution_accelerator", [])
    ]


def tensorrt_options(parameters: Mapping[str, str], device_id: int) -> dict[str, str]:
    """Options of onnxruntime's TensorRT provider from the parameters of the accelerator.

    Raises:
        ValueError: A precision that the provider does not have.
    """
    options = {"device_id": str(device_id)}
    for key, value in parameters.items():
        if key == "precision_mode":
            if value not in ("FP32", "FP16", "BF16", "INT8"):
                raise ValueError(f"unsupported precision mode '{value}' is requested")
            if value != "FP32":
                options[f"trt_{value.lower()}_enable"] = "1"
        elif key == "max_workspace_size_bytes":
            options["trt_max_workspace_size"] = value
        elif key.startswith("int8_"):
            options[f"trt_{key}"] = value
        elif key.startswith("trt_"):
            options[key] = value
        else:
            raise ValueError(
                f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator"
            )
    return options


def execution_providers(
    config: Mapping[str, Any], kind: str, device_id: int, available: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    """Providers of onnxruntime for an instance, best first.

    Args:
        config: The model config.
        kind: `CPU` or `GPU`.
        device_id: Number of the GPU.
        available: What the installed onnxruntime offers.

    Raises:
        ValueError: An accelerator that is unknown, or that this onnxruntime lacks.
    """
    providers: list[tuple[str, dict[str, str]]] = []
    if kind == "GPU":
        cuda_options = {"device_id": str(device_id)}
        for name, parameters in accelerators(config, "gpu"):
            if name == "tensorrt" and "TensorrtExecutionProvider" in available:
                options = tensorrt_options(parameters, device_id)
                providers.append(("TensorrtExecutionProvider", options))
            elif name == "cuda":
                cuda_options |= parameters
            else:
                raise ValueError(f"unknown Execution Accelerator '{name}' is requested")
        if "CUDAExecutionProvider" not in available:
            raise ValueError(
                f"model '{config['name']}' has a GPU instance, but onnxruntime in the server's "
                f"environment offers only {', '.join(available)}; install onnxruntime-gpu there"
            )
        providers.append(("CUDAExecutionProvider", cuda_options))
    return [*providers, ("CPUExecutionProvider", {})]


def uses_openvino(config: Mapping[str, Any]) -> bool:
    """Whether `cpu_execution_accelerator` asks for OpenVINO.

    Raises:
        ValueError: It asks for an accelerator that is unknown, for OpenVINO without its package, or
            gives it parameters. The native backend reads none of these and passes over them, so a
            config that has some does not do what it says.
    """
    listed = accelerators(config, "cpu")
    for name, parameters in listed:
        if name != "openvino" or importlib.util.find_spec("openvino") is None:
            raise ValueError(f"unknown Execution Accelerator '{name}' is requested")
        if parameters:
            raise ValueError(
                f"unknown parameter '{next(iter(parameters))}' is provided for OpenVINO Execution "
                "Accelerator"
            )
    return bool(listed)


def _shape_text(dims: Sequence[int]) -> str:
    return f"[{','.join(str(dim) for dim in dims)}]"


def check_dims(
    model: str,
    tensor: str,
    found: Sequence[int],
    dims: Sequence[int],
    max_batch_size: int,
    *,
    exact: bool,
) -> None:
    """Compare the dims of a config with those of the model.

    Args:
        model: Name of the model, for the message.
        tensor: Name of the tensor, for the message.
        found: Dims in the ONNX file, -1 where open.
        dims: Dims in the config, without the batch axis if `max_batch_size` > 0.
        max_batch_size: 0 for a model without a batch axis.
        exact: Outputs must agree exactly; an input may be fixed where the model is open.

    Raises:
        ValueError: They differ.
    """
    who = f"model '{model}', tensor '{tensor}': "
    if not found:
        if any(dim != 1 for dim in dims):
            raise ValueError(
                f"unable to load model '{model}', scalar tensor '{tensor}', should only provide 1 "
                "in the model configuration when the model doesn't support batching. Model "
                f"configuration provided: {_shape_text(dims)}."
            )
        return
    batched = max_batch_size > 0
    if batched and found[0] != -1:
        raise ValueError(
            f"{who}for the model to support batching the shape should have at least 1 dimension "
            "and the first dimension must be -1; but shape expected by the model is "
            f"{_shape_text(found)}"
        )
    declared = [-1, *dims] if batched else list(dims)
    agree = len(found) == len(declared) and all(
        have == want or (have == -1 and not exact)
        for have, want in zip(found, declared, strict=True)
    )
    if agree:
        return
    expects = (
        f"{who}the model expects {len(found)} dimensions (shape {_shape_text(found)}) but the "
        f"model configuration specifies {len(declared)} dimensions "
    )
    if batched:
        raise ValueError(
            f"{expects}(an initial batch dimension because max_batch_size > 0 followed by the "
            f"explicit tensor shape, making complete shape {_shape_text(declared)})"
        )
    raise ValueError(f"{expects}(shape {_shape_text(declared)})")


def check_tensors(config: Mapping[str, Any], inputs: TensorFacts, outputs: TensorFacts) -> None:
    """Compare names, types and dims of a model config with the ONNX model.

    Raises:
        ValueError: The native backend would not load this pair, in its words; or the config uses a
            feature that this backend lacks.
    """
    model, max_batch_size = config["name"], config["max_batch_size"]
    sequence = config.get("sequence_batching", {})
    for feature, used in (
        ("batch_input", config.get("batch_input")),
        ("batch_output", config.get("batch_output")),
        ("allow_ragged_batch", any(entry.get("allow_ragged_batch") for entry in config["input"])),
        ("optional input", any(entry.get("optional") for entry in config["input"])),
        ("sequence_batching.state", sequence.get("state")),
    ):
        if used:
            raise ValueError(
                f"unable to load model '{model}', {feature} is not supported by this backend; "
                "serve the model by NVIDIA's container"
            )
    num_expected = len(config["input"]) + len(sequence.get("control_input", []))
    if len(inputs) != num_expected:
        raise ValueError(
            f"unable to load model '{model}', configuration expects {num_expected} inputs, model "
            f"provides {len(inputs)}"
        )
    for kind, found in (("input", inputs), ("output", outputs)):
        for entry in config[kind]:
            name, wanted_type = entry["name"], entry["data_type"]
            if name not in found:
                raise ValueError(
                    f"unexpected inference {kind} '{name}', allowed {kind}s are: "
                    f"{', '.join(sorted(found))}"
                )
            found_type, found_dims = found[name]
            if wanted_type != found_type:
                raise ValueError(
                    f"unable to load model '{model}', configuration expects datatype {wanted_type} "
                    f"for {kind} '{name}', model provides {found_type}"
                )
            dims = entry["reshape"]["shape"] if "reshape" in entry else entry["dims"]
            check_dims(
                model,
                name,
                found_dims,
                [int(dim) for dim in dims],
                max_batch_size,
                exact=kind == "output",
            )


def tensor_facts(nodes: Sequence[Any]) -> TensorFacts:
    """Names, types and dims of the inputs or outputs of an `onnxruntime.InferenceSession`."""
    return {
        node.name: (
            TRITON_TYPES.get(node.type, "TYPE_INVALID"),
            [dim if isinstance(dim, int) else -1 for dim in node.shape],
        )
        for node in nodes
    }


def open_onnxruntime(
    path: Path, settings: Mapping[str, Any], providers: Sequence[tuple[str, dict[str, str]]]
) -> Any:
    """An `onnxruntime.InferenceSession` that runs on the first of `providers`.

    Raises:
        ValueError: onnxruntime fell back to another provider.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Worker threads that go on spinning after a run take a core from Triton and from the client.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    enums = {
        "graph_optimization_level": onnxruntime.GraphOptimizationLevel,
        "execution_mode": onnxruntime.ExecutionMode,
    }
    for attribute, value in settings.items():
        setattr(
            options, attribute, getattr(enums[attribute], value) if attribute in enums else value
        )
    session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    if session.get_providers()[0] != providers[0][0]:
        raise ValueError(
            f"{providers[0][0]} was asked for, but onnxruntime fell back to "
            f"{session.get_providers()[0]}; are its libraries installed?"
        )
    return session


def onnxruntime_engine(
    path: Path, settings: Mapping[str, Any], providers: Sequence[tuple[str, dict[str, str]]]
) -> Engine:
    """The ONNX file run by `open_onnxruntime`'s session."""
    session = open_onnxruntime(path, settings, providers)

    def run(names: Sequence[str], inputs: Tensors) -> Tensors:
        return dict(zip(names, session.run(names, inputs), strict=True))

    return run, tensor_facts(session.get_inputs()), tensor_facts(session.get_outputs())


def openvino_facts(ports: Sequence[Any]) -> TensorFacts:
    """Names, types and dims of the inputs or outputs of an `openvino.Model`."""
    return {
        port.any_name: (
            TRITON_TYPES.get(port.element_type.get_type_name(), "TYPE_INVALID"),
            [dim.get_length() if dim.is_static else -1 for dim in port.partial_shape],
        )
        for port in ports
    }


def openvino_engine(path: Path, settings: Mapping[str, Any]) -> Engine:
    """The ONNX file compiled by OpenVINO for the CPU, tuned for latency.

    What the file does not quantise is calculated in full precision. The batch stays open: a new
    batch size costs a small model 10 ms once, and one compiled for a single scan is 1 to 2 percent
    faster, which is not worth twice the memory.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    # Without the hint OpenVINO calculates in bfloat16 where the CPU can, which is not parity.
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if "intra_op_num_threads" in settings:
        properties["INFERENCE_NUM_THREADS"] = str(settings["intra_op_num_threads"])
        # Each instance is a process, and each would pin its threads to the same first cores.
        properties["ENABLE_CPU_PINNING"] = False
    request = core.compile_model(model, "CPU", properties).create_infer_request()

    def run(names: Sequence[str], inputs: Tensors) -> Tensors:
        request.infer(inputs, share_inputs=True)
        return {name: request.get_tensor(name).data.copy() for name in names}

    return run, openvino_facts(model.inputs), openvino_facts(model.outputs)


def run_merged(
    run: RunModel, wanted: Sequence[Sequence[str]], inputs: Sequence[Tensors]
) -> list[Tensors]:
    """Outputs of several requests from one run of the model.

    Args:
        run: Takes output names and inputs of shape (N, ...), gives those outputs.
        wanted: For each request the names of the outputs that it asked for.
        inputs: For each request its inputs, of shape (n, ...) with a common n.

    Returns:
        For each request its outputs, of shape (n, ...), views into the common ones.

    Raises:
        ValueError: An output does not have one row for each row of the inputs.
    """
    names = list(dict.fromkeys(name for request in wanted for name in request))
    if len(inputs) == 1:
        return [run(names, inputs[0])]
    merged = {name: np.concatenate([request[name] for request in inputs]) for name in inputs[0]}
    outputs = run(names, merged)
    ends = np.cumsum([len(next(iter(request.values()))) for request in inputs])
    for name, output in outputs.items():
        if output.ndim == 0 or len(output) != ends[-1]:
            raise ValueError(
                f"output '{name}' has shape {output.shape} for a batch of {ends[-1]} rows"
            )
    parts = {name: np.split(output, ends[:-1]) for name, output in outputs.items()}
    return [{name: parts[name][i] for name in request} for i, request in enumerate(wanted)]


def _text(array: np.ndarray) -> np.ndarray:
    decoded = [item.decode() if isinstance(item, bytes) else str(item) for item in array.flat]
    return np.array(decoded, dtype=object).reshape(array.shape)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.array([str(item).encode() for item in array.flat], dtype=object).reshape(array.shape)


class TritonPythonModel:
    """One instance of a model, in a process of its own; Triton calls its methods."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in inputs, outputs and batching where the config leaves them out."""
        config = auto_complete_model_config.as_dict()
        if config["input"] and config["output"]:
            return auto_complete_model_config
        path = model_path(config, Path(pb.get_model_dir()))
        providers = [("CPUExecutionProvider", {})]
        settings = {"graph_optimization_level": "ORT_DISABLE_ALL"}
        session = open_onnxruntime(path, settings, providers)
        inputs, outputs = tensor_facts(session.get_inputs()), tensor_facts(session.get_outputs())
        batched = all(dims and dims[0] == -1 for _, dims in [*inputs.values(), *outputs.values()])
        if batched and config["max_batch_size"] == 0:
            auto_complete_model_config.set_max_batch_size(DEFAULT_MAX_BATCH_SIZE)
        elif not batched and config["max_batch_size"] > 0:
            raise ValueError(
                f"autofill failed for model '{config['name']}': model does not support batching "
                "while non-zero max_batch_size is specified"
            )
        if batched and "sequence_batching" not in config:
            auto_complete_model_config.set_dynamic_batching()
        for given, found, add in (
            (config["input"], inputs, auto_complete_model_config.add_input),
            (config["output"], outputs, auto_complete_model_config.add_output),
        ):
            if not given:
                for name, (data_type, dims) in found.items():
                    add({"name": name, "data_type": data_type, "dims": dims[batched:] or [1]})
        return auto_complete_model_config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the model and compare it with its config.

        Raises:
            TritonModelException: The pair cannot be served; the message says why.
        """
        try:
            check_numpy(np.__version__)
            self._open(args)
        except Exception as error:
            raise pb.TritonModelException(str(error)) from error

    def _open(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        path = model_path(config, Path(args["model_repository"]) / args["model_version"])
        settings, kind = session_settings(config), args["model_instance_kind"]
        # An engine is imported only where it runs: beside the other it costs 30 MB and 0.1 s.
        if uses_openvino(config) and kind != "GPU":
            self._run, inputs, outputs = openvino_engine(path, settings)
        else:
            import onnxruntime

            device_id = int(args["model_instance_device_id"])
            available = onnxruntime.get_available_providers()
            providers = execution_providers(config, kind, device_id, available)
            self._run, inputs, outputs = onnxruntime_engine(path, settings, providers)
        check_tensors(config, inputs, outputs)
        self._batched = config["max_batch_size"] > 0
        self._text_inputs = {name for name, (type_, _) in inputs.items() if type_ == "TYPE_STRING"}

    def _inputs(self, request: Any) -> Tensors:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        return {n: _text(a) if n in self._text_inputs else a for n, a in tensors.items()}

    def _responses(self, requests: Sequence[Any]) -> list[Any]:
        wanted = [list(request.requested_output_names()) for request in requests]
        try:
            answers = run_merged(self._run, wanted, [self._inputs(request) for request in requests])
        except Exception as error:
            failure = pb.TritonError(f"{type(error).__name__}: {error}")
            return [pb.InferenceResponse(error=failure) for _ in requests]
        return [
            pb.InferenceResponse(
                [
                    pb.Tensor(name, _bytes(array) if array.dtype == object else array)
                    for name, array in answer.items()
                ]
            )
            for answer in answers
        ]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; with a batch axis all of them share one run."""
        if self._batched:
            return self._responses(requests)
        return [response for request in requests for response in self._responses([request])]

    def finalize(self) -> None:
        """Let go of the model."""
        del self._run
