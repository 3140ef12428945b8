from __future__ import annotations

import keras
import numpy as np
import pytest

from training.network.calibrate import profiles
from training.network.vgg16 import (
    DomainFit,
    build_classifier,
    frozen_prefix,
    logits_from,
    pooled_features,
    set_domain,
    with_temperature,
)

pytestmark = pytest.mark.xdist_group("model")  # its fixtures are made once


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(5)
    built = build_classifier(4)
    rng = np.random.default_rng(5)
    kernel, bias = built.get_layer("activation_map").get_weights()
    built.get_layer("activation_map").set_weights(
        [rng.normal(0, 0.5, kernel.shape), rng.normal(0, 1, bias.shape)]
    )
    return built


@pytest.fixture(scope="module")
def scans() -> np.ndarray:
    rng = np.random.default_rng(6)
    ramp = np.linspace(0, 200, 224)[np.newaxis, :, np.newaxis]
    return (ramp + rng.integers(0, 55, (3, 224, 224, 1))).astype(np.uint8)


def test_outputs_have_the_shapes_of_the_contract(model, scans):
    outputs = model.predict_on_batch(scans)
    assert {name: value.shape for name, value in outputs.items()} == {
        "probabilities": (3, 4),
        "activation_map": (3, 14, 14, 4),
        "domain_distance": (3, 1),
    }
    np.testing.assert_allclose(outputs["probabilities"].sum(axis=1), 1, rtol=1e-6)


def test_mean_of_the_map_is_the_logit(model, scans):
    outputs = model.predict_on_batch(scans)
    logits = outputs["activation_map"].mean(axis=(1, 2))
    direct = logits_from(model, 1).predict_on_batch(scans)
    np.testing.assert_allclose(logits, direct, rtol=1e-5, atol=1e-6)
    exponentials = np.exp(logits)
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["probabilities"], expected, rtol=1e-5)


def test_preprocessing_in_the_graph_is_that_of_keras(model, scans):
    entered = keras.Model(model.input, model.get_layer("vgg_preprocessing").output)
    expected = keras.applications.vgg16.preprocess_input(np.repeat(scans, 3, -1).astype("float32"))
    np.testing.assert_allclose(entered.predict_on_batch(scans), expected, atol=1e-4)


def test_temperature_cools_the_probabilities_and_leaves_the_map(model, scans):
    cooled = with_temperature(model, 2.5).predict_on_batch(scans)
    plain = model.predict_on_batch(scans)
    np.testing.assert_array_equal(cooled["activation_map"], plain["activation_map"])
    powered = plain["probabilities"] ** (1 / 2.5)
    expected = powered / powered.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(cooled["probabilities"], expected, rtol=1e-4)


def test_domain_distance_is_the_mahalanobis_distance(model, scans):
    rng = np.random.default_rng(7)
    mean = rng.normal(size=512).astype(np.float32)
    factor = np.tril(rng.normal(0, 0.1, (512, 512))).astype(np.float32)
    set_domain(model, DomainFit(mean, factor))
    features = pooled_features(model).predict_on_batch(scans).astype(np.float64)
    precision = factor.astype(np.float64) @ factor.T
    away = profiles(features) - mean
    expected = np.sqrt(np.einsum("ni,ij,nj->n", away, precision, away))
    got = model.predict_on_batch(scans)["domain_distance"][:, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("block", [2, 5, 6])
def test_prefix_and_rest_together_are_the_model(model, scans, block):
    entered = frozen_prefix(model, block).predict_on_batch(scans)
    logits = logits_from(model, block).predict_on_batch(entered)
    whole = logits_from(model, 1).predict_on_batch(scans)
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes is 1; expected at least 2"):
        build_classifier(1)
