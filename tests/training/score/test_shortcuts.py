from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from chestct.contract import LUNG_WINDOW, Window
from chestct.imaging.body import body_box
from chestct.imaging.prepare import load_scan, resize_scan
from chestct.imaging.window import apply_window
from training.common.metrics import wilson_interval
from training.data.dataset import ScanSet
from training.data.phantom import LABELS, dicom_from_phantom, make_phantom
from training.score.shortcuts import (
    TOLERANCE_PX,
    AnnotatedSlices,
    blank_lungs,
    blank_outside,
    body_outline,
    check_shortcuts,
    equalize_brightness,
    framed_boxes,
    lung_mask,
    map_mass,
    pointing_game,
    read_annotated,
    read_boxes,
    reencode_jpeg,
    report_lines,
    shortcut_scores,
)

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


def scan_of(hu: np.ndarray, window: Window = LUNG_WINDOW) -> np.ndarray:
    return resize_scan(apply_window(hu, window))


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """Hounsfield units of eight phantoms, two of a class."""
    return [make_phantom(label, seed).hu for seed in (0, 1) for label in LABELS]


@pytest.fixture(scope="module")
def scans(drawn) -> np.ndarray:
    return np.stack([scan_of(hu) for hu in drawn])


@pytest.fixture(scope="module")
def scan_set() -> ScanSet:
    """24 phantoms of four classes, six of each and two to a group."""
    pixels = np.stack([scan_of(make_phantom(label, seed).hu) for label in LABELS
                       for seed in range(10, 16)])  # fmt: skip
    labels = np.repeat(np.arange(4), 6)
    return ScanSet(pixels, labels, np.arange(24) // 2, tuple(map(str, range(24))), LABELS)


def one_hot(classes: np.ndarray, count: int = 4) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


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


def test_an_even_map_has_the_mass_of_the_area(scan_set):
    even = np.ones((24, 14, 14, 4), np.float32)
    found = map_mass(even, np.zeros(24, np.int64), scan_set)
    assert (found["n"], found["groups"]) == (24, 12)
    outlines = np.mean([body_outline(scan).mean() for scan in scan_set.pixels])
    assert found["body"]["uniform"] == pytest.approx(outlines, abs=1e-6)
    assert found["body"]["value"] == pytest.approx(outlines, abs=1e-5)
    assert found["lungs"]["difference"]["value"] == pytest.approx(0, abs=1e-5)
    assert found["lungs"]["value"] < found["body"]["value"]


def test_mass_is_that_of_the_predicted_class_and_positive(scan_set):
    lungs = np.stack([lung_mask(scan) for scan in scan_set.pixels])
    cells = lungs.reshape(24, 14, 16, 14, 16).mean(axis=(2, 4)) == 1
    assert cells.any(axis=(1, 2)).all()
    evidence = np.full((24, 14, 14, 4), 5, np.float32)
    evidence[..., 2] = np.where(cells, 1, -1)
    found = map_mass(evidence, np.full(24, 2), scan_set)
    assert found["lungs"]["value"] == found["body"]["value"] == 1
    assert found["lungs"]["difference"]["low"] > 0.5


def test_scans_without_evidence_or_outline_are_left_out_and_counted(scan_set):
    pixels = scan_set.pixels[:4].copy()
    pixels[0] = 0
    some = ScanSet(pixels, scan_set.labels[:4], np.arange(4), ("",) * 4, LABELS)
    evidence = np.ones((4, 14, 14, 4), np.float32)
    evidence[1] = -1
    found = map_mass(evidence, np.zeros(4, np.int64), some)
    assert (found["n"], found["no_outline"], found["no_evidence"]) == (2, 1, 1)


def test_nothing_counted_and_one_group_have_no_interval(scan_set):
    one = ScanSet(scan_set.pixels[:2], scan_set.labels[:2], np.zeros(2, int), ("",) * 2, LABELS)
    found = map_mass(np.ones((2, 14, 14, 4), np.float32), np.zeros(2, np.int64), one)
    assert found["body"]["value"] > 0.5
    assert math.isnan(found["body"]["low"])
    found = map_mass(-np.ones((2, 14, 14, 4), np.float32), np.zeros(2, np.int64), one)
    assert found["n"] == 0
    assert math.isnan(found["body"]["value"])
    assert math.isnan(found["body"]["uniform"])


def annotation(*boxes: tuple[str, tuple[float, ...]], size: tuple[int, int] = (512, 512)) -> str:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box in boxes
    )
    width, height = size
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        f"{objects}</annotation>"
    )


def test_boxes_are_read_with_their_names(tmp_path):
    file = tmp_path / "a.xml"
    file.write_text(annotation(("A", (1, 2, 30, 40)), ("G", (5, 6, 7.5, 8))))
    size, boxes = read_boxes(file)
    assert size == (512, 512)
    assert [name for name, _ in boxes] == ["A", "G"]
    np.testing.assert_array_equal(boxes[1][1], [5, 6, 7.5, 8])
    file.write_text("<annotation/>")
    assert read_boxes(file) == (None, [])


BOMB = """<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a "aaaaaaaaaa"><!ENTITY c "&a;&a;&a;&a;">]>
<annotation><folder>&c;</folder></annotation>"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no element found"),
        ("<annotation><object>", "no element found"),
        ("not xml", "syntax error"),
        ("<html/>", "the root is <html>, expected <annotation>"),
        ("<annotation><object><name>A</name></object></annotation>", "bndbox/xmin of <object>"),
        (annotation(("A", ("x", 2, 3, 4))), "is 'x', expected a number"),
        (annotation(("A", ("nan", 2, 3, 4))), "expected xmin < xmax"),
        (annotation(("A", (30, 2, 3, 4))), "expected xmin < xmax"),
        (annotation(("A", (1, 2, 600, 4))), r"in \(512, 512\)"),
        (annotation(("A", (-1, 2, 6, 4))), "expected xmin < xmax"),
        (BOMB, "document type 'b', expected none"),
    ],
)
def test_a_broken_annotation_is_named_with_its_reason(tmp_path, text, reason):
    file = tmp_path / "broken.xml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.xml: no Pascal-VOC annotation: .*{reason}"):
        read_boxes(file)


def test_boxes_in_the_frame_by_hand():
    # The crop is 100 rows and 200 columns: 2.24 scan pixels a row, 1.12 a column.
    crop = (50, 150, 100, 300)
    boxes = np.array(
        [
            [100.0, 50, 300, 150],  # the whole crop
            [150, 100, 200, 125],  # (50, 50, 100, 75) in it
            [0, 0, 150, 75],  # cut at its upper left corner
            [0, 0, 100, 150],  # ends where the crop begins
        ]
    )
    np.testing.assert_allclose(
        framed_boxes(boxes, crop),
        [[0, 0, 224, 224], [56, 112, 112, 168], [0, 0, 56, 56]],
    )


@pytest.fixture
def annotated(tmp_path) -> Path:
    """Two annotated series of phantoms: three slices with a lesion, and what is to be skipped."""
    folder = tmp_path / "series"
    (folder / "annotations").mkdir(parents=True)
    for seed in range(3):
        phantom = make_phantom(LABELS[0], seed)
        dataset = dicom_from_phantom(phantom)
        dataset.save_as(folder / f"{seed}.dcm", enforce_file_format=True)
        text = annotation(("A", phantom.lesion_box))
        (folder / "annotations" / f"{dataset.SOPInstanceUID}.xml").write_text(text)
    (folder / "notes.txt").write_text("no slice")
    return folder


def skip_by(annotated: Path, text: str) -> Path:
    """Replace the annotation of the first slice."""
    uid = dicom_from_phantom(make_phantom(LABELS[0], 0)).SOPInstanceUID
    file = annotated / "annotations" / f"{uid}.xml"
    file.write_text(text)
    return file


def test_annotated_slices_are_prepared_with_their_boxes(annotated):
    slices = read_annotated(annotated.parent, LABELS, LUNG_WINDOW)
    assert slices.pixels.shape == (3, 224, 224, 1)
    assert slices.labels.tolist() == [0, 0, 0]
    assert len(set(slices.patients.tolist())) == 3
    assert set(slices.skipped.values()) == {0}
    by_brightness = {scan.tobytes() for scan in slices.pixels}
    assert by_brightness == {load_scan(path).tobytes() for path in annotated.glob("*.dcm")}
    for scan, boxes in zip(slices.pixels, slices.boxes, strict=True):
        left, top, right, bottom = boxes[0].astype(int)
        assert boxes.shape == (1, 4)
        inside = scan[top + 2 : bottom - 1, left + 2 : right - 1]
        assert inside.mean() > scan[lung_mask(scan)].mean() + 30


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (annotation(), "no_box"),
        (annotation(("B", (200, 200, 300, 300))), "other_class"),
        (annotation(("A", (0, 0, 3, 3))), "outside_frame"),
    ],
)
def test_what_cannot_be_pointed_at_is_skipped_and_counted(annotated, text, reason):
    skip_by(annotated, text)
    slices = read_annotated(annotated, LABELS, LUNG_WINDOW)
    assert len(slices.boxes) == 2
    assert slices.skipped == {"no_slice": 0, "no_box": 0, "other_class": 0, "outside_frame": 0} | {
        reason: 1
    }


def test_boxes_without_a_slice_are_skipped_and_counted(annotated):
    (annotated / "1.dcm").unlink()
    slices = read_annotated(annotated, LABELS, LUNG_WINDOW)
    assert len(slices.boxes) == 2
    assert slices.skipped["no_slice"] == 1


def test_two_classes_on_one_slice_are_two_entries(annotated):
    box = make_phantom(LABELS[0], 0).lesion_box
    names = ("A", "squamous.cell.carcinoma", "A")
    skip_by(annotated, annotation(*((name, box) for name in names)))
    slices = read_annotated(annotated, LABELS, LUNG_WINDOW)
    assert sorted(slices.labels.tolist()) == [0, 0, 0, 3]
    assert sorted(len(boxes) for boxes in slices.boxes) == [1, 1, 1, 2]


def test_a_folder_without_annotations_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no annotation; expected .*annotations/<SOPInstanceUID>"):
        read_annotated(tmp_path / "nowhere", LABELS, LUNG_WINDOW)


def test_a_folder_of_which_nothing_can_be_used_is_refused(annotated):
    for file in annotated.glob("*.dcm"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no annotation can be used: .*'no_slice': 3"):
        read_annotated(annotated, LABELS, LUNG_WINDOW)


def test_an_annotation_of_another_size_is_refused(annotated):
    skip_by(annotated, annotation(("A", (1, 1, 9, 9)), size=(256, 512)))
    with pytest.raises(ValueError, match=r"256 x 512 pixels, its slice 0\.dcm has 512 x 512"):
        read_annotated(annotated, LABELS, LUNG_WINDOW)


def slices_with(boxes: list[list[float]], patients: tuple[int, ...]) -> AnnotatedSlices:
    return AnnotatedSlices(
        np.zeros((len(boxes), 224, 224, 1), np.uint8),
        tuple(np.array([box], np.float64) for box in boxes),
        np.zeros(len(boxes), np.int64),
        np.array(patients),
        {"no_slice": 0},
    )


def test_pointing_by_hand():
    # Cell (3, 4) has its centre at y = 56, x = 72. The first box holds it; the second begins 8
    # pixels to its right, which is just tolerated; the third 9 pixels below.
    assert TOLERANCE_PX == 8
    boxes = [[64, 48, 80, 64], [80, 48, 112, 64], [64, 65, 80, 96]]
    evidence = np.zeros((3, 14, 14, 2), np.float32)
    evidence[:, 3, 4, 0] = 3
    evidence[:, 10, 10, 0] = 1
    evidence[:, :, :, 1] = -1
    evidence[:, 0, 0, 1] = -0.5
    found = pointing_game(evidence, np.array([0, 1, 1]), slices_with(boxes, (0, 0, 1)))
    assert (found["n"], found["patients"], found["right"]) == (3, 2, 1)
    annotated = found["annotated_class"]
    low, high = wilson_interval(2, 3)
    assert annotated["hits"] == 2
    assert (annotated["value"], annotated["low"], annotated["high"]) == (2 / 3, low, high)
    # Of the first box all its own 16 x 16 cell, three quarters of the mass; nothing of the others.
    assert annotated["mass"]["value"] == pytest.approx(0.75 / 3)
    area = (16 * 16 + 32 * 16 + 16 * 31) / 3 / 224**2
    assert annotated["area"] == pytest.approx(area)
    # Centres within 8 pixels, edges of the box included. First: its own cell alone (the next
    # centres are 8 pixels from its edge: 88 - 80, 56 - 48 ...), so with those 5 cells; second:
    # columns 4 to 7 in its row and 2 above, 2 below; third: rows 4 and 5 inside, row 6 at 8
    # pixels (104 - 96), row 3 at 9; beside each of rows 4 and 5 two.
    assert annotated["chance"] == pytest.approx((5 + 8 + 7) / 3 / 196)
    predicted = found["predicted_class"]
    assert predicted["hits"] == 1
    # Where class 1 was predicted its map is nowhere positive.
    assert predicted["mass_n"] == 1
    assert predicted["mass"]["value"] == pytest.approx(0.75)
    assert math.isnan(predicted["mass"]["low"])


def test_a_map_without_any_idea_has_the_area_of_the_boxes():
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 150, (40, 2))
    boxes = np.concatenate([starts, starts + rng.uniform(20, 70, (40, 2))], axis=1)
    slices = slices_with(boxes.tolist(), tuple(range(40)))
    even = pointing_game(np.ones((40, 14, 14, 2), np.float32), np.zeros(40, int), slices)
    found = even["annotated_class"]
    assert found["mass"]["value"] == pytest.approx(found["area"], abs=1e-6)
    noise = rng.normal(size=(40, 14, 14, 2)).astype(np.float32)
    found = pointing_game(noise, np.zeros(40, int), slices)["annotated_class"]
    assert found["low"] < found["chance"] < found["high"]
    assert found["mass"]["low"] < found["area"] < found["mass"]["high"]


@pytest.fixture(scope="module")
def checked(trained, tmp_path_factory) -> dict:
    from training.data.dataset import read_split
    from training.network.vgg16 import load_trained

    folder = tmp_path_factory.mktemp("boxes")
    (folder / "annotations").mkdir()
    for seed in range(2):
        phantom = make_phantom(LABELS[0], seed)
        dataset = dicom_from_phantom(phantom)
        dataset.save_as(folder / f"{seed}.dcm", enforce_file_format=True)
        text = annotation((LABELS[0], phantom.lesion_box))
        (folder / "annotations" / f"{dataset.SOPInstanceUID}.xml").write_text(text)
    model, facts = load_trained(trained.model)
    test = read_split(trained.scans, trained.split, facts.window)["test"]
    alone = check_shortcuts(model, facts, test)
    return {"alone": alone, "pointed": check_shortcuts(model, facts, test, folder)}


def test_all_checks_of_a_model_are_plain_values(checked):
    found = json.loads(json.dumps(checked["pointed"], allow_nan=False))
    assert found == checked["pointed"]
    assert found["scores"]["n"] == 12
    assert set(found["scores"]["perturbed"]) == {
        "brightness_equalized", "outside_blanked", "lungs_blanked", "jpeg"
    }  # fmt: skip
    for perturbed in found["scores"]["perturbed"].values():
        # A scan may have the wanted brightness, or no outside, already.
        assert 0 < perturbed["changed"] <= 12
        assert perturbed["mean_change"] > 0
    assert found["map"]["n"] + found["map"]["no_evidence"] == 12
    assert found["pointing"]["n"] == found["pointing"]["patients"] == 2
    assert checked["alone"] == found | {"pointing": None}


@pytest.mark.parametrize("which", ["alone", "pointed"])
def test_report_tables_are_whole(checked, which):
    lines = report_lines(checked[which])
    assert not any("nan" in line or "None" in line for line in lines)
    tables = "\n".join(lines).split("\n\n")
    tables = [table.splitlines() for table in tables if table.startswith("|")]
    assert len(tables) == {"alone": 2, "pointed": 3}[which]
    for table in tables:
        assert len({row.count("|") for row in table}) == 1
        assert set(table[1]) == set("| -")
    assert len(tables[0]) == 2 + 5


def test_report_says_what_was_not_measured_and_what_was_skipped(checked):
    assert report_lines(checked["alone"])[-1].endswith("not measured (no annotated slices given).")
    pointed = report_lines(checked["pointed"])
    assert pointed[-1] == "Skipped: 0 no slice, 0 no box, 0 other class, 0 outside frame."
    assert any("2 annotated slices of 2 patients" in line for line in pointed)


def test_report_says_whether_blanked_lungs_lower_the_accuracy(checked):
    found = json.loads(json.dumps(checked["alone"]))
    difference = found["scores"]["perturbed"]["lungs_blanked"]["difference"]["accuracy"]
    difference.update(value=-0.3, low=-0.4, high=-0.2)
    assert any("Accuracy drops, as it must." in line for line in report_lines(found))
    difference.update(high=0.1)
    assert any("do not come from the lungs" in line for line in report_lines(found))


@pytest.mark.real_scans
def test_boxes_of_real_slices_hold_tumours(real_scans):
    slices = read_annotated(real_scans / "dicom", LABELS, LUNG_WINDOW)
    assert len(slices.boxes) == 14
    assert set(slices.labels.tolist()) == {LABELS.index("adenocarcinoma")}
    assert set(slices.patients.tolist()) == {0}
    assert set(slices.skipped.values()) == {0}
    for scan, boxes in zip(slices.pixels, slices.boxes, strict=True):
        ((left, top, right, bottom),) = np.rint(boxes).astype(int)
        assert 0 < left < right < 224
        assert 0 < top < bottom < 224
        lungs, inside = lung_mask(scan), scan[top:bottom, left:right]
        # Tissue in a box whose edges cut lung, in the right lung, on the left of the picture.
        assert np.quantile(inside, 0.75) > 200
        assert lungs[top:bottom, left:right].any()
        assert right < 112
        mirrored = scan[top:bottom, 224 - right : 224 - left]
        assert inside.mean() > mirrored.mean() + 20


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
