from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from chestct.contract import LUNG_WINDOW
from chestct.imaging.prepare import load_scan
from tests.support.slices import annotation
from training.common.metrics import wilson_interval
from training.data.dataset import ScanSet
from training.data.phantom import LABELS, dicom_from_phantom, make_phantom
from training.score.shortcuts.masks import body_outline, lung_mask
from training.score.shortcuts.pointing import (
    TOLERANCE_PX,
    AnnotatedSlices,
    framed_boxes,
    map_mass,
    pointing_game,
    read_annotated,
    read_boxes,
)

pytestmark = pytest.mark.xdist_group("shortcuts")  # its fixtures are made once


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
