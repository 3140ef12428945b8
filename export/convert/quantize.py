"""Quantize the exported model to INT8, calibrated on training scans."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import PositiveInt

from chestct.contract import ModelMetadata
from export.check.variant import facts_of, require_file
from export.convert.int8 import Scans, quantized
from export.convert.onnx import set_facts
from training.common.atomic_io import replaced, sha256_of, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.data.dataset import ScanSet, evenly_spread, read_split

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)


@config_class
class QuantizeConfig:
    """Settings of `export quantize`.

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
    num_scans: PositiveInt = 256
    output: Path = Path("results/int8")


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
        keep[members[evenly_spread(len(members), share)]] = True
    return train.where(keep)


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


def write_int8(config: QuantizeConfig) -> Path:
    """Quantize the variant in `config.source` and write that of `config.output` in one step.

    Writes `model.onnx`, `facts.json` and `quantize.json`, which names the calibration scans.

    Raises:
        ValueError: No FP32 variant or no split, or a graph that is no VGG.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The output cannot be written.
    """
    import onnx

    source = config.source / "model.onnx"
    require_file(source, "run python -m export onnx")
    facts = facts_of(config.source)
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


def main(argv: list[str] | None = None) -> int:
    """Write the INT8 variant of the exported model."""
    parser = command_parser("export quantize", main.__doc__, "configs/quantize.yaml")
    arguments = parser.parse_args(argv)

    def work() -> None:
        write_int8(load_config(QuantizeConfig, arguments.config))

    return run_command(work)
