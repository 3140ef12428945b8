from __future__ import annotations

import numpy as np
import pytest

from training.network.calibrate import (
    domain_distances,
    domain_threshold,
    fit_domain,
    fit_temperature,
    profiles,
    softmax,
)


def test_temperature_of_overconfident_logits_is_found():
    rng = np.random.default_rng(1)
    honest = rng.normal(0, 2, (20_000, 4)).astype(np.float32)
    labels = np.array([rng.choice(4, p=p / p.sum()) for p in softmax(honest).astype(float)])
    assert fit_temperature(honest * 3, labels) == pytest.approx(3, rel=0.05)


def test_temperature_stays_within_its_limits():
    logits = np.array([[5.0, 0.0], [0.0, 5.0]], np.float32)
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(0.2, rel=0.01)
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(10, rel=0.01)


def test_softmax_of_large_logits_is_finite():
    got = softmax(np.array([[1000.0, 0.0]], np.float32))
    np.testing.assert_array_equal(got, [[1.0, 0.0]])


def test_profile_by_hand():
    # Shares 0.75, 0.25, 0 of four units; the floor is 0.01 / 3.
    got = profiles(np.array([[3.0, 1.0, 0.0]], np.float32))
    np.testing.assert_allclose(got**2, [[0.75333, 0.25333, 0.00333]], atol=1e-5)


def test_distance_is_that_of_the_inverse_covariance():
    from sklearn.covariance import LedoitWolf

    rng = np.random.default_rng(2)
    features = rng.gamma(2, 2, (600, 64)).astype(np.float32)
    far = rng.gamma(4, 1, (5, 64)).astype(np.float32)
    fitted = LedoitWolf().fit(profiles(features).astype(float))
    expected = np.sqrt(fitted.mahalanobis(profiles(far).astype(float)))
    domain = fit_domain(features)
    np.testing.assert_allclose(domain_distances(far, domain), expected, rtol=1e-3)
    typical = domain_distances(features, domain)
    assert np.median(typical) == pytest.approx(np.sqrt(64), rel=0.1)


def test_distance_does_not_follow_the_contrast_of_a_slice():
    features = np.random.default_rng(2).gamma(2, 2, (300, 64)).astype(np.float32)
    domain = fit_domain(features)
    expected = domain_distances(features, domain)
    np.testing.assert_allclose(domain_distances(5 * features, domain), expected, rtol=1e-3)


def test_fewer_scans_than_channels_still_give_a_domain():
    features = np.random.default_rng(3).gamma(2, 2, (40, 512)).astype(np.float32)
    assert np.isfinite(domain_distances(features, fit_domain(features))).all()
    silent = np.zeros((1, 512), np.float32)
    assert np.isfinite(domain_distances(silent, fit_domain(features))).all()


def test_threshold_accepts_the_asked_fraction():
    distances = np.arange(1, 101, dtype=np.float32)
    assert (distances <= domain_threshold(distances, 0.95)).mean() == 0.95
