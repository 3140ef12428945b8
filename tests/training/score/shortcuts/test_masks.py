from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from chestct.contract import LUNG_WINDOW, Window
from chestct.imaging.body import body_box
from chestct.imaging.prepare import load_scan
from chestct.imaging.window import apply_window
from tests.support.slices import scan_of
from training.score.shortcuts.masks import body_outline, lung_mask
from training.score.shortcuts.perturb import blank_lungs, blank_outside

pytestmark = pytest.mark.xdist_group("shortcuts")  # its fixtures are made once

SOFT_WINDOW = Window(center_hu=40, width_hu=400)
BONE_WINDOW = Window(center_hu=600, width_hu=400)


def anatomy_of(hu: np.ndarray, window: Window = LUNG_WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Body and its air, bool in the frame of the prepared scan, straight from Hounsfield units."""
    parts, _ = ndimage.label(hu > -300)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    body = ndimage.binary_fill_holes(np.pad(parts == sizes.argmax(), 1))[1:-1, 1:-1]
    top, bottom, left, right = body_box(apply_window(hu, window))

    def framed(mask: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(picture.resize((224, 224), box=(left, top, right, bottom))) > 127

    return framed(body), framed(body & (hu < -500))


def overlap(found: np.ndarray, true: np.ndarray) -> float:
    """Dice's coefficient."""
    return 2 * (found & true).sum() / (found.sum() + true.sum())


@pytest.mark.parametrize("window", [LUNG_WINDOW, SOFT_WINDOW], ids=["lung", "soft tissue"])
def test_outline_and_lungs_are_those_of_the_phantom(drawn, window):
    for hu in drawn:
        body, air = anatomy_of(hu, window)
        outline = body_outline(scan_of(hu, window))
        lungs = lung_mask(scan_of(hu, window))
        assert outline.dtype == lungs.dtype == bool
        # A soft-tissue window shows the fat under the skin nearly as dark as air.
        assert overlap(outline, body) > (0.95 if window is LUNG_WINDOW else 0.92)
        assert (lungs & air).sum() / air.sum() > 0.95
        # Vessels and lesions in the lung belong to it, so the air alone is less.
        assert overlap(lungs, air) > 0.8
        assert not (lungs & ~outline).any()


def test_lungs_are_without_the_air_outside(drawn, scans):
    for hu, scan in zip(drawn, scans, strict=True):
        body, _ = anatomy_of(hu)
        inner = ndimage.binary_erosion(body, iterations=3, border_value=1)
        assert not (lung_mask(scan) & ~inner).any()


def test_lungs_are_without_the_air_outside_when_the_picture_cuts_the_body(drawn):
    for hu in drawn:
        rows, columns = np.flatnonzero((hu > -300).any(1)), np.flatnonzero((hu > -300).any(0))
        cut = hu[rows[0] + 24 : rows[-1] - 48, columns[0] + 24 : columns[-1] - 24]
        scan = scan_of(cut)
        body, air = anatomy_of(cut)
        lungs = lung_mask(scan)
        assert (scan[-1] > 128).mean() > 0.1
        assert (scan[:, -1] > 128).mean() > 0.1
        assert (~body).mean() > 0.05
        assert not (lungs & ~body).any()
        assert (lungs & air).sum() / air.sum() > 0.95


def hand_drawn(seed: int = 0) -> np.ndarray:
    """A body with two lungs and two breasts that reach the upper border: uint8 (224, 224)."""
    y, x = np.mgrid[:224, :224]
    picture = np.full((224, 224), 20.0)
    picture[((x - 112) / 112) ** 2 + ((y - 130) / 95) ** 2 < 1] = 150
    for center in (78, 146):
        picture[((x - center) / 30) ** 2 + ((y - 40) / 42) ** 2 < 1] = 150
        picture[((x - (112 + 1.3 * (center - 112))) / 30) ** 2 + ((y - 130) / 50) ** 2 < 1] = 40
    noise = np.random.default_rng(seed).normal(0, 4, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def test_the_air_between_breasts_is_no_lung():
    lungs = lung_mask(hand_drawn()[..., np.newaxis])
    assert lungs[130, 60]
    assert lungs[130, 160]
    assert not lungs[:60].any()


def test_a_scribble_from_outside_does_not_open_a_lung():
    picture = hand_drawn()
    clean = lung_mask(picture[..., np.newaxis])
    picture[128:131, :90] = 0
    scribbled = lung_mask(picture[..., np.newaxis])
    assert overlap(clean, scribbled) > 0.97


def test_vessels_and_nodules_belong_to_the_lung():
    picture = hand_drawn()
    picture[110:130, 55:70] = 150
    picture[60:200, 160:164] = 150
    lungs = lung_mask(picture[..., np.newaxis])
    assert lungs[110:130, 55:70].all()
    assert lungs[100:160, 160:164].all()


def test_a_frame_around_the_picture_makes_no_lungs_of_its_corners():
    picture = hand_drawn()
    picture[:4] = picture[-4:] = 255
    picture[:, :4] = picture[:, -4:] = 255
    lungs = lung_mask(picture[..., np.newaxis])
    assert lungs[130, 60]
    assert not lungs[:20, :20].any()
    assert not lungs[-20:, -20:].any()


def test_no_body_stands_out_in_a_blank_picture_or_in_a_bone_window(drawn):
    blank = np.zeros((1, 224, 224, 1), np.uint8)
    bones = np.stack([scan_of(drawn[0], BONE_WINDOW)])
    for pixels in (blank, bones):
        assert not body_outline(pixels[0]).any()
        assert not lung_mask(pixels[0]).any()
        np.testing.assert_array_equal(blank_outside(pixels), pixels)
        np.testing.assert_array_equal(blank_lungs(pixels), pixels)


@pytest.mark.real_scans
def test_masks_of_real_scans(real_scans):
    """A sample of training scans: a body, air in it, and the air is dark."""
    files = sorted((real_scans / "chest-ct" / "train").rglob("*.png"))[::25]
    assert len(files) > 20
    for file in files:
        scan = load_scan(file)
        outline, lungs = body_outline(scan), lung_mask(scan)
        assert 0.6 < outline.mean() <= 1, file.name
        assert 0.005 < lungs.mean() < 0.55, file.name
        assert np.median(scan[lungs]) < np.median(scan[outline & ~lungs]) - 20, file.name
