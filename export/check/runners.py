"""Runners: a model as a function from scans to the outputs of the contract, by engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from chestct.contract import INPUT_NAME, OUTPUT_NAMES
from chestct.inference.server_pool import ServerPool
from export.check.variant import require_file

BATCH_SIZES = (1, 8)  # two of them show that the batch axis is dynamic

Outputs = Mapping[str, npt.NDArray[np.float32]]
Runner = Callable[[npt.NDArray[np.uint8]], Outputs]  # uint8 (N, 224, 224, 1) to the outputs


def keras_runner(model: Any) -> Runner:
    """Runs a Keras model from `training.network.vgg16`."""

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        return {name: np.asarray(value) for name, value in model.predict_on_batch(scans).items()}

    return infer


def onnx_runner(path: Path) -> Runner:
    """Runs an ONNX file by ONNX Runtime on the CPU.

    Raises:
        ValueError: The file is missing or cannot be loaded.
    """
    import onnxruntime

    require_file(path)
    options = onnxruntime.SessionOptions()
    # Its idle threads spin, which makes OpenVINO in the same process 16 times slower on 2 cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        return dict(zip(names, session.run(names, {INPUT_NAME: scans}), strict=True))

    return infer


def openvino_runner(path: Path) -> Runner:
    """Runs an ONNX file by OpenVINO on the CPU, with the settings of the Triton backend.

    Raises:
        ValueError: The file is missing, or OpenVINO is not installed.
    """
    require_file(path)
    try:
        import openvino
    except ImportError as error:
        raise ValueError(
            "the engine openvino needs its package: pip install openvino, or leave it out of "
            "`engines`"
        ) from error
    # Without the hint OpenVINO calculates in bfloat16 where the CPU can, which is not parity.
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", properties).create_infer_request()

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        request.infer({INPUT_NAME: scans}, share_inputs=True)
        return {name: request.get_tensor(name).data.copy() for name in OUTPUT_NAMES}

    return infer


ENGINES: dict[str, Callable[[Path], Runner]] = {
    "onnxruntime": onnx_runner,
    "openvino": openvino_runner,
}


def triton_runner(client: ServerPool) -> Runner:
    """Runs the model that a connected client talks to."""

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        predictions = client.infer(scans, with_map=True)
        return {
            "probabilities": predictions.probabilities,
            "activation_map": np.asarray(predictions.activation_map),
            "domain_distance": predictions.domain_distance[:, np.newaxis],
        }

    return infer


def run_all(name: str, runner: Runner, scans: npt.NDArray[np.uint8]) -> Outputs:
    """All outputs for `scans`, uint8 (N, 224, 224, 1), split by the batch sizes in turn."""
    parts = [
        runner(scans[batch])
        for batch in tqdm(batches_of(len(scans), BATCH_SIZES), name, disable=None)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def output_differences(wanted: Outputs, got: Outputs) -> tuple[str, ...]:
    """Outputs that are missing or have another shape, one sentence each."""
    missing = [name for name in OUTPUT_NAMES if name not in got]
    shapes = [
        f"output {name} has shape {got[name].shape}, expected {wanted[name].shape}"
        for name in OUTPUT_NAMES
        if name in got and got[name].shape != wanted[name].shape
    ]
    return (*(f"output {name} is missing" for name in missing), *shapes)


def batches_of(count: int, sizes: tuple[int, ...]) -> list[slice]:
    """Slices of `count` items, of the batch sizes in turn."""
    batches: list[slice] = []
    start = 0
    while start < count:
        size = sizes[len(batches) % len(sizes)]
        batches.append(slice(start, min(start + size, count)))
        start += size
    return batches
