"""Measurements of every scan, and groups of equal and of nearly equal scans."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from chestct.errors import ScanDecodeError
from chestct.imaging.prepare import load_grey
from training.data.dataset import ScanFile, list_scan_folder

THUMBNAIL_PX = 32
ROWS_AT_ONCE = 1024  # rows of the correlation matrix in memory: 80 MB for 20,000 scans

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ScanFacts:
    """What the audit measures on each of N scans, in the order of their paths.

    Attributes:
        files: Path, split and label.
        formats: Container and mode, such as `PNG RGBA` or `DICOM MONOCHROME2`.
        sizes: int64 (N, 2), width and height in pixels.
        file_hashes: SHA-256 of each file.
        pixel_hashes: MD5 of the decoded grey picture and its shape.
        mean_grey: float32 (N,), 0 to 255.
        thumbnails: float32 (N, 1024), 32x32 grey, mean 0 and length 1 (0 if of one grey).
    """

    files: tuple[ScanFile, ...]
    formats: tuple[str, ...]
    sizes: IntArray
    file_hashes: tuple[str, ...]
    pixel_hashes: tuple[str, ...]
    mean_grey: FloatArray
    thumbnails: FloatArray

    @property
    def labels(self) -> npt.NDArray[np.str_]:
        """The label of each scan, (N,)."""
        return np.array([file.label for file in self.files])

    @property
    def splits(self) -> npt.NDArray[np.str_]:
        """The split of each scan, (N,); `all` for a folder without splits."""
        return np.array([file.split or "all" for file in self.files])


def measure_scans(scans: Path) -> ScanFacts:
    """Decode every scan of a folder once and measure it.

    Raises:
        ValueError: The folder is missing, empty, or holds a file that does not decode.
    """
    files = list_scan_folder(scans)
    with ThreadPoolExecutor(2) as pool:
        measured = pool.map(lambda file: _measure(scans / file.path), files)
        rows = list(tqdm(measured, desc="audit", total=len(files), unit="scan", disable=None))
    formats, sizes, file_hashes, pixel_hashes, means, thumbnails = zip(*rows, strict=True)
    pixels = np.array(thumbnails, np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    length = np.linalg.norm(pixels, axis=1, keepdims=True)
    pixels /= np.where(length > 0, length, 1)
    return ScanFacts(
        tuple(files),
        formats,
        np.array(sizes),
        file_hashes,
        pixel_hashes,
        np.array(means, np.float32),
        pixels,
    )


def _measure(
    path: Path,
) -> tuple[str, tuple[int, int], str, str, float, npt.NDArray[np.uint8]]:
    data = path.read_bytes()
    try:
        grey = load_grey(path)
    except ScanDecodeError as error:
        raise ValueError(f"{error}; run python -m training ingest again") from error
    height, width = grey.shape
    pixel_hash = hashlib.md5(f"{width}x{height}".encode() + grey.tobytes(), usedforsecurity=False)
    thumbnail = Image.fromarray(grey).resize(
        (THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR
    )
    return (
        _format(data),
        (width, height),
        hashlib.sha256(data).hexdigest(),
        pixel_hash.hexdigest(),
        float(grey.mean()),
        np.asarray(thumbnail).ravel(),
    )


def _format(data: bytes) -> str:
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG")) as picture:
            return f"{picture.format} {picture.mode}"
    except OSError:
        return "DICOM"


def group_equal(values: Sequence[str]) -> IntArray:
    """int64 (N,): the same number for equal values, numbered from 0 by first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def group_near(thumbnails: FloatArray, minimum: float, *also: IntArray) -> IntArray:
    """Groups of scans joined by a correlation of at least `minimum`, and by other groupings.

    A group is everything that can be reached from one to the next: its farthest members may
    correlate less.

    Args:
        thumbnails: float32 (N, K), rows of mean 0 and length 1: their product is Pearson's r.
        minimum: Least correlation that joins.
        also: int64 (N,) group numbers; equal numbers join too.

    Returns:
        int64 (N,), numbered from 0 by first appearance.
    """
    count = len(thumbnails)
    pairs = []
    for start in range(0, count, ROWS_AT_ONCE):
        correlation = thumbnails[start : start + ROWS_AT_ONCE] @ thumbnails.T
        # One in 1e6 allows for rounding in float32: equal pictures correlate by 1 - 1e-7.
        pairs.append(np.argwhere(correlation >= minimum - 1e-6) + np.array([start, 0]))
    return join_groups(count, *also, pairs=np.concatenate(pairs))


def join_groups(
    count: int, *groupings: IntArray, pairs: npt.NDArray[np.integer[Any]] | None = None
) -> IntArray:
    """The finest grouping of `count` things that keeps together what any grouping or pair joins.

    Args:
        count: Number of things.
        groupings: int64 (count,) each; equal numbers join, negative numbers join nothing.
        pairs: (M, 2) indices of further joined things.

    Returns:
        int64 (count,), numbered from 0 by first appearance.
    """
    links = [] if pairs is None else [pairs]
    for grouping in groupings:
        known = np.flatnonzero(grouping >= 0)
        _, first, which = np.unique(grouping[known], return_index=True, return_inverse=True)
        links.append(np.stack([known, known[first][which]], axis=1))
    both = np.concatenate(links) if links else np.empty((0, 2), np.int64)
    graph = coo_matrix((np.ones(len(both), bool), (both[:, 0], both[:, 1])), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    return group_equal([str(label) for label in labels])
