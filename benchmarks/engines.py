"""Engines inside this process: the two Keras baselines, ONNX Runtime and OpenVINO.

Little is imported here, because the cold start of an engine is measured by a process that imports
this module.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chestct.contract import INPUT_NAME, OUTPUT_NAMES

Scans = npt.NDArray[np.uint8]
Infer = Callable[[Scans], Any]  # uint8 (N, 224, 224, 1) to the outputs of the contract

# `predict` is what most people write; a compiled `tf.function` is the best that Keras can do.
BASELINES = ("keras_predict", "keras_compiled")
ENGINES = ("onnxruntime", "openvino", "openvino_bf16")

_FIRST_ANSWER = """
import sys, time
from pathlib import Path
import numpy as np
from benchmarks.engines import open_engine
infer = open_engine(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
infer(np.zeros((1, 224, 224, 1), np.uint8))
answered_s = time.monotonic()
infer(np.zeros((int(sys.argv[4]), 224, 224, 1), np.uint8))
print(answered_s, Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def open_engine(engine: str, folder: Path, threads: int = 0) -> Infer:
    """A function from scans, uint8 (N, 224, 224, 1), to the outputs of the contract by name.

    Args:
        engine: One of `BASELINES` or `ENGINES`.
        folder: Holds `model.keras` for a baseline, `model.onnx` for an engine.
        threads: Of an engine; 0 for one a core, as Keras has always.

    Raises:
        ValueError: The model is missing or the engine is unknown.
        ImportError: The engine is not installed.
    """
    if engine in BASELINES:
        return _open_keras(folder, compiled=engine == "keras_compiled")
    if not (folder / "model.onnx").is_file():
        raise ValueError(f"{folder}: no model.onnx in it")
    if engine == "onnxruntime":
        return _open_onnxruntime(folder / "model.onnx", threads)
    if engine in ENGINES:
        # OpenVINO takes bfloat16 by itself where the CPU has it, which is not what FP32 means.
        precision = "bf16" if engine == "openvino_bf16" else "f32"
        return _open_openvino(folder / "model.onnx", threads, precision)
    raise ValueError(f"engine {engine!r}: expected one of {(*BASELINES, *ENGINES)}")


def _open_keras(folder: Path, *, compiled: bool) -> Infer:
    from training.network.vgg16 import load_trained

    model, _ = load_trained(folder)
    if not compiled:
        return lambda scans: model.predict(scans, verbose=0)
    import tensorflow as tf

    function = tf.function(lambda scan: model(scan, training=False))
    return lambda scans: {name: value.numpy() for name, value in function(scans).items()}


def _open_onnxruntime(onnx: Path, threads: int) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # As in the server's backend; spinning threads would also disturb what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = [
        # TF32 keeps ten bits of the mantissa, which is not what FP32 means.
        (name, {"use_tf32": "0"} if name == "CUDAExecutionProvider" else {})
        for name in onnxruntime.get_available_providers()
    ]
    session = onnxruntime.InferenceSession(str(onnx), options, providers=providers)
    names = list(OUTPUT_NAMES)
    return lambda scans: dict(zip(names, session.run(names, {INPUT_NAME: scans}), strict=True))


def _open_openvino(onnx: Path, threads: int, precision: str) -> Infer:
    import openvino

    hints: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    if threads:  # both as in the server's backend
        hints |= {"INFERENCE_NUM_THREADS": str(threads), "ENABLE_CPU_PINNING": False}
    request = openvino.Core().compile_model(str(onnx), "CPU", hints).create_infer_request()

    def infer(scans: Scans) -> dict[str, npt.NDArray[np.float32]]:
        request.infer({INPUT_NAME: scans}, share_inputs=True)
        return {name: request.get_tensor(name).data.copy() for name in OUTPUT_NAMES}

    return infer


def first_answer(engine: str, folder: Path, threads: int, batch: int) -> tuple[float, float]:
    """Seconds from the start of a new process to its first answer, and its peak memory in MB.

    The peak (`VmHWM`, proc_pid_status(5)) is read after a further request of `batch` scans. Files
    are in the page cache, as after the first start on a machine.

    Raises:
        ValueError: The process failed.
    """
    command = [sys.executable, "-c", _FIRST_ANSWER, engine, str(folder), str(threads), str(batch)]
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    started_s = time.monotonic()  # one clock for all processes of a machine: clock_gettime(2)
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=300)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{engine} on {folder} in a process of its own: {said}")
    answered_s, peak_kb = done.stdout.split()
    return float(answered_s) - started_s, int(peak_kb) * 1024 / 1e6
