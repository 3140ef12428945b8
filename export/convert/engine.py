"""Build a TensorRT plan from the exported model, on the machine whose GPU will run it.

The graph for TensorRT (`export.convert.tensorrt_graph`) is written on any machine. Plans have not
been run on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from chestct.contract import INPUT_NAME, SCAN_SHAPE
from export.check.variant import facts_of, require_file
from export.convert.onnx import set_facts
from export.convert.tensorrt_graph import graph_of_precision, tensorrt_objections
from training.common.atomic_io import replaced, sha256_of, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config

logger = logging.getLogger(__name__)


@config_class
class EngineConfig:
    """Settings of `export engine`.

    Attributes:
        onnx: The exported model, its `facts.json` beside it; for int8 one with Q/DQ nodes.
        output: Folder of the new variant: `model.onnx`, `facts.json`, and where there is a GPU
            `model.plan` and `plan.json`.
        precision: `fp32`, `fp16` (the graph is cast here) or `int8` (Q/DQ nodes are in the file).
        min_batch: Least batch of the optimization profile.
        opt_batch: Batch that the tactics are chosen for.
        max_batch: Greatest batch; Triton's max_batch_size may not exceed it.
        workspace_mb: Memory that TensorRT may use while it builds and runs.
        timing_cache: What TensorRT measured in earlier builds; a second build takes seconds.
    """

    onnx: Path = Path("results/export/model.onnx")
    output: Path = Path("results/fp16")
    precision: Literal["fp32", "fp16", "int8"] = "fp16"
    min_batch: PositiveInt = 1
    opt_batch: PositiveInt = 8
    max_batch: PositiveInt = 32
    workspace_mb: PositiveInt = 2048
    timing_cache: Path = Path(".cache/tensorrt.timing")

    def __post_init__(self) -> None:
        """Refuse a profile that TensorRT would refuse after minutes.

        Raises:
            ValueError: The batches are out of order.
        """
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(
                f"batches {self.min_batch}, {self.opt_batch}, {self.max_batch}: expected "
                "min_batch <= opt_batch <= max_batch"
            )

    @property
    def profile(self) -> tuple[int, int, int]:
        """Least, best and greatest batch."""
        return self.min_batch, self.opt_batch, self.max_batch


def profile_shape(batch: int) -> str:
    """A batch of scans as trtexec and ONNX Runtime's TensorRT provider spell it."""
    return f"{INPUT_NAME}:{'x'.join(str(size) for size in (batch, *SCAN_SHAPE))}"


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU of this machine: its name and compute capability, such as `8.9`."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class PlanRecord:
    """The GPU, TensorRT and model that a plan was built for; it runs nowhere else.

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


def write_graph(config: EngineConfig) -> Path:
    """Write the variant that a plan is built from; gives the path of its ONNX file.

    The parity report is taken along where the graph stays as it was. An older variant of the same
    bytes keeps what has been added to it; of other bytes, it is replaced whole.

    Raises:
        ValueError: A file is missing, or TensorRT would refuse the graph; the message says why.
        OSError: The output cannot be written.
    """
    import onnx

    require_file(config.onnx, "run python -m export onnx")
    facts = facts_of(config.onnx.parent)
    source = onnx.load(config.onnx)
    graph = graph_of_precision(source, config.precision)
    objections = tensorrt_objections(graph)
    if objections:
        raise ValueError(f"TensorRT would refuse {config.onnx}: {'; '.join(objections)}")
    facts = dataclasses.replace(facts, precision=config.precision)
    if graph is not source:
        set_facts(graph, facts)
    data = config.onnx.read_bytes() if graph is source else graph.SerializeToString()
    written = config.output / "model.onnx"
    if not written.is_file() or written.read_bytes() != data:
        with replaced(config.output) as folder:
            folder.mkdir()
            (folder / "model.onnx").write_bytes(data)
        logger.info("wrote %s, %.1f MB", written, len(data) / 1e6)
    write_json(config.output / "facts.json", facts.to_parameters())
    parity = config.onnx.with_name("parity.json")
    if graph is source and parity.is_file():
        with replaced(config.output / "parity.json") as temporary:
            shutil.copyfile(parity, temporary)
    return written


def trtexec_command(config: EngineConfig) -> list[str]:
    """The command by which NVIDIA's TensorRT container builds the same plan."""
    least, best, most = (profile_shape(batch) for batch in config.profile)
    return [
        "trtexec",
        f"--onnx={config.output / 'model.onnx'}",
        f"--saveEngine={config.output / 'model.plan'}",
        f"--minShapes={least}",
        f"--optShapes={best}",
        f"--maxShapes={most}",
        "--stronglyTyped",
        "--noTF32",
        f"--memPoolSize=workspace:{config.workspace_mb}M",
        f"--timingCacheFile={config.timing_cache}",
        "--skipInference",
    ]


def build_plan(config: EngineConfig) -> PlanRecord:
    """Build a plan for this machine's GPU from the graph in `config.output`, and lay it beside.

    Raises:
        NoGpuError: No GPU or no TensorRT here.
        ValueError: The ONNX file is missing, or TensorRT refuses it; the message holds what
            TensorRT said.
        OSError: The output cannot be written.
    """
    gpu = find_gpu()
    tensorrt = _tensorrt()
    logger.info(
        "building a TensorRT %s %s plan for %s; this takes minutes",
        tensorrt.__version__, config.precision, gpu.name,
    )  # fmt: skip
    plan = _serialized(tensorrt, (config.output / "model.onnx").read_bytes(), config)
    with replaced(config.output / "model.plan") as temporary:
        temporary.write_bytes(plan)
    return write_record(config, gpu, tensorrt.__version__)


def write_record(config: EngineConfig, gpu: Gpu, tensorrt_version: str) -> PlanRecord:
    """Write the record of the plan in `config.output` beside it."""
    record = PlanRecord(
        gpu.name,
        gpu.compute_capability,
        tensorrt_version,
        sha256_of(config.output / "model.onnx"),
        config.precision,
        config.profile,
    )
    write_json(config.output / "plan.json", asdict(record))
    return record


def read_record(folder: Path) -> PlanRecord:
    """The record of the plan in `folder`.

    Raises:
        ValueError: There is no plan or no record of it.
    """
    if not (folder / "model.plan").is_file() or not (folder / "plan.json").is_file():
        raise ValueError(
            f"{folder}: no plan with its record in it; run python -m export engine, with --record "
            "if trtexec built it"
        )
    stored = json.loads((folder / "plan.json").read_text())
    return PlanRecord(**stored | {"profile": tuple(stored["profile"])})


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


def check_plan(folder: Path) -> PlanRecord:
    """The record of the plan in `folder`, if it fits this machine and the ONNX file beside it.

    Raises:
        NoGpuError: No GPU or no TensorRT here.
        ValueError: No plan, or one for another machine or model; the message gives the remedy.
    """
    record = read_record(folder)
    mismatches = plan_mismatches(record, find_gpu(), _tensorrt().__version__, folder / "model.onnx")
    if mismatches:
        raise ValueError(
            f"{folder}: the plan does not fit: {'; '.join(mismatches)}; build it here with "
            "python -m export engine"
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
    # On by default, and it keeps ten bits of the FP32 head and of the domain distance.
    settings.clear_flag(tensorrt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT_NAME, *((batch, *SCAN_SHAPE) for batch in config.profile))
    settings.add_optimization_profile(profile)
    _use_timing_cache(settings, config.timing_cache)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise ValueError(f"{config.onnx}: TensorRT built no plan; its log above says why")
    with replaced(config.timing_cache) as temporary:
        temporary.write_bytes(bytes(settings.get_timing_cache().serialize()))
    return bytes(plan)


def _use_timing_cache(settings: Any, file: Path) -> None:
    stored = file.read_bytes() if file.is_file() else b""
    for content in (stored, b""):  # that of another GPU or release is refused: then an empty one
        cache = settings.create_timing_cache(content)
        if cache is not None and settings.set_timing_cache(cache, ignore_mismatch=False):
            return


def main(argv: list[str] | None = None) -> int:
    """Write the graph for TensorRT and, where there is a GPU, the plan."""
    parser = command_parser("export engine", main.__doc__, "configs/engine.yaml")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="only say whether the plan fits")
    instead.add_argument("--find-gpu", action="store_true", help="only name the GPU; 1 without one")
    instead.add_argument(
        "--trtexec", action="store_true", help="write the graph and print trtexec's command line"
    )
    instead.add_argument(
        "--record",
        metavar="VERSION",
        help="record the plan that trtexec of this version built here",
    )
    arguments = parser.parse_args(argv)

    def work() -> int:
        config = load_config(EngineConfig, arguments.config)
        if arguments.find_gpu:
            gpu, version = find_gpu(), _tensorrt().__version__
            sys.stdout.write(f"{gpu.name}, {gpu.compute_capability}, TensorRT {version}\n")
            return 0
        if arguments.check:
            logger.info("the plan fits: %s", check_plan(config.output))
            return 0
        if arguments.record:
            logger.info("recorded: %s", write_record(config, find_gpu(), arguments.record))
            return 0
        write_graph(config)
        if arguments.trtexec:
            sys.stdout.write(f"{shlex.join(trtexec_command(config))}\n")
            return 0
        try:
            logger.info("wrote %s: %s", config.output / "model.plan", build_plan(config))
        except NoGpuError as error:
            logger.warning("no TensorRT plan: %s. The ONNX model is served instead.", error)
        return 0

    return run_command(work, errors=(NoGpuError,))
