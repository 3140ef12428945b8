"""Drawing of a phantom: body, bones, mediastinum, lungs, vessels, lesion, scanner."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from training.data.phantom_anatomy import (
    AIR_HU,
    CIRCLE,
    CORTICAL_HU,
    FAT_HU,
    LARGEST_HU,
    LIVER_HU,
    MARROW_HU,
    MUSCLE_HU,
    RESCALE_INTERCEPT_HU,
    SKIN_HU,
    TABLE_HU,
    TEXT_HU,
    Anatomy,
    Canvas,
    FloatArray,
    Points,
    blob,
    polar,
)


def draw_table(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Draw the scanner table behind the body; a quarter of the slices have none."""
    if rng.random() < 0.25:
        return
    x = np.linspace(-0.95, 0.95, 40) * anatomy.half_width_mm
    top = float(anatomy.skin(np.array([0.5 * np.pi]))[0]) + rng.uniform(1, 7)
    bend = rng.uniform(0, 22) * (x / anatomy.half_width_mm) ** 2
    for depth, width in ((0.0, 2.5), (rng.uniform(14, 24), 1.6)):
        canvas.stroke(np.stack([x, top + depth - bend], axis=1), width, TABLE_HU)


def draw_body(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Draw skin, fat and muscle."""
    skin = anatomy.skin(CIRCLE)
    canvas.polygon(polar(skin, CIRCLE), SKIN_HU)
    canvas.polygon(polar(skin - 2.0, CIRCLE), FAT_HU)
    canvas.polygon(polar(anatomy.wall(CIRCLE), CIRCLE), MUSCLE_HU)
    # Layers of fat between the muscles of the wall.
    for _ in range(6):
        at = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(0.25, 0.7), 24)
        share = rng.uniform(0.35, 0.8)
        radius = (1 - share) * anatomy.cavity(at) + share * anatomy.wall(at)
        canvas.stroke(polar(radius, at), rng.uniform(1.0, 2.6), FAT_HU)


def draw_bones(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Draw ribs, shoulder blades and breastbone."""

    def bone(points: Points, width: float) -> None:
        canvas.stroke(points, width, CORTICAL_HU)
        canvas.stroke(points[1:-1], width - 3.4, MARROW_HU)

    for side in (0.0, np.pi):
        angle = -1.15 + rng.uniform(0, 0.3)
        while angle < 1.0:
            at = np.linspace(angle, angle + rng.uniform(0.13, 0.42), 14)
            turned = at if side == 0.0 else np.pi - at
            bone(polar(anatomy.cavity(turned) + 5.5, turned), rng.uniform(6.0, 8.5))
            angle = float(at[-1]) + rng.uniform(0.14, 0.3)
        if anatomy.level < 0.5:
            at = np.linspace(0.38, 0.85 - 0.3 * anatomy.level, 12)
            turned = at if side == 0.0 else np.pi - at
            bone(polar(0.25 * anatomy.cavity(turned) + 0.75 * anatomy.wall(turned), turned), 6.0)
    canvas.ellipse(0, anatomy.front_mm - 7, rng.uniform(15, 21), CORTICAL_HU, aspect=0.4)
    canvas.ellipse(0, anatomy.front_mm - 7, 14, MARROW_HU, aspect=0.3)


def _draw_spine(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
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


def draw_cavity(
    canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Draw lungs and mediastinum; the bool (size, size) mask of what is lung."""
    mark = -2000.0
    canvas.polygon(polar(anatomy.cavity(CIRCLE), CIRCLE), mark)
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


def _draw_mediastinum(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
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


def _draw_liver(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """The dome of the liver in the right lung of some low slices."""
    if anatomy.level < 0.85 or rng.random() < 0.6:
        return
    radius = rng.uniform(22, 46)
    center = np.array([-0.44 * anatomy.half_width_mm, rng.uniform(-8, 14)])
    canvas.polygon(polar(blob(radius, 4, 0.08, rng), CIRCLE) + center, LIVER_HU)


def lung_pixels(
    canvas: Canvas, anatomy: Anatomy, lung: npt.NDArray[np.bool_], rng: np.random.Generator
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


def _hilum(anatomy: Anatomy, side: int) -> tuple[float, float]:
    y = anatomy.front_mm + 0.6 * (anatomy.back_mm - anatomy.front_mm)
    right, left = anatomy.mediastinum_mm(np.array([y]))
    return float(left[0] if side > 0 else -right[0]), y


def _draw_vessels(canvas: Canvas, anatomy: Anatomy, side: int, rng: np.random.Generator) -> None:
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
        place = (1 - part) * np.array([x, y]) + part * polar(np.array(rim), np.array(around))
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


def add_lesion(
    hu: FloatArray,
    canvas: Canvas,
    anatomy: Anatomy,
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
        fill.polygon(polar(blob(1.35 * radius, 5, 0.16, rng), CIRCLE) + center, 0.35)
        for turn in np.linspace(0, 2 * np.pi, int(rng.integers(9, 16)), endpoint=False):
            reach = radius * np.array([0.6, 1.0, rng.uniform(1.4, 2.2)])
            spike = polar(reach, turn + rng.uniform(-0.2, 0.2) + np.array([0, 0, 0.1])) + center
            fill.stroke(spike, np.array([3.4, 2.2, 0.8]), 0.8)
        fill.polygon(polar(blob(radius, 6, 0.14, rng), CIRCLE) + center, 1.0)
    elif label == "large.cell.carcinoma":
        fill.polygon(polar(blob(radius, 4, 0.10, rng), CIRCLE) + center, 1.0)
        for _ in range(3):  # necrosis: a little darker
            x, y = center + rng.uniform(-0.4, 0.4, 2) * radius
            fill.ellipse(x, y, rng.uniform(0.15, 0.3) * radius, 0.96, aspect=0.8)
    else:
        fill.polygon(polar(blob(radius, 6, 0.10, rng), CIRCLE) + center, 1.0)
        hollow = polar(blob(rng.uniform(0.42, 0.62) * radius, 6, 0.16, rng), CIRCLE)
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
    canvas: Canvas,
    anatomy: Anatomy,
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


def add_scanner(hu: FloatArray, anatomy: Anatomy, rng: np.random.Generator) -> FloatArray:
    """The slice as a scanner gives it: soft, noisy, in whole HU within 12 bits."""
    size = hu.shape[0]
    hu = ndimage.gaussian_filter(hu, anatomy.blur_px * size / 512)
    hu += 0.5 * anatomy.noise_hu * rng.standard_normal(hu.shape, np.float32)
    hu += 0.8 * anatomy.noise_hu * _cloud(size, int(size / 1.8), rng)
    np.rint(hu, out=hu)
    return np.clip(hu, float(RESCALE_INTERCEPT_HU), LARGEST_HU)


def burn_in_text(hu: FloatArray) -> None:
    """Write SYNTHETIC in the upper left corner of `hu`, outside the body, the same on all."""
    size = hu.shape[0]
    font = ImageFont.load_default(size / 32)
    left, top, right, bottom = (round(edge) for edge in font.getbbox("SYNTHETIC"))
    stamp = Image.new("L", (right + left + 2, bottom + top + 2), 0)
    ImageDraw.Draw(stamp).text((1, 1), "SYNTHETIC", fill=255, font=font)
    corner = hu[: stamp.height, : stamp.width]
    corner[:] = np.where(np.asarray(stamp) > 127, TEXT_HU, AIR_HU)
