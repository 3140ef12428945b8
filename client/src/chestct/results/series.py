"""The slices of a series as one answer: sorted, looked through for gaps, and summed up.

A tumour takes a few slices of a chest. The mean over all slices would drown it; the single worst
slice would let one mistaken slice decide. So the probabilities of a series are the mean of those
of its `k` slices with most evidence against normal, `k` a tenth of the slices in domain but at
least 3: a chest is some 300 mm tall, so a tenth is some 30 mm, the size up to which a tumour is
T1 (TNM, 8th edition), whatever the distance of the slices. It is a rule, not trained and not
calibrated for series: the slices that are chosen are the extreme ones, so the mean leans away
from normal, and more so the more slices there are.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from chestct.contract import NOT_A_MEDICAL_DEVICE
from chestct.imaging.metadata import SliceMetadata
from chestct.results.records import KeySlice, SeriesResult, SliceResult

__all__ = [
    "NORMAL",
    "SeriesSlice",
    "gaps_mm",
    "group_series",
    "num_top_slices",
    "series_record",
    "series_warnings",
    "sort_slices",
]

NORMAL = "normal"  # the label against which evidence counts
TOP_PART = 0.1  # of the slices in domain, see above
MIN_TOP_SLICES = 3  # one mistaken slice is outvoted
MIN_SLICES = 10  # of a chest some 300 mm tall, even at 30 mm from slice to slice
GAP = 1.5  # times the usual distance of neighbours: one slice that lacks makes it 2
SAME_POSITION_MM = 0.01  # positions are written with at least two decimals


@dataclass(frozen=True)
class SeriesSlice:
    """One classified slice, as small as a series needs it.

    Attributes:
        path: As in its record.
        probabilities: By label.
        in_domain: As in its record.
        facts: What its DICOM file says: `chestct.imaging.prepare.Scan.metadata`.
    """

    path: str
    probabilities: Mapping[str, float]
    in_domain: bool
    facts: SliceMetadata

    @classmethod
    def from_record(cls, record: SliceResult, facts: SliceMetadata) -> SeriesSlice:
        """From a record with status `ok`, as made by `chestct.results.records.result_line`."""
        return cls(record["path"], record["probabilities"], record["in_domain"], facts)

    @property
    def non_normal_probability(self) -> float:
        """Probability of everything but `normal`; 0 where the model has no such label."""
        return 1 - self.probabilities[NORMAL] if NORMAL in self.probabilities else 0.0


def group_series(slices: Iterable[SeriesSlice]) -> dict[str, list[SeriesSlice]]:
    """Slices by Series Instance UID, in the order in which each series was first seen.

    A slice whose file tells no series belongs to none and is left out. The keys are for grouping;
    no record carries them unless asked for.
    """
    series: dict[str, list[SeriesSlice]] = {}
    for item in slices:
        if item.facts.series_uid:
            series.setdefault(item.facts.series_uid, []).append(item)
    return series


def sort_slices(slices: Iterable[SeriesSlice]) -> list[SeriesSlice]:
    """From the feet to the head by position; behind them, by number, those without one."""

    def key(item: SeriesSlice) -> tuple[bool, float, int, int, str]:
        position, instance = item.facts.position_mm, item.facts.instance
        return (
            position is None,
            0.0 if position is None else position,
            0 if instance is None else instance,
            item.facts.frame,
            item.path,
        )

    return sorted(slices, key=key)


def num_top_slices(num_in_domain: int) -> int:
    """Number of slices averaged for a series: a tenth of those in domain, rounded up, at least 3.

    Never more than there are.
    """
    return min(num_in_domain, max(MIN_TOP_SLICES, -(-num_in_domain // round(1 / TOP_PART))))


def gaps_mm(slices: Iterable[SeriesSlice]) -> list[tuple[float, float]]:
    """Gaps between slices: the positions on both sides of each, from the feet to the head.

    A gap is a distance of neighbours above 1.5 times the median one.
    """
    positions = _distinct_positions(slices)
    distances = [upper - lower for lower, upper in pairwise(positions)]
    if not distances:
        return []
    usual = median(distances)
    return [(low, high) for low, high in pairwise(positions) if high - low > GAP * usual]


def series_warnings(slices: Sequence[SeriesSlice]) -> list[str]:
    """What makes a series doubtful, a sentence each, without a full stop.

    Gaps, several slices at one position, slices without a position, mixed kernels, thicknesses
    and frames of reference, and too few slices.
    """
    facts = [item.facts for item in slices]
    warnings = []
    if gaps := gaps_mm(slices):
        widest = max(high - low for low, high in gaps)
        warnings.append(
            f"gaps: {len(gaps)} between neighbouring slices, the widest {widest:.1f} mm"
        )
    known = [item for item in facts if item.position_mm is not None]
    if num_unknown := len(facts) - len(known):
        warnings.append(f"no position: {num_unknown} of {len(facts)} slices do not tell theirs")
    num_repeated = len(known) - len(_distinct_positions(slices))
    if num_repeated:
        warnings.append(f"repeated positions: {num_repeated} slices lie where another one does")
    for word, values in (
        ("kernels", Counter(item.kernel for item in facts)),
        ("slice thicknesses in mm", Counter(item.thickness_mm for item in facts)),
    ):
        if len(values) > 1:
            found = ", ".join(
                f"{'unknown' if value in ('', None) else value} ({count})"
                for value, count in values.most_common()
            )
            warnings.append(f"mixed {word}: {found}")
    if len({item.frame_of_reference_uid for item in facts}) > 1:
        warnings.append("several frames of reference: positions may not be comparable")
    if len(facts) < MIN_SLICES:
        warnings.append(f"few slices: {len(facts)}, expected at least {MIN_SLICES} of a chest")
    return warnings


def series_record(
    slices: Sequence[SeriesSlice], *, num_failed: int = 0, with_uids: bool = False
) -> SeriesResult:
    """The record of a series: the mean of its slices with most evidence, see the module.

    Copies of a slice (same SOP Instance UID and frame) count once. Where the model has no label
    `normal`, the mean is over all slices in domain.

    Args:
        slices: Of one series, in any order; at least one.
        num_failed: Files or frames of the series that could not be read.
        with_uids: Carry the UIDs of study and series.

    Returns:
        With `error` in place of label, probabilities, aggregation and slice where no slice is in
        domain.

    Raises:
        ValueError: No slices.
    """
    if not slices:
        raise ValueError("a series without slices: expected at least one")
    distinct = {(item.facts.sop_uid or item.path, item.facts.frame): item for item in slices}
    ordered = sort_slices(distinct.values())
    fit = [item for item in ordered if item.in_domain]
    kernels = {item.facts.kernel for item in ordered}
    warnings = series_warnings(ordered)
    if len(ordered) < len(slices):
        warnings.append(f"copies: {len(slices) - len(ordered)} slices occur again and count once")
    if num_failed:
        warnings.append(f"unreadable: {num_failed} slices of the series are missing here")
    record: SeriesResult = {
        "path": _common_path([item.path for item in slices]),
        "status": "error",
        "num_slices": len(ordered),
        "num_out_of_domain": len(ordered) - len(fit),
        "num_failed": num_failed,
        "gaps_mm": [[round(low, 2), round(high, 2)] for low, high in gaps_mm(ordered)],
        "warnings": warnings,
        "notice": NOT_A_MEDICAL_DEVICE,
    }
    if with_uids:
        record["study_uid"] = ordered[0].facts.study_uid
        record["series_uid"] = ordered[0].facts.series_uid
    if len(kernels) == 1 and "" not in kernels:
        record["kernel"] = kernels.pop()
    if fit:
        _add_answer(record, fit)
    else:
        message = f"none of its {len(ordered)} slices looks like a slice of a chest CT"
        record["error"] = {"type": "OutOfDomainError", "message": message}
    return record


def _add_answer(record: SeriesResult, fit: Sequence[SeriesSlice]) -> None:
    labels = list(fit[0].probabilities)
    top = list(fit)
    rule = "mean of all slices in domain"
    if NORMAL in labels:
        rule = "mean of the slices with most evidence against normal"
        top = sorted(fit, key=lambda item: -item.non_normal_probability)
        top = top[: num_top_slices(len(fit))]
    mean = {label: sum(item.probabilities[label] for item in top) / len(top) for label in labels}
    label = max(labels, key=lambda name: mean[name])
    key = top[0] if NORMAL in labels else max(top, key=lambda item: item.probabilities[label])
    key_slice: KeySlice = {"path": key.path}
    if key.facts.position_mm is not None:
        key_slice["position_mm"] = round(key.facts.position_mm, 2)
    if NORMAL in labels:
        key_slice["evidence"] = round(key.non_normal_probability, 7)
    record["status"] = "ok"
    record["label"] = label
    record["probabilities"] = {name: round(value, 7) for name, value in mean.items()}
    record["aggregation"] = {"rule": rule, "num_slices": len(top)}
    record["slice"] = key_slice


def _distinct_positions(slices: Iterable[SeriesSlice]) -> list[float]:
    positions: list[float] = []
    for position in sorted(
        item.facts.position_mm for item in slices if item.facts.position_mm is not None
    ):
        if not positions or position - positions[-1] > SAME_POSITION_MM:
            positions.append(position)
    return positions


def _common_path(paths: Sequence[str]) -> str:
    files = {path.rpartition("#")[0] or path for path in paths}
    if len(files) == 1:
        return files.pop()
    try:
        common = os.path.commonpath([_holder(file) for file in files])
    except ValueError:  # some absolute, some relative
        common = ""
    return common or "."


def _holder(file: str) -> str:
    """The folder or archive that holds a file."""
    folder, name = os.path.split(file)
    archive = re.match(r"(.*\.zip)!", name, re.IGNORECASE)
    return os.path.join(folder, archive[1]) if archive else folder
