"""Gate: limits on the loss of a variant against the FP32 model, on labelled scans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.check.runners import Outputs, Runner, output_differences, run_all
from training.common.config import config_class
from training.common.metrics import (
    Statistic,
    accuracy,
    bootstrap_interval,
    macro_auroc,
    paired_difference,
)
from training.data.dataset import ScanSet


@config_class
class Gate:
    """Limits on the loss of a variant against the FP32 model, on the labelled validation scans.

    AUROC and accuracy are judged by their measured change, not by its interval: on some 70 scans
    the interval of a paired difference is wider than the limits, so no variant could prove that
    it loses less than half a point. A variant that holds has shown no loss beyond the limit on
    these scans, which is less than a proof that there is none; the interval is reported beside
    it. One scan of 72 is 0.014: an accuracy limit of 0.01 means not one more error, net. The other
    figures need no labels and compare answer by answer, so they see a change long before labels
    can; that is why they are gated too.

    Attributes:
        label_agreement: Least fraction of scans with the same label.
        macro_auroc_drop: Most that the macro AUROC may be lower.
        accuracy_drop: Most that the accuracy may be lower.
        mean_probability_error: Of |p - p_fp32| over scans and classes.
        max_probability_error: A single probability moves most where two classes are about equal:
            there a small change of the logits is amplified, and no label was certain before.
        median_map_correlation: Pearson correlation of a scan's map, over places and classes;
            half the scans have at least this one. It does not see a common scale, which a
            temperature of its own may give.
        least_map_correlation: Of the worst scan.
        in_domain_agreement: Least fraction of scans on the same side of the domain threshold,
            each model with its own. 5 % of the validation scans lie beyond it by definition, so
            there are always scans near it.
    """

    label_agreement: float = 0.97
    macro_auroc_drop: float = 0.005
    accuracy_drop: float = 0.01
    mean_probability_error: float = 0.02
    max_probability_error: float = 0.2
    median_map_correlation: float = 0.98
    least_map_correlation: float = 0.9
    in_domain_agreement: float = 0.95


AT_LEAST = (
    "label_agreement", "median_map_correlation", "least_map_correlation", "in_domain_agreement",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One measured number of a variant and its limit, with a 95 % interval where labels count."""

    name: str
    value: float
    limit: float
    low: float | None = None
    high: float | None = None

    def __bool__(self) -> bool:
        """Whether the value is within the limit; false for NaN."""
        if self.name in AT_LEAST:
            return self.value >= self.limit
        return self.value <= self.limit

    def describe(self) -> str:
        """The name, the value, its interval and its limit."""
        interval = "" if self.low is None else f" ({self.low:.4f} to {self.high:.4f})"
        bound = "least" if self.name in AT_LEAST else "limit"
        return f"{self.name} {self.value:.4f}{interval} ({bound} {self.limit})"


@dataclass(frozen=True)
class GateReport:
    """Figures of a variant in one engine, on the scans of each split.

    Attributes:
        reference: Name of the runner that is right by definition.
        candidate: Name of the other one.
        num_scans: Scans compared, by split.
        num_groups: Their near-duplicate groups, which the intervals resample.
        figures: One for each limit of the gate, by split.
        differences: Names and shapes that differ, in words.
        gated: The split that decides; the others are only reported.
    """

    reference: str
    candidate: str
    num_scans: dict[str, int]
    num_groups: dict[str, int]
    figures: dict[str, tuple[Figure, ...]]
    differences: tuple[str, ...] = ()
    gated: str = "valid"

    @property
    def reasons(self) -> list[str]:
        """Why the variant is refused, one sentence each; empty when it holds."""
        if self.differences:
            return list(self.differences)
        if not self.num_scans.get(self.gated):
            return ["no scan was compared"]
        return [figure.describe() for figure in self.figures[self.gated] if not figure]

    def __bool__(self) -> bool:
        """Whether the variant may stand for the reference."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, with the verdict."""
        return {"holds": bool(self)} | asdict(self) | {"reasons": self.reasons}

    def describe(self) -> str:
        """One line that says whether the gate holds, and why not."""
        if self.reasons:
            return f"parity FAILS: {self.candidate}: {'; '.join(self.reasons)}"
        figures = ", ".join(figure.describe() for figure in self.figures[self.gated])
        return (
            f"parity holds: {self.candidate} against {self.reference} on "
            f"{self.num_scans[self.gated]} {self.gated} scans: {figures}"
        )


def gate_figures(
    scans: ScanSet,
    reference: Outputs,
    candidate: Outputs,
    thresholds: tuple[float, float],
    gate: Gate,
) -> tuple[Figure, ...]:
    """Every figure of the gate on labelled scans, in the order of its attributes.

    The intervals are paired: whole groups are resampled, and both models are scored on the same
    resample (Efron and Tibshirani 1993, section 8.3, with the difference as the statistic).

    Args:
        scans: The labelled scans.
        reference: Outputs of the FP32 model for them.
        candidate: Outputs of the variant.
        thresholds: Domain thresholds of the two.
        gate: The limits.
    """
    before, after = (outputs["probabilities"] for outputs in (reference, candidate))
    pairs = np.hstack([after, before])

    def drop(statistic: Statistic) -> tuple[float, float, float]:
        lost = paired_difference(statistic, before.shape[1])
        return lost(pairs, scans.labels), *bootstrap_interval(
            lost, pairs, scans.labels, scans.groups
        )

    errors = np.abs(before.astype(np.float64) - after)
    correlations = _map_correlations(reference["activation_map"], candidate["activation_map"])
    inside = [
        outputs["domain_distance"] <= threshold
        for outputs, threshold in zip((reference, candidate), thresholds, strict=True)
    ]
    found: dict[str, tuple[float, ...]] = {
        "label_agreement": (float(np.mean(before.argmax(axis=1) == after.argmax(axis=1))),),
        "macro_auroc_drop": drop(macro_auroc),
        "accuracy_drop": drop(accuracy),
        "mean_probability_error": (float(errors.mean()),),
        "max_probability_error": (float(errors.max()),),
        "median_map_correlation": (float(np.median(correlations)),),
        "least_map_correlation": (float(correlations.min()),),
        "in_domain_agreement": (float(np.mean(inside[0] == inside[1])),),
    }
    return tuple(
        Figure(name, found[name][0], limit, *found[name][1:])
        for name, limit in asdict(gate).items()
    )


def _map_correlations(
    wanted: npt.NDArray[np.float32], got: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Pearson correlation of each scan's two maps (N, 14, 14, C); NaN where one is constant."""
    with np.errstate(invalid="ignore"):
        pairs = zip(wanted, got, strict=True)
        return np.array([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])


def compare_by_labels(
    sets: Mapping[str, ScanSet],
    reference: tuple[str, Runner, float],
    candidates: Mapping[str, Runner],
    threshold: float,
    gate: Gate,
) -> tuple[GateReport, ...]:
    """Run the reference once and each candidate on the labelled scans of every split.

    Args:
        sets: Scans by split; `valid` decides.
        reference: Name, runner and domain threshold of the FP32 model.
        candidates: Name and runner of the variant in each engine.
        threshold: Domain threshold of the variant.
        gate: The limits.
    """
    name, runner, own_threshold = reference
    wanted = {split: run_all(f"{name}, {split}", runner, s.pixels) for split, s in sets.items()}
    reports = []
    for candidate, run in candidates.items():
        figures: dict[str, tuple[Figure, ...]] = {}
        differences: tuple[str, ...] = ()
        for split, scans in sets.items():
            got = run_all(f"{candidate}, {split}", run, scans.pixels)
            differences = output_differences(wanted[split], got)
            if differences:
                break
            figures[split] = gate_figures(
                scans, wanted[split], got, (own_threshold, threshold), gate
            )
        reports.append(
            GateReport(
                reference=name,
                candidate=candidate,
                num_scans={split: len(scans) for split, scans in sets.items()},
                num_groups={split: len(np.unique(s.groups)) for split, s in sets.items()},
                figures=figures,
                differences=differences,
            )
        )
    return tuple(reports)
