"""Activations of the frozen layers, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from training.augment import Augmentation, Scan, augment

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

CHUNK = 16  # scans between two records of progress: at most this many are lost to an interruption

Activations = npt.NDArray[np.float16]


def augmented_copy(scans: Scan, copy: int, limits: Augmentation, seed: int) -> Scan:
    """Copy number `copy` of `scans`, uint8 (N, 224, 224, 1); copy 0 is the scans themselves.

    The same seed, copy and position always give the same variant.
    """
    if copy == 0:
        return scans
    return np.stack(
        [
            augment(scan, limits, np.random.default_rng((seed, copy, index)))
            for index, scan in enumerate(scans)
        ]
    )


def cached_activations(prefix: keras.Model, scans: Scan, folder: Path, title: str) -> Activations:
    """Activations of `prefix` for `scans`, memory-mapped float16 (N, height, width, channels).

    The file is named by a hash of the pixels, of the prefix's weights and of its output layer, so
    a change of data, weights or preprocessing computes anew, and nothing else does. An
    interrupted computation goes on where it stopped. float16 keeps 11 bits of each activation:
    enough to train on; evaluation never reads this cache.

    Args:
        prefix: Model from uint8 scans to activations.
        scans: uint8 (N, 224, 224, 1).
        folder: Where the files are kept.
        title: Text of the progress bar.

    Raises:
        OSError: The folder cannot be written or the disk is full.
    """
    digest = hashlib.sha256(scans.tobytes())
    digest.update(json.dumps([layer.name for layer in prefix.layers]).encode())
    for weight in prefix.get_weights():
        digest.update(weight.tobytes())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{digest.hexdigest()[:32]}.npy"
    progress = file.with_suffix(".partial")
    shape = (len(scans), *prefix.output_shape[1:])
    if file.is_file() and not progress.is_file():
        return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]
    logger.info("%s: %d scans", title, len(scans))
    done = int(progress.read_text() or 0) if progress.is_file() and file.is_file() else 0
    if done == 0:
        progress.write_text("0")
        np.lib.format.open_memmap(file, "w+", np.float16, shape).flush()
    activations = np.lib.format.open_memmap(file, "r+")
    limit = np.finfo(np.float16).max
    with tqdm(
        total=len(scans), initial=done, desc=title, unit="scan", disable=None
    ) as progress_bar:
        for start in range(done, len(scans), CHUNK):
            chunk = prefix.predict_on_batch(scans[start : start + CHUNK])
            activations[start : start + len(chunk)] = np.clip(chunk, -limit, limit)
            activations.flush()
            progress.write_text(str(start + len(chunk)))
            progress_bar.update(len(chunk))
    progress.unlink()
    return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]
