"""Scores after a shortcut (brightness, margins, file format) or the lungs are taken out."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.common.metrics import (
    NORMAL,
    Floats,
    Statistic,
    accuracy,
    balanced_accuracy,
    class_auroc,
    macro_auroc,
    paired_difference,
    with_intervals,
)
from training.data.dataset import ScanSet
from training.score.shortcuts.masks import Pixels, body_outline, lung_mask

JPEG_QUALITY = 75  # Pillow's default, which is what most pictures on the web were saved with


def equalize_brightness(scans: Pixels, mean_grey: float) -> Pixels:
    """Every scan with the same mean grey, by a gamma curve of its own.

    A gamma curve and not an offset: black and white stay where they are and no two greys change
    their order, so that nothing is clipped and air stays air, whatever the window was. The mean is
    that of the whole scan, which is cropped to the body: it is what the baseline "mean grey"
    sees, and tells nothing any more. Other statistics of the greys still may.

    Args:
        scans: uint8 (N, 224, 224, 1).
        mean_grey: What the mean of each scan becomes, above 0 and below 255, as near as its black
            and white pixels allow, which stay.

    Returns:
        uint8 (N, 224, 224, 1).
    """
    if not 0 < mean_grey < 255:
        raise ValueError(f"mean_grey is {mean_grey}: expected a grey between 0 and 255")
    return np.stack([
        _gamma_table(np.bincount(scan.ravel(), minlength=256), mean_grey)[scan] for scan in scans
    ])  # fmt: skip


def _gamma_table(histogram: npt.NDArray[np.int64], mean_grey: float) -> Pixels:
    """uint8 (256,): 255 (grey / 255)^gamma, gamma by bisection between 1/16 and 16."""
    greys, low, high = np.arange(256) / 255, -4.0, 4.0
    for _ in range(24):
        gamma = 2 ** ((low + high) / 2)
        brighter = np.average(255 * greys**gamma, weights=histogram) > mean_grey
        low, high = ((low + high) / 2, high) if brighter else (low, (low + high) / 2)
    return np.rint(255 * greys**gamma).astype(np.uint8)


def blank_outside(scans: Pixels) -> Pixels:
    """Scans uint8 (N, 224, 224, 1) with all that lies outside the body's outline set to 0.

    A scan in which no body stands out stays as it is.
    """
    blanked = scans.copy()
    for scan in blanked:
        outline = body_outline(scan)
        if outline.any():
            scan[~outline] = 0
    return blanked


def blank_lungs(scans: Pixels) -> Pixels:
    """Scans uint8 (N, 224, 224, 1) with the lungs filled by the scan's own median tissue grey.

    Tissue is the body without its lungs. A scan in which no lung is seen stays as it is.
    """
    blanked = scans.copy()
    for scan in blanked:
        lungs = lung_mask(scan)
        if lungs.any():
            scan[lungs] = np.median(scan[body_outline(scan) & ~lungs])
    return blanked


def reencode_jpeg(scans: Pixels, quality: int = JPEG_QUALITY) -> Pixels:
    """Scans uint8 (N, 224, 224, 1) after one round through a grey JPEG of this quality.

    The blocks and the lost fine detail are then the same in scans that came as PNG and as JPEG.
    """
    decoded = np.empty_like(scans)
    for index, scan in enumerate(scans):
        file = BytesIO()
        Image.fromarray(scan[:, :, 0]).save(file, "JPEG", quality=quality)
        decoded[index, :, :, 0] = np.asarray(Image.open(file))
    return decoded


def shortcut_scores(
    predict: Callable[[Pixels], Floats], scans: ScanSet, probabilities: Floats
) -> dict[str, Any]:
    """Scores after a shortcut, or the lungs, are taken out of the scans.

    Args:
        predict: Gives the probabilities float32 (N, C) of scans uint8 (N, 224, 224, 1).
        scans: N scans of any number of groups.
        probabilities: float32 (N, C), what `predict` gives for them as they are.

    Returns:
        `n`, `groups`, `unperturbed` and `perturbed`. Scores are {value, low, high}, intervals of
        95 % by a bootstrap over groups: `accuracy`, `balanced_accuracy`, `macro_auroc` and, where
        a class is called normal, `normal_against_rest_auroc`. Each of `perturbed`
        (`brightness_equalized`, `outside_blanked`, `lungs_blanked`, `jpeg`) has these as `scores`,
        and as `difference` perturbed minus unperturbed, resampled as pairs; besides `changed`,
        how many scans differ from before, `mean_change` in grey levels over all pixels, and
        `same_label`, the share of scans whose most probable class stays.
    """
    mean_grey = float(np.median(scans.pixels.mean(axis=(1, 2, 3))))
    perturbations: dict[str, tuple[str, Callable[[Pixels], Pixels]]] = {
        "brightness_equalized": (
            f"brightness equalised (gamma to a mean grey of {mean_grey:.0f})",
            lambda pixels: equalize_brightness(pixels, mean_grey),
        ),
        "outside_blanked": ("outside of the body blanked", blank_outside),
        "lungs_blanked": ("lungs blanked with the median tissue grey", blank_lungs),
        "jpeg": (f"re-encoded as JPEG, quality {JPEG_QUALITY}", reencode_jpeg),
    }
    statistics = _statistics(scans.names)
    differences = {
        key: paired_difference(statistic, len(scans.names)) for key, statistic in statistics.items()
    }
    perturbed = {}
    for name, (what, perturb) in perturbations.items():
        pixels = perturb(scans.pixels)
        answers = predict(pixels)
        pairs = np.concatenate([probabilities, answers], axis=1)
        change = np.abs(pixels.astype(np.int16) - scans.pixels)
        perturbed[name] = {
            "what": what,
            "changed": int(change.any(axis=(1, 2, 3)).sum()),
            "mean_change": float(change.mean()),
            "same_label": float((answers.argmax(1) == probabilities.argmax(1)).mean()),
            "scores": with_intervals(statistics, answers, scans.labels, scans.groups),
            "difference": with_intervals(differences, pairs, scans.labels, scans.groups),
        }
    return {
        "n": len(scans),
        "groups": len(np.unique(scans.groups)),
        "unperturbed": with_intervals(statistics, probabilities, scans.labels, scans.groups),
        "perturbed": perturbed,
    }


def _statistics(names: tuple[str, ...]) -> dict[str, Statistic]:
    statistics = {
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
        "macro_auroc": macro_auroc,
    }
    if NORMAL in names and len(names) > 2:
        statistics["normal_against_rest_auroc"] = class_auroc(names.index(NORMAL))
    return statistics
