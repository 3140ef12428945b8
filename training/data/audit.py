"""What is wrong with a scan folder before anything is trained on it.

Finds exact and near duplicates within and across splits, scans that carry two labels, and two
shortcuts by which a network could tell the classes apart without looking at the anatomy: the file
format, and the mean grey of the picture.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config
from training.common.markdown import code, plain, table
from training.common.metrics import NORMAL, auroc, wilson_interval
from training.data.dataset import SPLITS
from training.data.ingest import ScanFile, list_scan_folder, read_table

THUMBNAIL_PX = 32
ROWS_AT_ONCE = 1024  # rows of the correlation matrix in memory: 80 MB for 20,000 scans
MOST_LISTED = 20  # groups written out in the report; audit.json has all of them

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
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
    near_correlation: float = 0.99

    def __post_init__(self) -> None:
        """Refuse a threshold that would join everything or nothing.

        Raises:
            ValueError: `near_correlation` is not above 0 and at most 1.
        """
        if not 0 < self.near_correlation <= 1:
            raise ValueError(f"near_correlation is {self.near_correlation}: expected above 0 to 1")


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


def report(findings: Mapping[str, Any]) -> str:
    """The findings as Markdown for people."""
    lines = ["# Audit of the scans", ""]
    if findings.get("source"):
        source, data_hash = code(findings["source"]), code(findings["data_hash"][:16])
        lines += [f"Source: {source}, data hash {data_hash}.", ""]
    counts = findings["counts"]
    labels = sorted({label for by_label in counts.values() for label in by_label})
    lines += _table(
        ["split", *map(plain, labels)],
        [[split, *(by.get(label, 0) for label in labels)] for split, by in counts.items()],
    )
    lines += ["## Duplicates", ""]
    kinds = {
        "exact_files": "same file",
        "exact_pixels": "same grey pixels",
        "near": f"near (32x32 correlation >= {findings['near_correlation']})",
    }
    duplicates = findings["duplicates"]
    head = ("num_distinct", "num_redundant", "num_groups", "num_groups_across_splits")
    lines += _table(
        ["kind", "distinct", "redundant", "groups", "groups across splits", "label conflicts"],
        [
            [title, *(duplicates[kind][key] for key in (*head, "num_label_conflicts"))]
            for kind, title in kinds.items()
        ],
    )
    for kind, title in list(kinds.items())[1:]:  # equal files have equal pixels
        shared = duplicates[kind]["shared"]
        if any(cell["copied"] for row in shared.values() for cell in row.values()):
            lines += [f"Scans with a copy in another split, {title}:", ""]
            lines += _table(
                ["split", *map(plain, labels)],
                [
                    [name, *(_share(row.get(label)) for label in labels)]
                    for name, row in shared.items()
                ],
            )
    conflicts = duplicates["near"]["label_conflicts"]
    if conflicts:
        lines += ["### One picture, two labels", ""]
        lines += [f"- {', '.join(map(code, paths))}" for paths in conflicts[:MOST_LISTED]]
        if len(conflicts) > MOST_LISTED:
            lines.append(f"- and {len(conflicts) - MOST_LISTED} more in audit.json")
        lines.append("")
    formats = findings["formats"]
    names = sorted({name for by in formats["by_label"].values() for name in by})
    lines += ["## Shortcuts", "", "Format and size:", ""]
    lines += _table(
        ["class", *names, "median width", "median height", "mean grey"],
        [
            [
                plain(label),
                *(by.get(name, 0) for name in names),
                f"{formats['median_width_px'][label]:.0f}",
                f"{formats['median_height_px'][label]:.0f}",
                f"{formats['mean_grey'][label]:.1f}",
            ]
            for label, by in formats["by_label"].items()
        ],
    )
    told = formats["label_from_format"]
    lines += [
        f"The format alone tells the class of {_percent(told)}, on the scans it was counted on; "
        f"the most frequent class is {100 * told['majority_accuracy']:.1f}%.",
        "",
    ]
    lines += _report_brightness(findings["brightness"], findings["majority"])
    return "\n".join(lines)


def _report_brightness(brightness: Mapping[str, Any], majority: Mapping[str, Any]) -> list[str]:
    direction = "brighter" if brightness["brighter"] else "darker"
    lines = [
        f"Mean grey: {code(brightness['label'])} if {direction} than "
        f"{brightness['threshold_grey']:.1f}, fitted on {brightness['fitted_n']} scans:",
        "",
    ]
    rows = []
    for name, result in brightness["measured"].items():
        if "not_measured" in result:
            rows.append([name, "not measured", plain(result["not_measured"]), "", result["n"]])
            continue
        rows.append(
            [
                name,
                f"{result['auroc']:.3f}",
                _percent(result),
                f"{100 * result['majority_accuracy']:.1f}%",
                f"{result['n']} ({result['n_positive']} {plain(brightness['label'])})",
            ]
        )
    lines += _table(["measured on", "AUROC", "accuracy", "majority of the two", "n"], rows)
    lines += [f"Always answering {code(majority['label'])}, among all classes:", ""]
    lines += _table(
        ["measured on", "accuracy", "n"],
        [[name, _percent(result), result["n"]] for name, result in majority["measured"].items()],
    )
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [*table(head, rows), ""]


def _share(cell: Mapping[str, int] | None) -> str:
    return f"{cell['copied']} of {cell['n']}" if cell else "-"


def _percent(result: Mapping[str, Any]) -> str:
    low, high = result["accuracy_95"]
    return f"{100 * result['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


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
