from __future__ import annotations

import keras
import numpy as np
import pytest

from training.network.activation_cache import CHUNK, augmented_copy, cached_activations
from training.network.augment import Augmentation


@pytest.fixture
def prefix() -> keras.Model:
    keras.utils.set_random_seed(1)
    scan = keras.Input((8, 8, 1), dtype="uint8")
    scaled = keras.layers.Rescaling(1 / 255)(scan)
    return keras.Model(scan, keras.layers.Conv2D(4, 3, name="conv")(scaled))


@pytest.fixture
def scans() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 255, (3 * CHUNK + 5, 8, 8, 1), dtype=np.uint8)


def test_activations_are_those_of_the_prefix(prefix, scans, tmp_path):
    got = cached_activations(prefix, scans, tmp_path, "test")
    assert len(got) == len(scans)
    assert got[:].dtype == np.float16
    np.testing.assert_allclose(got[:], prefix.predict_on_batch(scans), rtol=1e-3, atol=1e-3)
    some = np.array([7, 2, 2])
    np.testing.assert_array_equal(got[some], got[:][some])


def test_second_call_computes_nothing_and_equal_scans_share_a_file(prefix, scans, tmp_path):
    first = cached_activations(prefix, scans, tmp_path, "test")
    prefix.predict_on_batch = None  # a call of it would fail
    second = cached_activations(prefix, np.concatenate([scans[3:], scans]), tmp_path, "test")
    np.testing.assert_array_equal(second[:], np.concatenate([first[3 : len(scans)], first[:]]))
    assert len(set(second.files)) == len(scans)


def test_only_what_changed_is_computed_anew(prefix, scans, tmp_path):
    cached_activations(prefix, scans, tmp_path, "test")
    compute, calls = prefix.predict_on_batch, []
    prefix.predict_on_batch = lambda chunk: calls.append(len(chunk)) or compute(chunk)
    changed = scans.copy()
    changed[0, 0, 0] ^= 1
    cached_activations(prefix, changed, tmp_path, "test")
    assert calls == [1]
    kernel, bias = prefix.get_layer("conv").get_weights()
    prefix.get_layer("conv").set_weights([kernel, bias + 1])
    cached_activations(prefix, scans, tmp_path, "test")
    assert sum(calls) == 1 + len(scans)


def test_interrupted_computation_goes_on_where_it_stopped(prefix, scans, tmp_path):
    compute, calls = prefix.predict_on_batch, []

    def interrupted(chunk: np.ndarray) -> np.ndarray:
        calls.append(len(chunk))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(chunk)

    prefix.predict_on_batch = interrupted
    with pytest.raises(KeyboardInterrupt):
        cached_activations(prefix, scans, tmp_path, "test")
    prefix.predict_on_batch = lambda chunk: calls.append(len(chunk)) or compute(chunk)
    got = cached_activations(prefix, scans, tmp_path, "test")
    assert calls == [CHUNK, CHUNK, CHUNK, CHUNK, 5]  # two done, one interrupted, then the rest
    np.testing.assert_allclose(got[:], compute(scans), rtol=1e-3, atol=1e-3)


def test_copies_differ_and_are_repeatable(scans):
    limits = Augmentation()
    np.testing.assert_array_equal(augmented_copy(scans, 0, limits, 7), scans)
    one, two = (augmented_copy(scans, copy, limits, 7) for copy in (1, 2))
    assert (one != two).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(one, augmented_copy(scans, 1, limits, 7))
    # In another set, at another place, a scan has the same variants.
    np.testing.assert_array_equal(one[4:6], augmented_copy(scans[4:6], 1, limits, 7))
