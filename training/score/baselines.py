"""Trivial baselines that need no network; a score means something only beside them.

Each takes the training scans and the pixels to answer, uint8 (N, 224, 224, 1), and gives
probabilities float32 (N, C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.data.dataset import ScanSet

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Baseline = Callable[[ScanSet, Pixels], Floats]

NEIGHBOUR_PX = 64  # side of the thumbnails whose nearest neighbour answers
BLACK, WHITE = 10, 245  # grey levels beyond which a pixel counts as outside the window


def majority(train: ScanSet, pixels: Pixels) -> Floats:
    """The class frequencies of the training scans, for every scan."""
    frequencies = np.bincount(train.labels, minlength=len(train.names)) / len(train)
    return np.tile(frequencies.astype(np.float32), (len(pixels), 1))


def mean_grey(train: ScanSet, pixels: Pixels) -> Floats:
    """One Gaussian a class over the mean grey level: no anatomy can enter."""
    from sklearn.naive_bayes import GaussianNB

    fitted = GaussianNB().fit(train.pixels.mean(axis=(1, 2)), train.labels)
    return _spread(fitted.predict_proba(pixels.mean(axis=(1, 2))), fitted.classes_, train)


def grey_statistics(train: ScanSet, pixels: Pixels) -> Floats:
    """A random forest on seven statistics of the grey levels, places left out."""
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(300, min_samples_leaf=3, random_state=0, n_jobs=1)
    fitted = forest.fit(_statistics(train.pixels), train.labels)
    return _spread(fitted.predict_proba(_statistics(pixels)), fitted.classes_, train)


def nearest_neighbour(train: ScanSet, pixels: Pixels) -> Floats:
    """The class of the most similar training scan, by Euclidean distance of small thumbnails.

    Probabilities fall with the squared distance to the nearest scan of each class, so that they
    rank scans; the most probable class is that of the nearest.
    """
    known, asked = _thumbnails(train.pixels), _thumbnails(pixels)
    squares = (asked**2).sum(axis=1)[:, np.newaxis] + (known**2).sum(axis=1)
    distances = np.maximum(squares - 2 * asked @ known.T, 0)
    nearest = np.full((len(pixels), len(train.names)), np.inf, np.float32)
    for label in np.unique(train.labels):
        nearest[:, label] = distances[:, train.labels == label].min(axis=1)
    closeness = 1 / (nearest + 1e-3)  # a copy of a training scan has the distance 0
    shares: Floats = closeness / closeness.sum(axis=1, keepdims=True)
    return shares


BASELINES: Mapping[str, Baseline] = {
    "grey statistics": grey_statistics,
    "nearest neighbour": nearest_neighbour,
    "mean grey": mean_grey,
    "majority": majority,
}


def _statistics(pixels: Pixels) -> Floats:
    flat = pixels.reshape(len(pixels), -1)
    return np.column_stack(
        [
            flat.mean(axis=1), flat.std(axis=1), *np.percentile(flat, [5, 50, 95], axis=1),
            (flat < BLACK).mean(axis=1), (flat > WHITE).mean(axis=1),
        ]
    ).astype(np.float32)  # fmt: skip


def _thumbnails(pixels: Pixels) -> Floats:
    size = (NEIGHBOUR_PX, NEIGHBOUR_PX)
    small = [Image.fromarray(scan[..., 0]).resize(size, Image.Resampling.BOX) for scan in pixels]
    return np.stack([np.asarray(one, np.float32).ravel() / 255 for one in small])


def _spread(
    found: npt.NDArray[np.floating], classes: npt.NDArray[np.int64], train: ScanSet
) -> Floats:
    """Probabilities with a column for each class, also for those that training lacks."""
    spread = np.zeros((len(found), len(train.names)), np.float32)
    spread[:, classes] = found
    return spread
