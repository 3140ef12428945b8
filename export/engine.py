"""ONNX to a TensorRT plan, on the machine whose GPU will run it. Not run on a GPU yet.

TensorRT 11 knows strongly typed networks only (precision flags and calibrators are gone), and
TensorRT 10 accepts the same: precision is therefore put into the ONNX graph, by casts for FP16
and by Q/DQ nodes for INT8, and one way of building serves both.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestct.contract import INPUT_NAME, SCAN_SHAPE
from export.onnx import sha256_of
from training.command import command_parser, run_command
from training.config import load_config
from training.files import replaced, write_json

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class EngineConfig:
    """What `export.engine` is told.

    Attributes:
        onnx: The exported model; for int8 one with Q/DQ nodes.
        output: Folder for `model.plan` and `plan.json`.
        precision: `fp32`, `fp16` (the graph is cast here) or `int8` (Q/DQ nodes are in the file).
        min_batch: Least batch of the optimization profile.
        opt_batch: Batch that the tactics are chosen for.
        max_batch: Greatest batch; Triton's max_batch_size may not exceed it.
        workspace_mb: Memory that TensorRT may use while it builds and runs.
    """

    onnx: Path = Path("results/export/model.onnx")
    output: Path = Path("results/engine")
    precision: str = "fp16"
    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 32
    workspace_mb: int = 2048

    def __post_init__(self) -> None:
        """Refuse what TensorRT would refuse after minutes.

        Raises:
            ValueError: Unknown precision, or a profile out of order.
        """
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; expected one of {PRECISIONS}")
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(
                f"batches {self.min_batch}, {self.opt_batch}, {self.max_batch}; expected "
                "1 <= min <= opt <= max"
            )


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU of this machine: its name and compute capability, such as `8.9`."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class PlanRecord:
    """What a plan was built for; it runs nowhere else.

    Attributes:
        gpu: Name of the GPU.
        compute_capability: Of that GPU.
        tensorrt: Version of TensorRT.
        onnx_sha256: Hash of the ONNX file the plan was built from.
        precision: `fp32`, `fp16` or `int8`.
        profile: Least, best and greatest batch.
    """

    gpu: str
    compute_capability: str
    tensorrt: str
    onnx_sha256: str
    precision: str
    profile: tuple[int, int, int]


class NoGpuError(Exception):
    """This machine has no NVIDIA GPU that answers, or no TensorRT."""


def find_gpu() -> Gpu:
    """The first GPU that `nvidia-smi` names.

    Raises:
        NoGpuError: There is no driver or no GPU; the message says which.
    """
    if shutil.which("nvidia-smi") is None:
        raise NoGpuError("no NVIDIA driver on this machine (nvidia-smi is not there)")
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired as error:
        raise NoGpuError("the NVIDIA driver does not answer (nvidia-smi took over 30 s)") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr or done.stdout).strip().splitlines()[:1]
        raise NoGpuError(f"the NVIDIA driver names no GPU (nvidia-smi said {said})")
    name, _, capability = lines[0].rpartition(",")
    return Gpu(name.strip(), capability.strip())


def half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its convolutions in FP16; head, softmax and domain distance in FP32.

    Inputs and outputs keep their dtypes, so the contract holds.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(
        model, keep_io_types=True, node_block_list=nodes_after_features(model)
    )


def nodes_after_features(model: onnx.ModelProto) -> list[str]:
    """Names of all nodes behind the last ReLU, which is that of `block5_conv3`."""
    last = [index for index, node in enumerate(model.graph.node) if node.op_type == "Relu"][-1]
    reached = set(model.graph.node[last].output)
    behind = []
    for node in model.graph.node[last + 1 :]:
        if reached & set(node.input):
            reached |= set(node.output)
            behind.append(node.name)
    return behind


def graph_of_precision(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The graph that a strongly typed build of `precision` needs.

    Raises:
        ValueError: INT8 is asked for and the graph holds no Q/DQ nodes.
    """
    if precision == "fp16":
        return half_precision(model)
    if precision == "int8" and not any(n.op_type == "QuantizeLinear" for n in model.graph.node):
        raise ValueError("precision int8 needs an ONNX file with Q/DQ nodes; this one has none")
    return model


def build_plan(config: EngineConfig) -> PlanRecord:
    """Build a plan for this machine's GPU and write it with its record into `config.output`.

    Raises:
        NoGpuError: No GPU or no TensorRT here.
        ValueError: The ONNX file is missing, or TensorRT refuses it; the message holds what
            TensorRT said.
        OSError: The output cannot be written.
    """
    import onnx

    if not config.onnx.is_file():
        raise ValueError(f"{config.onnx}: no such file; run python -m export.onnx")
    gpu = find_gpu()
    tensorrt = _tensorrt()
    graph = graph_of_precision(onnx.load(config.onnx), config.precision)
    logger.info(
        "building a TensorRT %s %s plan for %s; this takes minutes",
        tensorrt.__version__, config.precision, gpu.name,
    )  # fmt: skip
    plan = _serialized(tensorrt, graph.SerializeToString(), config)
    record = PlanRecord(
        gpu.name,
        gpu.compute_capability,
        tensorrt.__version__,
        sha256_of(config.onnx),
        config.precision,
        (config.min_batch, config.opt_batch, config.max_batch),
    )
    with replaced(config.output) as folder:
        folder.mkdir()
        (folder / "model.plan").write_bytes(plan)
        write_json(folder / "plan.json", asdict(record))
    return record


def plan_mismatches(record: PlanRecord, gpu: Gpu, tensorrt_version: str, onnx: Path) -> list[str]:
    """Why a plan cannot be used here, one sentence each; empty when it can."""
    found = {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "tensorrt": tensorrt_version,
        "onnx_sha256": sha256_of(onnx),
    }
    return [
        f"built for {key} {getattr(record, key)}, here it is {value}"
        for key, value in found.items()
        if getattr(record, key) != value
    ]


def check_plan(folder: Path, onnx: Path) -> PlanRecord:
    """The record of the plan in `folder`, if the plan fits this machine and this ONNX file.

    Raises:
        NoGpuError: No GPU or no TensorRT here.
        ValueError: No plan, or one for another machine or model; the message gives the remedy.
    """
    if not (folder / "model.plan").is_file() or not (folder / "plan.json").is_file():
        raise ValueError(f"{folder}: no plan in it; run python -m export.engine")
    stored = json.loads((folder / "plan.json").read_text())
    record = PlanRecord(**stored | {"profile": tuple(stored["profile"])})
    mismatches = plan_mismatches(record, find_gpu(), _tensorrt().__version__, onnx)
    if mismatches:
        raise ValueError(
            f"{folder}: the plan does not fit: {'; '.join(mismatches)}; build it here with "
            "python -m export.engine"
        )
    return record


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise NoGpuError(
            f"TensorRT cannot be imported ({error}); install it with pip install tensorrt"
        ) from error
    return tensorrt


def _serialized(tensorrt: Any, onnx_bytes: bytes, config: EngineConfig) -> bytes:
    log = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(log)
    # Needed by TensorRT 10; the only kind of network that TensorRT 11 has.
    strongly_typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse(onnx_bytes):
        said = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ValueError(f"{config.onnx}: TensorRT cannot read it: {'; '.join(said)}")
    settings = builder.create_builder_config()
    settings.set_memory_pool_limit(
        tensorrt.MemoryPoolType.WORKSPACE, config.workspace_mb * 1024 * 1024
    )
    profile = builder.create_optimization_profile()
    batches = (config.min_batch, config.opt_batch, config.max_batch)
    profile.set_shape(INPUT_NAME, *((batch, *SCAN_SHAPE) for batch in batches))
    settings.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise ValueError(f"{config.onnx}: TensorRT built no plan; its log above says why")
    return bytes(plan)


def main(argv: list[str] | None = None) -> int:
    """Build a TensorRT plan; on a machine without a GPU say so and leave the ONNX to be served."""
    parser = command_parser("export.engine", main.__doc__, "configs/engine.yaml")
    parser.add_argument("--check", action="store_true", help="only say whether the plan fits")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(EngineConfig, arguments.config)
        try:
            if arguments.check:
                logger.info("the plan fits: %s", check_plan(config.output, config.onnx))
            else:
                logger.info("wrote %s: %s", config.output / "model.plan", build_plan(config))
        except NoGpuError as error:
            logger.warning("no TensorRT plan: %s. The ONNX model is served instead.", error)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
