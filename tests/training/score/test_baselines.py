from __future__ import annotations

import numpy as np
import pytest

from training.data.dataset import ScanSet
from training.score.baselines import BASELINES, majority, mean_grey, nearest_neighbour

NAMES = ("a", "b", "c")


@pytest.fixture
def train() -> ScanSet:
    """Class a is dark, c is bright, b is absent; each scan has a texture of its own."""
    rng = np.random.default_rng(1)
    labels = np.array([0, 0, 0, 0, 2, 2])
    pixels = rng.integers(0, 60, (6, 224, 224, 1)) + 120 * (labels == 2)[:, None, None, None]
    paths = tuple(f"{index}.png" for index in range(6))
    return ScanSet(pixels.astype(np.uint8), labels, np.arange(6), paths, NAMES)


@pytest.mark.parametrize("name", BASELINES)
def test_probabilities_have_a_column_for_each_class_and_sum_to_one(train, name):
    found = BASELINES[name](train, train.pixels[3:])
    assert found.shape == (3, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_majority_is_that_of_the_training_scans(train):
    np.testing.assert_allclose(majority(train, train.pixels[:2]), [[4 / 6, 0, 2 / 6]] * 2)


def test_mean_grey_tells_dark_from_bright(train):
    asked = np.stack([train.pixels[0] + 10, train.pixels[5] - 10])
    assert mean_grey(train, asked).argmax(axis=1).tolist() == [0, 2]


def test_nearest_neighbour_finds_the_copy_of_a_scan(train):
    changed = train.pixels.copy()
    changed[:, :20, :20] = 0
    found = nearest_neighbour(train, changed)
    assert found.argmax(axis=1).tolist() == train.labels.tolist()
    assert (nearest_neighbour(train, train.pixels).max(axis=1) > 0.999).all()
