"""Scores of a classifier with their intervals, as pure functions of probabilities and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
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


def accuracy(probabilities: Floats, labels: Labels) -> float:
    """Share of scans whose most probable class is the true one."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def sensitivity(probabilities: Floats, labels: Labels, label: int) -> float:
    """Share of the scans of class `label` that are called so; NaN without such scans."""
    called = probabilities.argmax(axis=1) == label
    return float(called[labels == label].mean()) if (labels == label).any() else math.nan


def specificity(probabilities: Floats, labels: Labels, label: int) -> float:
    """Share of the scans of other classes that are not called `label`; NaN without such scans."""
    called = probabilities.argmax(axis=1) == label
    return float(1 - called[labels != label].mean()) if (labels != label).any() else math.nan


def brier_score(probabilities: Floats, labels: Labels) -> float:
    """Mean over scans of the squared distance to the truth, 0 to 2 (Brier 1950, equation 2)."""
    truth = np.eye(probabilities.shape[1], dtype=np.float32)[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """Expected calibration error of the top probability, 0 to 1.

    Mean over the bins of `reliability`, weighted by their scans, of the distance between
    confidence and accuracy (Guo et al. 2017, equation 3).
    """
    bins = reliability(probabilities, labels)
    return sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(labels)


def sensitivity_at(scores: Floats, positive: npt.NDArray[np.bool_], specificity: float) -> float:
    """Share of `positive` above the lowest threshold that clears `specificity` of the others.

    Args:
        scores: float (N,), higher for positives.
        positive: bool (N,).
        specificity: 0 to 1.

    Returns:
        0 to 1; NaN where either side is empty.
    """
    if positive.all() or not positive.any():
        return math.nan
    negatives = np.sort(scores[~positive])
    cleared = math.ceil(specificity * len(negatives))
    return float((scores[positive] > negatives[cleared - 1]).mean())


Statistic = Callable[[Floats, Labels], float]


def bootstrap_intervals(
    statistics: Mapping[str, Statistic],
    probabilities: Floats,
    labels: Labels,
    groups: Labels,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of `statistics` over 1000 resamples of whole groups.

    Near-duplicates are not independent, so groups are drawn with replacement, not scans.
    Resamples in which a statistic is undefined are left out; (NaN, NaN) if all are.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    values: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(members), size=len(members))
        indices = np.concatenate([members[index] for index in chosen])
        drawn, true = probabilities[indices], labels[indices]
        for name, statistic in statistics.items():
            value = statistic(drawn, true)
            if not math.isnan(value):
                values[name].append(value)
    return {
        name: tuple(np.quantile(found, [0.025, 0.975]).tolist()) if found else (math.nan, math.nan)
        for name, found in values.items()
    }


def bootstrap_interval(
    statistic: Statistic, probabilities: Floats, labels: Labels, groups: Labels, seed: int = 0
) -> tuple[float, float]:
    """The interval of one statistic, see `bootstrap_intervals`."""
    one = {"statistic": statistic}
    return bootstrap_intervals(one, probabilities, labels, groups, seed)["statistic"]


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
    """All scores of one set of predictions, each with its 95 % interval.

    Intervals are percentiles of a bootstrap by group. Where all scans of a class are right or
    all are wrong, resampling sees no doubt; the interval of that proportion is Wilson's then, with
    the number of groups for n, since scans of one group are not independent.

    Args:
        probabilities: float (N, C), rows sum to 1.
        labels: int (N,), true class.
        groups: int (N,), scans of one group are resampled together.
        names: C class names.

    Returns:
        Plain values ready for JSON: `n`, `groups`, `confusion`; `accuracy`, `balanced_accuracy`,
        `macro_auroc`, `brier`, `calibration_error`, each {value, low, high}; where a class is
        called normal also `normal_against_rest_auroc`, `sensitivity_at_95_specificity` and
        `specificity_at_95_sensitivity` of telling all else from it by 1 - P(normal); `classes`,
        for each name {n, groups, sensitivity, specificity, auroc}.
    """
    statistics: dict[str, Statistic] = {
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
        "macro_auroc": macro_auroc,
        "brier": brier_score,
        "calibration_error": calibration_error,
    }
    if NORMAL in names:
        normal = names.index(NORMAL)
        statistics["normal_against_rest_auroc"] = lambda p, y: auroc(p[:, normal], y == normal)
        statistics["sensitivity_at_95_specificity"] = lambda p, y: sensitivity_at(
            -p[:, normal], y != normal, 0.95
        )
        # The same with the sides exchanged: how many normals are cleared.
        statistics["specificity_at_95_sensitivity"] = lambda p, y: sensitivity_at(
            p[:, normal], y == normal, 0.95
        )
    for index, name in enumerate(names):
        statistics[f"sensitivity of {name}"] = partial(sensitivity, label=index)
        statistics[f"specificity of {name}"] = partial(specificity, label=index)
        statistics[f"auroc of {name}"] = lambda p, y, index=index: auroc(p[:, index], y == index)  # type: ignore[misc]
    intervals = bootstrap_intervals(statistics, probabilities, labels, groups)

    def measured(key: str, counted: npt.NDArray[np.bool_] | None = None) -> dict[str, float]:
        value, (low, high) = statistics[key](probabilities, labels), intervals[key]
        if counted is not None and value in (0, 1) and counted.any():
            num_groups = len(np.unique(groups[counted]))
            low, high = wilson_interval(round(value * num_groups), num_groups)
        return {"value": value, "low": low, "high": high}

    everywhere = np.ones(len(labels), bool)
    scores: dict[str, Any] = {
        "n": len(labels),
        "groups": len(np.unique(groups)),
        "accuracy": measured("accuracy", everywhere),
    }
    scores |= {key: measured(key) for key in statistics if " of " not in key and key != "accuracy"}
    scores["classes"] = {
        name: {
            "n": int((labels == index).sum()),
            "groups": len(np.unique(groups[labels == index])),
            "sensitivity": measured(f"sensitivity of {name}", labels == index),
            "specificity": measured(f"specificity of {name}", labels != index),
            "auroc": measured(f"auroc of {name}"),
        }
        for index, name in enumerate(names)
    }
    return scores | {"confusion": confusion(probabilities, labels).tolist()}
