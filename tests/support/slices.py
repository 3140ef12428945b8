"""Prepared slices of phantoms, and annotations of their lesions."""

from __future__ import annotations

import numpy as np

from chestct.contract import LUNG_WINDOW, Window
from chestct.imaging.prepare import resize_scan
from chestct.imaging.window import apply_window


def scan_of(hu: np.ndarray, window: Window = LUNG_WINDOW) -> np.ndarray:
    return resize_scan(apply_window(hu, window))


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
