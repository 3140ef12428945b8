"""Geometry of a phantom: the numbers of one body, and a canvas in millimetres."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

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
class Anatomy:
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

    def towards(self, other: Anatomy, share: float) -> Anatomy:
        """Each number moved towards that of `other` by `share` of their difference."""

        def moved(one: Any, goal: Any) -> Any:
            if isinstance(one, tuple):
                return tuple(map(moved, one, goal))
            return one + share * (goal - one)

        return Anatomy(
            **{
                field.name: moved(getattr(self, field.name), getattr(other, field.name))
                for field in dataclasses.fields(self)
            }
        )

    def pixel_spacing_mm(self, size: int) -> float:
        """Pixel size in mm of a picture with `size` columns."""
        return round(self.field_mm / size, 4)

    def body(self, inset_mm: float, angle: Points) -> Points:
        """Radius in mm of the body's outline at `angle`, moved inwards by `inset_mm`."""
        radius = superellipse(
            self.half_width_mm - inset_mm, self.half_height_mm - inset_mm, self.squareness, angle
        )
        for k, (size, phase) in enumerate(zip(self.waves[::2], self.waves[1::2], strict=True), 2):
            radius = radius * (1 + size * np.cos(k * angle + phase))
        return radius

    def skin(self, angle: Points) -> Points:
        """Radius of the skin: the body's outline with breasts or chest muscles in front."""
        front = sum(
            np.exp(-((turn(angle - center) / 0.36) ** 2))
            for center in (-0.5 * np.pi - 0.75, -0.5 * np.pi + 0.75)
        )
        return self.body(0.0, angle) + self.breast_mm * front

    def wall(self, angle: Points) -> Points:
        """Radius of the chest wall's muscles, inside the fat; fat is thinner at the sides."""
        return self.body(2.0 + self.fat_mm, angle) + 0.25 * self.fat_mm * np.cos(angle) ** 2

    def cavity(self, angle: Points) -> Points:
        """Radius of the thoracic cavity, dented by the spine behind and the sternum in front."""
        inset = 2.0 + self.fat_mm + self.muscle_mm
        back = np.exp(-((turn(angle - 0.5 * np.pi) / 0.40) ** 2))
        front = np.exp(-((turn(angle + 0.5 * np.pi) / 0.30) ** 2))
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
        """Y of the front of the body, in mm."""
        return -self.rim_mm(-0.5 * np.pi)

    @property
    def back_mm(self) -> float:
        """Y of the back of the body, in mm."""
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
            scale * np.interp(down, at, between(self.level, right)),
            scale * np.interp(down, at, between(self.level, left)),
        )


def draw_anatomy_numbers(rng: np.random.Generator) -> Anatomy:
    """Draw the numbers of one body from `rng`."""
    half_width = rng.uniform(148, 192)
    waves: list[float] = []
    for k in (2, 3, 4):
        waves += [rng.uniform(0, 0.03) / (k - 1), rng.uniform(0, 2 * np.pi)]
    fat = rng.uniform(5, 24)
    breast = rng.uniform(6, 20) if rng.random() < 0.4 else rng.uniform(0, 3)
    return Anatomy(
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


class Canvas:
    """A float picture on which shapes are drawn in millimetres from the body's centre."""

    def __init__(self, size: int, anatomy: Anatomy) -> None:
        self.size = size
        self.spacing_mm = anatomy.pixel_spacing_mm(size)
        self.center = np.asarray(anatomy.offset_mm) / self.spacing_mm + 0.5 * (size - 1)
        self.image = Image.new("F", (size, size), AIR_HU)
        self.draw = ImageDraw.Draw(self.image)

    def blank(self) -> Canvas:
        """An empty canvas, value 0, of the same geometry."""
        other = object.__new__(Canvas)
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
        along, across = radius * UNIT[:, 0], radius * aspect * UNIT[:, 1]
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


CIRCLE: Points = np.linspace(0, 2 * np.pi, 180, endpoint=False)
UNIT: Points = np.stack([np.cos(CIRCLE[::4]), np.sin(CIRCLE[::4])], axis=1)


def superellipse(a: float, b: float, power: float, angle: Points) -> Points:
    """Radius of |x/a|^power + |y/b|^power = 1 in polar form."""
    total = np.abs(np.cos(angle) / a) ** power + np.abs(np.sin(angle) / b) ** power
    return np.asarray(total ** (-1 / power))


def turn(angle: Points) -> Points:
    """Angles wrapped to -pi to pi."""
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)


def polar(radius: Points, angle: Points) -> Points:
    """Points (n, 2) from polar coordinates, in mm."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def between(level: float, keys: tuple[tuple[float, ...], ...]) -> Points:
    """The key outlines for levels 0, 0.5 and 1, blended for `level`."""
    return np.array([np.interp(level, (0, 0.5, 1), column) for column in zip(*keys, strict=True)])


def blob(radius: float, waves: int, amount: float, rng: np.random.Generator) -> Points:
    """Radii of an irregular closed outline at the angles of `CIRCLE`."""
    outline = np.ones_like(CIRCLE)
    for k in range(2, 2 + waves):
        outline += (
            rng.uniform(-amount, amount)
            / np.sqrt(k - 1)
            * np.cos(k * CIRCLE + rng.uniform(0, 2 * np.pi))
        )
    return radius * outline
