"""Evaluation protocols: which scans are scored, and what the model has seen of them.

A score means something only together with its protocol. Each one holds scans, the answers of the
model and those of the baselines, which were fitted on the same training scans as the model.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chestct.contract import ModelMetadata
from chestct.imaging.sources import list_scans
from training.common.metrics import NORMAL, calibration_error, reliability, score
from training.data.dataset import ScanSet, load_pixels, predict_outputs, read_split
from training.score.baselines import BASELINES

Floats = npt.NDArray[np.float32]

CROSS_VALIDATE = (
    "run python -m training crossvalidate with the config and the overrides of the model"
)


@dataclass(frozen=True)
class Protocol:
    """Some scans and what was answered to them.

    Attributes:
        name: `official`, `official_without_duplicates`, `grouped_fold`, `grouped`,
            `grouped_distinct`, `external_<folder>`.
        scans: N scans.
        answers: Probabilities float32 (N, C) by who answered, `model` first.
        temperature: float32 (N,), what the model's logits were divided by.
    """

    name: str
    scans: ScanSet
    answers: dict[str, Floats]
    temperature: Floats

    def where(self, name: str, keep: npt.NDArray[np.bool_]) -> Protocol:
        """The scans for which `keep`, bool (N,), is true, as a protocol of its own."""
        answers = {who: answer[keep] for who, answer in self.answers.items()}
        return Protocol(name, self.scans.where(keep), answers, self.temperature[keep])

    def scores(self) -> dict[str, Any]:
        """By who answered the result of `training.common.metrics.score`; calibration beside it.

        `reliability` and `before_temperature` {calibration_error, reliability} are the model's.
        """
        scored: dict[str, Any] = {
            who: score(answer, self.scans.labels, self.scans.groups, self.scans.names)
            for who, answer in self.answers.items()
        }
        # softmax(z / T) to the power of T, normalised, is softmax(z).
        warm = self.answers["model"].astype(np.float64) ** self.temperature[:, np.newaxis]
        raw = (warm / warm.sum(axis=1, keepdims=True)).astype(np.float32)
        labels = self.scans.labels
        return scored | {
            "reliability": reliability(self.answers["model"], labels),
            "before_temperature": {
                "calibration_error": calibration_error(raw, labels),
                "reliability": reliability(raw, labels),
            },
        }


def distinct(scans: ScanSet) -> npt.NDArray[np.bool_]:
    """Bool (N,), true for the first of each set of scans with equal pixels."""
    seen: set[bytes] = set()
    first = []
    for scan in scans.pixels:
        content = scan.tobytes()
        first.append(content not in seen)
        seen.add(content)
    return np.array(first, bool)


def official_protocols(
    name: str, facts: ModelMetadata, sets: dict[str, ScanSet], probabilities: Floats
) -> list[Protocol]:
    """The test split as it is, and without scans that have a near duplicate in train or valid.

    Args:
        name: `official`, or `grouped_fold` where the split is one fold of a grouped split.
        facts: Of the model.
        sets: train, valid and test.
        probabilities: float32 (N, C), the model's answers to test.
    """
    train, test = sets["train"], sets["test"]
    answers = {"model": probabilities}
    answers |= {who: baseline(train, test.pixels) for who, baseline in BASELINES.items()}
    whole = Protocol(name, test, answers, np.full(len(test), facts.temperature, np.float32))
    seen = np.isin(test.groups, np.union1d(train.groups, sets["valid"].groups))
    return [whole, whole.where(f"{name}_without_duplicates", ~seen)] if seen.any() else [whole]


def read_cross_validation(folder: Path) -> dict[str, Any]:
    """The record of a complete cross-validation.

    Raises:
        ValueError: There is none; the message says which command to run.
    """
    try:
        record: dict[str, Any] = json.loads((folder / "crossvalidate.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: no such file; {CROSS_VALIDATE}") from error
    return record


def grouped_protocols(folder: Path, scans: Path, facts: ModelMetadata) -> list[Protocol]:
    """Every scan, answered by the fold that has not seen its group; and the distinct pictures.

    Args:
        folder: What `training crossvalidate` wrote.
        scans: Folder that its paths are relative to.
        facts: Of any model of the same scans, for the window.

    Raises:
        ValueError: The table of answers is missing or does not belong to the folds.
        chestct.errors.ScanDecodeError: A scan cannot be read.
    """
    num_folds = len(read_cross_validation(folder)["folds"])
    with (folder / "answers.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    parts = []
    for fold in (folder / f"fold-{number}" for number in range(num_folds)):
        sets = read_split(scans, fold / "split/split.csv", facts.window)
        test, train = sets["test"], sets["train"]
        if any(path not in rows for path in test.paths) or test.names != facts.class_names:
            raise ValueError(f"{fold}: other scans than in {folder}/answers.csv; run it again")
        of_fold = ModelMetadata.from_parameters(json.loads((fold / "train/facts.json").read_text()))
        model = np.array(
            [[rows[path][name] for name in facts.class_names] for path in test.paths], np.float32
        )
        answers = {"model": model}
        answers |= {who: baseline(train, test.pixels) for who, baseline in BASELINES.items()}
        temperature = np.full(len(test), of_fold.temperature, np.float32)
        parts.append(Protocol("grouped", test, answers, temperature))
    together = ScanSet(
        np.concatenate([part.scans.pixels for part in parts]),
        np.concatenate([part.scans.labels for part in parts]),
        np.concatenate([part.scans.groups for part in parts]),
        tuple(path for part in parts for path in part.scans.paths),
        facts.class_names,
    )
    whole = Protocol(
        "grouped",
        together,
        {who: np.concatenate([part.answers[who] for part in parts]) for who in parts[0].answers},
        np.concatenate([part.temperature for part in parts]),
    )
    return [whole, whole.where("grouped_distinct", distinct(whole.scans))]


def external_protocols(
    model: Any, facts: ModelMetadata, train: ScanSet, folder: Path
) -> list[Protocol]:
    """Each other folder of an outside source against its folder `normal`, as two classes.

    The probability of the second class is 1 - P(normal): outside sources rarely name the same
    subtypes.

    Args:
        model: The classifier.
        facts: Its facts.
        train: What it and the baselines were fitted on.
        folder: `CLASS/*`.

    Raises:
        ValueError: No class `normal` in the model or in the folder, or no other folder.
        chestct.errors.ScanDecodeError: A scan cannot be read.
    """
    classes = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    if NORMAL not in facts.class_names or NORMAL not in classes or len(classes) < 2:
        raise ValueError(
            f"{folder}: holds {sorted(classes)}, the model knows {list(facts.class_names)}; "
            f"expected {NORMAL!r} in both and another folder beside it"
        )
    paths = {name: list(list_scans(path)) for name, path in classes.items()}
    pixels = {
        name: load_pixels(found, f"decode {name}", facts.window) for name, found in paths.items()
    }
    protocols = []
    for name in classes:
        if name == NORMAL:
            continue
        both = np.concatenate([pixels[NORMAL], pixels[name]])
        labels = np.repeat([0, 1], [len(pixels[NORMAL]), len(pixels[name])])
        listed = tuple(
            str(path.relative_to(folder.parent)) for path in (*paths[NORMAL], *paths[name])
        )
        scans = ScanSet(both, labels, np.arange(len(labels)), listed, (NORMAL, name))
        answers = {"model": predict_outputs(model, both, f"external {name}")["probabilities"]}
        answers |= {who: baseline(train, both) for who, baseline in BASELINES.items()}
        normal = facts.class_names.index(NORMAL)
        two = {
            who: np.column_stack([answer[:, normal], 1 - answer[:, normal]])
            for who, answer in answers.items()
        }
        # The temperature scales four logits, not these two: only the served calibration is shown.
        ones = np.ones(len(labels), np.float32)
        protocols.append(Protocol(f"external_{name}", scans, two, ones))
    return protocols
