"""Cache of the frozen layers' activations, one file a scan."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from training.common.atomic_io import replaced
from training.network.augment import Augmentation, Scan, augment

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

CHUNK = 16  # scans in one pass; an interruption loses no more

Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Activations:
    """Activations of N scans, read from disk when they are asked for.

    Attributes:
        files: One for each scan, in its order; equal scans share a file.
    """

    files: Sequence[Path]

    def __len__(self) -> int:
        """The number of scans."""
        return len(self.files)

    def __getitem__(self, chosen: slice | npt.NDArray[np.int64]) -> Halves:
        """Activations float16 (n, height, width, channels) of some of the scans."""
        return np.stack([np.load(self.files[i]) for i in np.arange(len(self.files))[chosen]])


def augmented_copy(scans: Scan, copy: int, limits: Augmentation, seed: int) -> Scan:
    """Copy number `copy` of `scans`, uint8 (N, 224, 224, 1); copy 0 is the scans themselves.

    The same seed, copy and scan always give the same variant, whatever set the scan is in.
    """
    if copy == 0:
        return scans
    return np.stack(
        [
            augment(scan, limits, np.random.default_rng((seed, copy, zlib.crc32(scan.tobytes()))))
            for scan in scans
        ]
    )


def cached_activations(prefix: keras.Model, scans: Scan, folder: Path, title: str) -> Activations:
    """Activations of `prefix` for `scans`, one file of float16 (height, width, channels) a scan.

    The files are named by the prefix (a hash of its layers, precision and weights) and by the
    pixels, so a change of either computes anew and nothing else does: the folds of a
    cross-validation share what they have in common, and an interrupted computation goes on where
    it stopped. float16 keeps 11 bits of each activation: enough to train on; evaluation never
    reads this cache.

    Args:
        prefix: Model from uint8 scans to activations.
        scans: uint8 (N, 224, 224, 1).
        folder: Where the files are kept.
        title: Text of the progress bar.

    Raises:
        OSError: The folder cannot be written or the disk is full.
    """
    layers = [(layer.name, layer.compute_dtype) for layer in prefix.layers]
    digest = hashlib.sha256(json.dumps(layers).encode())
    for weight in prefix.get_weights():
        digest.update(weight.tobytes())
    folder = folder / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{hashlib.sha256(scan.tobytes()).hexdigest()[:32]}.npy" for scan in scans]
    first = {file: index for index, file in reversed(list(enumerate(files)))}
    missing = sorted(index for file, index in first.items() if not file.is_file())
    if missing:
        logger.info("%s: %d scans", title, len(missing))
    limit = np.finfo(np.float16).max
    with tqdm(total=len(missing), desc=title, unit="scan", disable=None) as progress:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            found: npt.NDArray[Any] = np.asarray(prefix.predict_on_batch(scans[chunk]), np.float32)
            for index, activation in zip(chunk, found, strict=True):
                with replaced(files[index]) as temporary:
                    np.save(temporary, np.clip(activation, -limit, limit).astype(np.float16))
            progress.update(len(chunk))
    return Activations(files)
