"""The scans of a split file as one array, decoded by `chestct.imaging.prepare`."""

from __future__ import annotations

import csv
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from chestct.contract import LUNG_WINDOW, SCAN_SHAPE, Window
from chestct.imaging.prepare import load_scan

SPLITS = ("train", "valid", "test")


def walk(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Every file and every folder below `folder` by relative POSIX path; links are followed."""
    files: dict[str, Path] = {}
    folders: list[str] = []

    def fail(error: OSError) -> None:
        raise error

    for current, inner, names in os.walk(folder, followlinks=True, onerror=fail):
        here = Path(current)
        real = here.resolve()
        inner[:] = [  # a link to a parent would never end
            name for name in sorted(inner) if not real.is_relative_to((here / name).resolve())
        ]
        folders += [(here / name).relative_to(folder).as_posix() for name in inner]
        files |= {(here / name).relative_to(folder).as_posix(): here / name for name in names}
    return files, folders


@dataclass(frozen=True)
class ScanFile:
    """A file of a scan folder: path relative to it, split (None in the plain layout), label."""

    path: str
    split: str | None
    label: str


def list_scan_folder(scans: Path) -> list[ScanFile]:
    """The scans of a folder that `training ingest` wrote, sorted by path.

    Raises:
        ValueError: The folder is missing, holds no scan, or a file outside its two layouts.
    """
    paths = sorted(walk(scans)[0]) if scans.is_dir() else []
    if not paths:
        raise ValueError(f"{scans}: no scans; run python -m training ingest first")
    found = []
    for path in paths:
        *split, label, _ = ["", *path.split("/")]
        if not label or len(split) > 2:
            raise ValueError(f"{scans}: {path} is in no class folder; run training ingest again")
        found.append(ScanFile(path, split[1] if len(split) == 2 else None, label))
    return found


@dataclass(frozen=True)
class ScanSet:
    """Some scans of a split file, in its order.

    Attributes:
        pixels: uint8 (N, 224, 224, 1).
        labels: int64 (N,), index into `names`.
        groups: int64 (N,), near-duplicate or series group.
        paths: N paths relative to the scan folder.
        names: Class names, sorted.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    paths: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """The number of scans."""
        return len(self.paths)

    @property
    def sha256(self) -> str:
        """Hash over pixels and labels: equal for equal training input."""
        digest = hashlib.sha256(self.pixels.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def where(self, keep: npt.NDArray[np.bool_]) -> ScanSet:
        """The scans for which `keep`, bool (N,), is true."""
        paths = tuple(path for path, kept in zip(self.paths, keep, strict=True) if kept)
        return ScanSet(self.pixels[keep], self.labels[keep], self.groups[keep], paths, self.names)


def evenly_spread(total: int, count: int) -> npt.NDArray[np.int64]:
    """Indices of at most `count` of `total` items, int64, rising, evenly spread from end to end."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def read_split(scans: Path, split_file: Path, window: Window = LUNG_WINDOW) -> dict[str, ScanSet]:
    """The scan sets `train`, `valid` and `test` of a split file.

    Args:
        scans: Folder that the paths of the split file are relative to.
        split_file: CSV with the columns path, label, split, group.
        window: Window for slices in Hounsfield units.

    Raises:
        ValueError: The file is missing or has other columns, or a split has no scans.
        chestct.errors.ScanDecodeError: A scan cannot be read.
    """
    try:
        with split_file.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise ValueError(f"{split_file}: no such file; run python -m training split") from error
    if not rows or not {"path", "label", "split", "group"} <= set(rows[0]):
        raise ValueError(f"{split_file}: expected rows with the columns path,label,split,group")
    names = tuple(sorted({row["label"] for row in rows}))
    sets = {}
    for split in SPLITS:
        chosen = [row for row in rows if row["split"] == split]
        if not chosen:
            raise ValueError(f"{split_file}: no scan in the split {split!r}")
        sets[split] = ScanSet(
            load_pixels([scans / row["path"] for row in chosen], f"decode {split}", window),
            np.array([names.index(row["label"]) for row in chosen], np.int64),
            np.array([int(row["group"]) for row in chosen], np.int64),
            tuple(row["path"] for row in chosen),
            names,
        )
    return sets


def load_pixels(
    paths: list[Path], title: str, window: Window = LUNG_WINDOW
) -> npt.NDArray[np.uint8]:
    """Scans as uint8 (N, 224, 224, 1), decoded on two threads with a progress bar.

    Raises:
        chestct.errors.ScanDecodeError: A scan cannot be read.
    """
    pixels = np.empty((len(paths), *SCAN_SHAPE), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        decoded = pool.map(lambda path: load_scan(path, window), paths)
        for index, scan in enumerate(tqdm(decoded, title, len(paths), disable=None, unit="scan")):
            pixels[index] = scan
    return pixels


def predict_outputs(
    model: Any, pixels: npt.NDArray[np.uint8], title: str
) -> dict[str, npt.NDArray[np.float32]]:
    """All outputs of a classifier for uint8 scans (N, 224, 224, 1), with a progress bar."""
    starts = tqdm(range(0, len(pixels), 16), title, unit="batch", disable=None)
    batches = [model.predict_on_batch(pixels[start : start + 16]) for start in starts]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
