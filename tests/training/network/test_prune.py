from __future__ import annotations

import keras
import numpy as np
import pytest

from training.network.prune import chosen_channels, grey_kernel, pruned
from training.network.vgg16 import (
    VGG_MEAN_BGR,
    build_classifier,
    convolution_names,
    map_from,
    widths_of,
)

pytestmark = pytest.mark.xdist_group("prune")  # its fixtures are made once

WIDE = (8, 8, 12, 12, 16, 16, 16, 20, 20, 20, 24, 24, 24)
HALF = tuple(width // 2 for width in WIDE)


@pytest.fixture(scope="module")
def wide() -> keras.Model:
    """Random kernels that stand in pairs: every other channel repeats its neighbour."""
    keras.utils.set_random_seed(3)
    model = build_classifier(3, widths=WIDE)
    rng = np.random.default_rng(3)
    for name in convolution_names():
        kernel, bias = model.get_layer(name).get_weights()
        kernel[..., 1::2] = kernel[..., ::2]
        model.get_layer(name).set_weights([kernel, bias])
    kernel, _ = model.get_layer("activation_map").get_weights()
    model.get_layer("activation_map").set_weights(
        [rng.normal(0, 1, kernel.shape).astype(np.float32), np.array([0.5, -1, 2], np.float32)]
    )
    return model


def textured(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (count, 14, 14, 1)).repeat(16, axis=1).repeat(16, axis=2)
    return (coarse + rng.integers(0, 55, (count, 224, 224, 1))).astype(np.uint8)


def test_channels_that_only_repeat_others_go_without_loss(wide):
    narrow = pruned(wide, HALF, textured(16, seed=1))
    assert widths_of(narrow) == HALF
    scans = textured(4, seed=2)
    wanted, got = (map_from(model, 1).predict_on_batch(scans) for model in (wide, narrow))
    assert np.abs(wanted - got).max() < 0.02 * np.ptp(wanted)


def test_what_is_removed_is_gone(wide):
    narrow = pruned(wide, HALF, textured(2, seed=1), places=16)
    kernels = {name: narrow.get_layer(name).get_weights()[0].shape for name in convolution_names()}
    assert kernels["block1_conv1"] == (3, 3, 1, 4)
    assert kernels["block3_conv2"] == (3, 3, 8, 8)
    assert kernels["block5_conv3"] == (3, 3, 12, 12)
    assert narrow.get_layer("activation_map").get_weights()[0].shape == (1, 1, 12, 3)


def test_refitting_is_better_than_cutting_alone(wide):
    """With a quarter of the channels something is lost, and least squares gives part of it back."""
    quarter = tuple(width // 4 for width in WIDE)
    scans = textured(16, seed=1)
    wanted = map_from(wide, 1).predict_on_batch(scans)

    def error(ridge: float) -> float:
        narrow = pruned(wide, quarter, scans, ridge=ridge)
        return float(np.square(map_from(narrow, 1).predict_on_batch(scans) - wanted).mean())

    assert error(1e-3) < 0.7 * error(1e9)  # an infinite ridge keeps the kernels as they were


def test_layers_are_fitted_to_what_the_narrow_network_feeds_them(wide):
    """Then no other head makes better maps of its features; of the wide ones, another would."""
    scans = textured(16, seed=1)
    narrow = pruned(wide, tuple(width // 4 for width in WIDE), scans)
    wanted, got = (map_from(model, 1).predict_on_batch(scans) for model in (wide, narrow))
    layer = keras.Model(narrow.input, narrow.get_layer("block5_conv3").output)
    features = layer.predict_on_batch(scans).reshape(-1, WIDE[-1] // 4)
    inputs = np.hstack([features, np.ones((len(features), 1))])
    wanted, got = (maps.reshape(-1, 3) for maps in (wanted, got))
    best = inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    assert np.square(got - wanted).mean() < 1.04 * np.square(best - wanted).mean()


def test_one_grey_channel_gives_the_first_layer_what_three_gave():
    model = build_classifier(3)
    kernel, bias = model.get_layer("block1_conv1").get_weights()
    bias = np.linspace(-1, 1, len(bias), dtype=np.float32)
    model.get_layer("block1_conv1").set_weights([kernel, bias])
    scans = textured(1, seed=4).astype(np.float32)
    three = np.repeat(scans, 3, axis=-1) - np.array(VGG_MEAN_BGR, np.float32)
    wanted = keras.ops.conv(three, kernel, padding="valid") + bias
    grey, offset = grey_kernel(model)
    got = keras.ops.conv(scans - 128, grey, padding="valid") + offset
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=1e-3)


def test_a_network_cannot_grow(wide):
    with pytest.raises(ValueError, match="at most"):
        pruned(wide, (9, *WIDE[1:]), textured(1, seed=1))


def test_a_repeated_channel_is_chosen_last():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(4, 10, 10, 5)).astype(np.float32)
    maps[..., 3] = maps[..., 1] + 0.01 * maps[..., 3]  # strong, but 1 says it already
    kernel = np.ones((3, 3, 5, 2), np.float32)
    kernel[:, :, 1] *= 3
    kernel[:, :, 3] *= 3
    kernel[:, :, 4] *= 0.001  # hardly read at all
    kept = chosen_channels(maps, kernel, 3, np.random.default_rng(0)).tolist()
    assert {0, 2} < set(kept)
    assert len({1, 3} & set(kept)) == 1


def test_a_constant_counts_for_nothing():
    maps = np.random.default_rng(0).normal(size=(4, 10, 10, 2)).astype(np.float32)
    maps[..., 0] = 1000
    assert chosen_channels(maps, np.ones((1, 1, 2, 2)), 1, np.random.default_rng(0)).tolist() == [1]
