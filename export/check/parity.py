"""Does a model variant answer as the trained model does? A report whose truth is the verdict.

The FP32 file must give Keras' answers up to rounding (`Tolerance`). A variant that loses something
for speed is held to what a user would notice (`Gate`), against the FP32 file, on labelled scans.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from chestct.contract import INPUT_NAME, MODEL_NAME, OUTPUT_NAMES, ModelMetadata
from chestct.imaging.scan import list_scans, load_scan
from chestct.inference.server_pool import ServerPool
from training.common.atomic_io import sha256_of, write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config
from training.common.metrics import (
    Statistic,
    accuracy,
    bootstrap_interval,
    macro_auroc,
    paired_difference,
)
from training.data.dataset import ScanSet, evenly_spread, read_split
from training.network.vgg16 import load_trained
from training.track.registry import model_folder

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 8)  # two of them show that the batch axis is dynamic

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


@dataclass(frozen=True)
class Gate:
    """What a variant may lose against the FP32 model, on the labelled validation scans.

    AUROC and accuracy are judged by their measured change, not by its interval: on some 70 scans
    the interval of a paired difference is wider than the limits, so no variant could prove that
    it loses less than half a point. A variant that holds has shown no loss beyond the limit on
    these scans, which is less than a proof that there is none; the interval is reported beside
    it. One scan of 72 is 0.014: an accuracy limit of 0.01 means not one more error, net. The other
    figures need no labels and compare answer by answer, so they see a change long before labels
    can; that is why they are gated too.

    Attributes:
        label_agreement: Least fraction of scans with the same label.
        macro_auroc_drop: Most that the macro AUROC may be lower.
        accuracy_drop: Most that the accuracy may be lower.
        mean_probability_error: Of |p - p_fp32| over scans and classes.
        max_probability_error: A single probability moves most where two classes are about equal:
            there a small change of the logits is amplified, and no label was certain before.
        median_map_correlation: Pearson correlation of a scan's map, over places and classes;
            half the scans have at least this one. It does not see a common scale, which a
            temperature of its own may give.
        least_map_correlation: Of the worst scan.
        in_domain_agreement: Least fraction of scans on the same side of the domain threshold,
            each model with its own. 5 % of the validation scans lie beyond it by definition, so
            there are always scans near it.
    """

    label_agreement: float = 0.97
    macro_auroc_drop: float = 0.005
    accuracy_drop: float = 0.01
    mean_probability_error: float = 0.02
    max_probability_error: float = 0.2
    median_map_correlation: float = 0.98
    least_map_correlation: float = 0.9
    in_domain_agreement: float = 0.95


AT_LEAST = (
    "label_agreement", "median_map_correlation", "least_map_correlation", "in_domain_agreement",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One measured number of a variant and its limit, with a 95 % interval where labels count."""

    name: str
    value: float
    limit: float
    low: float | None = None
    high: float | None = None

    def __bool__(self) -> bool:
        """Whether the value is within the limit; false for NaN."""
        if self.name in AT_LEAST:
            return self.value >= self.limit
        return self.value <= self.limit

    def in_words(self) -> str:
        """The name, the value, its interval and its limit."""
        interval = "" if self.low is None else f" ({self.low:.4f} to {self.high:.4f})"
        bound = "least" if self.name in AT_LEAST else "limit"
        return f"{self.name} {self.value:.4f}{interval} ({bound} {self.limit})"


@dataclass(frozen=True)
class GateReport:
    """What one engine made of a variant, on the scans of each split.

    Attributes:
        reference: Name of the runner that is right by definition.
        candidate: Name of the other one.
        num_scans: Scans compared, by split.
        num_groups: Their near-duplicate groups, which the intervals resample.
        figures: One for each limit of the gate, by split.
        differences: Names and shapes that differ, in words.
        gated: The split that decides; the others are only reported.
    """

    reference: str
    candidate: str
    num_scans: dict[str, int]
    num_groups: dict[str, int]
    figures: dict[str, tuple[Figure, ...]]
    differences: tuple[str, ...] = ()
    gated: str = "valid"

    @property
    def reasons(self) -> list[str]:
        """Why the variant is refused, one sentence each; empty when it holds."""
        if self.differences:
            return list(self.differences)
        if not self.num_scans.get(self.gated):
            return ["no scan was compared"]
        return [figure.in_words() for figure in self.figures[self.gated] if not figure]

    def __bool__(self) -> bool:
        """Whether the variant may stand for the reference."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, with the verdict."""
        return {"holds": bool(self)} | asdict(self) | {"reasons": self.reasons}

    def in_words(self) -> str:
        """One line that says whether the gate holds, and why not."""
        if self.reasons:
            return f"parity FAILS: {self.candidate}: {'; '.join(self.reasons)}"
        figures = ", ".join(figure.in_words() for figure in self.figures[self.gated])
        return (
            f"parity holds: {self.candidate} against {self.reference} on "
            f"{self.num_scans[self.gated]} {self.gated} scans: {figures}"
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
            "verdict": self.in_words(),
            "reasons": [report.in_words() for report in self.reports if not report],
            "reports": [report.to_json() for report in self.reports],
        }

    def in_words(self) -> str:
        """One line an engine."""
        return "\n".join(report.in_words() for report in self.reports)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; make the variant first, by python -m export onnx (FP32), "
            "export quantize (INT8), export compress or export engine"
        )


def keras_runner(model: Any) -> Runner:
    """Runs a Keras model from `training.network.vgg16`."""

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        return {name: np.asarray(value) for name, value in model.predict_on_batch(scans).items()}

    return infer


def onnx_runner(path: Path) -> Runner:
    """Runs an ONNX file by ONNX Runtime on the CPU.

    Raises:
        ValueError: The file is missing or cannot be loaded.
    """
    import onnxruntime

    _require_file(path)
    options = onnxruntime.SessionOptions()
    # Its idle threads spin, which makes OpenVINO in the same process 16 times slower on 2 cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        return dict(zip(names, session.run(names, {INPUT_NAME: scans}), strict=True))

    return infer


def openvino_runner(path: Path) -> Runner:
    """Runs an ONNX file by OpenVINO on the CPU, with the settings of the Triton backend.

    Raises:
        ValueError: The file is missing, or OpenVINO is not installed.
    """
    _require_file(path)
    try:
        import openvino
    except ImportError as error:
        raise ValueError(
            "the engine openvino needs its package: pip install openvino, or leave it out of "
            "`engines`"
        ) from error
    # Without the hint OpenVINO calculates in bfloat16 where the CPU can, which is not parity.
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", properties).create_infer_request()

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        request.infer({INPUT_NAME: scans}, share_inputs=True)
        return {name: request.get_tensor(name).data.copy() for name in OUTPUT_NAMES}

    return infer


ENGINES: dict[str, Callable[[Path], Runner]] = {
    "onnxruntime": onnx_runner,
    "openvino": openvino_runner,
}


def triton_runner(client: ServerPool) -> Runner:
    """Runs the model that a connected client talks to."""

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        predictions = client.infer(scans, with_map=True)
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
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
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
    differences: tuple[str, ...] = ()
    errors: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in OUTPUT_NAMES}
    same_label: list[bool] = []
    batches = _batches(len(scans), batch_sizes)
    for batch in tqdm(batches, f"{candidate[0]} against {reference[0]}", disable=None):
        wanted, got = reference[1](scans[batch]), candidate[1](scans[batch])
        differences = _differences(wanted, got)
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


def _differences(wanted: Outputs, got: Outputs) -> tuple[str, ...]:
    """Outputs that are missing or have another shape, one sentence each."""
    missing = [name for name in OUTPUT_NAMES if name not in got]
    shapes = [
        f"output {name} has shape {got[name].shape}, expected {wanted[name].shape}"
        for name in OUTPUT_NAMES
        if name in got and got[name].shape != wanted[name].shape
    ]
    return (*(f"output {name} is missing" for name in missing), *shapes)


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


def run_all(name: str, runner: Runner, scans: npt.NDArray[np.uint8]) -> Outputs:
    """All outputs for `scans`, uint8 (N, 224, 224, 1), dealt to the batch sizes in turn."""
    parts = [
        runner(scans[batch])
        for batch in tqdm(_batches(len(scans), BATCH_SIZES), name, disable=None)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def gate_figures(
    scans: ScanSet,
    reference: Outputs,
    candidate: Outputs,
    thresholds: tuple[float, float],
    gate: Gate,
) -> tuple[Figure, ...]:
    """Every figure of the gate on labelled scans, in the order of its attributes.

    The intervals are paired: whole groups are resampled, and both models are scored on the same
    resample (Efron and Tibshirani 1993, section 8.3, with the difference as the statistic).

    Args:
        scans: The labelled scans.
        reference: Outputs of the FP32 model for them.
        candidate: Outputs of the variant.
        thresholds: Domain thresholds of the two.
        gate: The limits.
    """
    before, after = (outputs["probabilities"] for outputs in (reference, candidate))
    pairs = np.hstack([after, before])

    def drop(statistic: Statistic) -> tuple[float, float, float]:
        lost = paired_difference(statistic, before.shape[1])
        return lost(pairs, scans.labels), *bootstrap_interval(
            lost, pairs, scans.labels, scans.groups
        )

    errors = np.abs(before.astype(np.float64) - after)
    correlations = _map_correlations(reference["activation_map"], candidate["activation_map"])
    inside = [
        outputs["domain_distance"] <= threshold
        for outputs, threshold in zip((reference, candidate), thresholds, strict=True)
    ]
    found: dict[str, tuple[float, ...]] = {
        "label_agreement": (float(np.mean(before.argmax(axis=1) == after.argmax(axis=1))),),
        "macro_auroc_drop": drop(macro_auroc),
        "accuracy_drop": drop(accuracy),
        "mean_probability_error": (float(errors.mean()),),
        "max_probability_error": (float(errors.max()),),
        "median_map_correlation": (float(np.median(correlations)),),
        "least_map_correlation": (float(correlations.min()),),
        "in_domain_agreement": (float(np.mean(inside[0] == inside[1])),),
    }
    return tuple(
        Figure(name, found[name][0], limit, *found[name][1:])
        for name, limit in asdict(gate).items()
    )


def _map_correlations(
    wanted: npt.NDArray[np.float32], got: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Pearson correlation of each scan's two maps (N, 14, 14, C); NaN where one is constant."""
    rows = []
    for maps in (wanted, got):
        flat = maps.reshape(len(maps), -1).astype(np.float64)
        flat -= flat.mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            rows.append(flat / np.linalg.norm(flat, axis=1, keepdims=True))
    return (rows[0] * rows[1]).sum(axis=1)  # type: ignore[no-any-return]


def compare_by_labels(
    sets: Mapping[str, ScanSet],
    reference: tuple[str, Runner, float],
    candidates: Mapping[str, Runner],
    threshold: float,
    gate: Gate,
) -> tuple[GateReport, ...]:
    """Run the reference once and each candidate on the labelled scans of every split.

    Args:
        sets: Scans by split; `valid` decides.
        reference: Name, runner and domain threshold of the FP32 model.
        candidates: Name and runner of the variant in each engine.
        threshold: Domain threshold of the variant.
        gate: The limits.
    """
    name, runner, own_threshold = reference
    wanted = {split: run_all(f"{name}, {split}", runner, s.pixels) for split, s in sets.items()}
    reports = []
    for candidate, run in candidates.items():
        figures: dict[str, tuple[Figure, ...]] = {}
        differences: tuple[str, ...] = ()
        for split, scans in sets.items():
            got = run_all(f"{candidate}, {split}", run, scans.pixels)
            differences = _differences(wanted[split], got)
            if differences:
                break
            figures[split] = gate_figures(
                scans, wanted[split], got, (own_threshold, threshold), gate
            )
        reports.append(
            GateReport(
                reference=name,
                candidate=candidate,
                num_scans={split: len(scans) for split, scans in sets.items()},
                num_groups={split: len(np.unique(s.groups)) for split, s in sets.items()},
                figures=figures,
                differences=differences,
            )
        )
    return tuple(reports)


@dataclass(frozen=True)
class ParityConfig:
    """What `export parity` is told.

    Attributes:
        variant: Folder with `model.onnx` and `facts.json`, whose precision says how it is judged;
            the report becomes its `parity.json`.
        engines: All that will serve the file.
        model: Folder that `training fit` wrote, or an address of MLflow; the reference of an
        FP32
            variant. Where the variant was exported from another run, that run's model is fetched.
        scans: Folder of scans; an FP32 variant is compared on any of them.
        num_scans: At most so many of them, evenly spread.
        reference: FP32 variant, the reference of the others.
        split: Split file; the other variants are compared on its labelled scans.
        gate: Limits that differ from the defaults of `Gate`.
    """

    variant: Path = Path("results/export")
    engines: tuple[str, ...] = ("onnxruntime", "openvino")
    model: str | Path = Path("results/train")
    scans: Path = Path("data/scans")
    num_scans: int = 64
    reference: Path = Path("results/export")
    split: Path = Path("results/split/split.csv")
    gate: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an unknown engine or limit.

        Raises:
            ValueError: The message lists what is known.
        """
        known = [limit.name for limit in dataclasses.fields(Gate)]
        for what, given, allowed in (
            ("engines", self.engines, list(ENGINES)),
            ("gate", self.gate, known),
        ):
            unknown = [name for name in given if name not in allowed]
            if unknown:
                raise ValueError(f"{what} names {unknown}; expected some of {allowed}")
        if any(type(limit) not in (int, float) for limit in self.gate.values()):
            raise ValueError(f"gate is {self.gate}; expected numbers")
        if not self.engines:
            raise ValueError("engines is empty; expected at least one")


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


def facts_of(variant: Path) -> ModelMetadata:
    """The facts that lie beside the model of a variant.

    Raises:
        ValueError: There are none.
    """
    file = variant / "facts.json"
    _require_file(file)
    return ModelMetadata.from_parameters(json.loads(file.read_text()))


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
            Gate(**config.gate),
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
    """Judge what the server at `url` answers for `model`, by the precision that it tells.

    Raises:
        ValueError: Reference or scans are missing.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
    """
    with ServerPool(url, model) as client:
        name = f"triton {model} version {client.model_version}"
        return judge(config, client.metadata, {name: triton_runner(client)})


def main(argv: list[str] | None = None) -> int:
    """Compare a model variant, or what a server answers, with the trained model."""
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
        logger.info("%s", verdict.in_words())
        return 0 if verdict else 1

    return run_command(work)
