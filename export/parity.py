"""Does the exported model answer as the trained one does? A report whose truth is the verdict."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from chestct.client import ScanClient
from chestct.contract import INPUT_NAME, OUTPUT_NAMES
from chestct.scan import list_scans, load_scan
from export.onnx import sha256_of
from training.command import command_parser, run_command
from training.config import load_config
from training.files import write_json
from training.model import load_trained

logger = logging.getLogger(__name__)

Outputs = Mapping[str, npt.NDArray[np.float32]]
Runner = Callable[[npt.NDArray[np.uint8]], Outputs]  # uint8 (N, 224, 224, 1) to the outputs


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
    """What a comparison of two runners found.

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

    def in_words(self) -> str:
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


def keras_runner(model: Any) -> Runner:
    """Runs a Keras model from `training.model`."""

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        return {name: np.asarray(value) for name, value in model.predict_on_batch(scans).items()}

    return infer


def onnx_runner(path: Path) -> Runner:
    """Runs an ONNX file by ONNX Runtime on the CPU.

    Raises:
        ValueError: The file is missing or cannot be loaded.
    """
    import onnxruntime

    if not path.is_file():
        raise ValueError(f"{path}: no such ONNX file; run python -m export.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        return dict(zip(names, session.run(names, {INPUT_NAME: scans}), strict=True))

    return infer


def triton_runner(client: ScanClient) -> Runner:
    """Runs the model that a connected client talks to."""

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        predictions = client.classify(scans)
        return {
            "probabilities": predictions.probabilities,
            "activation_map": np.asarray(predictions.activation_map),
            "domain_distance": predictions.domain_distance[:, np.newaxis],
        }

    return infer


def compare(
    scans: npt.NDArray[np.uint8],
    reference: tuple[str, Runner],
    candidate: tuple[str, Runner],
    tolerance: Tolerance,
    batch_sizes: tuple[int, ...] = (1, 8),
) -> ParityReport:
    """Run both on the same scans: names, then shapes, then values, at each batch size.

    The scans are dealt to the batch sizes in turn, so each scan is compared once.

    Args:
        scans: uint8 (N, 224, 224, 1).
        reference: Name and runner whose answers are right by definition.
        candidate: Name and runner to be judged.
        tolerance: What is allowed.
        batch_sizes: Scans in a call; at least two sizes show that the batch axis is dynamic.
    """
    differences: list[str] = []
    errors: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in OUTPUT_NAMES}
    same_label: list[bool] = []
    batches = _batches(len(scans), batch_sizes)
    for batch in tqdm(batches, f"{candidate[0]} against {reference[0]}", disable=None):
        wanted, got = reference[1](scans[batch]), candidate[1](scans[batch])
        for name in OUTPUT_NAMES:
            if name not in got:
                differences.append(f"output {name} is missing")
            elif got[name].shape != wanted[name].shape:
                differences.append(
                    f"output {name} has shape {got[name].shape}, expected {wanted[name].shape}"
                )
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
        differences=tuple(differences),
    )


def _batches(count: int, sizes: tuple[int, ...]) -> list[slice]:
    batches: list[slice] = []
    start = 0
    while start < count:
        size = sizes[len(batches) % len(sizes)]
        batches.append(slice(start, min(start + size, count)))
        start += size
    return batches


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


@dataclass(frozen=True)
class ParityConfig:
    """What `export.parity` is told.

    Attributes:
        model: Folder that `training.fit` wrote.
        onnx: The exported file.
        scans: Folder, or file, of scans to compare on.
        num_scans: At most so many of them, evenly spread.
        output: The report.
    """

    model: Path = Path("results/train")
    onnx: Path = Path("results/export/model.onnx")
    scans: Path = Path("data/scans")
    num_scans: int = 64
    output: Path = Path("results/export/parity.json")


def spread_scans(folder: Path, count: int) -> npt.NDArray[np.uint8]:
    """At most `count` scans, uint8 (N, 224, 224, 1), evenly spread over the files of `folder`.

    Raises:
        ValueError: No scan in the folder.
        chestct.errors.ScanDecodeError: A scan cannot be read.
    """
    paths = list(list_scans(folder)) if folder.exists() else []
    if not paths:
        raise ValueError(f"{folder}: no scan found; parity needs at least one")
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int))
    return np.stack([load_scan(paths[index]) for index in chosen])


def check_parity(config: ParityConfig, url: str | None = None) -> ParityReport:
    """Compare Keras with the ONNX file, or with the server at `url`, and write the report.

    Raises:
        ValueError: Model, file or scans are missing.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
        OSError: The report cannot be written.
    """
    scans = spread_scans(config.scans, config.num_scans)
    reference = ("keras", keras_runner(load_trained(config.model)[0]))
    about = {}
    if url:
        with ScanClient(url) as client:
            name = f"triton version {client.model_version}"
            report = compare(scans, reference, (name, triton_runner(client)), Tolerance())
    else:
        about = {"onnx_sha256": sha256_of(config.onnx)}
        candidate = ("onnxruntime", onnx_runner(config.onnx))
        report = compare(scans, reference, candidate, Tolerance())
    write_json(config.output, report.to_json() | about)
    return report


def main(argv: list[str] | None = None) -> int:
    """Compare the trained Keras model with its ONNX file, or with what a server answers."""
    parser = command_parser("export.parity", main.__doc__, "configs/parity.yaml")
    parser.add_argument("--url", help="compare with the server at grpc://HOST:PORT or http://...")
    parser.add_argument("--scans", type=Path, help="instead of the config's")
    parser.add_argument("--num-scans", type=int, help="instead of the config's")
    parser.add_argument("--output", type=Path, help="instead of the config's")
    arguments = parser.parse_args(argv)

    def work() -> int:
        given = {key: getattr(arguments, key) for key in ("scans", "num_scans", "output")}
        config = load_config(ParityConfig, arguments.config)
        config = dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})
        report = check_parity(config, arguments.url)
        logger.info("%s", report.in_words())
        return 0 if report else 1

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
