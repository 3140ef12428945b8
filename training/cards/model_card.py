"""The model card, from `templates/model_card.md.j2`, and its summary."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import training.score.ood
import training.score.shortcuts.report
from chestct.contract import (
    MODEL_NAME,
    NOT_A_MEDICAL_DEVICE,
    PREPARATION,
    input_spec,
    output_specs,
)
from training.cards.rendering import templates
from training.cards.run_records import Artefacts, CardConfig
from training.common.markdown import below, code
from training.network.weights import BRAIN_MRI_REQUIREMENT
from training.score.report import OPERATING_POINTS, answered_by
from training.track.mlflow_run import RunRecord

# The first of these that was scored stands for the model: the strictest comes first.
SUMMARY_PROTOCOLS = (
    "grouped_distinct", "grouped", "grouped_fold", "official_without_duplicates",
)  # fmt: skip
SUMMARY_SCORES = ("balanced_accuracy", "macro_auroc", "calibration_error")
LEAST_PROBABILITY = 5e-7  # predictions.csv rounds to six digits, so what it calls 0 is below this
PACKAGES = (
    "tensorflow", "keras", "numpy", "scipy", "scikit-learn", "pillow", "pydicom", "mlflow",
)  # fmt: skip
# How the result of a further check becomes lines of Markdown, by its key in metrics.json.
CHECKS: dict[str, Callable[[Any], list[str]]] = {
    "shortcuts": training.score.shortcuts.report.report_lines,
    "domain": training.score.ood.report_lines,
}


class Failure(NamedTuple):
    """A scan and its loss.

    Attributes:
        loss: Negative natural logarithm of the true class's probability.
        path: As in the split file.
        actual: Its class.
        predicted: The most probable class.
        probability: Of the true class.
    """

    loss: float
    path: str
    actual: str
    predicted: str
    probability: float


class Failures(NamedTuple):
    """The failures under one protocol.

    Attributes:
        n: Number of scans.
        num_wrong: Number of scans with another class predicted than the true one.
        worst: Scans with the largest loss; none where their classes are not the model's.
    """

    n: int
    num_wrong: int
    worst: list[Failure]


def model_card(records: Artefacts, config: CardConfig, run: RunRecord | None) -> str:
    """The card as Markdown.

    Args:
        records: Of the run.
        config: Statements that no record can make.
        run: MLflow's record of the training; None where its store does not know the run.
    """
    protocols, strictest = records.protocols, summary_protocol(records)
    return templates().get_template("model_card.md.j2").render(
        records=records,
        config=config,
        run=run,
        model_name=MODEL_NAME,
        notice=NOT_A_MEDICAL_DEVICE,
        preparation=PREPARATION,
        tensors=[input_spec(), *output_specs(len(records.facts.class_names))],
        brain_mri_requirement=BRAIN_MRI_REQUIREMENT,
        epochs={
            "head alone": records.history[0],
            "least loss": min(records.history, key=lambda row: float(row["valid_loss"])),
            "last": records.history[-1],
        },
        settings=_settings(run),
        strictest=strictest,
        rarest_class=_rarest_class(protocols[strictest]["model"]["classes"]),
        best_baseline=_best_baseline(protocols[strictest]),
        operating_points=OPERATING_POINTS,
        protocols_with_points=[
            name for name in protocols if OPERATING_POINTS.keys() & protocols[name]["model"].keys()
        ],
        failures={
            name: _failures(records, name, config.worst_scans) for name in protocols
        },
        least_probability=LEAST_PROBABILITY,
        checks={key: "\n".join(check_lines(records.metrics, key)) for key in CHECKS},
        versions=_versions(),
    )  # fmt: skip


def summary(records: Artefacts) -> dict[str, Any]:
    """The card in a few hundred characters: it travels with the served model.

    Returns:
        `run`, `data_hash`, `precision` (of the scored network), `protocol`, `n`, `groups`,
        `balanced_accuracy`, `macro_auroc` and `calibration_error` (each [value, low, high]) and
        `notice`.
    """
    name = summary_protocol(records)
    scores = records.protocols[name]["model"]
    return {
        "run": records.facts.run,
        "data_hash": records.facts.data_hash,
        "precision": records.facts.precision,
        "protocol": name,
        "n": scores["n"],
        "groups": scores["groups"],
        **{
            key: [
                None if scores[key][end] is None else round(scores[key][end], 4)
                for end in ("value", "low", "high")
            ]
            for key in SUMMARY_SCORES
        },
        "notice": NOT_A_MEDICAL_DEVICE,
    }


def summary_protocol(records: Artefacts) -> str:
    """The protocol whose scores stand for the model."""
    wanted = [name for name in SUMMARY_PROTOCOLS if name in records.protocols]
    return wanted[0] if wanted else next(iter(records.protocols))


def worst_scans(predictions: list[dict[str, str]], protocol: str, most: int) -> list[Failure]:
    """The scans of a protocol with the largest loss, the largest first; equal ones by path."""
    failures = []
    for row in predictions:
        if row["protocol"] == protocol:
            probability = float(row[row["actual"]])
            loss = -math.log(max(probability, LEAST_PROBABILITY))
            failures.append(
                Failure(loss, row["path"], row["actual"], row["predicted"], probability)
            )
    return sorted(failures, key=lambda failure: (-failure.loss, failure.path))[:most]


def check_lines(metrics: Mapping[str, Any], key: str) -> list[str]:
    """The result of a further check of the evaluation, as lines below a heading of level two."""
    if not metrics.get(key):
        return [f"Not measured: `metrics.json` holds no {code(key)}."]
    return below(CHECKS[key](metrics[key]), 2)


def _settings(run: RunRecord | None) -> dict[str, str]:
    """The settings of the training that MLflow holds, without its input files."""
    return {
        key.removeprefix("fit."): value
        for key, value in sorted((run.params if run else {}).items())
        if key.startswith("fit.") and key not in ("fit.scans", "fit.split")
    }


def _rarest_class(classes: Mapping[str, Any]) -> str:
    return min(classes, key=lambda label: (classes[label]["groups"], label))


def _best_baseline(answers: Mapping[str, Any]) -> str | None:
    """The baseline with the highest balanced accuracy under a protocol."""
    return max(
        (who for who in answered_by(answers) if who != "model"),
        key=lambda who: answers[who]["balanced_accuracy"]["value"] or 0.0,
        default=None,
    )


def _failures(records: Artefacts, protocol: str, most: int) -> Failures:
    scores = records.protocols[protocol]["model"]
    num_right = sum(row[index] for index, row in enumerate(scores["confusion"]))
    worst = worst_scans(records.predictions, protocol, most)
    return Failures(scores["n"], scores["n"] - num_right, worst)


def _versions() -> dict[str, str]:
    """The system, Python and the libraries with their versions."""
    versions = {"system": platform.platform(), "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
