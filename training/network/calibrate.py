"""Calibration after training: softmax temperature, domain model and its threshold."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from training.network.vgg16 import SHARE_FLOOR, DomainFit

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

TEMPERATURE_LIMITS = (0.2, 10.0)  # a few dozen validation scans may ask for absurd values


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """Probabilities float32 (N, C) from logits (N, C) divided by `temperature`."""
    scaled = logits / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)  # type: ignore[no-any-return]


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The divisor of the logits that gives the least mean negative log likelihood.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. Searched between 0.2
    and 10; one number, so a small validation set suffices and the ranking cannot change.

    Args:
        logits: float (N, C) of the validation scans.
        labels: int (N,).
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) / math.exp(log_temperature)
        scaled -= scaled.max(axis=1, keepdims=True)
        log_probabilities = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        return float(-log_probabilities[np.arange(len(labels)), labels].mean())

    bounds = tuple(math.log(limit) for limit in TEMPERATURE_LIMITS)
    return float(math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def profiles(features: Floats) -> Floats:
    """Square-root channel shares (Hellinger transform): float32 (N, F) of pooled features (N, F).

    Each feature's share of the scan's total, and the square root of that: the Hellinger
    transformation of Legendre and Gallagher 2001, with a floor for inactive channels. Contrast and
    window of a slice scale all features alike and cancel out. On the features themselves the
    distance missed a third of what is no chest CT; see benchmarks/results/README.md.
    """
    shares = features / (features.sum(axis=1, keepdims=True) + 1e-6)
    roots: Floats = np.sqrt(shares + SHARE_FLOOR / features.shape[1])
    return roots


def fit_domain(features: Floats) -> DomainFit:
    """Mean and whitening of the profiles of pooled features, float32 (N, F), of training scans.

    The covariance is shrunk towards a multiple of the identity (Ledoit and Wolf 2004), so that it
    can be inverted with fewer scans than channels. With the Cholesky factor L of its inverse,
    |(p - mean) L| is the Mahalanobis distance (Lee et al. 2018, equation 1, with one class).
    """
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(profiles(features).astype(np.float64))
    whitening = np.linalg.cholesky(fitted.precision_)
    return DomainFit(fitted.location_.astype(np.float32), whitening.astype(np.float32))


def domain_distances(features: Floats, domain: DomainFit) -> Floats:
    """Distance float32 (N,) of pooled features (N, F): what the graph computes."""
    whitened = (profiles(features) - domain.mean) @ domain.whitening
    return np.linalg.norm(whitened, axis=1)  # type: ignore[no-any-return]


def domain_threshold(validation_distances: Floats, accepted: float) -> float:
    """The distance below which the fraction `accepted` of the validation scans lies."""
    return float(np.quantile(validation_distances, accepted))
