"""ONNX graphs that TensorRT's parser takes: FP16 by casts, INT8 by signed Q/DQ nodes.

TensorRT 11 knows strongly typed networks only (precision flags and calibrators are gone), and
TensorRT 10 accepts the same. So the precision is a property of the graph, and one way of building
serves both. Such a graph is a variant of its own, which ONNX Runtime serves too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chestct.contract import INPUT_NAME
from export.convert.int8 import ACTIVATION_STEPS

if TYPE_CHECKING:
    import onnx

TENSORRT_STEPS = 127  # signed activations: 0 to 127 times the step of their tensor
OPSETS = range(9, 21)  # what every TensorRT 10 and 11 reads (onnx/onnx-tensorrt, docs/operators.md)
# Operators of ONNX Runtime's other quantized form, which TensorRT's parser does not know (there).
INTEGER_OPERATORS = frozenset(
    ["QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"]
)


def cast_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, with the cast of its uint8 input in front of whatever else reads it.

    TensorRT takes uint8 only as the input of a cast to floating point. ONNX Runtime would leave
    nodes before the cast to the CUDA provider, whose output then lacks a shape profile.
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
    if precision == "fp16":
        return half_precision(model)
    if precision == "fp32":
        return cast_first(model)
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise ValueError("precision int8 needs an ONNX file with Q/DQ nodes; this one has none")
    # What TensorRT takes already is no file of export.convert.int8, which writes for CPUs.
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


def for_tensorrt(model: onnx.ModelProto) -> onnx.ModelProto:
    """An INT8 model for TensorRT: signed activations, float biases; from that of `quantized`.

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
