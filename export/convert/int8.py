"""INT8 form of a VGG-16 in ONNX: Q/DQ nodes that ONNX Runtime and OpenVINO both fuse.

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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chestct.contract import INPUT_NAME, SCAN_SIZE

if TYPE_CHECKING:
    import onnx

Scans = npt.NDArray[np.uint8]  # (N, 224, 224, 1)
Floats = npt.NDArray[np.float64]
Histogram = npt.NDArray[np.int64]

WEIGHT_STEPS = 127  # a weight is -127 to 127 times its channel's step
ACTIVATION_STEPS = 255  # an activation is 0 to 255 times its tensor's step


@dataclass(frozen=True)
class Calibration:
    """Statistics of the activations of the FP32 model on calibration scans.

    Attributes:
        ranges: For each ReLU, by the name of its output, the value to be clipped at.
        means: For each convolution, by the name of its input, the mean of each input channel.
    """

    ranges: dict[str, float]
    means: dict[str, Floats]


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
    from tqdm import tqdm  # not in the GPU server's image, which takes this module's constants

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
    """The preprocessing in front of the first convolution, as a x + b of a pixel x: a, b (C,).

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
