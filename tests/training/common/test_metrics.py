from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

import training.common.metrics
from training.common.metrics import (
    Statistic,
    accuracy,
    auroc,
    balanced_accuracy,
    bootstrap_interval,
    bootstrap_intervals,
    brier_score,
    calibration_error,
    class_auroc,
    confusion,
    macro_auroc,
    mean_value,
    paired_difference,
    reliability,
    score,
    sensitivity,
    sensitivity_at,
    specificity,
    wilson_interval,
)

NAMES = ("a", "normal", "c")


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, 90)
    raw = rng.random((90, 3)) + np.eye(3)[labels] * 0.5
    return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32), labels


def test_wilson_interval_of_eight_of_eight():
    # z^2 = 3.8415; (1 + z^2/16 - z * sqrt(z^2 / 256)) / (1 + z^2/8) = 1 / 1.48018 = 0.6756
    low, high = wilson_interval(8, 8)
    assert low == pytest.approx(0.6756, abs=1e-4)
    assert high == 1.0


def test_wilson_interval_of_nothing_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_auroc_by_hand_with_a_tie():
    # Pairs (positive, negative): .9>.4, .9>.5, .5>.4, .5=.5 -> (3 + 0.5) / 4
    scores = np.array([0.9, 0.5, 0.4, 0.5])
    assert auroc(scores, np.array([True, True, False, False])) == 0.875


def test_auroc_of_one_class_is_undefined():
    assert math.isnan(auroc(np.array([0.1, 0.2]), np.array([True, True])))


def test_scores_agree_with_scikit_learn(predictions):
    probabilities, labels = predictions
    assert macro_auroc(probabilities, labels) == pytest.approx(
        roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    )
    assert balanced_accuracy(probabilities, labels) == pytest.approx(
        balanced_accuracy_score(labels, probabilities.argmax(axis=1))
    )


def test_confusion_has_true_classes_in_rows():
    probabilities = np.eye(3, dtype=np.float32)[[0, 2, 2, 1]]
    expected = [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    np.testing.assert_array_equal(confusion(probabilities, np.array([0, 0, 2, 1])), expected)


def test_interval_is_wider_when_scans_come_in_groups(predictions):
    probabilities, labels = predictions
    probabilities, labels = np.repeat(probabilities, 4, 0), np.repeat(labels, 4)
    alone = bootstrap_interval(macro_auroc, probabilities, labels, np.arange(360))
    grouped = bootstrap_interval(macro_auroc, probabilities, labels, np.repeat(np.arange(90), 4))
    assert grouped[1] - grouped[0] > 1.5 * (alone[1] - alone[0])


def test_interval_holds_the_value_and_is_repeatable(predictions):
    probabilities, labels = predictions
    first = bootstrap_interval(macro_auroc, probabilities, labels, np.arange(90))
    assert first == bootstrap_interval(macro_auroc, probabilities, labels, np.arange(90))
    assert first[0] < macro_auroc(probabilities, labels) < first[1]


def test_specificity_and_sensitivity_by_hand():
    probabilities = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 1, 2]]
    labels = np.array([0, 1, 1, 1, 2, 2])
    found = score(probabilities, labels, np.arange(6), NAMES)
    assert found["classes"]["normal"]["sensitivity"]["value"] == pytest.approx(2 / 3)
    assert found["classes"]["normal"]["specificity"]["value"] == pytest.approx(2 / 3)
    specificity = found["classes"]["a"]["specificity"]
    assert specificity["value"] == pytest.approx(4 / 5)
    assert specificity["low"] < 4 / 5 < specificity["high"]
    assert found["accuracy"]["value"] == pytest.approx(4 / 6)
    assert found["n"] == 6


def test_interval_of_a_proportion_without_an_error_counts_groups_not_scans():
    """12 right scans of class 1 in 3 groups: Wilson of 3 of 3, not of 12 of 12, nor (1, 1)."""
    probabilities = np.eye(3, dtype=np.float32)[[1] * 12 + [0]]
    labels = np.array([1] * 12 + [0])
    found = score(probabilities, labels, np.array([0, 1, 2] * 4 + [3]), NAMES)
    low, high = wilson_interval(3, 3)
    assert found["classes"]["normal"]["sensitivity"] == {"value": 1, "low": low, "high": high}


def test_brier_and_calibration_error_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.92, 0.08], [0.35, 0.65]], np.float32)
    labels = np.array([0, 1, 1])
    # (0.05^2 + 0.05^2 + 0.92^2 + 0.92^2 + 0.35^2 + 0.35^2) / 3
    assert brier_score(probabilities, labels) == pytest.approx(1.9428 / 3, abs=1e-4)
    # Bin 0.6 to 0.7: |0.65 - 1|, one scan; bin 0.9 to 1: |0.935 - 0.5|, two scans.
    assert calibration_error(probabilities, labels) == pytest.approx((0.35 + 2 * 0.435) / 3)


def test_sensitivity_at_a_specificity_by_hand():
    scores = np.array([0.1, 0.2, 0.3, 0.9, 0.25, 0.35, 0.95])
    positive = np.array([False] * 4 + [True] * 3)
    assert sensitivity_at(1.0)(scores, positive) == pytest.approx(1 / 3)  # above 0.9
    assert sensitivity_at(0.75)(scores, positive) == pytest.approx(2 / 3)  # above 0.3
    assert sensitivity_at(0.5)(scores, positive) == 1  # above 0.2
    assert math.isnan(sensitivity_at(0.95)(scores, np.ones(7, bool)))
    assert math.isnan(sensitivity_at(0.95)(scores, np.zeros(7, bool)))


# What each statistic is, written down for one resample with all its scans one after the other.


def area_by_pairs(scores: np.ndarray, positive: np.ndarray) -> float:
    if positive.all() or not positive.any():
        return math.nan
    pairs = scores[positive][:, np.newaxis] - scores[~positive]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def plain_macro_auroc(p: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([area_by_pairs(p[:, c], y == c) for c in np.unique(y)]))


def plain_balanced_accuracy(p: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([(p.argmax(1) == y)[y == c].mean() for c in np.unique(y)]))


def plain_sensitivity(p: np.ndarray, y: np.ndarray) -> float:
    return float((p.argmax(1) == 2)[y == 2].mean()) if (y == 2).any() else math.nan


def plain_specificity(p: np.ndarray, y: np.ndarray) -> float:
    return float((p.argmax(1) != 2)[y != 2].mean()) if (y != 2).any() else math.nan


def plain_sensitivity_at(p: np.ndarray, y: np.ndarray) -> float:
    if (y == 1).all() or not (y == 1).any():
        return math.nan
    others = sorted(p[y != 1, 1])
    threshold = others[math.ceil(0.95 * len(others)) - 1]
    return float((p[y == 1, 1] > threshold).mean())


def plain_calibration_error(p: np.ndarray, y: np.ndarray) -> float:
    top, right = p.max(1), p.argmax(1) == y
    bins = np.minimum((top * 10).astype(int), 9)
    gaps = [abs((top - right)[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


RESAMPLED = {
    "accuracy": (accuracy, lambda p, y: float((p.argmax(1) == y).mean())),
    "balanced accuracy": (balanced_accuracy, plain_balanced_accuracy),
    "macro AUROC": (macro_auroc, plain_macro_auroc),
    "AUROC": (class_auroc(2), lambda p, y: area_by_pairs(p[:, 2], y == 2)),
    "sensitivity": (sensitivity(2), plain_sensitivity),
    "specificity": (specificity(2), plain_specificity),
    "sensitivity at": (
        Statistic(lambda p, y, w: sensitivity_at(0.95).resampled(p[:, 1], y == 1, w)),
        plain_sensitivity_at,
    ),
    "Brier": (brier_score, lambda p, y: float(((p - np.eye(3)[y]) ** 2).sum(1).mean())),
    "calibration error": (calibration_error, plain_calibration_error),
    "mean": (
        Statistic(lambda p, y, w: mean_value.resampled(p[:, 0], y, w)),
        lambda p, y: float(p[:, 0].mean()),
    ),
    "difference": (
        Statistic(
            lambda p, y, w: paired_difference(balanced_accuracy, 3).resampled(
                np.hstack([p, p[::-1]]), y, w
            )
        ),
        None,  # its pairs are of all scans, so it is written down below
    ),
}


@pytest.mark.parametrize("num_scans", [9, 90])
@pytest.mark.parametrize("weights_at_once", [1, 200, 1 << 18])
def test_all_resamples_at_once_are_the_resamples_one_by_one(
    monkeypatch, num_scans, weights_at_once
):
    """Groups of several sizes, tied scores, and classes that some resamples lack."""
    monkeypatch.setattr(training.common.metrics, "WEIGHTS_AT_ONCE", weights_at_once)
    monkeypatch.setattr(training.common.metrics, "RESAMPLES", 80)
    rng = np.random.default_rng(num_scans)
    labels = rng.integers(0, 2, num_scans)
    labels[2] = 2
    raw = rng.random((num_scans, 3)) + 0.4 * np.eye(3)[labels]
    probabilities = np.round(raw / raw.sum(axis=1, keepdims=True), 1).astype(np.float32)
    groups = 7 * rng.integers(0, num_scans // 2, num_scans)
    found = bootstrap_intervals(
        {name: statistic for name, (statistic, _) in RESAMPLED.items()},
        probabilities, labels, groups, seed=3,
    )  # fmt: skip

    draw = np.random.default_rng(3)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    values = {name: [] for name in RESAMPLED}
    for _ in range(80):
        chosen = draw.integers(len(members), size=len(members))
        scans = np.concatenate([members[index] for index in chosen])
        p, other, y = probabilities[scans], probabilities[::-1][scans], labels[scans]
        for name, (_, plain) in RESAMPLED.items():
            if plain is None:
                value = plain_balanced_accuracy(other, y) - plain_balanced_accuracy(p, y)
            else:
                value = plain(p, y)
            if not math.isnan(value):
                values[name].append(value)
    assert 0 < len(values["sensitivity"]) < 80  # some resamples lack the class
    for name, one_by_one in values.items():
        wanted = np.quantile(one_by_one, [0.025, 0.975])
        np.testing.assert_allclose(found[name], wanted, atol=1e-6, err_msg=name)


def test_what_no_resample_defines_has_no_interval():
    probabilities, labels = np.full((4, 3), 1 / 3, np.float32), np.zeros(4, int)
    found = bootstrap_interval(macro_auroc, probabilities, labels, np.arange(4))
    assert all(math.isnan(end) for end in found)
    scores = np.array([0.1, math.nan, 0.3, 0.4])
    assert math.isnan(auroc(scores, np.array([True, False, True, False])))


def test_normal_against_rest_needs_a_class_of_that_name(predictions):
    probabilities, labels = predictions
    groups = np.arange(90)
    assert "normal_against_rest_auroc" in score(probabilities, labels, groups, NAMES)
    assert "normal_against_rest_auroc" not in score(probabilities, labels, groups, ("a", "b", "c"))


def test_reliability_bins_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.92, 0.08], [0.35, 0.65]], np.float32)
    bins = reliability(probabilities, np.array([0, 1, 1]))
    assert [item["n"] for item in bins] == [1, 2]
    assert bins[0]["accuracy"] == 1
    assert bins[1]["accuracy"] == 0.5
    assert bins[1]["confidence"] == pytest.approx(0.935)
