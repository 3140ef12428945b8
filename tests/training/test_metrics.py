from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from training.metrics import (
    auroc,
    balanced_accuracy,
    bootstrap_interval,
    brier_score,
    calibration_error,
    confusion,
    macro_auroc,
    reliability,
    score,
    sensitivity_at,
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
    assert sensitivity_at(scores, positive, 1.0) == pytest.approx(1 / 3)  # above 0.9
    assert sensitivity_at(scores, positive, 0.75) == pytest.approx(2 / 3)  # above 0.3
    assert sensitivity_at(scores, positive, 0.5) == 1  # above 0.2
    assert math.isnan(sensitivity_at(scores, np.ones(7, bool), 0.95))


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
