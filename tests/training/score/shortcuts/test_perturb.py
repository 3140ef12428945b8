from __future__ import annotations

import math

import numpy as np
import pytest

from training.data.dataset import ScanSet
from training.data.phantom import LABELS
from training.score.shortcuts.masks import body_outline, lung_mask
from training.score.shortcuts.perturb import (
    blank_lungs,
    blank_outside,
    equalize_brightness,
    reencode_jpeg,
    shortcut_scores,
)

pytestmark = pytest.mark.xdist_group("shortcuts")  # its fixtures are made once


def one_hot(classes: np.ndarray, count: int = 4) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_equalized_scans_have_one_mean_grey_and_keep_the_order_of_greys(scans):
    darkened = np.stack([(scan * factor).astype(np.uint8) for scan, factor in
                         zip(scans, np.linspace(0.4, 1, len(scans)), strict=True)])  # fmt: skip
    assert np.ptp(darkened.mean(axis=(1, 2, 3))) > 40
    equal = equalize_brightness(darkened, 100)
    assert equal.dtype == np.uint8
    np.testing.assert_allclose(equal.mean(axis=(1, 2, 3)), 100, atol=0.5)
    for before, after in zip(darkened, equal, strict=True):
        table = {int(grey): set(after[before == grey].tolist()) for grey in np.unique(before)}
        assert all(len(greys) == 1 for greys in table.values())
        curve = [greys.pop() for _, greys in sorted(table.items())]
        assert curve == sorted(curve)


def test_gamma_by_hand():
    # A scan of 64 alone: 255 (64 / 255)^g = 128 gives g = ln(128/255) / ln(64/255) = 0.4986
    scans = np.full((1, 224, 224, 1), 64, np.uint8)
    scans[0, 0, 0], scans[0, 0, 1] = 0, 255
    equal = equalize_brightness(scans, 128)
    assert equal[0, 100, 100, 0] == 128
    assert equal[0, 0, 0, 0] == 0
    assert equal[0, 0, 1, 0] == 255


@pytest.mark.parametrize("mean_grey", [0, 255, math.nan])
def test_a_mean_that_no_scan_can_have_is_refused(scans, mean_grey):
    with pytest.raises(ValueError, match=r"mean_grey is .*: expected a grey between 0 and 255"):
        equalize_brightness(scans, mean_grey)


def test_outside_is_black_and_inside_as_before(scans):
    before = scans.copy()
    for scan, blanked in zip(scans, blank_outside(scans), strict=True):
        outline = body_outline(scan)
        assert not blanked[~outline].any()
        np.testing.assert_array_equal(blanked[outline], scan[outline])
    assert scans[0][~body_outline(scans[0])].any()
    np.testing.assert_array_equal(scans, before)


def test_blanked_lungs_have_the_median_grey_of_the_tissue(scans):
    before = scans.copy()
    for scan, blanked in zip(scans, blank_lungs(scans), strict=True):
        lungs = lung_mask(scan)
        tissue = np.median(scan[body_outline(scan) & ~lungs])
        assert set(blanked[lungs].ravel()) == {int(tissue)}
        np.testing.assert_array_equal(blanked[~lungs], scan[~lungs])
    np.testing.assert_array_equal(scans, before)


def test_jpeg_changes_little_and_more_at_a_lower_quality(scans):
    def change(decoded: np.ndarray) -> float:
        return float(np.abs(decoded.astype(int) - scans).mean())

    decoded = reencode_jpeg(scans)
    assert decoded.shape == scans.shape
    assert decoded.dtype == np.uint8
    assert 0 < change(decoded) < change(reencode_jpeg(scans, 20)) < 8


def mean_grey_rule(pixels: np.ndarray) -> np.ndarray:
    """Tells class 0 from the others by brightness alone."""
    dark = pixels.mean(axis=(1, 2, 3)) < 100
    return np.where(dark[:, np.newaxis], one_hot(np.array(0)), one_hot(np.array(1)))


@pytest.fixture(scope="module")
def dark_first(scan_set) -> ScanSet:
    """Two classes, the first at a third of the brightness."""
    pixels = scan_set.pixels.copy()
    pixels[:12] //= 3
    labels = np.repeat([0, 1], 12)
    return ScanSet(pixels, labels, scan_set.groups, scan_set.paths, LABELS)


def test_a_classifier_by_brightness_falls_when_brightness_is_equalized(dark_first):
    found = shortcut_scores(mean_grey_rule, dark_first, mean_grey_rule(dark_first.pixels))
    assert found["n"] == 24
    assert found["groups"] == 12
    assert found["unperturbed"]["accuracy"] == {"value": 1, "low": 1, "high": 1}
    equalized = found["perturbed"]["brightness_equalized"]
    assert equalized["scores"]["accuracy"]["value"] == 0.5
    assert equalized["scores"]["balanced_accuracy"]["value"] == 0.5
    assert equalized["difference"]["accuracy"]["value"] == -0.5
    assert equalized["difference"]["accuracy"]["high"] < 0
    assert equalized["same_label"] == 0.5
    assert equalized["changed"] == 24
    jpeg = found["perturbed"]["jpeg"]
    assert jpeg["difference"]["accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert jpeg["same_label"] == 1


def test_a_classifier_by_lungs_falls_when_they_are_blanked(scan_set):
    """Class 1 has its lungs blackened; the rule looks for black in the middle of the scan."""
    pixels = scan_set.pixels.copy()
    for scan in pixels[12:]:
        scan[lung_mask(scan)] = 0
    labels = np.repeat([0, 1], 12)
    blackened = ScanSet(pixels, labels, scan_set.groups, scan_set.paths, LABELS)

    def rule(pixels: np.ndarray) -> np.ndarray:
        black = (pixels[:, 60:160, 60:160] < 20).mean(axis=(1, 2, 3)) > 0.1
        return one_hot(black.astype(int))

    found = shortcut_scores(rule, blackened, rule(pixels))["perturbed"]
    assert found["lungs_blanked"]["difference"]["accuracy"]["value"] == -0.5
    for name in ("outside_blanked", "jpeg"):
        assert found[name]["difference"]["accuracy"]["value"] == 0


def test_differences_are_resampled_as_pairs(scan_set):
    """Answers that are wrong for the same scans as before differ by nothing in every resample."""
    answers = one_hot(np.where(np.arange(24) % 3 == 0, 0, scan_set.labels))
    found = shortcut_scores(lambda _: answers, scan_set, answers)
    assert found["unperturbed"]["accuracy"]["low"] < found["unperturbed"]["accuracy"]["high"]
    for perturbed in found["perturbed"].values():
        for difference in perturbed["difference"].values():
            assert difference == {"value": 0, "low": 0, "high": 0}
    assert "normal_against_rest_auroc" in found["unperturbed"]
