"""ONNX to a TensorRT plan, on the machine whose GPU will run it. Not run on a GPU yet.

TensorRT 11 knows strongly typed networks only (precision flags and calibrators are gone), and
TensorRT 10 accepts the same: precision is therefore put into the ONNX graph, by casts for FP16
and by Q/DQ nodes for INT8, and one way of building serves both. That graph is a variant of its
own, which ONNX Runtime serves too; it is written on any machine.
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
from typing import TYPE_CHECKING, Any

from chestct.contract import INPUT_NAME, SCAN_SHAPE, ModelMetadata
from export.convert.onnx import set_facts
from training.common.atomic_io import replaced, sha256_of, write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "int8")
OPSETS = range(9, 21)  # what every TensorRT 10 and 11 reads (onnx/onnx-tensorrt, docs/operators.md)
# Operators of ONNX Runtime's other quantized form, which TensorRT's parser does not know (there).
INTEGER_OPERATORS = frozenset(
    ["QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"]
)


@dataclass(frozen=True)
class EngineConfig:
    """What `export engine` is told.

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
    precision: str = "fp16"
    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 32
    workspace_mb: int = 2048
    timing_cache: Path = Path(".cache/tensorrt.timing")

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


def cast_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, with the cast of its uint8 input in front of whatever else reads it.

    TensorRT knows uint8 only as what is cast to floating point, and ONNX Runtime would leave what
    precedes the cast to the CUDA provider, whose output then lacks a shape profile.
    """
    from onnx import ModelProto, TensorProto, helper

    if all(node.op_type == "Cast" for node in model.graph.node if INPUT_NAME in node.input):
        return model
    changed = ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        node.input[:] = [f"{INPUT_NAME}_float" if n == INPUT_NAME else n for n in node.input]
    del changed.graph.value_info[:]  # their types are those of before
    name = f"{INPUT_NAME}_float"
    changed.graph.node.insert(
        0, helper.make_node("Cast", [INPUT_NAME], [name], name=name, to=TensorProto.FLOAT)
    )
    return changed


def half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in FP16 up to the last ReLU, that of `block5_conv3`, and in FP32 behind it.

    Head, softmax and domain distance must not pass through FP16 anywhere: the distance sums
    squares, and FP16 ends at 65504. (onnxruntime.transformers.float16 casts to and fro behind each
    node that it is told to leave alone.) Inputs and outputs keep their dtypes.

    Raises:
        ValueError: A weight is too large for FP16.
    """
    from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

    half = ModelProto()
    half.CopyFrom(cast_first(model))
    graph = half.graph
    last = [index for index, node in enumerate(graph.node) if node.op_type == "Relu"][-1]
    wanted = set(graph.node[last].output)
    backbone = []
    for node in reversed(graph.node[: last + 1]):
        if wanted & set(node.output):
            wanted |= set(node.input)
            backbone.append(node)
    renamed = {}
    for tensor in list(graph.initializer):
        if tensor.name in wanted and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if abs(values).max(initial=0) > 65504:  # the largest of IEEE 754 binary16
                raise ValueError(f"{tensor.name} holds {abs(values).max():.0f}, too large for FP16")
            renamed[tensor.name] = f"{tensor.name}_half"
            graph.initializer.append(
                numpy_helper.from_array(values.astype("float16"), renamed[tensor.name])
            )
    for node in backbone:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = TensorProto.FLOAT16
    features = graph.node[last].output[0]
    graph.node[last].output[0] = f"{features}_half"
    back = helper.make_node(
        "Cast", [f"{features}_half"], [features], name=f"{features}_float", to=TensorProto.FLOAT
    )
    graph.node.insert(last + 1, back)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    checker.check_model(half, full_check=True)
    return half


def graph_of_precision(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The graph that a strongly typed build of `precision` needs; `model` itself if it is that.

    Raises:
        ValueError: INT8 is asked for and the graph holds no Q/DQ nodes.
    """
    from export.convert.quantize import for_tensorrt

    if precision == "fp16":
        return half_precision(model)
    if precision == "fp32":
        return cast_first(model)
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise ValueError("precision int8 needs an ONNX file with Q/DQ nodes; this one has none")
    # What TensorRT takes already is no file of export quantize, which writes for CPUs.
    return for_tensorrt(model) if tensorrt_objections(model) else model


def tensorrt_objections(model: onnx.ModelProto) -> list[str]:
    """Why TensorRT's parser would refuse a graph, one sentence for each kind of fault.

    TensorRT knows one explicit quantization: signed 8 bits, zero point 0, positive constant scales,
    one scale for an activation and one for each output channel of a kernel, and biases in floating
    point. An empty list is no promise: only what has refused such files is looked for.
    """
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found: dict[str, list[str]] = {}

    def object_to(node: Any, reason: str) -> None:
        found.setdefault(reason, []).append(node.name or node.output[0])

    opset = next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0
    )
    sentences = []
    if opset not in OPSETS:
        sentences.append(f"opset is {opset}; expected {OPSETS.start} to {OPSETS.stop - 1}")
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            for node in users.get(value.name, []):
                if node.op_type != "Cast":
                    object_to(node, f"takes the uint8 input {value.name!r}; only a Cast may")
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            object_to(node, f"is of domain {node.domain!r}; expected ONNX's own operators")
        elif node.op_type in INTEGER_OPERATORS:
            object_to(node, f"is a {node.op_type}; expected Q/DQ nodes around a Conv")
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        tensor, scale, zero_point = (*node.input, "", "")[:3]
        if tensor in constants and constants[tensor].data_type == TensorProto.INT32:
            object_to(node, "quantizes a bias to int32; expected biases in floating point")
        elif zero_point not in constants:
            object_to(node, "has no constant zero point, which means uint8; expected int8 zeros")
        elif constants[zero_point].data_type != TensorProto.INT8:
            kind = TensorProto.DataType.Name(constants[zero_point].data_type).lower()
            object_to(node, f"is {kind}; expected int8")
        elif numpy_helper.to_array(constants[zero_point]).any():
            object_to(node, "has a zero point that is not 0; expected symmetric quantization")
        if scale not in constants:
            object_to(node, "has a scale that is not constant")
            continue
        scales = numpy_helper.to_array(constants[scale])
        if not (scales > 0).all():
            object_to(node, "has a scale that is not positive")
        if scales.size == 1:
            continue
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        kernels = [user for user in users.get(node.output[0], []) if user.op_type == "Conv"]
        if tensor not in constants:
            object_to(node, "has a scale for each channel of an activation; expected one scale")
        elif kernels and axis != 0:
            object_to(node, f"has scales along axis {axis} of a kernel; expected axis 0")
    return sentences + [
        f"{names[0]} {reason}" + f" (and {len(names) - 1} more)" * (len(names) > 1)
        for reason, names in found.items()
    ]


def write_graph(config: EngineConfig) -> Path:
    """Write the variant that a plan is built from; gives the path of its ONNX file.

    The parity report is taken along where the graph stays as it was. An older variant of the same
    bytes keeps what has been added to it; of other bytes, it is replaced whole.

    Raises:
        ValueError: A file is missing, or TensorRT would refuse the graph; the message says why.
        OSError: The output cannot be written.
    """
    import onnx

    facts_file = config.onnx.with_name("facts.json")
    for path in (config.onnx, facts_file):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run python -m export onnx")
    source = onnx.load(config.onnx)
    graph = graph_of_precision(source, config.precision)
    objections = tensorrt_objections(graph)
    if objections:
        raise ValueError(f"TensorRT would refuse {config.onnx}: {'; '.join(objections)}")
    facts = ModelMetadata.from_parameters(json.loads(facts_file.read_text()))
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
    """Write beside the plan in `config.output` what it was built for."""
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
    """What the plan in `folder` was built for.

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
