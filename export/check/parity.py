"""Compare a model variant, or a running server, with the trained model.

The FP32 file must give Keras' answers up to rounding (`Tolerance`). A variant that loses something
for speed is held to limits that a user would notice (`Gate`), against the FP32 file, on labelled
scans.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveInt
from tqdm import tqdm

from chestct.contract import MODEL_NAME, OUTPUT_NAMES, ModelMetadata
from chestct.imaging.prepare import load_scan
from chestct.imaging.sources import list_scans
from chestct.inference.server_pool import ServerPool
from export.check.gate import Gate, GateReport, compare_by_labels
from export.check.runners import (
    BATCH_SIZES,
    ENGINES,
    Runner,
    batches_of,
    keras_runner,
    onnx_runner,
    output_differences,
    triton_runner,
)
from export.check.variant import facts_of
from training.common.atomic_io import sha256_of, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.data.dataset import evenly_spread, read_split
from training.network.vgg16 import load_trained
from training.track.registry import model_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tolerance:
    """The largest absolute error that each output may have.

    FP32 convolutions add some thousand products in an order that each engine chooses. On VGG-16
    this moves probabilities by less than 1e-6; the map and the distance, numbers of size 10 to
    100, by less than 1e-4.

    Attributes:
        probabilities: Of a probability.
        activation_map: Of the class evidence, relative to its largest magnitude in the batch.
        domain_distance: Relative to the distance.
        label_agreement: Least fraction of scans with the same label.
    """

    probabilities: float = 1e-5
    activation_map: float = 1e-4
    domain_distance: float = 1e-4
    label_agreement: float = 1.0


@dataclass(frozen=True)
class OutputError:
    """How far one output is off: max, mean and 99th percentile of the error, and its limit."""

    output: str
    max: float
    mean: float
    p99: float
    limit: float

    def __bool__(self) -> bool:
        """Whether the largest error is within the limit; false for NaN."""
        return self.max <= self.limit


@dataclass(frozen=True)
class ParityReport:
    """Comparison of the outputs of two runners.

    Attributes:
        reference: Name of the runner that is right by definition.
        candidate: Name of the other one.
        num_scans: Scans compared.
        batch_sizes: Batch sizes used.
        label_agreement: Fraction of scans with the same label.
        least_agreement: What that fraction must reach.
        errors: One entry an output.
        differences: Names and shapes that differ, in words.
    """

    reference: str
    candidate: str
    num_scans: int
    batch_sizes: tuple[int, ...]
    label_agreement: float
    least_agreement: float
    errors: tuple[OutputError, ...]
    differences: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether the candidate may stand for the reference; comparing nothing is a failure."""
        return (
            self.num_scans > 0
            and not self.differences
            and len(self.errors) == len(OUTPUT_NAMES)
            and all(self.errors)
            and self.label_agreement >= self.least_agreement
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, with the verdict."""
        return {"holds": bool(self)} | asdict(self)

    def describe(self) -> str:
        """One line that says whether parity holds, and why not."""
        if self.differences:
            return f"parity fails: {'; '.join(self.differences)}"
        if not self.num_scans:
            return "parity fails: no scan was compared"
        worst = ", ".join(f"{e.output} {e.max:.1e} (limit {e.limit:.0e})" for e in self.errors)
        return (
            f"parity {'holds' if self else 'FAILS'}: {self.candidate} against {self.reference} on "
            f"{self.num_scans} scans, same label {self.label_agreement:.1%}, largest error {worst}"
        )


@dataclass(frozen=True)
class Verdict:
    """The reports of all engines that serve a file; it holds if each of them does."""

    reports: tuple[ParityReport | GateReport, ...]

    def __bool__(self) -> bool:
        """Whether every engine holds; no engine at all is a failure."""
        return bool(self.reports) and all(self.reports)

    def to_json(self) -> dict[str, Any]:
        """`holds`, `verdict` and `reasons` of all, and each report."""
        return {
            "holds": bool(self),
            "verdict": self.describe(),
            "reasons": [report.describe() for report in self.reports if not report],
            "reports": [report.to_json() for report in self.reports],
        }

    def describe(self) -> str:
        """One line an engine."""
        return "\n".join(report.describe() for report in self.reports)


def compare(
    scans: npt.NDArray[np.uint8],
    reference: tuple[str, Runner],
    candidate: tuple[str, Runner],
    tolerance: Tolerance,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
) -> ParityReport:
    """Run both on the same scans: names, then shapes, then values, at each batch size.

    The scans are split by the batch sizes in turn, so each scan is compared once.

    Args:
        scans: uint8 (N, 224, 224, 1).
        reference: Name and runner whose answers are right by definition.
        candidate: Name and runner to be judged.
        tolerance: What is allowed.
        batch_sizes: Scans in a call; at least two sizes show that the batch axis is dynamic.
    """
    differences: tuple[str, ...] = ()
    errors: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in OUTPUT_NAMES}
    same_label: list[bool] = []
    batches = batches_of(len(scans), batch_sizes)
    for batch in tqdm(batches, f"{candidate[0]} against {reference[0]}", disable=None):
        wanted, got = reference[1](scans[batch]), candidate[1](scans[batch])
        differences = output_differences(wanted, got)
        if differences:
            break
        for name in OUTPUT_NAMES:
            errors[name].append(_error(name, wanted[name], got[name]).ravel())
        labels = (outputs["probabilities"].argmax(axis=1) for outputs in (wanted, got))
        same_label += list(np.equal(*labels))
    limits = asdict(tolerance)
    return ParityReport(
        reference=reference[0],
        candidate=candidate[0],
        num_scans=len(same_label),
        batch_sizes=batch_sizes,
        label_agreement=float(np.mean(same_label)) if same_label else 0.0,
        least_agreement=tolerance.label_agreement,
        errors=tuple(
            _summary(name, np.concatenate(parts), limits[name])
            for name, parts in errors.items()
            if parts
        ),
        differences=differences,
    )


def _error(name: str, wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    error = np.abs(wanted.astype(np.float64) - got.astype(np.float64))
    if name == "probabilities":
        return error
    # Map and distance have no fixed scale: the error is taken relative to their size.
    return error / max(float(np.abs(wanted).max()), 1.0)


def _summary(name: str, error: npt.NDArray[np.float64], limit: float) -> OutputError:
    # Sorting would hide NaN: it is kept as the largest error, and fails the report.
    largest = float("nan") if np.isnan(error).any() else float(error.max())
    return OutputError(name, largest, float(error.mean()), float(np.quantile(error, 0.99)), limit)


EngineName = Annotated[str, Field(pattern=f"^({'|'.join(ENGINES)})$")]


@config_class
class ParityConfig:
    """Settings of `export parity`.

    Attributes:
        variant: Folder with `model.onnx` and `facts.json`, whose precision says how it is judged;
            the report becomes its `parity.json`.
        engines: All that will serve the file.
        model: Folder that `training fit` wrote, or an address of MLflow; the reference of
            an FP32 variant. Where the variant was exported from another run, that run's model is
            fetched.
        scans: Folder of scans; an FP32 variant is compared on any of them.
        num_scans: At most so many of them, evenly spread.
        reference: FP32 variant, the reference of the others.
        split: Split file; the other variants are compared on its labelled scans.
        gate: What the variant may lose.
    """

    variant: Path = Path("results/export")
    engines: Annotated[tuple[EngineName, ...], Field(min_length=1)] = ("onnxruntime", "openvino")
    model: str | Path = Path("results/train")
    scans: Path = Path("data/scans")
    num_scans: PositiveInt = 64
    reference: Path = Path("results/export")
    split: Path = Path("results/split/split.csv")
    gate: Gate = Gate()


def spread_scans(folder: Path, count: int) -> npt.NDArray[np.uint8]:
    """At most `count` scans, uint8 (N, 224, 224, 1), evenly spread over the files of `folder`.

    Raises:
        ValueError: No scan in the folder.
        chestct.errors.ScanDecodeError: A scan cannot be read.
    """
    paths = list(list_scans(folder)) if folder.exists() else []
    if not paths:
        raise ValueError(f"{folder}: no scan found; parity needs at least one")
    return np.stack([load_scan(paths[index]) for index in evenly_spread(len(paths), count)])


def judge(config: ParityConfig, facts: ModelMetadata, candidates: Mapping[str, Runner]) -> Verdict:
    """Compare the runners of a variant, by name, with the reference that its precision asks for.

    Raises:
        ValueError: The reference or the scans are missing.
        chestct.errors.ChestCTError: A scan cannot be read, or a server fails.
    """
    if facts.precision == "fp32":
        scans = spread_scans(config.scans, config.num_scans)
        reference = ("keras", keras_runner(load_trained(_exported_model(config, facts))[0]))
        return Verdict(
            tuple(
                compare(scans, reference, candidate, Tolerance())
                for candidate in candidates.items()
            )
        )
    full = onnx_runner(config.reference / "model.onnx")
    sets = read_split(config.scans, config.split, facts.window)
    return Verdict(
        compare_by_labels(
            {split: sets[split] for split in ("valid", "test")},
            ("FP32", full, facts_of(config.reference).domain_threshold),
            candidates,
            facts.domain_threshold,
            config.gate,
        )
    )


def _exported_model(config: ParityConfig, facts: ModelMetadata) -> Path:
    """The folder of the trained model that the variant came from, which may be an older one."""
    folder = model_folder(config.model)
    if (folder / "facts.json").is_file() and facts_of(folder).run == facts.run:
        return folder
    logger.info("%s is not of run %s, from which the variant came", config.model, facts.run)
    try:
        return model_folder(f"runs:/{facts.run}")
    except ValueError as error:
        raise ValueError(
            f"{config.model} is not the model of run {facts.run}, from which the variant was "
            f"exported, and that one cannot be fetched ({error}); export again"
        ) from error


def check_parity(config: ParityConfig) -> Verdict:
    """Judge the variant in every engine and write its `parity.json`.

    Raises:
        ValueError: Variant, reference or scans are missing.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The report cannot be written.
    """
    onnx = config.variant / "model.onnx"
    runners = {engine: ENGINES[engine](onnx) for engine in config.engines}
    verdict = judge(config, facts_of(config.variant), runners)
    about = {"onnx_sha256": sha256_of(onnx)}
    write_json(config.variant / "parity.json", verdict.to_json() | about)
    return verdict


def check_served(config: ParityConfig, url: str, model: str = MODEL_NAME) -> Verdict:
    """Judge `model` on the server at `url`, by the precision among its parameters.

    Raises:
        ValueError: Reference or scans are missing.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
    """
    with ServerPool(url, model) as client:
        name = f"triton {model} version {client.model_version}"
        return judge(config, client.metadata, {name: triton_runner(client)})


def main(argv: list[str] | None = None) -> int:
    """Compare a model variant, or a model on a server, with the trained model."""
    parser = command_parser("export parity", main.__doc__, "configs/parity.yaml")
    parser.add_argument("--variant", type=Path, help="folder, instead of the config's")
    parser.add_argument("--url", help="judge the server at grpc://HOST:PORT or http://... instead")
    parser.add_argument("--model", default=MODEL_NAME, help="its model; only with --url")
    parser.add_argument("--scans", type=Path, help="instead of the config's")
    parser.add_argument("--num-scans", type=int, help="instead of the config's")
    parser.add_argument("--output", type=Path, help="one more copy of the report")
    arguments = parser.parse_args(argv)

    def work() -> int:
        given = {key: getattr(arguments, key) for key in ("variant", "scans", "num_scans")}
        config = load_config(ParityConfig, arguments.config)
        config = dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})
        if arguments.url:
            verdict = check_served(config, arguments.url, arguments.model)
        else:
            verdict = check_parity(config)
        if arguments.output:
            write_json(arguments.output, verdict.to_json())
        logger.info("%s", verdict.describe())
        return 0 if verdict else 1

    return run_command(work)
