"""All shortcut checks of one model, and their report in Markdown.

Three questions. What is left of the scores when a shortcut is taken out of the scans, and what
when the lungs are? Does the activation map lie in the body and in the lungs? Does it point at the
tumours that radiologists have boxed?
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chestct.contract import SCAN_SIZE, ModelMetadata
from training.common.atomic_io import without_nan
from training.common.metrics import Floats
from training.data.dataset import ScanSet, predict_outputs
from training.score.shortcuts.masks import Pixels
from training.score.shortcuts.perturb import shortcut_scores
from training.score.shortcuts.pointing import map_mass, pointing_game, read_annotated


def check_shortcuts(
    model: Any, facts: ModelMetadata, test: ScanSet, boxes: Path | None = None
) -> dict[str, Any]:
    """All checks of one model as plain values ready for JSON; None for what is undefined.

    Args:
        model: The Keras model of `training.network.vgg16`.
        facts: Its labels and window.
        test: Scans that it was not trained on.
        boxes: Folder for `read_annotated`; without one nothing is pointed at.

    Returns:
        `scores` of `shortcut_scores`, `map` of `map_mass`, `pointing` of `pointing_game` or None.

    Raises:
        ValueError: `boxes` holds no annotation that can be used.
        chestct.errors.ScanDecodeError: An annotated slice cannot be read.
        OSError: A file under `boxes` cannot be read.
    """
    annotated = None if boxes is None else read_annotated(boxes, facts.class_names, facts.window)
    outputs = predict_outputs(model, test.pixels, "scans as they are")
    probabilities = outputs["probabilities"]

    def predict(pixels: Pixels) -> Floats:
        return predict_outputs(model, pixels, "perturbed scans")["probabilities"]

    pointing = None
    if annotated is not None:
        shown = predict_outputs(model, annotated.pixels, "annotated slices")
        pointing = pointing_game(
            shown["activation_map"], shown["probabilities"].argmax(axis=1), annotated
        )
    plain: dict[str, Any] = without_nan({
        "scores": shortcut_scores(predict, test, probabilities),
        "map": map_mass(outputs["activation_map"], probabilities.argmax(axis=1), test),
        "pointing": pointing,
    })  # fmt: skip
    return plain


def report_lines(shortcuts: dict[str, Any]) -> list[str]:
    """The result of `check_shortcuts` as lines of Markdown, without a heading."""
    scores, mass, pointing = (shortcuts[key] for key in ("scores", "map", "pointing"))
    keys = list(scores["unperturbed"])
    lines = [
        f"{scores['n']} scans in {scores['groups']} groups; after each score its change against "
        "the scans as they are. Intervals are 95 %, by a bootstrap over groups.",
        "",
        f"| scans | {' | '.join(key.replace('_', ' ').replace('auroc', 'AUROC') for key in keys)} "
        "| same label |",
        "| --- |" + " --- |" * (len(keys) + 1),
        f"| as they are | {' | '.join(_shown(scores['unperturbed'][key]) for key in keys)} | |",
    ]
    for found in scores["perturbed"].values():
        cells = [
            f"{_shown(found['scores'][key])}; {_shown(found['difference'][key], signed=True)}"
            for key in keys
        ]
        lines.append(f"| {found['what']} | {' | '.join(cells)} | {found['same_label']:.3f} |")
    blanked = scores["perturbed"]["lungs_blanked"]
    high = blanked["difference"]["accuracy"]["high"]
    drops = high is not None and high < 0
    lines += [
        "",
        f"Lungs were found and blanked in {blanked['changed']} of {scores['n']} scans. Accuracy "
        + ("drops, as it must." if drops else "does not drop beyond doubt, as it must: ")
        + ("" if drops else "the answers do not come from the lungs."),
        "",
        f"| positive mass of the predicted class's map, n = {mass['n']} | share | even map | "
        "difference |",
        "| --- | --- | --- | --- |",
    ]
    for place in ("body", "lungs"):
        found = mass[place]
        lines.append(
            f"| inside the {place} | {_shown(found)} | {_figure(found['uniform'])} | "
            f"{_shown(found['difference'], signed=True)} |"
        )
    lines += [
        "",
        f"Left out: {mass['no_outline']} scans without a body that stands out, "
        f"{mass['no_evidence']} without positive evidence.",
        "",
    ]
    if pointing is None:
        return [*lines, "Pointing at boxed tumours: not measured (no annotated slices given)."]
    lines += [
        f"Pointing game on {pointing['n']} annotated slices of {pointing['patients']} "
        f"patient{'s' * (pointing['patients'] != 1)}, {pointing['right']} of them given the "
        f"annotated class; a hit lies within {pointing['tolerance_px']:g} of {SCAN_SIZE} pixels of "
        "a box. Wilson's interval takes the slices of a patient for independent, which they are "
        "not: it is too narrow.",
        "",
        "| map of the | hits | random cell | mass in the boxes | boxes' share of the area |",
        "| --- | --- | --- | --- | --- |",
    ]
    for whose in ("annotated_class", "predicted_class"):
        found = pointing[whose]
        lines.append(
            f"| {whose.replace('_', ' ')} | {found['hits']} of {found['n']}, {_shown(found)} | "
            f"{_figure(found['chance'])} | {_shown(found['mass'])} | {_figure(found['area'])} |"
        )
    reasons = [f"{count} {why.replace('_', ' ')}" for why, count in pointing["skipped"].items()]
    return [*lines, "", f"Skipped: {', '.join(reasons)}."]


def _shown(number: dict[str, float | None], *, signed: bool = False) -> str:
    value, low, high = (_figure(number[key], signed=signed) for key in ("value", "low", "high"))
    return value if number["low"] is None else f"{value} ({low} to {high})"


def _figure(value: float | None, *, signed: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if signed else ''}.3f}"
