"""Whether a classifier answers by what is no sign of disease: brightness, margins, file format.

Three questions. What is left of the scores when such a thing is taken out of the scans, and what
when the lungs are? Does the activation map lie in the body and in the lungs? Does it point at the
tumours that radiologists have boxed?
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull

from chestct.contract import MAP_SIZE, SCAN_SIZE, ModelMetadata, Window
from chestct.imaging.body import body_box, body_mask
from chestct.imaging.scan import list_scans, load_grey, resize_scan
from training.common.atomic_io import without_nan
from training.common.metrics import (
    NORMAL,
    Floats,
    Labels,
    Statistic,
    accuracy,
    balanced_accuracy,
    bootstrap_intervals,
    class_auroc,
    macro_auroc,
    mean_value,
    paired_difference,
    wilson_interval,
)
from training.data.dataset import ScanSet, predict_outputs

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Boxes = npt.NDArray[np.float64]

CELL_PX = SCAN_SIZE // MAP_SIZE  # side in the scan of one place of the activation map

# The outline, in pixels of the mask of `chestct.imaging.body`, which has 128 a side.
CRACK_PX = 6  # a scribble or a thin wall seen as dark is closed up to twice this
# Of its convex hull; chests reach 0.9 (957 scans), a window that shows bones alone 0.2 to 0.8.
SMALLEST_SOLIDITY = 0.85

# The lungs, in pixels of the scan.
RIM_PX = 8  # thinner than most chest walls, thicker than a couch or the gap between two breasts
# Of the edge of an air-filled part within RIM_PX of the outline: lungs 0.05 at most in 95 of 100
# scans, the air between body and couch or breasts and fat shown as black from 0.3 up.
MOST_RIM = 0.3
CORNER_PX = 18  # no lung reaches so far into the corner of a scan that is cropped to its body
SMALLEST_AIR_PX = 25  # a bronchus; below it noise
LARGEST_VESSEL = 0.02  # of the scan; a hole of the lung above it is no vessel or nodule
VESSEL_PX = 5  # half the width of a vessel that the mask closes over

JPEG_QUALITY = 75  # Pillow's default, which is what most pictures on the web were saved with
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


def body_outline(scan: Pixels) -> Mask:
    """Where the body lies in a prepared scan, lungs and all.

    The largest bright part, cracks closed and holes filled. Where that is no solid shape, the
    window shows bones alone and the skin cannot be told.

    Args:
        scan: uint8 (224, 224, 1), as from `chestct.imaging.scan.load_scan`.

    Returns:
        bool (224, 224); all false where no body stands out.
    """
    part = body_mask(scan[:, :, 0])
    if not part.any():
        return np.zeros((SCAN_SIZE, SCAN_SIZE), bool)
    room = CRACK_PX + 1  # so that what lies beyond the picture counts as outside
    closed = ndimage.binary_closing(np.pad(part, room), _disk(CRACK_PX))
    filled = ndimage.binary_fill_holes(closed)[room:-room, room:-room]
    corners = [np.argwhere(part) + offset for offset in ((0, 0), (0, 1), (1, 0), (1, 1))]
    if filled.sum() < SMALLEST_SOLIDITY * ConvexHull(np.concatenate(corners)).volume:
        return np.zeros((SCAN_SIZE, SCAN_SIZE), bool)
    smooth = Image.fromarray(filled.astype(np.uint8) * 255).resize(
        (SCAN_SIZE, SCAN_SIZE), Image.Resampling.BILINEAR
    )
    return np.asarray(smooth) >= 128


def lung_mask(scan: Pixels) -> Mask:
    """The air-filled parts of the body with what lies inside them: vessels, bronchi, nodules.

    Inside the outline all that is darker than half way between air and tissue (the threshold of
    Hu et al. 2001, IEEE TMI 20(6), section II-A), but for parts along the skin or in a corner of
    the scan: the air between breasts, or between body and couch. A tumour that touches the chest
    wall or the mediastinum stays outside, gas in stomach and bowel counts as lung.

    Args:
        scan: uint8 (224, 224, 1), as from `chestct.imaging.scan.load_scan`.

    Returns:
        bool (224, 224), within `body_outline`; all false where that is, or where no air is seen.
    """
    grey, outline = scan[:, :, 0], body_outline(scan)
    if not outline.any():
        return outline
    around = ndimage.binary_dilation(outline, _disk(RIM_PX))  # shows how dark air is
    dark = outline & (grey <= _halfway(grey[around]))
    parts, count = ndimage.label(dark)
    depth = ndimage.distance_transform_edt(np.pad(outline, 1))[1:-1, 1:-1]
    edge = dark & ~ndimage.binary_erosion(dark)

    def in_parts(pixels: Mask) -> npt.NDArray[np.int64]:
        return np.bincount(parts[pixels], minlength=count + 1)

    kept = in_parts(dark) >= SMALLEST_AIR_PX
    kept &= in_parts(edge & (depth <= RIM_PX)) <= MOST_RIM * in_parts(edge)
    kept &= in_parts(dark & _corners()) == 0
    lungs: Mask = kept[parts] & dark
    holes, _ = ndimage.label(ndimage.binary_fill_holes(lungs) & ~lungs)
    sizes = np.bincount(holes.ravel())
    lungs |= (holes > 0) & (sizes <= LARGEST_VESSEL * grey.size)[holes]
    closed = ndimage.binary_closing(np.pad(lungs, VESSEL_PX + 1), _disk(VESSEL_PX))
    lungs |= closed[VESSEL_PX + 1 : -VESSEL_PX - 1, VESSEL_PX + 1 : -VESSEL_PX - 1]
    # Pixels that are part lung, part wall would draw the lung's outline where it is blanked.
    grown: Mask = ndimage.binary_dilation(lungs) & outline
    return grown


def _disk(radius: int) -> Mask:
    at = np.arange(-radius, radius + 1)
    disk: Mask = at[:, np.newaxis] ** 2 + at**2 <= radius * (radius + 1)
    return disk


def _corners() -> Mask:
    near = np.minimum(np.arange(SCAN_SIZE), np.arange(SCAN_SIZE)[::-1]) < CORNER_PX
    return near[:, np.newaxis] & near


def _halfway(grey: Pixels) -> float:
    """The grey level half way between the means of what is darker and of what is brighter."""
    share = np.bincount(grey, minlength=256)
    level, before = float(grey.mean()), math.nan
    while level != before:
        dark = np.arange(256) <= level
        if not share[dark].any() or not share[~dark].any():
            break
        means = [np.average(np.arange(256)[side], weights=share[side]) for side in (dark, ~dark)]
        level, before = float(sum(means) / 2), level
    return level


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
    """What the scores become when a shortcut, or the lungs, are taken out of the scans.

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
            "scores": _with_intervals(statistics, answers, scans.labels, scans.groups),
            "difference": _with_intervals(differences, pairs, scans.labels, scans.groups),
        }
    return {
        "n": len(scans),
        "groups": len(np.unique(scans.groups)),
        "unperturbed": _with_intervals(statistics, probabilities, scans.labels, scans.groups),
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


def _with_intervals(
    statistics: Mapping[str, Statistic], values: Floats, labels: Labels, groups: Labels
) -> dict[str, dict[str, float]]:
    intervals = bootstrap_intervals(statistics, values, labels, groups)
    return {
        key: {"value": statistic(values, labels), "low": low, "high": high}
        for (key, statistic), (low, high) in zip(
            statistics.items(), intervals.values(), strict=True
        )
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
            cells = [_covered(outline), _covered(lung_mask(scan))]
            rows.append(
                [(evidence * cell).sum() / evidence.sum() for cell in cells]
                + [cell.mean() for cell in cells]
            )
            groups.append(scans.groups[index])
    shares, by_group = np.array(rows, np.float32).reshape(-1, 4), np.array(groups, np.int64)
    found: dict[str, Any] = {"n": len(rows), "groups": len(np.unique(by_group)), **skipped}
    for column, place in enumerate(("body", "lungs")):
        mass, uniform = shares[:, column], shares[:, column + 2]
        found[place] = _mean(mass, by_group) | {
            "uniform": float(uniform.mean()) if rows else math.nan,
            "difference": _mean(mass - uniform, by_group),
        }
    return found


def _covered(mask: Mask) -> Floats:
    """The share of each cell of the activation map that a mask covers, float32 (14, 14)."""
    cells = mask.reshape(MAP_SIZE, CELL_PX, MAP_SIZE, CELL_PX)
    covered: Floats = cells.mean(axis=(1, 3), dtype=np.float32)
    return covered


def _mean(values: Floats, groups: Labels) -> dict[str, float]:
    """Mean of (N,) with its interval over groups; NaN where fewer than two groups leave none."""
    if len(np.unique(groups)) < 2:
        value = float(values.mean()) if len(values) else math.nan
        return {"value": value, "low": math.nan, "high": math.nan}
    return _with_intervals({"mean": mean_value}, values, groups, groups)["mean"]


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

    `chestct.imaging.scan` crops a picture to its body and stretches it to 224 x 224; so are the
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
            positive, inside = np.maximum(evidence, 0), _covered(_drawn(boxes))
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
            "mass": _mean(shares.astype(np.float32), patients.astype(np.int64)),
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
