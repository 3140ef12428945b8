from __future__ import annotations

import numpy as np

from training.network.augment import Augmentation, augment

NOTHING = Augmentation(0, 0, 0, 0, 0, mirror=0)


def textured_scan() -> np.ndarray:
    rng = np.random.default_rng(2)
    ramp = np.linspace(20, 180, 64)[:, np.newaxis] + np.linspace(0, 40, 64)
    return (ramp + rng.integers(0, 20, (64, 64))).astype(np.uint8)[..., np.newaxis]


def test_no_limits_no_change():
    scan = textured_scan()
    np.testing.assert_array_equal(augment(scan, NOTHING, np.random.default_rng(1)), scan)


def test_same_seed_same_variant_and_another_seed_another():
    scan = textured_scan()
    one, same, other = (augment(scan, Augmentation(), np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.5
    assert one.shape == scan.shape
    assert one.dtype == np.uint8


def test_brightness_moves_the_mean_within_its_limit():
    scan = textured_scan()
    limits = Augmentation(0, 0, 0, 0, brightness=0.1, mirror=0)
    means = [
        augment(scan, limits, np.random.default_rng(seed)).mean() - scan.mean()
        for seed in range(40)
    ]
    assert max(np.abs(means)) <= 25.5 + 0.5
    assert min(means) < -10 < 10 < max(means)


def test_shift_moves_the_picture_by_at_most_its_limit():
    dot = np.zeros((64, 64, 1), np.uint8)
    dot[30:34, 30:34] = 200
    places = []
    for seed in range(40):
        moved = augment(dot, Augmentation(0, 0.1, 0, 0, 0, mirror=0), np.random.default_rng(seed))[
            ..., 0
        ]
        weights = moved.astype(float)
        places.append((weights.sum(1) @ np.arange(64), weights.sum(0) @ np.arange(64)))
        places[-1] = tuple(np.array(places[-1]) / weights.sum() - 31.5)
    assert np.abs(places).max() <= 6.4 + 0.5
    assert np.abs(places).max() > 4
    assert np.abs(np.mean(places, axis=0)).max() < 2


def test_rotation_keeps_the_centre_and_turns_the_rest():
    line = np.zeros((65, 65, 1), np.uint8)
    line[31:34] = 200
    turned = augment(line, Augmentation(20, 0, 0, 0, 0, mirror=0), np.random.default_rng(3))[..., 0]
    assert turned[32, 32] > 150
    left = turned[:, 2].astype(float) @ np.arange(65) / turned[:, 2].sum()
    right = turned[:, 62].astype(float) @ np.arange(65) / turned[:, 62].sum()
    assert abs(left - right) > 2
    assert abs((left + right) / 2 - 32) < 0.5


def test_mirror_turns_left_into_right_as_often_as_asked():
    scan = textured_scan()
    limits = Augmentation(0, 0, 0, 0, 0, mirror=0.25)
    seen = [augment(scan, limits, np.random.default_rng(seed)) for seed in range(200)]
    mirrored = sum(np.array_equal(one, scan[:, ::-1]) for one in seen)
    assert mirrored + sum(np.array_equal(one, scan) for one in seen) == 200
    assert 30 < mirrored < 70
