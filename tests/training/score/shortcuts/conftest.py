from __future__ import annotations

import numpy as np
import pytest

from tests.support.slices import scan_of
from training.data.dataset import ScanSet
from training.data.phantom import LABELS, make_phantom


@pytest.fixture(scope="session")
def drawn() -> list[np.ndarray]:
    """Hounsfield units of eight phantoms, two of a class."""
    return [make_phantom(label, seed).hu for seed in (0, 1) for label in LABELS]


@pytest.fixture(scope="session")
def scans(drawn) -> np.ndarray:
    return np.stack([scan_of(hu) for hu in drawn])


@pytest.fixture(scope="session")
def scan_set() -> ScanSet:
    """24 phantoms of four classes, six of each and two to a group."""
    pixels = np.stack([scan_of(make_phantom(label, seed).hu) for label in LABELS
                       for seed in range(10, 16)])  # fmt: skip
    labels = np.repeat(np.arange(4), 6)
    return ScanSet(pixels, labels, np.arange(24) // 2, tuple(map(str, range(24))), LABELS)
