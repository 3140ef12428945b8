"""Where the activation map lies: inside the body and the lungs, and at boxed tumours."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from chestct.contract import MAP_SIZE, SCAN_SIZE, Window
from chestct.imaging.body import body_box
from chestct.imaging.prepare import load_grey, resize_scan
from chestct.imaging.sources import list_scans
from training.common.metrics import Floats, Labels, mean_with_interval, wilson_interval
from training.data.dataset import ScanSet
from training.score.shortcuts.masks import (
    CELL_PX,
    Mask,
    Pixels,
    body_outline,
    covered_cells,
    lung_mask,
)

Boxes = npt.NDArray[np.float64]

# Half a cell: the map cannot point finer. Zhang et al. 2018 allow 15 pixels of pictures of about
# 500, which is the same share of the side.
TOLERANCE_PX = CELL_PX / 2
# Names in the boxes of TCIA's collection Lung-PET-CT-Dx (doi 10.7937/TCIA.2020.NNC20461). Its
# "B", small cell carcinoma, is no class here.
COLLECTION_CLASSES = {
    "A": "adenocarcinoma",
    "E": "large.cell.carcinoma",
    "G": "squamous.cell.carcinoma",
}


def map_mass(activation_map: Floats, predicted: Labels, scans: ScanSet) -> dict[str, Any]:
    """How much of the predicted class's evidence lies inside the body, and inside the lungs.

    Of each scan the positive part of the map of its predicted class; a place of the map is its
    cell of 16 x 16 pixels, and a cell that the outline crosses counts by its covered share. The
    neurons of the map see nearly the whole scan, so mass outside the body is no proof that what
    lies outside was used.

    Args:
        activation_map: float32 (N, 14, 14, C).
        predicted: int64 (N,), the class whose map is looked at.
        scans: The N scans.

    Returns:
        `n` and `groups` of the scans that are counted, `no_evidence` and `no_outline`, how many
        are not because the map is nowhere positive or no body stands out; `body` and `lungs`,
        each with the mean share of the mass {value, low, high}, `uniform`, the share that an even
        map would have there, and `difference`, the first less the second {value, low, high}.
        Intervals of 95 % by a bootstrap over groups.
    """
    rows, groups, skipped = [], [], Counter({"no_evidence": 0, "no_outline": 0})
    for index, scan in enumerate(scans.pixels):
        evidence = np.maximum(activation_map[index, :, :, predicted[index]], 0)
        outline = body_outline(scan)
        if not outline.any():
            skipped["no_outline"] += 1
        elif not evidence.any():
            skipped["no_evidence"] += 1
        else:
            cells = [covered_cells(outline), covered_cells(lung_mask(scan))]
            rows.append(
                [(evidence * cell).sum() / evidence.sum() for cell in cells]
                + [cell.mean() for cell in cells]
            )
            groups.append(scans.groups[index])
    shares, by_group = np.array(rows, np.float32).reshape(-1, 4), np.array(groups, np.int64)
    found: dict[str, Any] = {"n": len(rows), "groups": len(np.unique(by_group)), **skipped}
    for column, place in enumerate(("body", "lungs")):
        mass, uniform = shares[:, column], shares[:, column + 2]
        found[place] = mean_with_interval(mass, by_group) | {
            "uniform": float(uniform.mean()) if rows else math.nan,
            "difference": mean_with_interval(mass - uniform, by_group),
        }
    return found


@dataclass(frozen=True)
class AnnotatedSlices:
    """Slices with tumours in boxes, one entry for each class that is boxed on a slice.

    Attributes:
        pixels: uint8 (N, 224, 224, 1), prepared like every scan.
        boxes: N arrays float64 (B, 4): left, top, right, bottom in pixels of the prepared scan.
        labels: int64 (N,), class of the boxes.
        patients: int64 (N,), one number a patient.
        skipped: Why and how many annotated slices or boxes are left out.
    """

    pixels: Pixels
    boxes: tuple[Boxes, ...]
    labels: Labels
    patients: Labels
    skipped: dict[str, int]


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, the only place where entities can be defined: none is expanded."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"document type {name!r}, expected none")


def read_boxes(path: Path) -> tuple[tuple[int, int] | None, list[tuple[str, Boxes]]]:
    """The boxes of one annotation in Pascal-VOC XML (Everingham et al. 2010, devkit, section 5).

    Args:
        path: XML file with one `object` a box. A document type, so any entity, is refused.

    Returns:
        Width and height of the annotated picture, None where the file does not tell, and for each
        box its class name and float64 (4,) left, top, right, bottom in pixels of that picture.

    Raises:
        ValueError: The file is no such annotation.
        OSError: The file cannot be read.
    """
    try:
        parser = ElementTree.XMLParser(target=_WithoutDoctype())
        root = ElementTree.fromstring(path.read_bytes(), parser)
        if root.tag != "annotation":
            raise ValueError(f"the root is <{root.tag}>, expected <annotation>")
        size = (
            None
            if root.find("size") is None
            else (int(_number(root, "size/width")), int(_number(root, "size/height")))
        )
        boxes = []
        for item in root.iter("object"):
            edges = [_number(item, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
            left, top, right, bottom = edges
            width, height = size or (math.inf, math.inf)
            if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                raise ValueError(f"box {edges}, expected xmin < xmax and ymin < ymax in {size}")
            boxes.append((item.findtext("name", "").strip(), np.array(edges)))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: no Pascal-VOC annotation: {error}") from error
    return size, boxes


def _number(element: ElementTree.Element, place: str) -> float:
    text = element.findtext(place)
    try:
        return float(text or "")
    except ValueError as error:
        raise ValueError(f"{place} of <{element.tag}> is {text!r}, expected a number") from error


def framed_boxes(boxes: Boxes, crop: tuple[int, int, int, int]) -> Boxes:
    """Boxes of a picture in the frame of its prepared scan.

    `chestct.imaging.prepare` crops a picture to its body and stretches it to 224 x 224; so are the
    boxes.

    Args:
        boxes: float64 (B, 4): left, top, right, bottom in pixels of the picture.
        crop: First row, row after the last, first column, column after the last, as from
            `chestct.imaging.body.body_box`.

    Returns:
        float64 (K, 4) in pixels of the scan, cut at its border; a box outside of it is left out.
    """
    top, bottom, left, right = crop
    start = np.array([left, top, left, top])
    side = np.array([right - left, bottom - top, right - left, bottom - top])
    framed = np.clip((boxes - start) * SCAN_SIZE / side, 0, SCAN_SIZE)
    kept: Boxes = framed[(framed[:, 0] < framed[:, 2]) & (framed[:, 1] < framed[:, 3])]
    return kept


def read_annotated(folder: Path, labels: tuple[str, ...], window: Window) -> AnnotatedSlices:
    """All annotated slices under a folder, prepared, with their boxes in the same frame.

    An annotation `.../annotations/<SOPInstanceUID>.xml` belongs to the DICOM slice of that UID
    in the folder `...`. A box's name is one of `labels` or a letter of `COLLECTION_CLASSES`.

    Args:
        folder: Searched for annotations, with all below it.
        labels: The classes of the model.
        window: Window of the model.

    Returns:
        The slices. Skipped are `no_slice` (annotations whose slice is missing), `no_box`
        (annotations without one), `other_class` (boxes of a class that the model does not know)
        and `outside_frame` (boxes outside of what the model sees).

    Raises:
        ValueError: No annotation, a broken one, one of another size than its slice, or none that
            can be used.
        chestct.errors.ScanDecodeError: An annotated slice cannot be read.
        OSError: A file cannot be read.
    """
    files = sorted(folder.rglob("annotations/*.xml"))
    if not files:
        raise ValueError(f"{folder}: no annotation; expected .../annotations/<SOPInstanceUID>.xml")
    slices = {place: _slices_by_uid(place) for place in {file.parents[1] for file in files}}
    skipped = Counter(dict.fromkeys(("no_slice", "no_box", "other_class", "outside_frame"), 0))
    pixels, found, classes, patients = [], [], [], []
    for file in files:
        size, boxes = read_boxes(file)
        path, patient = slices[file.parents[1]].get(file.stem, (None, ""))
        if path is None or not boxes:
            skipped["no_slice" if path is None else "no_box"] += 1
            continue
        grey = load_grey(path, window)
        if size is not None and size != grey.shape[::-1]:
            raise ValueError(
                f"{file}: annotates {size[0]} x {size[1]} pixels, its slice {path.name} has "
                f"{grey.shape[1]} x {grey.shape[0]}; expected the same"
            )
        names = [COLLECTION_CLASSES.get(name, name) for name, _ in boxes]
        skipped["other_class"] += sum(name not in labels for name in names)
        for label in sorted(set(names) & set(labels)):
            mine = np.array([box for name, (_, box) in zip(names, boxes, strict=True)
                             if name == label])  # fmt: skip
            framed = framed_boxes(mine, body_box(grey))
            skipped["outside_frame"] += len(mine) - len(framed)
            if len(framed):
                pixels.append(resize_scan(grey))
                found.append(framed)
                classes.append(labels.index(label))
                patients.append(patient)
    if not found:
        raise ValueError(f"{folder}: no annotation can be used: {dict(skipped)}")
    return AnnotatedSlices(
        np.stack(pixels),
        tuple(found),
        np.array(classes, np.int64),
        np.unique(patients, return_inverse=True)[1].astype(np.int64),
        dict(skipped),
    )


def _slices_by_uid(folder: Path) -> dict[str, tuple[Path, str]]:
    """Path and patient of each DICOM file of a folder by its SOP Instance UID."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    slices = {}
    for path in list_scans(folder):
        try:
            dataset = dcmread(path, specific_tags=["SOPInstanceUID", "PatientID"])
        except InvalidDicomError:
            continue
        if "SOPInstanceUID" in dataset:
            slices[str(dataset.SOPInstanceUID)] = (path, str(dataset.get("PatientID") or ""))
    return slices


def pointing_game(
    activation_map: Floats, predicted: Labels, slices: AnnotatedSlices
) -> dict[str, Any]:
    """Whether the activation map points at the boxed tumours (Zhang et al. 2018, section 5.1).

    The map points at the centre of its largest cell: bilinear enlargement has its maximum there
    too. It is a hit within `TOLERANCE_PX` of a box. Beside it stands how much of the positive
    part of the map lies in the boxes, and for both what a map without any idea would give.

    Args:
        activation_map: float32 (N, 14, 14, C) of the slices.
        predicted: int64 (N,), most probable class.
        slices: The annotated slices.

    Returns:
        `n`, `patients`, `tolerance_px`, `skipped`, `right`, the number of slices whose predicted
        class is the annotated one; `annotated_class` and `predicted_class`, by whose map is
        looked at: `hits` of `n` as {value, low, high} with Wilson's interval, which takes slices
        for independent and so is too narrow where a patient has several; `chance`, what a random
        cell hits; `mass` in the boxes {value, low, high} over the `mass_n` slices with a positive
        map, its interval by a bootstrap over patients and NaN for one; `area`, the boxes' share of
        these scans.
    """
    found: dict[str, Any] = {
        "n": len(slices.boxes),
        "patients": len(np.unique(slices.patients)),
        "tolerance_px": TOLERANCE_PX,
        "skipped": slices.skipped,
        "right": int((predicted == slices.labels).sum()),
    }
    for whose, classes in (("annotated_class", slices.labels), ("predicted_class", predicted)):
        hits, chances, rows = 0, [], []
        for index, boxes in enumerate(slices.boxes):
            evidence = activation_map[index, :, :, classes[index]]
            hit = _near(boxes)
            hits += int(hit.flat[evidence.argmax()])
            chances.append(hit.mean())
            positive, inside = np.maximum(evidence, 0), covered_cells(_drawn(boxes))
            if positive.any():
                share = (positive * inside).sum() / positive.sum()
                rows.append((slices.patients[index], share, inside.mean()))
        patients, shares, areas = np.array(rows, np.float64).reshape(-1, 3).T
        low, high = wilson_interval(hits, found["n"])
        found[whose] = {
            "hits": hits,
            "n": found["n"],
            "value": hits / found["n"],
            "low": low,
            "high": high,
            "chance": float(np.mean(chances)),
            "mass": mean_with_interval(shares.astype(np.float32), patients.astype(np.int64)),
            "mass_n": len(rows),
            "area": float(areas.mean()) if rows else math.nan,
        }
    return found


def _near(boxes: Boxes) -> Mask:
    """Which cells, bool (14, 14), have their centre within `TOLERANCE_PX` of a box."""
    near, centers = np.zeros((MAP_SIZE, MAP_SIZE), bool), (np.arange(MAP_SIZE) + 0.5) * CELL_PX
    for left, top, right, bottom in boxes:
        aside = np.maximum(np.maximum(left - centers, centers - right), 0)
        above = np.maximum(np.maximum(top - centers, centers - bottom), 0)
        near |= np.hypot(above[:, np.newaxis], aside) <= TOLERANCE_PX
    return near


def _drawn(boxes: Boxes) -> Mask:
    """The pixels of the scan, bool (224, 224), whose centre lies in a box."""
    drawn, at = np.zeros((SCAN_SIZE, SCAN_SIZE), bool), np.arange(SCAN_SIZE) + 0.5
    for left, top, right, bottom in boxes:
        drawn |= ((top <= at) & (at < bottom))[:, np.newaxis] & (left <= at) & (at < right)
    return drawn
