"""Procedural axial chest slices in Hounsfield units: the embedded default data and the test data.

Every slice is drawn from a seed: a body with skin, fat and muscle, ribs, spine, mediastinum, two
lungs with vessels and texture, a scanner table, noise, and the lesion of its class. They teach
nothing about patients; they let everything after them run on something that behaves like CT.
They say on themselves that they are synthetic: in the pixels, in the PNG's text and in the DICOM
attributes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy import ndimage
from tqdm import tqdm

from chestct.contract import LUNG_WINDOW
from chestct.imaging.window import apply_window
from training.common.atomic_io import replaced
from training.common.cli import command_parser, run_command
from training.common.config import load_config
from training.data.dataset import SPLITS

LABELS = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")

NOTICE = "Synthetic phantom drawn by a program. Not a patient. Not for diagnosis."

# Hounsfield units. Air and water are fixed by the definition of the unit; the others lie in the
# usual ranges (Kalender, Computed Tomography, 3rd edition 2011, chapter 1). Ranges that vary from
# one slice to the next (lung, blood, lesions) stand where they are drawn.
AIR_HU = -1000.0
FAT_HU = -100.0
SKIN_HU = 20.0
MUSCLE_HU = 55.0
MARROW_HU = 180.0
CORTICAL_HU = 800.0
LIVER_HU = 60.0
TABLE_HU = -150.0
TEXT_HU = 400.0
RESCALE_INTERCEPT_HU = -1024
LARGEST_HU = 3071.0  # 12 bits above the intercept

FloatArray = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PhantomConfig:
    """How many phantoms to write.

    Attributes:
        train: Slices of each class for training.
        valid: Slices of each class for validation.
        test: Slices of each class for testing.
        dicom_fraction: Part of the test slices of each class that is written as DICOM; the
            others are PNG, as in the real folder.
        variety: How much bodies differ: 1 is the whole range, less is easier to learn.
        lesion_scale: Factor on the radius of lesions: 1 is lifelike, more is easier to learn.
        seed: First number of the anatomies; the same seed writes the same bytes.
    """

    train: int = 60
    valid: int = 16
    test: int = 24
    dicom_fraction: float = 0.25
    variety: float = 1.0
    lesion_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no folder can have.

        Raises:
            ValueError: A negative number, no training slice, or a fraction outside 0 to 1.
        """
        if self.train < 1 or min(self.valid, self.test, self.seed) < 0:
            raise ValueError(
                f"train {self.train}, valid {self.valid}, test {self.test}, seed {self.seed}: "
                "expected train of at least 1 and no negative number"
            )
        if not 0 <= self.dicom_fraction <= 1:
            raise ValueError(f"dicom_fraction is {self.dicom_fraction}: expected 0 to 1")
        if not 0 < self.variety <= 1 or not 0.5 <= self.lesion_scale <= 2.5:
            raise ValueError(
                f"variety {self.variety}, lesion_scale {self.lesion_scale}: expected more than 0 "
                "and at most 1, and 0.5 to 2.5"
            )


@dataclass(frozen=True)
class Phantom:
    """One synthetic slice.

    Attributes:
        label: One of `LABELS`.
        seed: The seed of its anatomy.
        hu: float32 (rows, columns) of whole Hounsfield units, -1024 to 3071, patient's right on
            the left.
        pixel_spacing_mm: Side of one pixel.
        lesion_box: (left, top, right, bottom) in pixels, right and bottom exclusive; None for
            the normal class.
    """

    label: str
    seed: int
    hu: FloatArray
    pixel_spacing_mm: float
    lesion_box: tuple[int, int, int, int] | None


def make_phantom(
    label: str, seed: int, *, size: int = 512, variety: float = 1.0, lesion_scale: float = 1.0
) -> Phantom:
    """A slice of the class `label` with the anatomy of `seed`.

    The anatomy is drawn before the lesion, from its own stream of random numbers: one seed gives
    the same body in every class. Size, fat, inflation and noise do not know the label.

    Args:
        label: One of `LABELS`.
        seed: Number of the anatomy, 0 or more.
        size: Rows and columns in pixels, at least 128.
        variety: See `PhantomConfig`.
        lesion_scale: See `PhantomConfig`.

    Raises:
        ValueError: An unknown label, a negative seed or a size too small to hold the anatomy.
    """
    if label not in LABELS:
        raise ValueError(f"label {label!r}: expected one of {', '.join(LABELS)}")
    if seed < 0 or size < 128:
        raise ValueError(f"seed {seed}, size {size}: expected seed >= 0 and size >= 128")
    rng = np.random.default_rng([seed, 0])
    anatomy = _draw_anatomy_numbers(rng)
    if variety < 1:
        anatomy = anatomy.towards(_draw_anatomy_numbers(np.random.default_rng(5)), 1 - variety)
    canvas = _Canvas(size, anatomy)
    _draw_table(canvas, anatomy, rng)
    _draw_body(canvas, anatomy, rng)
    _draw_bones(canvas, anatomy, rng)
    lung = _draw_cavity(canvas, anatomy, rng)
    hu = canvas.pixels()
    hu[lung] = _lung_pixels(canvas, anatomy, lung, rng)
    rng_of_lesion = np.random.default_rng([seed, 1])
    lesion = _add_lesion(hu, canvas, anatomy, lung, label, lesion_scale, rng_of_lesion)
    hu = _add_scanner(hu, anatomy, rng)
    _burn_in_text(hu)
    return Phantom(
        label, seed, hu, anatomy.pixel_spacing_mm(size), None if lesion is None else _box(lesion)
    )


@dataclass(frozen=True)
class _Anatomy:
    """The numbers of one body; millimetres from its centre, x to the patient's left, y back."""

    level: float  # 0 = aortic arch, 1 = lower heart
    half_width_mm: float
    half_height_mm: float
    squareness: float  # exponent of the superellipse
    fat_mm: float
    muscle_mm: float
    breast_mm: float
    waves: tuple[float, ...]
    field_mm: float
    offset_mm: tuple[float, float]
    lung_hu: float
    blood_hu: float
    noise_hu: float
    blur_px: float

    def towards(self, other: _Anatomy, share: float) -> _Anatomy:
        """Each number moved towards that of `other` by `share` of their difference."""

        def moved(one: Any, goal: Any) -> Any:
            if isinstance(one, tuple):
                return tuple(map(moved, one, goal))
            return one + share * (goal - one)

        return _Anatomy(
            **{
                field.name: moved(getattr(self, field.name), getattr(other, field.name))
                for field in dataclasses.fields(self)
            }
        )

    def pixel_spacing_mm(self, size: int) -> float:
        return round(self.field_mm / size, 4)

    def body(self, inset_mm: float, angle: Points) -> Points:
        """Radius in mm of the body's outline at `angle`, moved inwards by `inset_mm`."""
        radius = _superellipse(
            self.half_width_mm - inset_mm, self.half_height_mm - inset_mm, self.squareness, angle
        )
        for k, (size, phase) in enumerate(zip(self.waves[::2], self.waves[1::2], strict=True), 2):
            radius = radius * (1 + size * np.cos(k * angle + phase))
        return radius

    def skin(self, angle: Points) -> Points:
        """Radius of the skin: the body's outline with breasts or chest muscles in front."""
        front = sum(
            np.exp(-((_turn(angle - center) / 0.36) ** 2))
            for center in (-0.5 * np.pi - 0.75, -0.5 * np.pi + 0.75)
        )
        return self.body(0.0, angle) + self.breast_mm * front

    def wall(self, angle: Points) -> Points:
        """Radius of the chest wall's muscles, inside the fat; fat is thinner at the sides."""
        return self.body(2.0 + self.fat_mm, angle) + 0.25 * self.fat_mm * np.cos(angle) ** 2

    def cavity(self, angle: Points) -> Points:
        """Radius of the thoracic cavity, dented by the spine behind and the sternum in front."""
        inset = 2.0 + self.fat_mm + self.muscle_mm
        back = np.exp(-((_turn(angle - 0.5 * np.pi) / 0.40) ** 2))
        front = np.exp(-((_turn(angle + 0.5 * np.pi) / 0.30) ** 2))
        narrow = 1 - 0.10 * (1 - self.level) * np.abs(np.sin(angle))
        return self.body(inset, angle) * narrow * (1 - 0.30 * back - 0.08 * front)

    @cached_property
    def _rim(self) -> Points:
        return self.cavity(np.linspace(0, 2 * np.pi, 721))

    def rim_mm(self, angle: float) -> float:
        """Radius of the cavity at one angle, to the nearest half degree."""
        return float(self._rim[round(angle * 360 / np.pi) % 720])

    @property
    def front_mm(self) -> float:
        return -self.rim_mm(-0.5 * np.pi)

    @property
    def back_mm(self) -> float:
        return self.rim_mm(0.5 * np.pi)

    def mediastinum_mm(self, y: Points) -> tuple[Points, Points]:
        """Its right and left border (both positive, mm from the midline) at the heights `y`."""
        down = np.clip((y - self.front_mm) / (self.back_mm - self.front_mm), 0, 1)
        at = (0.0, 0.12, 0.35, 0.58, 0.8, 1.0)
        # Drawn from the outlines of axial slices at the aortic arch, the carina and the heart.
        right = ((12, 18, 28, 24, 15, 12), (7, 15, 34, 36, 20, 12), (10, 28, 44, 36, 18, 12))
        left = ((12, 20, 34, 36, 28, 14), (7, 20, 38, 40, 32, 18), (20, 62, 80, 58, 30, 18))
        scale = self.half_width_mm / 168
        return (
            scale * np.interp(down, at, _between(self.level, right)),
            scale * np.interp(down, at, _between(self.level, left)),
        )


def _draw_anatomy_numbers(rng: np.random.Generator) -> _Anatomy:
    half_width = rng.uniform(148, 192)
    waves: list[float] = []
    for k in (2, 3, 4):
        waves += [rng.uniform(0, 0.03) / (k - 1), rng.uniform(0, 2 * np.pi)]
    fat = rng.uniform(5, 24)
    breast = rng.uniform(6, 20) if rng.random() < 0.4 else rng.uniform(0, 3)
    return _Anatomy(
        level=rng.uniform(0, 1),
        half_width_mm=half_width,
        half_height_mm=half_width * rng.uniform(0.66, 0.77),
        squareness=rng.uniform(2.0, 2.45),
        fat_mm=fat,
        muscle_mm=rng.uniform(14, 20),
        breast_mm=breast,
        waves=tuple(waves),
        field_mm=2 * half_width * rng.uniform(1.04, 1.28) + 18,
        offset_mm=(rng.uniform(-7, 7), rng.uniform(-14, 8)),
        lung_hu=rng.uniform(-900, -800),
        blood_hu=rng.uniform(40, 60) if rng.random() < 0.4 else rng.uniform(110, 240),
        noise_hu=rng.uniform(9, 28),
        blur_px=rng.uniform(0.55, 0.95),
    )


class _Canvas:
    """A float picture on which shapes are drawn in millimetres from the body's centre."""

    def __init__(self, size: int, anatomy: _Anatomy) -> None:
        self.size = size
        self.spacing_mm = anatomy.pixel_spacing_mm(size)
        self.center = np.asarray(anatomy.offset_mm) / self.spacing_mm + 0.5 * (size - 1)
        self.image = Image.new("F", (size, size), AIR_HU)
        self.draw = ImageDraw.Draw(self.image)

    def blank(self) -> _Canvas:
        """An empty canvas, value 0, of the same geometry."""
        other = object.__new__(_Canvas)
        other.size, other.spacing_mm, other.center = self.size, self.spacing_mm, self.center
        other.image = Image.new("F", (self.size, self.size), 0.0)
        other.draw = ImageDraw.Draw(other.image)
        return other

    def polygon(self, points: Points, value: float) -> None:
        """Fill the (n, 2) points in mm with `value`."""
        self.draw.polygon((points / self.spacing_mm + self.center).ravel().tolist(), fill=value)

    def ellipse(
        self, x: float, y: float, radius: float, value: float, *, aspect: float = 1, tilt: float = 0
    ) -> None:
        """Fill an ellipse of the half axes `radius` and `radius * aspect`, turned by `tilt`."""
        along, across = radius * _UNIT[:, 0], radius * aspect * _UNIT[:, 1]
        cos, sin = np.cos(tilt), np.sin(tilt)
        points = np.stack([x + along * cos - across * sin, y + along * sin + across * cos], axis=1)
        self.polygon(points, value)

    def stroke(self, points: Points, widths: Points | float, value: float) -> None:
        """Draw the (n, 2) path with a width in mm at each point, as one tapered polygon."""
        direction = np.gradient(points, axis=0)
        normal = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
        length = np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
        half = 0.5 * np.broadcast_to(np.asarray(widths, float), len(points))[:, None]
        side = half * normal / length
        self.polygon(np.concatenate([points + side, (points - side)[::-1]]), value)

    def pixels(self) -> FloatArray:
        """A float32 (size, size) copy of the picture."""
        return np.array(self.image, np.float32)

    def grid(self, step: int = 1) -> tuple[Points, Points]:
        """Coordinates x (1, columns) and y (rows, 1) in mm of every `step`-th pixel."""
        at = np.arange(0, self.size, step)
        x, y = ((at - center) * self.spacing_mm for center in self.center)
        return x[None, :], y[:, None]


_CIRCLE: Points = np.linspace(0, 2 * np.pi, 180, endpoint=False)
_UNIT: Points = np.stack([np.cos(_CIRCLE[::4]), np.sin(_CIRCLE[::4])], axis=1)


def _superellipse(a: float, b: float, power: float, angle: Points) -> Points:
    """Radius of |x/a|^power + |y/b|^power = 1 in polar form."""
    total = np.abs(np.cos(angle) / a) ** power + np.abs(np.sin(angle) / b) ** power
    return np.asarray(total ** (-1 / power))


def _turn(angle: Points) -> Points:
    """Angles wrapped to -pi to pi."""
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)


def _polar(radius: Points, angle: Points) -> Points:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def _between(level: float, keys: tuple[tuple[float, ...], ...]) -> Points:
    """The key outlines for levels 0, 0.5 and 1, blended for `level`."""
    return np.array([np.interp(level, (0, 0.5, 1), column) for column in zip(*keys, strict=True)])


def _blob(radius: float, waves: int, amount: float, rng: np.random.Generator) -> Points:
    """Radii of an irregular closed outline at the angles of `_CIRCLE`."""
    outline = np.ones_like(_CIRCLE)
    for k in range(2, 2 + waves):
        outline += (
            rng.uniform(-amount, amount)
            / np.sqrt(k - 1)
            * np.cos(k * _CIRCLE + rng.uniform(0, 2 * np.pi))
        )
    return radius * outline


def _draw_table(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator) -> None:
    if rng.random() < 0.25:
        return
    x = np.linspace(-0.95, 0.95, 40) * anatomy.half_width_mm
    top = float(anatomy.skin(np.array([0.5 * np.pi]))[0]) + rng.uniform(1, 7)
    bend = rng.uniform(0, 22) * (x / anatomy.half_width_mm) ** 2
    for depth, width in ((0.0, 2.5), (rng.uniform(14, 24), 1.6)):
        canvas.stroke(np.stack([x, top + depth - bend], axis=1), width, TABLE_HU)


def _draw_body(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator) -> None:
    skin = anatomy.skin(_CIRCLE)
    canvas.polygon(_polar(skin, _CIRCLE), SKIN_HU)
    canvas.polygon(_polar(skin - 2.0, _CIRCLE), FAT_HU)
    canvas.polygon(_polar(anatomy.wall(_CIRCLE), _CIRCLE), MUSCLE_HU)
    # Layers of fat between the muscles of the wall.
    for _ in range(6):
        at = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(0.25, 0.7), 24)
        share = rng.uniform(0.35, 0.8)
        radius = (1 - share) * anatomy.cavity(at) + share * anatomy.wall(at)
        canvas.stroke(_polar(radius, at), rng.uniform(1.0, 2.6), FAT_HU)


def _draw_bones(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator) -> None:
    def bone(points: Points, width: float) -> None:
        canvas.stroke(points, width, CORTICAL_HU)
        canvas.stroke(points[1:-1], width - 3.4, MARROW_HU)

    for side in (0.0, np.pi):
        angle = -1.15 + rng.uniform(0, 0.3)
        while angle < 1.0:
            at = np.linspace(angle, angle + rng.uniform(0.13, 0.42), 14)
            turned = at if side == 0.0 else np.pi - at
            bone(_polar(anatomy.cavity(turned) + 5.5, turned), rng.uniform(6.0, 8.5))
            angle = float(at[-1]) + rng.uniform(0.14, 0.3)
        if anatomy.level < 0.5:
            at = np.linspace(0.38, 0.85 - 0.3 * anatomy.level, 12)
            turned = at if side == 0.0 else np.pi - at
            bone(_polar(0.25 * anatomy.cavity(turned) + 0.75 * anatomy.wall(turned), turned), 6.0)
    canvas.ellipse(0, anatomy.front_mm - 7, rng.uniform(15, 21), CORTICAL_HU, aspect=0.4)
    canvas.ellipse(0, anatomy.front_mm - 7, 14, MARROW_HU, aspect=0.3)


def _draw_spine(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator) -> None:
    y = anatomy.back_mm + 12
    tip = min(y + 44, float(anatomy.wall(np.array([0.5 * np.pi]))[0]) - 1)
    half_width = rng.uniform(16, 20)
    canvas.ellipse(0, y + 4, half_width + 5, MUSCLE_HU, aspect=0.85)
    for side in (-1, 1):
        process = np.array([[0, 16], [14, 24], [27, 22], [40, 14]]) * [side, 1] + [0, y]
        canvas.stroke(process, np.array([9.0, 9.0, 8.0, 6.0]), CORTICAL_HU)
        canvas.stroke(process[1:], np.array([5.0, 4.5, 2.5]), MARROW_HU)
    canvas.stroke(np.array([[0, y + 24], [0, tip]], float), np.array([7.0, 5.0]), CORTICAL_HU)
    canvas.ellipse(0, y + 18, 12.5, CORTICAL_HU, aspect=0.9)
    canvas.ellipse(0, y, half_width, CORTICAL_HU, aspect=0.82)
    canvas.ellipse(0, y, half_width - 2, MARROW_HU, aspect=0.80)
    canvas.ellipse(0, y + 18.5, 8.5, 25.0, aspect=0.85)


def _draw_cavity(
    canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Draw lungs and mediastinum; the bool (size, size) mask of what is lung."""
    mark = -2000.0
    canvas.polygon(_polar(anatomy.cavity(_CIRCLE), _CIRCLE), mark)
    front, back = anatomy.front_mm - 1, anatomy.back_mm + 1
    y = np.linspace(front, back, 60)
    right, left = (
        ndimage.gaussian_filter1d(
            border * (1 + rng.uniform(-0.1, 0.1))
            + 1.5 * ndimage.gaussian_filter1d(rng.standard_normal(len(y)), 3),
            3,
        )
        for border in anatomy.mediastinum_mm(y)
    )
    for shrink, value in ((0.0, MUSCLE_HU), (2.5, FAT_HU + 15)):
        points = np.concatenate(
            [np.stack([shrink - right, y], axis=1), np.stack([left - shrink, y], axis=1)[::-1]]
        )
        canvas.polygon(points, value)
    _draw_mediastinum(canvas, anatomy, rng)
    _draw_liver(canvas, anatomy, rng)
    _draw_spine(canvas, anatomy, rng)
    return np.asarray(canvas.pixels() == mark)


def _draw_mediastinum(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator) -> None:
    front, back, level = anatomy.front_mm, anatomy.back_mm, anatomy.level
    scale, blood = anatomy.half_width_mm / 168, anatomy.blood_hu
    vein = max(45.0, blood * rng.uniform(0.6, 1.0))

    def at(down: float) -> float:
        return front + down * (back - front)

    if level < 0.3:
        arch = np.array([[-14, at(0.30)], [4, at(0.34)], [22, at(0.5)], [26, at(0.74)]])
        canvas.stroke(arch * [scale, 1], np.array([16.0, 25.0, 26.0, 20.0]) * scale, blood)
        canvas.ellipse(-19 * scale, at(0.34), 8.5, vein, aspect=1.2)
    elif level < 0.68:
        canvas.ellipse(-9 * scale, at(0.34), rng.uniform(14, 18) * scale, blood)
        canvas.ellipse(-29 * scale, at(0.42), 8.5, vein, aspect=1.2)
        canvas.ellipse(19 * scale, at(0.38), 13 * scale, blood, aspect=1.5, tilt=0.9)
        across = np.array([[18, at(0.42)], [0, at(0.56)], [-32, at(0.58)]])
        canvas.stroke(across * [scale, 1], np.array([17.0, 15.0, 11.0]), blood)
    else:
        canvas.ellipse(20 * scale, at(0.38), 54 * scale, MUSCLE_HU + 25, aspect=0.72, tilt=0.45)
        for x, down, radius in ((-16, 0.38, 21), (12, 0.24, 19), (38, 0.42, 26), (4, 0.58, 19)):
            canvas.ellipse(x * scale, at(down), radius * scale, blood, aspect=0.85, tilt=0.5)
    canvas.ellipse(25 * scale, at(0.88), rng.uniform(11, 14.5), blood)
    canvas.ellipse(9, at(0.8), 6, MUSCLE_HU, aspect=1.3)
    if level < 0.42:
        trachea = rng.uniform(7.5, 9.5)
        canvas.ellipse(-2, at(0.62), trachea + 1.6, MUSCLE_HU, aspect=1.1)
        canvas.ellipse(-2, at(0.62), trachea, AIR_HU, aspect=1.1)
    elif level < 0.72:
        apart = 16 + 30 * (level - 0.42)
        for side in (-1, 1):
            for outer, value in ((7.5, MUSCLE_HU), (6.0, AIR_HU)):
                canvas.ellipse(side * apart, at(0.68), outer, value, aspect=1.35, tilt=-0.9 * side)


def _draw_liver(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator) -> None:
    """The dome of the liver in the right lung of some low slices."""
    if anatomy.level < 0.85 or rng.random() < 0.6:
        return
    radius = rng.uniform(22, 46)
    center = np.array([-0.44 * anatomy.half_width_mm, rng.uniform(-8, 14)])
    canvas.polygon(_polar(_blob(radius, 4, 0.08, rng), _CIRCLE) + center, LIVER_HU)


def _lung_pixels(
    canvas: _Canvas, anatomy: _Anatomy, lung: npt.NDArray[np.bool_], rng: np.random.Generator
) -> FloatArray:
    """HU of the lung's pixels: texture, gravity, vessels, airways and now and then a granuloma."""
    _, y = canvas.grid()
    gravity = rng.uniform(15, 75) * np.clip(y / anatomy.half_height_mm, -1, 1)
    texture = _cloud(canvas.size, 64, rng) * 22 + _cloud(canvas.size, canvas.size // 2, rng) * 16
    base = anatomy.lung_hu + gravity.astype(np.float32) + texture
    tree = canvas.blank()
    for side in (-1, 1):
        _draw_vessels(tree, anatomy, side, rng)
    filled = tree.pixels()
    vessel_hu = min(anatomy.blood_hu, 140.0)
    hu = np.where(filled < 0, AIR_HU + 30, base + filled * (vessel_hu - base))
    return np.asarray(hu[lung], np.float32)


def _cloud(size: int, cells: int, rng: np.random.Generator) -> FloatArray:
    """Smooth noise of unit deviation, (size, size), with about `cells` bumps along a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray(smooth / smooth.std(), np.float32)


def _hilum(anatomy: _Anatomy, side: int) -> tuple[float, float]:
    y = anatomy.front_mm + 0.6 * (anatomy.back_mm - anatomy.front_mm)
    right, left = anatomy.mediastinum_mm(np.array([y]))
    return float(left[0] if side > 0 else -right[0]), y


def _draw_vessels(canvas: _Canvas, anatomy: _Anatomy, side: int, rng: np.random.Generator) -> None:
    """Vessels of one lung as filling (0 to 1) and lumens of airways as -1."""
    x, y = _hilum(anatomy, side)
    near_hilum = 1 - abs(anatomy.level - 0.6)
    branches: list[tuple[Points, Points]] = []
    count = int(rng.integers(5, 9))
    fan = np.linspace(-1.25, 1.25, count) + rng.uniform(-0.15, 0.15, count)
    waiting = [
        (np.array([x - 4 * side, y + 6 * turn]), turn, rng.uniform(2.6, 5.6) * near_hilum)
        for turn in fan
    ]
    while waiting:
        place, turn, width = waiting.pop()
        path, widths = [place], [width]
        while width > 0.7:
            turn += rng.normal(0, 0.2)
            place = place + rng.uniform(6, 10) * np.array([side * np.cos(turn), np.sin(turn)])
            width *= rng.uniform(0.82, 0.92)
            path.append(place)
            widths.append(width)
            inside = 0.95 * anatomy.rim_mm(np.arctan2(place[1], place[0]))
            leaves_plane = rng.random() < 0.16
            if leaves_plane or np.hypot(*place) > inside:
                break
            if rng.random() < 0.42:
                fork = turn + rng.choice((-1, 1)) * rng.uniform(0.4, 0.9)
                waiting.append((place, fork, width * rng.uniform(0.6, 0.85)))
        if len(path) > 1:
            branches.append((np.array(path), np.array(widths)))
    # Vessels that cross the slice are seen end-on, fewer and finer towards the pleura.
    count = int(rng.integers(70, 120))
    angle, share = rng.uniform(-1.45, 1.45, count), rng.uniform(0.0, 0.93, count)
    for turn, part in zip(angle, share, strict=True):
        around = turn if side > 0 else np.pi - turn
        rim = anatomy.rim_mm(around)
        place = (1 - part) * np.array([x, y]) + part * _polar(np.array(rim), np.array(around))
        radius = (0.5 + 2.1 * (1 - part) * near_hilum) * rng.uniform(0.6, 1.15)
        canvas.ellipse(
            place[0],
            place[1],
            max(radius, 0.6),
            _partial(2 * radius),
            aspect=rng.uniform(0.7, 1),
            tilt=turn,
        )
    for line, line_widths in sorted(branches, key=lambda branch: branch[1][0]):
        canvas.stroke(line, np.maximum(line_widths, 1.0), _partial(float(line_widths.mean())))
    for _ in range(int(rng.integers(1, 4))):
        away, turn, radius = rng.uniform(4, 26), rng.uniform(-1, 1), rng.uniform(1.8, 3.4)
        place = np.array([x + side * away * np.cos(turn), y + away * np.sin(turn)])
        canvas.ellipse(place[0], place[1], radius + 1.2, 0.75)
        canvas.ellipse(place[0], place[1], radius, -1.0)
    if rng.random() < 0.2:
        turn, part = rng.uniform(-1, 1), rng.uniform(0.4, 0.85)
        rim = anatomy.rim_mm(turn)
        canvas.ellipse(side * part * rim * np.cos(turn), part * rim * np.sin(turn), 2.0, 1.4)


def _partial(width_mm: float) -> float:
    """Filling of a vessel that is thinner than the slice: 1 from 3.5 mm on."""
    return float(np.clip(width_mm / 3.5, 0.3, 1.0))


def _add_lesion(
    hu: FloatArray,
    canvas: _Canvas,
    anatomy: _Anatomy,
    lung: npt.NDArray[np.bool_],
    label: str,
    scale: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.bool_] | None:
    """Draw the lesion of `label` into the lung of `hu` in place; its mask, or None.

    Where and how follows the textbook pictures of the three types: adenocarcinoma a spiculated
    peripheral nodule with a faint rim, large cell carcinoma a large peripheral mass, squamous
    cell carcinoma a central mass that breaks down into a cavity.
    """
    if label == "normal":
        return None
    radius = (
        scale
        * {
            "adenocarcinoma": rng.uniform(9, 15),
            "large.cell.carcinoma": rng.uniform(23, 34),
            "squamous.cell.carcinoma": rng.uniform(18, 28),
        }[label]
    )
    center = _lesion_place(canvas, anatomy, lung, label, radius, rng)
    fill = canvas.blank()
    if label == "adenocarcinoma":
        fill.polygon(_polar(_blob(1.35 * radius, 5, 0.16, rng), _CIRCLE) + center, 0.35)
        for turn in np.linspace(0, 2 * np.pi, int(rng.integers(9, 16)), endpoint=False):
            reach = radius * np.array([0.6, 1.0, rng.uniform(1.4, 2.2)])
            spike = _polar(reach, turn + rng.uniform(-0.2, 0.2) + np.array([0, 0, 0.1])) + center
            fill.stroke(spike, np.array([3.4, 2.2, 0.8]), 0.8)
        fill.polygon(_polar(_blob(radius, 6, 0.14, rng), _CIRCLE) + center, 1.0)
    elif label == "large.cell.carcinoma":
        fill.polygon(_polar(_blob(radius, 4, 0.10, rng), _CIRCLE) + center, 1.0)
        for _ in range(3):  # necrosis: a little darker
            x, y = center + rng.uniform(-0.4, 0.4, 2) * radius
            fill.ellipse(x, y, rng.uniform(0.15, 0.3) * radius, 0.96, aspect=0.8)
    else:
        fill.polygon(_polar(_blob(radius, 6, 0.10, rng), _CIRCLE) + center, 1.0)
        hollow = _polar(_blob(rng.uniform(0.42, 0.62) * radius, 6, 0.16, rng), _CIRCLE)
        hollow += center + rng.uniform(-0.12, 0.12, 2) * radius
        fill.polygon(hollow, -1.0)
        if rng.random() < 0.4:  # fluid lies at the back of the cavity, the patient on his
            level = center[1] + rng.uniform(0.05, 0.3) * radius
            fill.polygon(np.maximum(hollow, [-1e9, level]), 0.95)
    amount = fill.pixels()
    amount[~lung] = 0
    tissue = rng.uniform(20, 65) + 10 * _cloud(canvas.size, canvas.size // 8, rng)
    np.copyto(hu, hu + amount * (tissue - hu), where=amount > 0)
    np.copyto(hu, np.float32(-970.0), where=amount < 0)
    return np.asarray(amount != 0)


def _lesion_place(
    canvas: _Canvas,
    anatomy: _Anatomy,
    lung: npt.NDArray[np.bool_],
    label: str,
    radius: float,
    rng: np.random.Generator,
) -> Points:
    """Centre in mm of the lesion: a place in the lung that suits its class, by least misfit."""
    step = max(1, canvas.size // 128)
    coarse = lung[::step, ::step]
    depth = ndimage.distance_transform_edt(coarse) * step * canvas.spacing_mm
    rows, columns = np.nonzero(coarse)
    grid_x, grid_y = canvas.grid(step)
    x, y = grid_x[0, columns], grid_y[rows, 0]
    to_wall = anatomy.cavity(np.arctan2(y, x)) - np.hypot(x, y)
    from_hilum = np.min(
        [np.hypot(x - hx, y - hy) for hx, hy in (_hilum(anatomy, side) for side in (-1, 1))], axis=0
    )
    shallow = np.maximum(0, 0.6 * radius - depth[rows, columns])
    if label == "squamous.cell.carcinoma":
        misfit = np.abs(from_hilum - 0.95 * radius) + shallow + np.maximum(0, radius - to_wall)
    elif label == "large.cell.carcinoma":
        misfit = np.abs(to_wall - 0.75 * radius) + shallow
        misfit += np.maximum(0, radius + 12 - from_hilum)
    else:
        misfit = np.abs(to_wall - radius - rng.uniform(4, 12)) + 3 * shallow
        misfit += np.maximum(0, 35 - from_hilum)
    good = np.flatnonzero(misfit <= max(6.0, float(misfit.min()) + 1))
    chosen = good[rng.integers(len(good))]
    return np.array([x[chosen], y[chosen]])


def _add_scanner(hu: FloatArray, anatomy: _Anatomy, rng: np.random.Generator) -> FloatArray:
    """The slice as a scanner gives it: soft, noisy, in whole HU within 12 bits."""
    size = hu.shape[0]
    hu = ndimage.gaussian_filter(hu, anatomy.blur_px * size / 512)
    hu += 0.5 * anatomy.noise_hu * rng.standard_normal(hu.shape, np.float32)
    hu += 0.8 * anatomy.noise_hu * _cloud(size, int(size / 1.8), rng)
    np.rint(hu, out=hu)
    return np.clip(hu, float(RESCALE_INTERCEPT_HU), LARGEST_HU)


def _burn_in_text(hu: FloatArray) -> None:
    """Write SYNTHETIC in the upper left corner of `hu`, outside the body, the same on all."""
    size = hu.shape[0]
    font = ImageFont.load_default(size / 32)
    left, top, right, bottom = (round(edge) for edge in font.getbbox("SYNTHETIC"))
    stamp = Image.new("L", (right + left + 2, bottom + top + 2), 0)
    ImageDraw.Draw(stamp).text((1, 1), "SYNTHETIC", fill=255, font=font)
    corner = hu[: stamp.height, : stamp.width]
    corner[:] = np.where(np.asarray(stamp) > 127, TEXT_HU, AIR_HU)


def _box(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def write_png(phantom: Phantom, path: Path) -> None:
    """The slice in the lung window as 8-bit grey PNG, with a text chunk that says what it is."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", NOTICE)
    text.add_text("Synthetic", f"label {phantom.label}, seed {phantom.seed}")
    picture = Image.fromarray(apply_window(phantom.hu, LUNG_WINDOW))
    picture.save(path, format="PNG", pnginfo=text, compress_level=4)


def dicom_from_phantom(phantom: Phantom) -> Dataset:
    """A CT Image Storage data set with all type 1 and 2 attributes (DICOM PS3.3 A.3).

    Unknown type 2 attributes are present and empty. UIDs follow from label and seed, so that the
    same phantom is the same file.
    """
    name = f"{phantom.label}/{phantom.seed}/{phantom.hu.shape[0]}"

    def uid(part: str) -> str:
        return str(generate_uid(entropy_srcs=["chest-ct phantom", name, part]))

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid("image")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    # SOP Common (C.12.1), Patient (C.7.1.1), General Study (C.7.2.1)
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.SyntheticData = "YES"
    dataset.PatientName = "SYNTHETIC^PHANTOM"
    dataset.PatientID = f"PHANTOM-{phantom.seed}"
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.PatientComments = NOTICE
    dataset.StudyInstanceUID = uid("study")
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = dataset.StudyID = ""
    # General Series (C.7.3.1), Frame of Reference (C.7.4.1), General Equipment (C.7.5.1)
    dataset.Modality = "CT"
    dataset.SeriesInstanceUID = uid("series")
    dataset.SeriesNumber = 1
    dataset.SeriesDescription = "SYNTHETIC chest phantom"
    dataset.PatientPosition = "HFS"
    dataset.FrameOfReferenceUID = uid("frame")
    dataset.PositionReferenceIndicator = ""
    dataset.Manufacturer = ""
    # General Image (C.7.6.1), Image Plane (C.7.6.2)
    rows, columns = phantom.hu.shape
    spacing = phantom.pixel_spacing_mm
    dataset.InstanceNumber = 1
    dataset.ImageComments = NOTICE
    dataset.BurnedInAnnotation = "YES"
    dataset.PixelSpacing = [spacing, spacing]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [
        round(-0.5 * (columns - 1) * spacing, 3),
        round(-0.5 * (rows - 1) * spacing, 3),
        0,
    ]
    dataset.SliceThickness = 3
    # CT Image (C.8.2.1), Image Pixel (C.7.6.3), VOI LUT (C.11.2)
    dataset.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    dataset.KVP = dataset.AcquisitionNumber = None
    dataset.RescaleIntercept = RESCALE_INTERCEPT_HU
    dataset.RescaleSlope = 1
    dataset.RescaleType = "HU"
    dataset.WindowCenter, dataset.WindowWidth = LUNG_WINDOW.center_hu, LUNG_WINDOW.width_hu
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    stored = (phantom.hu - RESCALE_INTERCEPT_HU).astype("<i2")
    dataset.PixelData = stored.tobytes()
    return dataset


def write_dicom(phantom: Phantom, path: Path) -> None:
    """The slice as a DICOM file: int16 pixels, rescale intercept -1024."""
    dicom_from_phantom(phantom).save_as(path, enforce_file_format=True)


def write_phantoms(
    folder: Path,
    *,
    per_class: Mapping[str, int],
    seed: int,
    dicom_fraction: float = 0.0,
    variety: float = 1.0,
    lesion_scale: float = 1.0,
) -> int:
    """Write `folder/train|valid|test/CLASS/*` whole or not at all; how many files it holds.

    No two files share an anatomy, so none is shared between splits or classes.

    Args:
        folder: What to write; an older folder is replaced.
        per_class: Slices of each class for `train`, `valid` and `test`; a split of 0 is left out.
        seed: The same seed gives the same bytes.
        dicom_fraction: Part of the test slices of each class written as DICOM.
        variety: See `PhantomConfig`.
        lesion_scale: See `PhantomConfig`.

    Raises:
        ValueError: `per_class` names something else than train, valid or test.
        OSError: The folder cannot be written.
    """
    if unknown := set(per_class) - set(SPLITS):
        raise ValueError(f"splits {sorted(unknown)}: expected {', '.join(SPLITS)}")
    plan = [
        (split, label, number)
        for split in SPLITS
        for label in LABELS
        for number in range(per_class.get(split, 0))
    ]
    with replaced(folder) as temporary:
        for count, (split, label, number) in enumerate(
            tqdm(plan, desc="phantoms", unit="slice", disable=None)
        ):
            phantom = make_phantom(
                label, seed * 1_000_000 + count, variety=variety, lesion_scale=lesion_scale
            )
            target = temporary / split / label
            target.mkdir(parents=True, exist_ok=True)
            stem = f"phantom_{phantom.seed:07d}"
            as_dicom = split == "test" and number < round(dicom_fraction * per_class["test"])
            if as_dicom:
                write_dicom(phantom, target / f"{stem}.dcm")
            else:
                write_png(phantom, target / f"{stem}.png")
    return len(plan)


def write_configured(folder: Path, config: PhantomConfig) -> int:
    """`write_phantoms` with the numbers of a config."""
    return write_phantoms(
        folder,
        per_class={"train": config.train, "valid": config.valid, "test": config.test},
        seed=config.seed,
        dicom_fraction=config.dicom_fraction,
        variety=config.variety,
        lesion_scale=config.lesion_scale,
    )


def main(argv: list[str] | None = None) -> int:
    """Write a folder of phantoms."""
    parser = command_parser("training phantom", main.__doc__, "configs/phantom.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, help="instead of the config's seed")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(PhantomConfig, arguments.config)
        if arguments.seed is not None:
            config = dataclasses.replace(config, seed=arguments.seed)
        count = write_configured(arguments.output, config)
        sys.stdout.write(f"{count} phantoms in {arguments.output}\n")

    return run_command(work)
