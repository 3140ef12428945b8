"""Classification metrics with 95 % intervals, as pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float64]  # (N, R)
Values = npt.NDArray[np.float64]  # (R,)

RESAMPLES = 1000
WEIGHTS_AT_ONCE = 1 << 18  # of scans in resamples: 2 MB, which the cache of a processor holds
SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
NORMAL = "normal"  # the class that all others are told from, where the data set has it


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) when nothing was counted."""
    from scipy.stats import binomtest

    if total == 0:
        return 0.0, 1.0
    interval = binomtest(successes, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Statistic:
    """A score of predictions, called for its value or worked out for many resamples at once.

    Attributes:
        resampled: Gives values float64 (R,) of probabilities (N, C) or scores (N,), the truth (N,)
            and weights (N, R): how often each scan is drawn in each resample. NaN where undefined.
    """

    resampled: Callable[[Floats, Any, Weights], Values]

    def __call__(self, predictions: Floats, truth: Any) -> float:
        """The value for every scan once."""
        return float(self.resampled(predictions, truth, np.ones((len(truth), 1)))[0])


@Statistic
def auroc(scores: Floats, positive: Flags, weights: Weights) -> Values:
    """Area under the ROC curve of `scores` (N,) for telling `positive` (N,); NaN for one class.

    The Mann-Whitney statistic over n+ n-: the probability that a positive scores higher than a
    negative, ties counting one half (Hanley and McNeil 1982).
    """
    if np.isnan(scores).any():
        return np.full(weights.shape[1], math.nan)
    negatives, below = _cumulated(scores[~positive], weights[~positive])
    lower, upper = (np.searchsorted(negatives, scores[positive], side) for side in SIDES)
    counted = weights[positive]
    pairs = np.einsum("nr,nr->r", counted, (below[lower] + below[upper]) / 2)
    return _ratio(pairs, counted.sum(axis=0) * below[-1])


@Statistic
def macro_auroc(probabilities: Floats, labels: Labels, weights: Weights) -> Values:
    """Unweighted mean over the present classes of one-vs-rest AUROC; NaN for one class."""
    present = np.unique(labels)
    areas = [auroc.resampled(probabilities[:, label], labels == label, weights)
             for label in present]  # fmt: skip
    return _mean_of_present(np.stack(areas), labels, weights, at_least=2)


@Statistic
def balanced_accuracy(probabilities: Floats, labels: Labels, weights: Weights) -> Values:
    """Unweighted mean over the present classes of their sensitivity."""
    right = probabilities.argmax(axis=1) == labels
    shares = [_share(right, labels == label, weights) for label in np.unique(labels)]
    return _mean_of_present(np.stack(shares), labels, weights, at_least=1)


@Statistic
def accuracy(probabilities: Floats, labels: Labels, weights: Weights) -> Values:
    """Share of scans whose most probable class is the true one."""
    return _share(probabilities.argmax(axis=1) == labels, np.ones(len(labels), bool), weights)


def sensitivity(label: int) -> Statistic:
    """Share of the scans of class `label` that are called so; NaN without such scans."""
    return Statistic(lambda p, y, weights: _share(p.argmax(axis=1) == label, y == label, weights))


def specificity(label: int) -> Statistic:
    """Share of the scans of other classes that are not called `label`; NaN without such scans."""
    return Statistic(lambda p, y, weights: _share(p.argmax(axis=1) != label, y != label, weights))


@Statistic
def brier_score(probabilities: Floats, labels: Labels, weights: Weights) -> Values:
    """Mean over scans of the squared distance to the truth, 0 to 2 (Brier 1950, equation 2)."""
    truth = np.eye(probabilities.shape[1], dtype=np.float32)[labels]
    return mean_value.resampled(((probabilities - truth) ** 2).sum(axis=1), labels, weights)


@Statistic
def mean_value(values: Floats, truth: Labels, weights: Weights) -> Values:
    """Mean of `values` (N,); `truth` is not looked at."""
    return _ratio(values @ weights, weights.sum(axis=0))


@Statistic
def calibration_error(probabilities: Floats, labels: Labels, weights: Weights) -> Values:
    """Expected calibration error of the top probability, 0 to 1.

    Mean over the bins of `reliability`, weighted by their scans, of the distance between
    confidence and accuracy (Guo et al. 2017, equation 3).
    """
    top, bins = _binned(probabilities)
    excess = top.astype(np.float64) - (probabilities.argmax(axis=1) == labels)
    of_bins = (bins == np.unique(bins)[:, np.newaxis]) * excess
    return _ratio(np.abs(of_bins @ weights).sum(axis=0), weights.sum(axis=0))


def sensitivity_at(specificity: float) -> Statistic:
    """Share of positives above the lowest threshold that clears `specificity` of the others.

    Args:
        specificity: Above 0, at most 1.

    Returns:
        A statistic of scores (N,), higher for positives, and which are positive, bool (N,). NaN
        where either side is empty.
    """

    def resampled(scores: Floats, positive: Flags, weights: Weights) -> Values:
        negatives, below = _cumulated(scores[~positive], weights[~positive])
        positives, lower = _cumulated(scores[positive], weights[positive])
        if not len(negatives):
            return np.full(weights.shape[1], math.nan)
        cleared = np.ceil(specificity * below[-1])
        thresholds = negatives[(below[1:] < cleared).sum(axis=0)]
        place = np.searchsorted(positives, thresholds, "right")
        found = _ratio(lower[-1] - lower[place, np.arange(weights.shape[1])], lower[-1])
        return np.where(below[-1] > 0, found, math.nan)

    return Statistic(resampled)


def paired_difference(statistic: Statistic, num_classes: int) -> Statistic:
    """`statistic` of the last C columns less that of the first C, of probabilities (N, 2C).

    Both are scored on the same resamples (Efron and Tibshirani 1993, section 8.3, with the
    difference as the statistic).
    """
    return Statistic(
        lambda pairs, labels, weights: (
            statistic.resampled(pairs[:, num_classes:], labels, weights)
            - statistic.resampled(pairs[:, :num_classes], labels, weights)
        )
    )


def class_auroc(label: int) -> Statistic:
    """AUROC of the probability of class `label` for telling it from the others."""
    return Statistic(lambda p, y, weights: auroc.resampled(p[:, label], y == label, weights))


def normal_statistics(normal: int) -> dict[str, Statistic]:
    """How well class `normal` is told from all others by its probability."""
    at_95 = sensitivity_at(0.95)
    return {
        "normal_against_rest_auroc": class_auroc(normal),
        "sensitivity_at_95_specificity": Statistic(
            lambda p, y, weights: at_95.resampled(-p[:, normal], y != normal, weights)
        ),
        # The same with the sides exchanged: how many normals are cleared.
        "specificity_at_95_sensitivity": Statistic(
            lambda p, y, weights: at_95.resampled(p[:, normal], y == normal, weights)
        ),
    }


def _cumulated(scores: Floats, weights: Weights) -> tuple[Floats, Weights]:
    """Sorted scores (n,) and, (n + 1, R), the weight of the first 0 to n of them."""
    order = np.argsort(scores)
    total = np.zeros((len(scores) + 1, weights.shape[1]))
    np.cumsum(weights[order], axis=0, out=total[1:])
    return scores[order], total


def _share(hits: Flags, among: Flags, weights: Weights) -> Values:
    return _ratio((hits & among) @ weights, among @ weights)


def _ratio(numerator: Values, denominator: Values) -> Values:
    """NaN where the denominator, and with it the numerator, is 0."""
    with np.errstate(invalid="ignore"):
        return numerator / denominator


def _mean_of_present(values: Values, labels: Labels, weights: Weights, *, at_least: int) -> Values:
    """Mean over classes of `values` (C, R), those left out that a resample (N, R) lacks."""
    classes = np.unique(labels)[:, np.newaxis]
    present = (labels == classes) @ weights > 0
    count = present.sum(axis=0)
    total = np.where(present, values, 0).sum(axis=0)
    return np.where(count >= at_least, total / np.maximum(count, 1), math.nan)


def bootstrap_intervals(
    statistics: Mapping[str, Statistic],
    predictions: Floats,
    truth: Any,
    groups: Labels,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of `statistics` over 1000 resamples of whole groups.

    Near-duplicates are not independent, so groups are drawn with replacement, not scans.
    Resamples in which a statistic is undefined are left out; (NaN, NaN) if all are.
    """
    rng = np.random.default_rng(seed)
    group_of = np.unique(groups, return_inverse=True)[1]
    num_groups = int(group_of.max()) + 1
    at_once = max(1, WEIGHTS_AT_ONCE // len(groups))
    parts: dict[str, list[Values]] = {name: [] for name in statistics}
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        chosen = rng.integers(num_groups, size=(size, num_groups))
        cells = chosen + num_groups * np.arange(size)[:, np.newaxis]
        counts = np.bincount(cells.ravel(), minlength=size * num_groups)
        weights = counts.reshape(size, num_groups).T.astype(np.float64)[group_of]
        for name, statistic in statistics.items():
            parts[name].append(statistic.resampled(predictions, truth, weights))
    return {name: _percentiles(np.concatenate(values)) for name, values in parts.items()}


def _percentiles(values: Values) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [0.025, 0.975]).tolist()
    return low, high


def bootstrap_interval(
    statistic: Statistic, predictions: Floats, truth: Any, groups: Labels, seed: int = 0
) -> tuple[float, float]:
    """The interval of one statistic, see `bootstrap_intervals`."""
    one = {"statistic": statistic}
    return bootstrap_intervals(one, predictions, truth, groups, seed)["statistic"]


def with_intervals(
    statistics: Mapping[str, Statistic], values: Floats, truth: Any, groups: Labels
) -> dict[str, dict[str, float]]:
    """{value, low, high} of each statistic, see `bootstrap_intervals`."""
    intervals = bootstrap_intervals(statistics, values, truth, groups)
    return {
        key: {"value": statistic(values, truth), "low": low, "high": high}
        for (key, statistic), (low, high) in zip(
            statistics.items(), intervals.values(), strict=True
        )
    }


def mean_with_interval(values: Floats, groups: Labels) -> dict[str, float]:
    """Mean of (N,) with its interval over groups; NaN where fewer than two groups leave none."""
    if len(np.unique(groups)) < 2:
        value = float(values.mean()) if len(values) else math.nan
        return {"value": value, "low": math.nan, "high": math.nan}
    return with_intervals({"mean": mean_value}, values, groups, groups)["mean"]


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
    top, bins = _binned(probabilities, num_bins)
    right = probabilities.argmax(axis=1) == labels
    return [
        {
            "confidence": float(top[bins == index].mean()),
            "accuracy": float(right[bins == index].mean()),
            "n": int((bins == index).sum()),
        }
        for index in np.unique(bins)
    ]


def _binned(probabilities: Floats, num_bins: int = 10) -> tuple[Floats, Labels]:
    """The top probability of each scan (N,) and its bin (N,)."""
    top = probabilities.max(axis=1)
    return top, np.minimum((top * num_bins).astype(np.int64), num_bins - 1)


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
        statistics |= normal_statistics(names.index(NORMAL))
    for index, name in enumerate(names):
        statistics[f"sensitivity of {name}"] = sensitivity(index)
        statistics[f"specificity of {name}"] = specificity(index)
        statistics[f"auroc of {name}"] = class_auroc(index)
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
