"""Choose the fastest student whose loss is allowed, in INT8."""

from __future__ import annotations

import logging
import random
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import PositiveInt
from tqdm import tqdm

from chestct.contract import ModelMetadata
from export.check.gate import Figure, gate_figures
from export.check.parity import ParityConfig, check_parity
from export.check.runners import Outputs, Runner, onnx_runner, openvino_runner, run_all
from export.check.variant import facts_of
from export.convert.onnx import onnx_from_keras
from export.convert.quantize import calibration_scans, int8_form
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.common.markdown import table
from training.common.metrics import score
from training.data.dataset import ScanSet, read_split
from training.network.vgg16 import VGG16_WIDTHS, load_trained, widths_of

logger = logging.getLogger(__name__)

SPLITS = ("valid", "test")


@config_class
class CompressConfig:
    """Settings of `export compress`.

    Attributes:
        students: Folder that `training distill` wrote.
        int8: INT8 variant of the full network, one more point of the curve.
        parity: Config of `export parity` for the variant to be written: its folder, the FP32
            variant that students are held to, the scans, and what may be lost.
        num_scans: At most so many training scans INT8 is calibrated on.
        rounds: Timed requests of each model, all models in turn.
    """

    students: Path = Path("results/students")
    int8: Path = Path("results/int8")
    parity: Path = Path("configs/parity-compressed.yaml")
    num_scans: PositiveInt = 256
    rounds: PositiveInt = 40


@dataclass(frozen=True)
class Candidate:
    """One model of the curve: its name, the widths of its 13 convolutions, its facts, its file."""

    name: str
    widths: tuple[int, ...]
    facts: ModelMetadata
    onnx: Path


def compress(config: CompressConfig) -> str | None:
    """Quantize every student, compare it with the full network, and write the fastest allowed one.

    The variant's folder is replaced in one step. It holds `curve.json` and `curve.md`, and, if a
    student keeps within the gate on the validation scans, its `model.onnx`, `facts.json` and
    `student.json`, which names its teacher, and the `parity.json` of both CPU engines. Latency is
    that of OpenVINO in this process, batch 1, all models in turn. The full network in INT8 is a
    point of the curve, not a choice.

    Returns:
        The name of the chosen student; None if none keeps within the gate.

    Raises:
        ValueError: Students, reference or scans are missing.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The output cannot be written.
    """
    parity = load_config(ParityConfig, config.parity)
    full = facts_of(parity.reference)
    sets = read_split(parity.scans, parity.split, full.window)
    calibration = calibration_scans(sets["train"], config.num_scans).pixels
    reference = onnx_runner(parity.reference / "model.onnx")
    wanted = {split: run_all(f"fp32, {split}", reference, sets[split].pixels) for split in SPLITS}
    with replaced(parity.variant) as output:
        output.mkdir()
        candidates = students_in_int8(config.students, calibration, output)
        candidates.append(
            Candidate("full", VGG16_WIDTHS, facts_of(config.int8), config.int8 / "model.onnx")
        )
        runners = {c.name: openvino_runner(c.onnx) for c in candidates}
        latencies = latencies_ms(runners, sets["valid"].pixels[:1], config.rounds)
        points = []
        for candidate in candidates:
            point = _about(candidate) | {"latency_ms": latencies[candidate.name]}
            for split in SPLITS:
                scans = sets[split]
                given = run_all(f"{candidate.name}, {split}", runners[candidate.name], scans.pixels)
                thresholds = (full.domain_threshold, candidate.facts.domain_threshold)
                figures = gate_figures(scans, wanted[split], given, thresholds, parity.gate)
                point[split] = quality_metrics(scans, given, figures)
            points.append(point)
        chosen = fastest_allowed(points[:-1])
        for point in points:
            point["chosen"] = point["name"] == chosen
        curve = {
            "reference": {
                split: quality_metrics(sets[split], wanted[split], ()) for split in SPLITS
            },
            "points": sorted(points, key=lambda point: point["latency_ms"]),
        }
        write_json(output / "curve.json", curve)
        (output / "curve.md").write_text(describe(curve), encoding="utf-8")
        for candidate in candidates[:-1]:
            if candidate.name == chosen:
                candidate.onnx.rename(output / "model.onnx")
                write_json(output / "facts.json", candidate.facts.to_parameters())
                shutil.copyfile(config.students / chosen / "student.json", output / "student.json")
            else:
                candidate.onnx.unlink()
    if chosen:
        check_parity(parity)
    return chosen


def fastest_allowed(points: list[dict[str, Any]]) -> str | None:
    """Name of the point with the least latency of those that break no limit on `valid`."""
    allowed = [point for point in points if not point["valid"]["refused_for"]]
    return min(allowed, key=lambda point: point["latency_ms"])["name"] if allowed else None


def students_in_int8(
    students: Path, calibration: npt.NDArray[np.uint8], output: Path
) -> list[Candidate]:
    """Each student as `NAME.onnx` in `output`.

    Raises:
        ValueError: There is no student.
    """
    folders = sorted(path.parent for path in students.glob("*/model.keras"))
    if not folders:
        raise ValueError(f"{students}: no student in it; run python -m training distill")
    candidates = []
    for folder in folders:
        logger.info("student %s: to INT8", folder.name)
        model, facts = load_trained(folder)
        converted, facts = int8_form(onnx_from_keras(model, facts), facts, calibration)
        file = output / f"{folder.name}.onnx"
        file.write_bytes(converted.SerializeToString())
        candidates.append(Candidate(folder.name, widths_of(model), facts, file))
    return candidates


def latencies_ms(
    runners: Mapping[str, Runner], scan: npt.NDArray[np.uint8], rounds: int
) -> dict[str, float]:
    """Median milliseconds of one request, all models in turn, each after an untimed request.

    Args:
        runners: By name.
        scan: uint8 (1, 224, 224, 1).
        rounds: Timed requests of each.
    """
    order, times = random.Random(0), {name: list[float]() for name in runners}
    for _ in tqdm(range(rounds), "latency", disable=None):
        for name in order.sample(sorted(runners), len(runners)):
            runners[name](scan)
            started = time.perf_counter_ns()
            runners[name](scan)
            times[name].append((time.perf_counter_ns() - started) / 1e6)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def _about(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "widths": list(candidate.widths),
        "size_mb": round(candidate.onnx.stat().st_size / 1e6, 2),
    }


def quality_metrics(
    scans: ScanSet, outputs: Outputs, figures: tuple[Figure, ...]
) -> dict[str, Any]:
    """Scores with intervals; the figures of the gate, and the limits that they break."""
    scores = score(outputs["probabilities"], scans.labels, scans.groups, scans.names)
    return {
        "n": len(scans),
        "accuracy": scores["accuracy"],
        "macro_auroc": scores["macro_auroc"],
        "against_full": {figure.name: figure.value for figure in figures},
        "refused_for": [figure.describe() for figure in figures if not figure],
    }


def describe(curve: dict[str, Any]) -> str:
    """The curve as a table."""

    def row(name: str, latency: str, widths: str, at: dict[str, Any], remark: str) -> list[str]:
        cells = []
        for split in SPLITS:
            for key in ("macro_auroc", "accuracy"):
                value = at[split][key]
                cells.append(f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})")
            agreement = at[split]["against_full"].get("label_agreement")
            cells.append("" if agreement is None else f"{agreement:.3f}")
        return [name, latency, widths, *cells, remark]

    counts = ", ".join(f"{split} n = {curve['reference'][split]['n']}" for split in SPLITS)
    columns = ["model", "ms, batch 1", "channels, first and last"]
    for split in SPLITS:
        columns += [f"{split}: macro AUROC", "accuracy", "agreement"]
    rows = [row("FP32", "", "64, 512", curve["reference"], "reference")]
    for point in curve["points"]:
        refused = "; ".join(point["valid"]["refused_for"])
        remark = "chosen" if point["chosen"] else refused or "allowed"
        widths = f"{point['widths'][0]}, {point['widths'][-1]}"
        rows.append(row(point["name"], f"{point['latency_ms']:.2f}", widths, point, remark))
    title = f"All but the first in INT8 by OpenVINO; {counts}; 95 % intervals."
    return "\n".join([title, "", *table([*columns, ""], rows)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the fastest student that loses no more than the config allows, in INT8."""
    parser = command_parser("export compress", main.__doc__, "configs/compress.yaml")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(CompressConfig, arguments.config)
        folder = load_config(ParityConfig, config.parity).variant
        chosen = compress(config)
        logger.info("%s", (folder / "curve.md").read_text())
        if chosen:
            logger.info("chosen: %s, now %s", chosen, folder / "model.onnx")
        else:
            logger.warning("no student keeps within the gate: %s holds no model", folder)

    return run_command(work)
