"""Records of one trained model: read the outputs of earlier stages and check that they match."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import PositiveInt, StringConstraints

from chestct.contract import ModelMetadata
from training.common.config import config_class

Statement = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


@config_class
class CardConfig:
    """Settings of `training card`.

    Attributes:
        train: Folder that `training fit` wrote.
        evaluate: Folder that `training evaluate` wrote for that model.
        audit: Findings of `training audit`.
        split: Record of `training split`.
        ingest: Table of `training ingest`.
        variants: Folder of `facts.json` and `parity.json` by variant. A variant without these
            files, or of another run, is written as not measured.
        latency: Result of `benchmarks latency`, likewise.
        output: Folder for the cards.
        worst_scans: Number of scans with the largest loss to list for each protocol.
        intended_use: Purpose of the model, beyond research. This and the rest are statements in
            Markdown that no record can make; None is written as not stated.
        data_source: Who collected the scans, where, when, and from whom.
        data_licence: Terms under which the scans may be used.
        population: Age, sex, origin and illness of the patients.
        reference_standard: How, and by whom, the class of a scan was decided.
        ethics: Approval, consent and de-identification.
        funding: Funders and their role.
        contact: Where to report faults.
    """

    train: Path = Path("results/train")
    evaluate: Path = Path("results/evaluate")
    audit: Path = Path("results/audit/audit.json")
    split: Path = Path("results/split/split.json")
    ingest: Path = Path("data/ingest.json")
    variants: dict[str, str] = field(
        default_factory=lambda: {
            "fp32": "results/export",
            "int8": "results/int8",
            "compressed": "results/compressed",
        }
    )
    latency: Path = Path("results/benchmark/latency.json")
    output: Path = Path("results/card")
    worst_scans: PositiveInt = 10
    intended_use: Statement | None = None
    data_source: Statement | None = None
    data_licence: Statement | None = None
    population: Statement | None = None
    reference_standard: Statement | None = None
    ethics: Statement | None = None
    funding: Statement | None = None
    contact: Statement | None = None


STATEMENTS = (
    "intended_use", "data_source", "data_licence", "population", "reference_standard", "ethics",
    "funding", "contact",
)  # fmt: skip


@dataclass(frozen=True)
class Artefacts:
    """The records of one trained model.

    Attributes:
        facts: Of the model.
        model_sha256: Of the file `model.keras`.
        training: Content of `run.json`: run, weights, settings, seconds.
        history: Rows of `history.csv`, one an epoch.
        metrics: Content of `metrics.json`.
        predictions: Rows of `predictions.csv`.
        audit: Content of `audit.json`.
        split: Content of `split.json`.
        ingest: Content of `ingest.json`.
        parity: For each variant its parity report, or the reason why there is none.
        latency: Content of `latency.json`, or the reason why there is none.
    """

    facts: ModelMetadata
    model_sha256: str
    training: dict[str, Any]
    history: list[dict[str, str]]
    metrics: dict[str, Any]
    predictions: list[dict[str, str]]
    audit: dict[str, Any]
    split: dict[str, Any]
    ingest: dict[str, Any]
    parity: dict[str, dict[str, Any] | str]
    latency: dict[str, Any] | str

    @property
    def protocols(self) -> dict[str, Any]:
        """The scores, by protocol."""
        return self.metrics["protocols"]  # type: ignore[no-any-return]

    @property
    def external(self) -> list[str]:
        """The protocols on scans of another source."""
        return [name for name in self.protocols if name.startswith("external_")]

    @property
    def public_source(self) -> str:
        """The source of the scans without secrets: folders above, queries and passwords."""
        source = str(self.ingest["source"])
        if "://" not in source:
            return source.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        scheme, _, rest = source.partition("://")
        host, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def read_artefacts(config: CardConfig) -> Artefacts:
    """Read all records and check that they are of one run and one set of scans.

    Raises:
        ValueError: A record is missing, broken, or about another run or other scans; the message
            names the command that makes it.
    """
    model = config.train / "model.keras"
    facts_file = config.train / "facts.json"
    facts = _facts(facts_file, _read_json(facts_file, "training fit"))
    training = _read_json(config.train / "run.json", "training fit", ("run", "weights", "seconds"))
    metrics_file = config.evaluate / "metrics.json"
    metrics = _read_json(
        metrics_file, "training evaluate", ("run", "data_hash", "intervals", "protocols")
    )
    _require_same(metrics_file, metrics["run"], config.train, facts.run, "training evaluate")
    _require_same(
        metrics_file, metrics["data_hash"], config.train, facts.data_hash, "training evaluate"
    )
    for name, answers in metrics["protocols"].items():
        if missing := {"model", "reliability", "before_temperature"} - set(answers):
            raise ValueError(
                f"{metrics_file}: no {', '.join(sorted(missing))} under {name}; run python -m "
                "training evaluate again"
            )
    ingest = _read_json(
        config.ingest, "training ingest", ("source", "data_hash", "num_scans", "counts")
    )
    audit = _read_json(config.audit, "training audit", ("data_hash", "duplicates", "brightness"))
    split = _read_json(config.split, "training split", ("data_hash", "protocol", "counts"))
    data_hash = ingest["data_hash"]
    _require_same(config.audit, audit["data_hash"], config.ingest, data_hash, "training audit")
    _require_same(config.split, split["data_hash"], config.ingest, data_hash, "training split")
    _require_file(model, "training fit")
    with model.open("rb") as opened:
        model_sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return Artefacts(
        facts=facts,
        model_sha256=model_sha256,
        training=training,
        history=_read_csv(config.train / "history.csv", "training fit"),
        metrics=metrics,
        predictions=_read_csv(config.evaluate / "predictions.csv", "training evaluate"),
        audit=audit,
        split=split,
        ingest=ingest,
        parity={name: _parity(Path(folder), facts.run) for name, folder in config.variants.items()},
        latency=_of_run(config.latency, facts.run, "benchmarks latency"),
    )


def _parity(folder: Path, run: str) -> dict[str, Any] | str:
    """The parity report of a variant of the model of `run`, or the reason why there is none."""
    facts_file = folder / "facts.json"
    if not facts_file.is_file() or not (folder / "parity.json").is_file():
        return f"{folder} holds no parity report"
    variant_of = _facts(facts_file, _read_json(facts_file, "export onnx")).run
    student = folder / "student.json"
    if student.is_file():
        variant_of = _read_json(student, "training distill", ("teacher",))["teacher"]
    if variant_of != run:
        return f"{folder} is of run {variant_of}"
    return _read_json(folder / "parity.json", "export parity", ("holds",))


def _of_run(file: Path, run: str, command: str) -> dict[str, Any] | str:
    """An optional record of `run`, or the reason why there is none."""
    if not file.is_file():
        return f"{file} does not exist"
    content = _read_json(file, command, ("run",))
    return content if content["run"] == run else f"{file} is of run {content['run']}"


def _facts(file: Path, content: Mapping[str, Any]) -> ModelMetadata:
    try:
        return ModelMetadata.from_parameters(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; run python -m training fit again") from error


def _require_file(file: Path, command: str) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; run python -m {command}")


def _require_same(file: Path, found: str, other: Path, wanted: str, command: str) -> None:
    if found != wanted:
        raise ValueError(
            f"{file} is about {found}, {other} about {wanted}; run python -m {command} again"
        )


def _read_json(file: Path, command: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    _require_file(file, command)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON; run python -m {command} again") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        raise ValueError(
            f"{file}: no {', '.join(missing) or 'keys'} in it; run python -m {command} again"
        )
    return content


def _read_csv(file: Path, command: str) -> list[dict[str, str]]:
    _require_file(file, command)
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    if not rows:
        raise ValueError(f"{file}: no rows in it; run python -m {command} again")
    return rows
