"""Scores of a classifier with their intervals, as pure functions of probabilities and labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 1000
NORMAL = "normal"  # the class that all others are told from, where the data set has it


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    denominator = 1 + Z_95**2 / total
    center = share + Z_95**2 / (2 * total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    return max(0.0, (center - half) / denominator), min(1.0, (center + half) / denominator)


def auroc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve of `scores` (N,) for telling `positive` (N,); NaN for one class.

    The Mann-Whitney statistic over n+ n-: the probability that a positive scores higher than a
    negative, ties counting one half (Hanley and McNeil 1982).
    """
    from scipy.stats import rankdata

    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return math.nan
    ranks = float(rankdata(scores)[positive].sum())
    return (ranks - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def macro_auroc(probabilities: Floats, labels: Labels) -> float:
    """Unweighted mean over the present classes of one-vs-rest AUROC."""
    present = np.unique(labels)
    areas = [auroc(probabilities[:, label], labels == label) for label in present]
    return float(np.mean(areas)) if len(present) > 1 else math.nan


def balanced_accuracy(probabilities: Floats, labels: Labels) -> float:
    """Unweighted mean over the present classes of their sensitivity."""
    right = probabilities.argmax(axis=1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def bootstrap_interval(
    statistic: Callable[[Floats, Labels], float],
    probabilities: Floats,
    labels: Labels,
    groups: Labels,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of `statistic` over 1000 resamples of whole groups.

    Near-duplicates are not independent, so groups are drawn with replacement, not scans.
    Resamples in which the statistic is undefined are left out; (NaN, NaN) if all are.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    values = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(members), size=len(members))
        indices = np.concatenate([members[index] for index in chosen])
        value = statistic(probabilities[indices], labels[indices])
        if not math.isnan(value):
            values.append(value)
    if not values:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def confusion(probabilities: Floats, labels: Labels) -> npt.NDArray[np.int64]:
    """Counts int64 (C, C), rows = true class, columns = predicted class."""
    num_classes = probabilities.shape[1]
    flat = labels * num_classes + probabilities.argmax(axis=1)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def reliability(
    probabilities: Floats, labels: Labels, num_bins: int = 10
) -> list[dict[str, float]]:
    """For each bin of the top probability: its mean, the accuracy and n; empty bins left out.

    Equal-width bins as in Guo et al. 2017, section 2.
    """
    top = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((top * num_bins).astype(int), num_bins - 1)
    return [
        {
            "confidence": float(top[bins == index].mean()),
            "accuracy": float(right[bins == index].mean()),
            "n": int((bins == index).sum()),
        }
        for index in np.unique(bins)
    ]


def score(
    probabilities: Floats, labels: Labels, groups: Labels, names: tuple[str, ...]
) -> dict[str, Any]:
    """All scores of one set of predictions, each as value and 95 % interval, with n.

    Args:
        probabilities: float (N, C), rows sum to 1.
        labels: int (N,), true class.
        groups: int (N,), scans of one group are resampled together.
        names: C class names.

    Returns:
        Plain values ready for JSON: `n`, `groups`, `accuracy` (Wilson), `balanced_accuracy` and
        `macro_auroc` (bootstrap by group), `normal_against_rest_auroc` where a class is called
        normal, `classes` (n, sensitivity, specificity with Wilson intervals, AUROC), `confusion`.
    """
    table = confusion(probabilities, labels)
    total = int(table.sum())

    def interval(statistic: Callable[[Floats, Labels], float]) -> dict[str, float]:
        low, high = bootstrap_interval(statistic, probabilities, labels, groups)
        return {"value": statistic(probabilities, labels), "low": low, "high": high}

    def proportion(successes: int, count: int) -> dict[str, float]:
        low, high = wilson_interval(successes, count)
        value = successes / count if count else math.nan
        return {"value": value, "low": low, "high": high, "n": count}

    classes = {}
    for index, name in enumerate(names):
        positives = int(table[index].sum())
        false_alarms = int(table[:, index].sum() - table[index, index])
        negatives = total - positives
        classes[name] = {
            "sensitivity": proportion(int(table[index, index]), positives),
            "specificity": proportion(negatives - false_alarms, negatives),
            "auroc": auroc(probabilities[:, index], labels == index),
        }
    scores: dict[str, Any] = {
        "n": total,
        "groups": len(np.unique(groups)),
        "accuracy": proportion(int(np.trace(table)), total),
        "balanced_accuracy": interval(balanced_accuracy),
        "macro_auroc": interval(macro_auroc),
    }
    if NORMAL in names and len(names) > 2:
        normal = names.index(NORMAL)
        scores["normal_against_rest_auroc"] = interval(
            lambda p, y: auroc(p[:, normal], y == normal)
        )
    return scores | {"classes": classes, "confusion": table.tolist()}
