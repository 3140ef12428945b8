"""What a trained model is worth on held-out scans, beside what needs no model at all."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from chestct.contract import ModelFacts
from chestct.scan import list_scans
from training.command import command_parser, run_command
from training.config import load_config
from training.files import replaced, write_json
from training.metrics import NORMAL, auroc, bootstrap_interval, reliability, score
from training.model import load_trained
from training.scans import ScanSet, load_pixels, read_split
from training.tracking import tracked_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EvaluateConfig:
    """What `training.evaluate` is told.

    Attributes:
        scans: Folder that the split file's paths are relative to.
        split: CSV with path, label, split, group.
        protocol: How the split was made, the record that `training.split` writes beside it.
        model: Folder that `training.fit` wrote.
        output: Folder for scores and plots.
    """

    scans: Path = Path("data/scans")
    split: Path = Path("results/split/split.csv")
    protocol: Path = Path("results/split/split.json")
    model: Path = Path("results/train")
    output: Path = Path("results/evaluate")


def evaluate(config: EvaluateConfig, external: Path | None = None) -> dict[str, Any]:
    """Score the model on the test split by each protocol that the split allows.

    With an official split these are `official` and `official_without_duplicates` (test scans with
    a near-duplicate in train or valid left out); with a grouped split, `grouped`. Writes
    `metrics.json`, `scores.json` (the headline numbers), `report.md`, `predictions.csv` and
    plots into `config.output`, replaced in one step, and logs them to the training's MLflow run.

    Args:
        config: Paths.
        external: Folder `CLASS/*` of another source; scored as normal against all else.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: Model or split cannot be used.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The output cannot be written.
    """
    model, facts = load_trained(config.model)
    sets = read_split(config.scans, config.split, facts.window)
    test, train = sets["test"], sets["train"]
    if test.names != facts.labels:
        raise ValueError(
            f"{config.split} has the classes {test.names}, the model {facts.labels}; train again"
        )
    made_by = json.loads(config.protocol.read_text())["protocol"]
    probabilities = predict_probabilities(model, test, "test scans")
    baselines = {
        "majority": majority_baseline(train, len(test)),
        "mean grey": brightness_baseline(train, test),
    }
    seen = np.isin(test.groups, np.union1d(train.groups, sets["valid"].groups))
    parts = {made_by: np.ones(len(test), bool)}
    if seen.any():
        parts[f"{made_by}_without_duplicates"] = ~seen
    protocols: dict[str, dict[str, Any]] = {}
    for name, keep in parts.items():
        chosen = test.where(keep)
        answers = {"model": probabilities} | baselines
        protocols[name] = {
            who: score(answer[keep], chosen.labels, chosen.groups, test.names)
            for who, answer in answers.items()
        }
        protocols[name]["reliability"] = reliability(probabilities[keep], chosen.labels)
    metrics: dict[str, Any] = {
        "run": facts.run,
        "data_hash": facts.data_hash,
        "labels": list(facts.labels),
        "intervals": "95 %; Wilson for proportions, bootstrap over groups for the rest",
        "protocols": protocols,
    }
    if external is not None:
        metrics["external"] = score_external(model, facts, external)
    with replaced(config.output) as folder:
        folder.mkdir()
        write_json(folder / "metrics.json", _without_nan(metrics))
        write_json(folder / "scores.json", headline(protocols))
        (folder / "report.md").write_text(report(metrics), encoding="utf-8")
        _write_predictions(folder / "predictions.csv", test, probabilities)
        _plot(folder, protocols[made_by], test, probabilities)
    with tracked_run("evaluate", facts.run) as run:
        for protocol, numbers in headline(protocols).items():
            run.log_metrics({f"{protocol}.{key}": value for key, value in numbers.items()})
        run.log_file(config.output, "evaluate")
    return metrics


def predict_probabilities(model: Any, scans: ScanSet, title: str) -> Floats:
    """Probabilities float32 (N, C) of a classifier, with a progress bar."""
    starts = tqdm(range(0, len(scans), 16), title, unit="batch", disable=None)
    batches = (scans.pixels[start : start + 16] for start in starts)
    return np.concatenate([model.predict_on_batch(batch)["probabilities"] for batch in batches])


def majority_baseline(train: ScanSet, count: int) -> Floats:
    """The class frequencies of `train` for every one of `count` scans, float32 (count, C)."""
    frequencies = np.bincount(train.labels, minlength=len(train.names)) / len(train)
    return np.tile(frequencies.astype(np.float32), (count, 1))


def brightness_baseline(train: ScanSet, test: ScanSet) -> Floats:
    """Probabilities float32 (N, C) from the mean grey level alone, fitted on `train`.

    One Gaussian a class (naive Bayes on one feature): no anatomy can enter.
    """
    from sklearn.naive_bayes import GaussianNB

    grey = [scans.pixels.mean(axis=(1, 2)) for scans in (train, test)]
    return GaussianNB().fit(grey[0], train.labels).predict_proba(grey[1]).astype(np.float32)  # type: ignore[no-any-return]


def score_external(model: Any, facts: ModelFacts, folder: Path) -> dict[str, Any]:
    """AUROC of telling each other folder of an outside source from its folder `normal`.

    The score is 1 - P(normal): outside sources rarely name the same subtypes.

    Raises:
        ValueError: No class `normal` in the model or in the folder, or no other folder.
    """
    classes = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    if NORMAL not in facts.labels or NORMAL not in classes or len(classes) < 2:
        raise ValueError(
            f"{folder}: holds {sorted(classes)}, the model knows {list(facts.labels)}; expected "
            f"{NORMAL!r} in both and another folder beside it"
        )
    cancer = {}
    for name, path in classes.items():
        pixels = load_pixels(list(list_scans(path)), f"decode {name}", facts.window)
        empty = np.zeros(len(pixels), np.int64)
        scans = ScanSet(pixels, empty, empty, tuple(map(str, empty)), facts.labels)
        answers = predict_probabilities(model, scans, f"external {name}")
        cancer[name] = 1 - answers[:, facts.labels.index(NORMAL)]
    found: dict[str, Any] = {"folder": folder.name}
    for name in classes:
        if name == NORMAL:
            continue
        scores = np.concatenate([cancer[NORMAL], cancer[name]])[:, np.newaxis]
        labels = np.repeat([0, 1], [len(cancer[NORMAL]), len(cancer[name])])

        def area(p: Floats, y: npt.NDArray[np.int64]) -> float:
            return auroc(p[:, 0], y == 1)

        low, high = bootstrap_interval(area, scores, labels, np.arange(len(labels)))
        found[f"{name}_against_normal_auroc"] = {
            "value": area(scores, labels), "low": low, "high": high,
            "n": [len(cancer[name]), len(cancer[NORMAL])],
        }  # fmt: skip
    return found


def headline(protocols: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The few numbers of each protocol that are compared between runs."""
    keys = ("accuracy", "balanced_accuracy", "macro_auroc", "normal_against_rest_auroc")
    return {
        protocol: {"n": answers["model"]["n"]}
        | {
            key: round(answers["model"][key]["value"], 4)
            for key in keys
            if key in answers["model"] and not math.isnan(answers["model"][key]["value"])
        }
        | {"majority_accuracy": round(answers["majority"]["accuracy"]["value"], 4)}
        for protocol, answers in protocols.items()
    }


def report(metrics: dict[str, Any]) -> str:
    """The scores as Markdown tables, baselines beside the model."""
    lines = ["# Evaluation", "", f"Run `{metrics['run']}`. Intervals: {metrics['intervals']}.", ""]
    for protocol, answers in metrics["protocols"].items():
        model = answers["model"]
        lines += [
            f"## {protocol}: {model['n']} scans in {model['groups']} groups",
            "",
            "| | accuracy | balanced accuracy | macro AUROC | normal against rest AUROC |",
            "| --- | --- | --- | --- | --- |",
        ]
        for who in ("model", "mean grey", "majority"):
            cells = [
                _with_interval(answers[who].get(key))
                for key in (
                    "accuracy",
                    "balanced_accuracy",
                    "macro_auroc",
                    "normal_against_rest_auroc",
                )
            ]
            lines.append(f"| {who} | {' | '.join(cells)} |")
        lines += ["", "| class | n | sensitivity | specificity | AUROC |", "|" + " --- |" * 5]
        for name, numbers in model["classes"].items():
            lines.append(
                f"| {name} | {numbers['sensitivity']['n']} | "
                f"{_with_interval(numbers['sensitivity'])} | "
                f"{_with_interval(numbers['specificity'])} | {numbers['auroc']:.3f} |"
            )
        lines.append("")
    for key, value in metrics.get("external", {}).items():
        if isinstance(value, dict):
            lines.append(f"External, {key}: {_with_interval(value)}, n = {value['n']}.")
    return "\n".join(lines) + "\n"


def _with_interval(number: dict[str, float] | None) -> str:
    if number is None or math.isnan(number["value"]):
        return "-"
    return f"{number['value']:.3f} ({number['low']:.3f} to {number['high']:.3f})"


def _without_nan(value: Any) -> Any:
    """The same structure with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write_predictions(path: Path, test: ScanSet, probabilities: Floats) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "actual", "predicted", *test.names])
        for index, row in enumerate(probabilities):
            actual, predicted = test.names[test.labels[index]], test.names[int(row.argmax())]
            writer.writerow([test.paths[index], actual, predicted, *(f"{p:.6f}" for p in row)])


def _plot(folder: Path, answers: dict[str, Any], test: ScanSet, probabilities: Floats) -> None:
    from matplotlib.figure import Figure

    drawings: dict[str, Callable[[Axes], None]] = {
        "confusion": lambda axes: _draw_confusion(axes, answers["model"]["confusion"], test.names),
        "roc": lambda axes: _draw_roc(axes, test, probabilities),
        "reliability": lambda axes: _draw_reliability(axes, answers["reliability"]),
    }
    for name, draw in drawings.items():
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes: Axes = figure.add_subplot()
        draw(axes)
        figure.savefig(folder / f"{name}.png", dpi=120)


def _draw_confusion(axes: Axes, table: list[list[int]], names: tuple[str, ...]) -> None:
    counts = np.array(table)
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, str(count), ha="center", va="center")
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="actual", title=f"Test scans, n = {counts.sum()}")


def _draw_roc(axes: Axes, test: ScanSet, probabilities: Floats) -> None:
    from sklearn.metrics import roc_curve

    for index, name in enumerate(test.names):
        positive = test.labels == index
        if positive.any() and not positive.all():
            false_alarms, hits, _ = roc_curve(positive, probabilities[:, index])
            area = auroc(probabilities[:, index], positive)
            axes.plot(false_alarms, hits, label=f"{name} {area:.3f}")
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="One against the rest")
    axes.legend(title="AUROC")


def _draw_reliability(axes: Axes, bins: list[dict[str, float]]) -> None:
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker="o")
    for item in bins:
        axes.annotate(f"n={item['n']}", (item["confidence"], item["accuracy"]))
    axes.set(xlabel="mean top probability", ylabel="accuracy", title="Reliability")


def main(argv: list[str] | None = None) -> int:
    """Score the trained model on its test split."""
    parser = command_parser("training.evaluate", main.__doc__, "configs/evaluate.yaml")
    parser.add_argument("--external", type=Path, help="folder CLASS/* of another source")
    parser.add_argument("--output", type=Path, help="instead of the config's")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(EvaluateConfig, arguments.config)
        if arguments.output:
            config = dataclasses.replace(config, output=arguments.output)
        sys.stdout.write(report(evaluate(config, arguments.external)))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
