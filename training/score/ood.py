"""Out-of-distribution detection: how well the model and the client reject other images.

Three things speak against a scan: the client refuses it (by DICOM tags, or because it holds no
readable slice), the client's rules flag its picture, or its `domain_distance` lies above the
threshold. Each is counted by itself and all together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from chestct.contract import SCAN_SHAPE, ModelMetadata
from chestct.errors import ScanDecodeError
from chestct.imaging.prepare import inspect_scan
from chestct.imaging.sources import list_scans
from training.common.markdown import plain
from training.common.metrics import auroc, wilson_interval
from training.data.dataset import predict_outputs

Floats = npt.NDArray[np.float32]


def check_domain(
    model: Any, facts: ModelMetadata, test: list[Path], foreign: Path, chest: list[Path]
) -> dict[str, Any]:
    """Rejections of scans that should be accepted and of those that should not.

    Args:
        model: The classifier.
        facts: Its facts, for window and threshold.
        test: The test scans of the model's own split.
        foreign: Folder of things that are no axial chest-CT slice, a folder for each kind.
        chest: Folders of axial chest-CT slices from elsewhere.

    Returns:
        `threshold`; `accept` and `reject`, for each source {n, refused, flagged_by_rules,
        flagged_by_distance, rejected, share {value, low, high}}, Wilson intervals;
        `auroc` of telling test from `foreign` by distance, over `auroc_n` readable scans of each.

    Raises:
        ValueError: A folder holds no scans.
    """
    sources = {"test": test} | {folder.name: _listed(folder) for folder in chest}
    accept = {name: _looked_at(model, facts, paths, name) for name, paths in sources.items()}
    kinds = {path.name: path for path in sorted(foreign.iterdir()) if path.is_dir()}
    reject = {name: _looked_at(model, facts, _listed(path), name) for name, path in kinds.items()}
    if not reject:
        raise ValueError(f"{foreign}: no folders in it; expected one for each kind of picture")
    inside = accept["test"]["distances"]
    outside = np.concatenate([found["distances"] for found in reject.values()])
    reject["all"] = _summed(reject)
    is_outside = np.repeat([False, True], [len(inside), len(outside)])
    return {
        "threshold": facts.domain_threshold,
        "auroc": auroc(np.concatenate([inside, outside]), is_outside),
        "auroc_n": [len(inside), len(outside)],
        "accept": {name: _counts(found) for name, found in accept.items()},
        "reject": {name: _counts(found) for name, found in reject.items()},
    }


def report_lines(domain: Mapping[str, Any]) -> list[str]:
    """The result of `check_domain` as lines of Markdown."""
    lines = [
        f"Threshold {domain['threshold']:.2f}. AUROC of the distance, test against foreign: "
        f"{domain['auroc']:.3f} (n = {domain['auroc_n'][0]} and {domain['auroc_n'][1]}).",
        "",
        "| should be | source | n | refused by the client | flagged by its rules | flagged by "
        "distance | rejected in all |",
        "|" + " --- |" * 7,
    ]
    for wanted, key in (("accepted", "accept"), ("rejected", "reject")):
        for name, found in domain[key].items():
            share = found["share"]
            lines.append(
                f"| {wanted} | {plain(name)} | {found['n']} | {found['refused']} | "
                f"{found['flagged_by_rules']} | {found['flagged_by_distance']} | "
                f"{found['rejected']}: {share['value']:.3f} "
                f"({share['low']:.3f} to {share['high']:.3f}) |"
            )
    return lines


def _listed(folder: Path) -> list[Path]:
    paths = list(list_scans(folder))
    if not paths:
        raise ValueError(f"{folder}: no scans in it; expected PNG, JPEG or DICOM files")
    return paths


def _looked_at(model: Any, facts: ModelMetadata, paths: list[Path], name: str) -> dict[str, Any]:
    scans, by_rules = [], []
    for path in tqdm(paths, f"look at {name}", unit="scan", disable=None):
        try:
            scan = inspect_scan(path, facts.window)
        except ScanDecodeError:
            continue
        scans.append(scan.pixels)
        by_rules.append(bool(scan.reasons))
    pixels = np.stack(scans) if scans else np.empty((0, *SCAN_SHAPE), np.uint8)
    distances = (
        predict_outputs(model, pixels, name)["domain_distance"][:, 0]
        if scans
        else np.empty(0, np.float32)
    )
    return {
        "n": len(paths),
        "distances": distances,
        "by_rules": np.array(by_rules, bool),
        "by_distance": distances > facts.domain_threshold,
    }


def _summed(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    keys = ("distances", "by_rules", "by_distance")
    return {"n": sum(found["n"] for found in parts.values())} | {
        key: np.concatenate([found[key] for found in parts.values()]) for key in keys
    }


def _counts(found: Mapping[str, Any]) -> dict[str, Any]:
    refused = found["n"] - len(found["distances"])
    rejected = refused + int((found["by_rules"] | found["by_distance"]).sum())
    low, high = wilson_interval(rejected, found["n"])
    return {
        "n": found["n"],
        "refused": refused,
        "flagged_by_rules": int(found["by_rules"].sum()),
        "flagged_by_distance": int(found["by_distance"].sum()),
        "rejected": rejected,
        "share": {"value": rejected / found["n"], "low": low, "high": high},
    }
