"""Audit a scan folder before training: duplicates, label conflicts, shortcuts.

Finds exact and near duplicates within and across splits, scans that carry two labels, and two
shortcuts by which a network could tell the classes apart without looking at the anatomy: the file
format, and the mean grey of the picture.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.common.metrics import NORMAL, auroc, wilson_interval
from training.data.audit_report import report
from training.data.dataset import SPLITS
from training.data.duplicates import ScanFacts, group_equal, group_near, measure_scans
from training.data.ingest import read_table

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@config_class
class AuditConfig:
    """What is audited and where the findings go.

    Attributes:
        scans: Folder that `training ingest` wrote.
        table: Its table, for the data hash.
        output: Folder for audit.json, audit.md and groups.csv.
        near_correlation: Two 32x32 thumbnails at or above it are near duplicates. 0.99 joins
            copies that were re-cropped by a little, scribbled on or recompressed, and very
            close neighbours of one series; other patients stay below.
    """

    scans: Path = Path("data/scans")
    table: Path = Path("data/ingest.json")
    output: Path = Path("results/audit")
    near_correlation: Annotated[float, Field(gt=0, le=1)] = 0.99


def fit_threshold(scores: FloatArray, positive: npt.NDArray[np.bool_]) -> float:
    """The threshold at or above which most are `positive`: the best accuracy on these scores."""
    order = np.argsort(scores, kind="stable")
    sorted_scores, hits = scores[order], positive[order]
    # Cutting before index k calls k scores negative and the rest positive.
    right = np.concatenate([[0], np.cumsum(~hits)]) + np.concatenate(
        [np.cumsum(hits[::-1])[::-1], [0]]
    )
    edges = np.concatenate([sorted_scores[:1] - 1, sorted_scores, sorted_scores[-1:] + 1])
    possible = np.concatenate([[True], sorted_scores[1:] > sorted_scores[:-1], [True]])
    cut = int(np.argmax(np.where(possible, right, -1)))
    return float((edges[cut] + edges[cut + 1]) / 2)


def audit(facts: ScanFacts, near_correlation: float) -> tuple[dict[str, Any], IntArray]:
    """The findings of `audit.json`, and the near-duplicate group of each scan, int64 (N,)."""
    exact_files = group_equal(facts.file_hashes)
    exact_pixels = group_equal(facts.pixel_hashes)
    near = group_near(facts.thumbnails, near_correlation, exact_files, exact_pixels)
    findings = {
        "num_scans": len(facts.files),
        "near_correlation": near_correlation,
        "counts": _crosstab(facts.splits, facts.labels),
        "duplicates": {
            "exact_files": _describe_groups(facts, exact_files),
            "exact_pixels": _describe_groups(facts, exact_pixels),
            "near": _describe_groups(facts, near),
        },
        "formats": _describe_formats(facts),
        "brightness": _describe_brightness(facts, near),
        "majority": _describe_majority(facts, near),
    }
    return findings, near


def _crosstab(rows: Iterable[str], columns: Iterable[str]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for (row, column), count in sorted(
        Counter((str(row), str(column)) for row, column in zip(rows, columns, strict=True)).items()
    ):
        counts.setdefault(row, {})[column] = count
    return counts


def _describe_groups(facts: ScanFacts, groups: IntArray) -> dict[str, Any]:
    """Counts of a grouping, its reach over splits and labels, and all groups of two or more."""
    members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
    several = [inside for inside in members if len(inside) > 1]
    across_splits = [inside for inside in several if len(set(facts.splits[inside])) > 1]
    conflicts = [inside for inside in several if len(set(facts.labels[inside])) > 1]
    return {
        "num_distinct": len(members),
        "num_redundant": len(facts.files) - len(members),
        "num_groups": len(several),
        "num_groups_across_splits": len(across_splits),
        "num_label_conflicts": len(conflicts),
        "distinct_by_label": {
            str(label): len(set(groups[facts.labels == label].tolist()))
            for label in sorted(set(facts.labels))
        },
        "shared": _shared_between_splits(facts, groups),
        "label_conflicts": [_paths(facts, inside) for inside in conflicts],
        "groups": [_paths(facts, inside) for inside in several],
    }


def _paths(facts: ScanFacts, inside: IntArray) -> list[str]:
    return [facts.files[index].path for index in inside]


def _shared_between_splits(facts: ScanFacts, groups: IntArray) -> dict[str, dict[str, Any]]:
    """For each pair of splits and label, how many scans of the first have a copy in the second."""
    shared: dict[str, dict[str, Any]] = {}
    present = [split for split in SPLITS if split in facts.splits]
    for first in reversed(present):
        for second in present[: present.index(first)]:
            here = facts.splits == first
            copied = here & np.isin(groups, groups[facts.splits == second])
            shared[f"{first} in {second}"] = {
                str(label): {
                    "copied": int((copied & (facts.labels == label)).sum()),
                    "n": int((here & (facts.labels == label)).sum()),
                }
                for label in sorted(set(facts.labels[here]))
            }
    return shared


def _fit_and_measure_masks(
    facts: ScanFacts, near: IntArray
) -> tuple[npt.NDArray[np.bool_], dict[str, npt.NDArray[np.bool_]]]:
    """Which scans a baseline is fitted on, and by name the sets that it is measured on."""
    train, test = facts.splits == "train", facts.splits == "test"
    if not train.any() or not test.any():
        everything = np.ones(len(facts.files), bool)
        return everything, {"fitted_on": everything}
    _, first = np.unique(np.where(test, near, -1), return_index=True)
    once = np.zeros(len(near), bool)
    once[first] = True
    new = test & once & ~np.isin(near, near[~test])
    return train, {"test": test, "test_without_duplicates": new}


def _proportion(right: npt.NDArray[np.bool_]) -> dict[str, Any]:
    low, high = wilson_interval(int(right.sum()), len(right))
    return {"accuracy": float(right.mean()), "accuracy_95": [low, high], "n": len(right)}


def _describe_formats(facts: ScanFacts) -> dict[str, Any]:
    """Container, mode and size by label, and how far the format alone tells the label."""
    formats, labels = np.array(facts.formats), facts.labels
    by_label = _crosstab(labels, formats)
    guess = {
        name: max(sorted(counts), key=lambda label, counts=counts: counts[label])  # type: ignore[misc]
        for name, counts in _crosstab(formats, labels).items()
    }
    majority = max(Counter(labels.tolist()).values()) / len(labels)
    right = np.array([guess[name] for name in formats]) == labels
    return {
        "by_label": by_label,
        "median_width_px": _median_by_label(facts.sizes[:, 0], labels),
        "median_height_px": _median_by_label(facts.sizes[:, 1], labels),
        "mean_grey": {
            str(label): float(facts.mean_grey[labels == label].mean())
            for label in sorted(set(labels))
        },
        "num_sizes": len(np.unique(facts.sizes, axis=0)),
        "label_from_format": {**_proportion(right), "majority_accuracy": majority},
    }


def _median_by_label(values: npt.NDArray[Any], labels: npt.NDArray[np.str_]) -> dict[str, float]:
    return {str(label): float(np.median(values[labels == label])) for label in sorted(set(labels))}


def _describe_brightness(facts: ScanFacts, near: IntArray) -> dict[str, Any]:
    """How far a threshold on the mean grey tells one class from the rest.

    The class is `normal` where there is one, else the one that is told best on the scans that the
    threshold is fitted on. A class that is darker than the rest counts by its darkness.
    """
    fitted, measured = _fit_and_measure_masks(facts, near)
    labels, grey = facts.labels, facts.mean_grey
    areas = {
        str(label): auroc(grey[fitted], labels[fitted] == label)
        for label in sorted(set(labels[fitted]))
    }
    best = max(areas, key=lambda label: abs(areas[label] - 0.5))
    chosen = NORMAL if NORMAL in areas else best
    sign = 1.0 if areas[chosen] >= 0.5 else -1.0
    positive = labels == chosen
    threshold = fit_threshold(sign * grey[fitted], positive[fitted])
    called = sign * grey >= threshold
    results: dict[str, Any] = {}
    for name, mask in measured.items():
        kinds = set(positive[mask].tolist())
        if kinds != {True, False}:
            results[name] = {"n": int(mask.sum()), "not_measured": f"only one of {chosen} and rest"}
            continue
        share = float(positive[mask].mean())
        results[name] = {
            "auroc": auroc(sign * grey[mask], positive[mask]),
            **_proportion(called[mask] == positive[mask]),
            "n_positive": int(positive[mask].sum()),
            "majority_accuracy": max(share, 1 - share),
        }
    return {
        "label": chosen,
        "brighter": sign > 0,
        "threshold_grey": sign * threshold,
        "fitted_n": int(fitted.sum()),
        "measured": results,
    }


def _describe_majority(facts: ScanFacts, near: IntArray) -> dict[str, Any]:
    """Accuracy of always answering the most frequent label of the scans fitted on."""
    fitted, measured = _fit_and_measure_masks(facts, near)
    counts = Counter(facts.labels[fitted].tolist())
    label = max(sorted(counts), key=lambda name: counts[name])
    return {
        "label": label,
        "measured": {
            name: _proportion(facts.labels[mask] == label)
            for name, mask in measured.items()
            if mask.any()
        },
    }


def write_audit(config: AuditConfig) -> dict[str, Any]:
    """Audit `config.scans`, write audit.json, audit.md and groups.csv; the findings.

    Raises:
        ValueError: There are no scans, or one that does not decode.
        OSError: The output cannot be written.
    """
    facts = measure_scans(config.scans)
    table = read_table(config.table) or {}
    findings, near = audit(facts, config.near_correlation)
    findings = {key: table[key] for key in ("source", "data_hash") if key in table} | findings
    write_json(config.output / "audit.json", findings)
    with replaced(config.output / "audit.md") as temporary:
        temporary.write_text(report(findings), encoding="utf-8")
    with (
        replaced(config.output / "groups.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "near_dup_group"])
        writer.writerows(zip((scan.path for scan in facts.files), near.tolist(), strict=True))
    return findings


def main(argv: list[str] | None = None) -> int:
    """Look for duplicates, label conflicts and shortcuts."""
    parser = command_parser("training audit", main.__doc__, "configs/audit.yaml")
    arguments = parser.parse_args(argv)

    def work() -> None:
        sys.stdout.write(report(write_audit(load_config(AuditConfig, arguments.config))))

    return run_command(work)
