"""The same network in INT8: one Q/DQ file for ONNX Runtime and OpenVINO, and a form for TensorRT.

All convolutions of the backbone calculate with 8 bits; head, pooled features and domain distance
stay in FP32. Where Q/DQ nodes stand and what they hold decides the speed (measured, see
benchmarks/results):

- activations are UINT8 with zero point 0: quantizing then does what ReLU does, and both engines
  fuse the two into the convolution. With INT8, ONNX Runtime keeps the ReLU and, for its sake, the
  convolution in FP32, which takes four times as long;
- a pair stands on both sides of each pool, which keeps the pool in 8 bits, and behind the last
  ReLU, without which ONNX Runtime runs the last convolution in FP32;
- each convolution has a bias of its own, in INT32. OpenVINO fuses no constant that several
  convolutions share, and tf2onnx shares equal ones;
- the first convolution reads raw pixels, see `first_kernel`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from chestct.contract import INPUT_NAME, SCAN_SIZE, ModelMetadata
from export.convert.onnx import set_facts
from training.common.atomic_io import replaced, sha256_of, write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config
from training.data.dataset import ScanSet, read_split

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

Scans = npt.NDArray[np.uint8]  # (N, 224, 224, 1)
Floats = npt.NDArray[np.float64]
Histogram = npt.NDArray[np.int64]

WEIGHT_STEPS = 127  # a weight is -127 to 127 times its channel's step
ACTIVATION_STEPS = 255  # an activation is 0 to 255 times its tensor's step
TENSORRT_STEPS = 127  # and in TensorRT, which has signed activations only, 0 to 127 times


@dataclass(frozen=True)
class QuantizeConfig:
    """What `export quantize` is told.

    Attributes:
        source: Variant folder with the FP32 `model.onnx` and its `facts.json`.
        scans: Folder that the paths of the split file are relative to.
        split: Split file; only scans of `train` are calibrated on.
        num_scans: At most so many of them, the classes in equal parts, one scan a group.
        output: Variant folder to write.
    """

    source: Path = Path("results/export")
    scans: Path = Path("data/scans")
    split: Path = Path("results/split/split.csv")
    num_scans: int = 256
    output: Path = Path("results/int8")

    def __post_init__(self) -> None:
        """Refuse to calibrate on nothing.

        Raises:
            ValueError: `num_scans` is not positive.
        """
        if self.num_scans < 1:
            raise ValueError(f"num_scans is {self.num_scans}; expected at least 1")


@dataclass(frozen=True)
class Calibration:
    """What the activations of the FP32 model are like on some scans.

    Attributes:
        ranges: For each ReLU, by the name of its output, the value to be clipped at.
        means: For each convolution, by the name of its input, the mean of each input channel.
    """

    ranges: dict[str, float]
    means: dict[str, Floats]


def calibration_scans(train: ScanSet, count: int) -> ScanSet:
    """At most `count` scans: one of each group, classes in equal parts, always the same.

    Near duplicates would only weigh one patient more. A class with few groups gives one scan of
    each, and the others do not make up for it.
    """
    _, firsts = np.unique(train.groups, return_index=True)
    share = -(-count // len(train.names))
    keep = np.zeros(len(train), bool)
    for label in range(len(train.names)):
        members = np.sort(firsts[train.labels[firsts] == label])
        spread = np.linspace(0, len(members) - 1, min(share, len(members))).round().astype(int)
        keep[members[spread]] = True
    return train.where(keep)


def quantized(model: onnx.ModelProto, scans: Scans) -> onnx.ModelProto:
    """The INT8 form of an FP32 model of `export onnx`: same inputs, outputs and metadata.

    Weights have one step for each output channel, activations one for each tensor. What rounding
    the weights shifts the mean of each channel by is taken back in the bias (Nagel et al. 2019,
    "Data-free quantization through weight equalization and bias correction", equation 17, with
    means measured instead of assumed).

    Args:
        model: VGG-16 of any widths: scan, an affine preprocessing, then a chain of convolutions,
            each with its ReLU, and pools, then any head.
        scans: uint8 (N, 224, 224, 1), to calibrate on.

    Raises:
        ValueError: Another graph, or no scan.
    """
    import onnx

    chain = backbone(model)
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    found = calibrate(model, scans)
    build = _Builder()
    value, step = build.pixels(), 1.0
    for index, node in enumerate(chain):
        if node.op_type == "Conv":
            kernel = arrays[node.input[1]].astype(np.float64)
            bias = arrays[node.input[2]] if len(node.input) > 2 else np.zeros(len(kernel))
            if index == 0:
                weights, steps, error = first_kernel(kernel, pixel_map(model), np.abs(bias))
                mean = np.array([scans.mean()])
            else:
                weights, steps, error = rounded_kernel(kernel, np.abs(bias) / step)
                mean = found.means[node.input[0]]
            bias = bias + np.einsum("oihw,i->o", error, mean)
            value = build.convolution(
                f"convolution{index}", node, value, weights, steps, bias, step
            )
            continue
        value = build.add(node.op_type, [value], node.output[0], node.attribute)
        if node.op_type == "Relu":
            step = float(np.float32(max(found.ranges[node.output[0]], 1e-6) / ACTIVATION_STEPS))
        value = build.pair(f"steps{index}", value, step)
    return build.model(model, chain[-1], value)


def int8_form(
    model: onnx.ModelProto, facts: ModelMetadata, scans: Scans
) -> tuple[onnx.ModelProto, ModelMetadata]:
    """The `quantized` form of a model and its facts, which are its metadata too.

    Args:
        model: As of `quantized`.
        facts: Of the FP32 model.
        scans: uint8 (N, 224, 224, 1), to calibrate on.

    Raises:
        ValueError: As of `quantized`.
    """
    facts = dataclasses.replace(facts, precision="int8")
    result = quantized(model, scans)
    set_facts(result, facts)
    return result, facts


def backbone(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes from the first convolution to the last ReLU, in order.

    Raises:
        ValueError: They are no chain of convolutions, ReLUs and pools.
    """
    kinds = [node.op_type for node in model.graph.node]
    if "Conv" not in kinds or "Relu" not in kinds:
        raise ValueError("the graph has no convolution with a ReLU; expected a VGG")
    last = len(kinds) - 1 - kinds[::-1].index("Relu")
    chain = list(model.graph.node)[kinds.index("Conv") : last + 1]
    follow = {"Conv": ("Relu",), "Relu": ("Conv", "MaxPool"), "MaxPool": ("Conv",)}
    for before, node in itertools.pairwise(chain):
        known = node.op_type in follow.get(before.op_type, ())
        if not known or node.input[0] != before.output[0]:
            raise ValueError(
                f"{node.op_type} {node.name!r} behind {before.op_type} {before.name!r}; expected a "
                "chain of convolution, ReLU and pool. Is the model quantized already?"
            )
    return chain


def calibrate(model: onnx.ModelProto, scans: Scans) -> Calibration:
    """Run the FP32 model on `scans`, one by one, and see where its activations lie.

    Raises:
        ValueError: No scan.
    """
    if not len(scans):
        raise ValueError("no scan to calibrate on; at least one is needed")
    chain = backbone(model)
    relus = [node.output[0] for node in chain if node.op_type == "Relu"]
    inputs = [node.input[0] for node in chain[1:] if node.op_type == "Conv"]
    names = list(dict.fromkeys([*relus, *inputs]))
    run = _front(model, names)
    counts = {name: np.zeros(1 << 16, np.int64) for name in relus}
    sums: dict[str, Any] = dict.fromkeys(inputs, 0.0)
    for scan in tqdm(scans, "calibrate", disable=None, unit="scan"):
        values = dict(zip(names, run(scan[np.newaxis]), strict=True))
        for name in relus:
            # The upper half of a float32 is its bfloat16: 128 bins to each power of two.
            halves = values[name].ravel().view(np.uint32) >> 16
            counts[name] += np.bincount(halves, minlength=1 << 16)
        for name in inputs:
            sums[name] = sums[name] + values[name].mean(axis=(0, 2, 3), dtype=np.float64)
    return Calibration(
        {name: best_range(count[: 1 << 15]) for name, count in counts.items()},
        {name: total / len(scans) for name, total in sums.items()},
    )


def best_range(counts: Histogram) -> float:
    """The clipping value that makes the mean squared error of quantizing least.

    Below it a value is off by a uniform part of a step (variance step**2 / 12), or by itself where
    it rounds to zero; above it by what is cut off (Banner et al. 2019, "Post training 4-bit
    quantization", equation 5, on the measured histogram instead of a fitted density).

    Args:
        counts: int64 (32768,), how often each non-negative bfloat16 was seen.
    """
    seen = np.flatnonzero(counts[1:]).astype(np.uint32) + 1  # 0 is exact at any step
    if not len(seen):
        return 0.0
    counted, values = counts[seen], (seen << 16 | 0x8000).view(np.float32).astype(np.float64)

    def error(limit: float) -> float:
        step = limit / ACTIVATION_STEPS
        rounding = np.where(values < step / 2, values**2, step**2 / 12)
        return float((counted * np.where(values > limit, (values - limit) ** 2, rounding)).sum())

    return float(min(values[-1] * np.linspace(0.2, 1, 161), key=error))


def rounded_kernel(kernel: Floats, reach: Floats) -> tuple[npt.NDArray[np.int8], Floats, Floats]:
    """A kernel (out, in, 3, 3) in whole steps, the step of each output channel, and the error.

    Args:
        kernel: Weights.
        reach: (out,), magnitude of the bias divided by the step of the input: a channel of tiny
            weights gets steps so large that its bias fits into INT32.
    """
    steps = np.maximum(np.abs(kernel).max(axis=(1, 2, 3)) / WEIGHT_STEPS, reach / 2**30)
    steps = np.maximum(steps, 1e-12).astype(np.float32).astype(np.float64)
    by_channel = steps[:, np.newaxis, np.newaxis, np.newaxis]
    whole = np.rint(kernel / by_channel).clip(-WEIGHT_STEPS, WEIGHT_STEPS)
    return whole.astype(np.int8), steps, kernel - whole * by_channel


def pixel_map(model: onnx.ModelProto) -> tuple[Floats, Floats]:
    """What stands in front of the first convolution, as a x + b of a pixel x: a (C,) and b (C,).

    Raises:
        ValueError: It is not of that form.
    """
    name = backbone(model)[0].input[0]
    ramp = np.arange(SCAN_SIZE**2).astype(np.uint8).reshape(1, SCAN_SIZE, SCAN_SIZE, 1)
    mapped = _front(model, [name])(ramp)[0][0].astype(np.float64)
    pixels = ramp[0, :, :, 0]
    b = mapped[:, pixels == 0].mean(axis=1)
    a = (mapped[:, pixels == 255].mean(axis=1) - b) / 255
    if not np.allclose(mapped, np.multiply.outer(a, pixels) + b[:, None, None], atol=1e-3):
        raise ValueError(f"{name} is no a x + b of each pixel x; it cannot be folded")
    return a, b


def first_kernel(
    kernel: Floats, pixels: tuple[Floats, Floats], reach: Floats
) -> tuple[npt.NDArray[np.int8], Floats, Floats]:
    """The first kernel for the channels x, 255 and 1 of raw pixels, as of `rounded_kernel`.

    The preprocessing a x + b is folded in. Like the preprocessed scan, the two constant channels
    that carry b are 0 beyond the border, so the fold is exact there too. UINT8 pixels have step 1:
    nothing of the scan is rounded. b times a weight is large and nearly cancels with x times it;
    the channel of ones carries what the channel of 255 is too coarse for.

    Args:
        kernel: Weights (out, C, 3, 3) for the preprocessed channels.
        pixels: a and b of `pixel_map`.
        reach: As of `rounded_kernel`.

    Returns:
        int8 (out, 3, 3, 3), the step of each output channel, and the error (out, 1, 3, 3) of the
        weights of x.
    """
    of_x, constant = (np.einsum("oihw,i->ohw", kernel, factor)[:, np.newaxis] for factor in pixels)
    largest = np.concatenate([of_x, constant / 255], axis=1)
    whole, steps, error = rounded_kernel(largest, reach)
    constant = np.rint(constant / steps[:, np.newaxis, np.newaxis, np.newaxis])
    of_255 = np.rint(constant / 255)
    of_1 = (constant - 255 * of_255).clip(-WEIGHT_STEPS, WEIGHT_STEPS)
    weights = np.concatenate([whole[:, :1], of_255, of_1], axis=1).astype(np.int8)
    return weights, steps, error[:, :1]


def for_tensorrt(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of `quantized` in the form that TensorRT takes: signed activations, float biases.

    TensorRT knows INT8 with zero point 0 only, so the ranges are cut into 127 steps instead of
    255; weights and biases keep their values. The first convolution, 0.5 % of the work, stays
    in float: raw pixels do not fit into a signed byte.
    """
    import onnx
    from onnx import numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    coarser = np.float32(ACTIVATION_STEPS / TENSORRT_STEPS)
    first = next(node for node in graph.node if node.op_type == "Conv")
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            source, scale, zero = node.input
            name = node.output[0]
            in_float = arrays.get(source)
            if in_float is not None and (in_float.dtype == np.int32 or name == first.input[1]):
                steps = arrays[scale].reshape(-1, *[1] * (in_float.ndim - 1))
                arrays[name] = in_float.astype(np.float32) * steps
                continue
            if name == first.input[0]:
                first_value = source
                continue
            if arrays[zero].dtype == np.uint8:
                arrays[zero] = arrays[zero].astype(np.int8)
                arrays[scale] = arrays[scale] * coarser
        nodes.append(node)
    first.input[0] = first_value
    cast = onnx.helper.make_node("Cast", [INPUT_NAME], [f"{INPUT_NAME}_float"], name="cast", to=1)
    for node in nodes:
        node.input[:] = [cast.output[0] if name == INPUT_NAME else name for name in node.input]
        if node.op_type == "Pad":
            arrays[node.input[2]] = arrays[node.input[2]].astype(np.float32)
    read = {name for node in nodes for name in node.input}
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend([cast, *nodes])
    graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items() if name in read
    )
    onnx.checker.check_model(result, full_check=True)
    return result


def write_int8(config: QuantizeConfig) -> Path:
    """Quantize the variant in `config.source` and write that of `config.output` in one step.

    Writes `model.onnx`, `facts.json` and `quantize.json`, which says what was calibrated on.

    Raises:
        ValueError: No FP32 variant or no split, or a graph that is no VGG.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The output cannot be written.
    """
    import onnx

    source, facts_file = config.source / "model.onnx", config.source / "facts.json"
    for path in (source, facts_file):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run python -m export onnx")
    facts = ModelMetadata.from_parameters(json.loads(facts_file.read_text()))
    train = read_split(config.scans, config.split, facts.window)["train"]
    chosen = calibration_scans(train, config.num_scans)
    model, facts = int8_form(onnx.load(source), facts, chosen.pixels)
    with replaced(config.output) as folder:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        write_json(folder / "facts.json", facts.to_parameters())
        write_json(
            folder / "quantize.json",
            {
                "source": source.as_posix(),
                "source_sha256": sha256_of(source),
                "calibration": {
                    "split": config.split.as_posix(),
                    "part": "train",
                    "num_scans": len(chosen),
                    "num_groups": len(np.unique(chosen.groups)),
                    "scans_by_class": {
                        name: int((chosen.labels == label).sum())
                        for label, name in enumerate(chosen.names)
                    },
                    "scans_sha256": chosen.sha256,
                    "activations": "clipped where the squared error is least",
                    "weights": "symmetric by output channel, bias corrected",
                },
            },
        )
    size_mb = (config.output / "model.onnx").stat().st_size / 1e6
    logger.info("wrote %s, %.1f MB, %d scans", config.output / "model.onnx", size_mb, len(chosen))
    return config.output / "model.onnx"


def _front(model: onnx.ModelProto, names: list[str]) -> Any:
    """A function from scans to the tensors `names` of `model`, run by ONNX Runtime."""
    import onnx
    import onnxruntime

    made = [set(names) & set(node.output) for node in model.graph.node]
    last = max(index for index, found in enumerate(made) if found)
    nodes = list(model.graph.node)[: last + 1]
    outputs = [onnx.helper.make_tensor_value_info(name, 1, None) for name in names]
    graph = onnx.helper.make_graph(
        nodes, "front", list(model.graph.input), outputs, _read_by(nodes, model)
    )
    front = onnx.helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    session = onnxruntime.InferenceSession(
        front.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda scans: session.run(names, {INPUT_NAME: scans})


def _read_by(nodes: list[onnx.NodeProto], model: onnx.ModelProto) -> list[onnx.TensorProto]:
    read = {name for node in nodes for name in node.input}
    return [constant for constant in model.graph.initializer if constant.name in read]


class _Builder:
    """Nodes and constants of a graph as it grows; each method gives the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, array: Any) -> str:
        import onnx

        self.constants.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(
        self, kind: str, inputs: list[str], output: str, attributes: Sequence[Any] = (), **more: Any
    ) -> str:
        import onnx

        node = onnx.helper.make_node(kind, inputs, [output], name=output, **more)
        node.attribute.extend(attributes)
        self.nodes.append(node)
        return output

    def pixels(self) -> str:
        """The channels x, 255 and 1 of the scan, float (N, 3, 224, 224)."""
        shape = self.constant("scan_shape", np.array([0, 1, SCAN_SIZE, SCAN_SIZE]))
        value = self.add("Reshape", [INPUT_NAME, shape], "pixels")
        one_channel = self.constant("one_channel", np.array([0, 0, 0, 0, 0, 1, 0, 0]))
        for number in (255, 1):
            filling = self.constant(f"filling_{number}", np.uint8(number))
            value = self.add("Pad", [value, one_channel, filling], f"pixels_and_{number}")
        return self.dequantized("pixels_float", value, 1.0, np.uint8)

    def dequantized(self, output: str, whole: str, step: Any, dtype: Any) -> str:
        """`whole` times `step`, one number or one for each output channel."""
        steps = np.asarray(step, np.float32)
        inputs = [
            whole,
            self.constant(f"{output}_step", steps),
            self.constant(f"{output}_zero", np.zeros(steps.shape, dtype)),
        ]
        if steps.ndim:
            return self.add("DequantizeLinear", inputs, output, axis=0)
        return self.add("DequantizeLinear", inputs, output)

    def pair(self, name: str, value: str, step: float) -> str:
        """`value` rounded to whole steps, and in float again."""
        output = f"{name}_float"
        self.add("QuantizeLinear", [value, f"{output}_step", f"{output}_zero"], name)
        return self.dequantized(output, name, step, np.uint8)

    def convolution(
        self,
        name: str,
        node: onnx.NodeProto,
        value: str,
        weights: npt.NDArray[np.int8],
        steps: Floats,
        bias: Floats,
        step: float,
    ) -> str:
        """The convolution `node` of `value`, whose step is `step`, with quantized weights."""
        whole = self.constant(f"{name}_weights", weights)
        offset = self.constant(f"{name}_bias", np.rint(bias / (steps * step)).astype(np.int32))
        inputs = [
            value,
            self.dequantized(f"{name}_weights_float", whole, steps, np.int8),
            self.dequantized(f"{name}_bias_float", offset, steps * step, np.int32),
        ]
        return self.add("Conv", inputs, node.output[0], node.attribute)

    def model(self, like: onnx.ModelProto, last: onnx.NodeProto, value: str) -> onnx.ModelProto:
        """These nodes in place of those of `like` up to `last`, whose output is now `value`."""
        import onnx

        result = onnx.ModelProto()
        result.CopyFrom(like)
        behind = list(result.graph.node)[list(like.graph.node).index(last) + 1 :]
        for node in behind:
            node.input[:] = [value if name == last.output[0] else name for name in node.input]
        nodes, kept = [*self.nodes, *behind], _read_by(behind, like)
        del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
        result.graph.node.extend(nodes)
        result.graph.initializer.extend([*self.constants, *kept])
        onnx.checker.check_model(result, full_check=True)
        return result


def main(argv: list[str] | None = None) -> int:
    """Write the INT8 variant of the exported model."""
    parser = command_parser("export quantize", main.__doc__, "configs/quantize.yaml")
    arguments = parser.parse_args(argv)

    def work() -> None:
        write_int8(load_config(QuantizeConfig, arguments.config))

    return run_command(work)
