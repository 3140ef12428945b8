"""Scores as Markdown tables and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.common.markdown import plain, table
from training.common.metrics import auroc
from training.score.ood import report_lines as domain_lines
from training.score.protocols import Protocol
from training.score.shortcuts.report import report_lines as shortcut_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Scores of the first table, which are compared between runs; the last two are errors.
HEADLINE = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_auroc": "macro AUROC",
    "normal_against_rest_auroc": "normal against rest AUROC",
    "brier": "Brier",
    "calibration_error": "ECE",
}
RANGE = ("value", "low", "high")  # the keys of a score
OPERATING_POINTS = {
    "sensitivity_at_95_specificity": "sensitivity at 95 % specificity",
    "specificity_at_95_sensitivity": "specificity at 95 % sensitivity",
}


def report(metrics: Mapping[str, Any]) -> str:
    """The content of `metrics.json` as Markdown: all protocols side by side, then each alone."""
    protocols = metrics["protocols"]
    lines = ["# Evaluation", "", f"Run `{metrics['run']}`. Intervals: {metrics['intervals']}.", ""]
    lines += side_by_side(protocols)
    for protocol, answers in protocols.items():
        lines += ["", f"## {plain(protocol)}", "", *class_table(answers["model"])]
        points = [
            f"{text}: {interval(answers['model'][key])}"
            for key, text in OPERATING_POINTS.items() if key in answers["model"]
        ]  # fmt: skip
        if points:
            lines += ["", f"All other classes against normal, {'; '.join(points)}."]
        before = answers["before_temperature"]["calibration_error"]
        after = answers["model"]["calibration_error"]["value"]
        lines += ["", f"Calibration error before temperature {before:.3f}, after {after:.3f}."]
    lines += ["", "## Shortcuts", "", *shortcut_lines(metrics["shortcuts"])]
    if "domain" in metrics:
        lines += ["", "## Out of domain", "", *domain_lines(metrics["domain"])]
    return "\n".join(lines) + "\n"


def side_by_side(protocols: Mapping[str, Any]) -> list[str]:
    """Lines of a table: scores of the model and of the baselines under every protocol."""
    return table(["protocol", "n", "groups", "answered by", *HEADLINE.values()], [
        [plain(protocol), answers[who]["n"], answers[who]["groups"], who,
         *(interval(answers[who].get(key)) for key in HEADLINE)]
        for protocol, answers in protocols.items()
        for who in answered_by(answers)
    ])  # fmt: skip


def answered_by(answers: Mapping[str, Any]) -> list[str]:
    """The model and the baselines that were scored under a protocol."""
    return [who for who, found in answers.items() if isinstance(found, dict) and "groups" in found]


def class_table(scores: Mapping[str, Any]) -> list[str]:
    """Lines of a table: sensitivity, specificity and AUROC of each class."""
    return table(["class", "n", "groups", "sensitivity", "specificity", "AUROC"], [
        [plain(name), found["n"], found["groups"],
         *(interval(found[key]) for key in ("sensitivity", "specificity", "auroc"))]
        for name, found in scores["classes"].items()
    ])  # fmt: skip


def interval(number: Mapping[str, float | None] | None) -> str:
    """A value with its interval, or a dash where it is undefined (None in JSON, else NaN)."""
    value, low, high = (_defined(number.get(key) if number else None) for key in RANGE)
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:.3f} (no interval)"
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _defined(number: float | None) -> float | None:
    return None if number is None or math.isnan(number) else number


def draw_plots(folder: Path, protocols: Sequence[Protocol], metrics: Mapping[str, Any]) -> None:
    """Write confusion matrix, ROC curves and reliability diagram of each protocol as PNG files.

    The files of the first protocol have no prefix.
    """
    from matplotlib.figure import Figure

    for number, protocol in enumerate(protocols):
        answers = metrics["protocols"][protocol.name]
        drawings: dict[str, Callable[[Axes], None]] = {
            "confusion": partial(_draw_confusion, answers=answers, protocol=protocol),
            "roc": partial(_draw_roc, protocol=protocol),
            "reliability": partial(_draw_reliability, answers=answers),
        }
        for name, draw in drawings.items():
            figure = Figure(figsize=(6, 5), layout="constrained")
            axes: Axes = figure.add_subplot()
            draw(axes)
            prefix = f"{protocol.name}-" if number else ""
            figure.savefig(folder / f"{prefix}{name}.png", dpi=120)


def _draw_confusion(axes: Axes, answers: Mapping[str, Any], protocol: Protocol) -> None:
    counts, names = np.array(answers["model"]["confusion"]), protocol.scans.names
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, str(count), ha="center", va="center")
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="actual", title=f"{protocol.name}, n = {counts.sum()}")


def _draw_roc(axes: Axes, protocol: Protocol) -> None:
    from sklearn.metrics import roc_curve

    for index, name in enumerate(protocol.scans.names):
        positive = protocol.scans.labels == index
        if positive.any() and not positive.all():
            scores = protocol.answers["model"][:, index]
            false_alarms, hits, _ = roc_curve(positive, scores)
            axes.plot(false_alarms, hits, label=f"{name} {auroc(scores, positive):.3f}")
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    title = f"{protocol.name}: one against the rest"
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=title)
    axes.legend(title="AUROC")


def _draw_reliability(axes: Axes, answers: Mapping[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    for bins, style, text in (
        (answers["before_temperature"]["reliability"], ":", "before temperature"),
        (answers["reliability"], "-", "as served"),
    ):
        confidence, right = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axes.plot(confidence, right, style, marker="o", label=text)
    for item in answers["reliability"]:
        axes.annotate(f"n={item['n']}", (item["confidence"], item["accuracy"]))
    axes.set(xlabel="mean top probability", ylabel="accuracy", title="Reliability")
    axes.legend()
