"""Export the trained Keras model to ONNX, with the contract's names and shapes."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from chestct.contract import (
    INPUT_NAME,
    NOT_A_MEDICAL_DEVICE,
    OUTPUT_NAMES,
    SCAN_SHAPE,
    ModelMetadata,
    TensorSpec,
    input_spec,
    output_specs,
    tensor_differences,
)
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.network.vgg16 import load_trained
from training.track.registry import model_folder

if TYPE_CHECKING:
    import keras
    import onnx

logger = logging.getLogger(__name__)

TRITON_DTYPES = {1: "FP32", 2: "UINT8", 6: "INT32", 7: "INT64", 10: "FP16", 11: "FP64"}


@config_class
class OnnxConfig:
    """Settings of `export onnx`.

    Attributes:
        model: Folder that `training fit` wrote, or `models:/chestct@champion` and the like
            (`training.track.registry.model_folder`).
        output: The ONNX file.
        opset: ONNX operator set; 18 is the highest that tf2onnx writes, and TensorRT 10 and 11,
            ONNX Runtime and OpenVINO all read it.
    """

    model: str | Path = Path("results/train")
    output: Path = Path("results/export/model.onnx")
    opset: PositiveInt = 18


def onnx_from_keras(model: keras.Model, facts: ModelMetadata, opset: int = 18) -> onnx.ModelProto:
    """An ONNX model with a dynamic batch axis, checked, with `facts` among its metadata.

    Input and outputs carry the names, dtypes and shapes of `chestct.contract`.

    Raises:
        ValueError: The converted graph differs from the contract; the message lists how.
    """
    import onnx
    import tensorflow as tf
    import tf2onnx

    @tf.function(input_signature=[tf.TensorSpec((None, *SCAN_SHAPE), tf.uint8, name=INPUT_NAME)])  # type: ignore[untyped-decorator]
    def serve(scan: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = model(scan, training=False)
        return {name: tf.identity(outputs[name], name=name) for name in OUTPUT_NAMES}

    logging.getLogger("tf2onnx").setLevel(logging.WARNING)
    # from_function, because from_keras stumbles over reloaded Keras 3 models (tf2onnx 1.17).
    converted, _ = tf2onnx.convert.from_function(
        serve, input_signature=serve.input_signature, opset=opset
    )
    _name_tensors(converted)
    converted.producer_name, converted.producer_version = "chestct", ""
    onnx.checker.check_model(converted, full_check=True)
    set_facts(converted, facts)
    return converted


def set_facts(model: onnx.ModelProto, facts: ModelMetadata) -> None:
    """Make `facts` the metadata of a model, in place of any before, and hold it to the contract.

    Raises:
        ValueError: Its inputs or outputs differ from the contract; the message lists how.
    """
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts.to_parameters() | {"notice": NOT_A_MEDICAL_DEVICE})
    differences = contract_differences(model, len(facts.class_names))
    if differences:
        raise ValueError(f"the graph differs from the contract: {'; '.join(differences)}")


def contract_differences(model: onnx.ModelProto, num_classes: int) -> list[str]:
    """Every difference between an ONNX model's inputs and outputs and the contract."""
    inputs = [_spec(value) for value in model.graph.input]
    outputs = [_spec(value) for value in model.graph.output]
    return tensor_differences("input", [input_spec()], inputs) + tensor_differences(
        "output", output_specs(num_classes), outputs
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TensorSpec(value.name, TRITON_DTYPES.get(tensor.elem_type, "?"), shape)


def _name_tensors(model: onnx.ModelProto) -> None:
    """Give graph inputs and outputs the contract's names and a batch axis called `N`.

    tf2onnx sorts the outputs of a dict by key, as TensorFlow does, and names them after the
    function.
    """
    graph = model.graph
    names = {graph.input[0].name: INPUT_NAME}
    names |= dict(zip((o.name for o in graph.output), sorted(OUTPUT_NAMES), strict=True))
    for value in (*graph.input, *graph.output):
        value.name = names[value.name]
        batch = value.type.tensor_type.shape.dim[0]
        batch.Clear()
        batch.dim_param = "N"
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def write_onnx(config: OnnxConfig) -> Path:
    """Convert the model in `config.model`; write `config.output`, and `facts.json` beside it.

    Raises:
        ValueError: No model, or a graph that differs from the contract.
        OSError: The file cannot be written.
    """
    started = time.monotonic()
    folder = model_folder(config.model)
    model, facts = load_trained(folder)
    if not facts.git_commit and (folder / "run.json").is_file():
        commit = json.loads((folder / "run.json").read_text()).get("git_commit", "")
        facts = dataclasses.replace(facts, git_commit=commit)
    converted = onnx_from_keras(model, facts, config.opset)
    with replaced(config.output) as temporary:
        temporary.write_bytes(converted.SerializeToString())
    write_json(config.output.with_name("facts.json"), facts.to_parameters())
    size_mb = config.output.stat().st_size / 1e6
    elapsed_s = time.monotonic() - started
    logger.info("wrote %s, %.1f MB, %.1f s", config.output, size_mb, elapsed_s)
    return config.output


def main(argv: list[str] | None = None) -> int:
    """Write the trained model as ONNX."""
    parser = command_parser("export onnx", main.__doc__, "configs/export.yaml")
    parser.add_argument(
        "--model", help="folder, models:/NAME@ALIAS or runs:/ID, instead of the config's"
    )
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(OnnxConfig, arguments.config)
        if arguments.model:
            config = dataclasses.replace(config, model=arguments.model)
        write_onnx(config)

    return run_command(work)
