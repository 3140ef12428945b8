"""Pictures of results: overlays of the activation map, and one page that shows them."""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
from PIL import Image

from chestct.contract import NOT_A_MEDICAL_DEVICE
from chestct.results.records import Record, plain_text
from chestct.results.writers import DecodedInput

__all__ = ["HtmlReport", "OverlayPngs", "overlay_of"]

OPACITY = 0.6  # of the strongest evidence
MOST_SHOWN = 500  # scans on a page: some 10 MB, which a browser still opens
THUMBNAIL_PX = 112
STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{padding:4px 10px;border-bottom:1px solid #ccc;text-align:left;vertical-align:top}"
    ".no{color:#a00}img{margin-right:4px}"
)


def overlay_of(
    grey: npt.NDArray[np.uint8],
    activation_map: npt.NDArray[np.float32],
    class_index: int,
    box: tuple[int, int, int, int] | None = None,
) -> npt.NDArray[np.uint8]:
    """A slice with the evidence for a class over it, from clear over red to yellow.

    The evidence is that for the class minus the mean over all classes, which is all of it that
    the probabilities depend on (softmax ignores what classes have in common). Negative
    evidence is not coloured; the strongest place is yellow, so colours of two slices cannot be
    compared.

    Args:
        grey: uint8 (H, W), 0 = floor of the window.
        activation_map: float32 (14, 14, C).
        class_index: Which of the C classes.
        box: Top, bottom, left and right of the network's crop, see
            `chestct.imaging.body.body_box`; None where that is the whole picture.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    evidence = activation_map[..., class_index] - activation_map.mean(axis=-1)
    heat = np.clip(evidence / max(float(evidence.max()), 1e-6), 0, 1).astype(np.float32)
    top, bottom, left, right = box or (0, grey.shape[0], 0, grey.shape[1])
    stretched = Image.fromarray(heat).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    spread = np.zeros((*grey.shape, 1), np.float32)
    spread[top:bottom, left:right, 0] = np.clip(np.asarray(stretched), 0, 1)
    colour = 255 * np.concatenate([np.ones_like(spread), spread, 0 * spread], axis=2)
    opacity = OPACITY * spread
    mixed = (1 - opacity) * grey[:, :, np.newaxis] + opacity * colour
    picture: npt.NDArray[np.uint8] = np.rint(mixed).astype(np.uint8)
    return picture


class OverlayPngs:
    """A PNG for each classified scan, in the folders of the scans under one folder.

    A name is that of the scan with a few digits of the digest of its path, so that scans of
    several folders do not meet: `OUT/scans/inner/a.dcm-1f2e3d4c.png`.
    """

    wants_maps = True
    wants_series = False

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        """Makes the folder.

        Args:
            folder: Where the pictures go.
            labels: Of the model, in the order of the map's columns.

        Raises:
            OSError: The folder cannot be made.
        """
        self._folder = folder
        self._labels = list(labels)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, record: Record, item: DecodedInput) -> None:
        """Write the picture of one scan atomically."""
        if item.pixels is None or item.activation_map is None:
            return
        path = self.path_of(record["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        index = self._labels.index(record["label"])
        picture = overlay_of(item.pixels[:, :, 0], item.activation_map, index)
        Image.fromarray(picture).save(unfinished, "PNG")
        unfinished.replace(path)

    def path_of(self, name: str) -> Path:
        """Where the picture of a scan is, by the `path` of its record."""
        digest = hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()
        parts = [part.replace("!", "_") for part in PurePath(plain_text(name)).parts]
        inside = [part for part in parts if part not in ("/", "..") and ":" not in part]
        return self._folder.joinpath(*inside[:-1], f"{inside[-1][:200]}-{digest}.png")

    def end_series(self, record: Record, items: Sequence[tuple[Record, DecodedInput]]) -> None:
        """Has no picture."""

    def close(self) -> None:
        """All is written."""


class HtmlReport:
    """One page without links to anything, with thumbnails of the first scans of a run.

    It holds images of patients. It is written when the run ends, and shows what this run did.
    """

    wants_maps = True
    wants_series = False

    def __init__(self, path: Path, labels: Sequence[str]) -> None:
        """Opens nothing yet.

        Args:
            path: The file; one that is there is replaced.
            labels: Of the model, in the order of the map's columns.
        """
        self._path = path
        self._labels = list(labels)
        self._rows: list[str] = []
        self._series: list[str] = []
        self._num_scans = 0
        self._counts: Counter[str] = Counter()
        self._models: dict[str, None] = {}

    def add(self, record: Record, item: DecodedInput) -> None:
        """Takes in one scan."""
        self._num_scans += 1
        self._counts[record.get("label") or record["error"]["type"]] += 1
        if "model" in record:
            self._models["model {name} version {version}, run {run}".format(**record["model"])] = (
                None
            )
        if len(self._rows) < MOST_SHOWN:
            self._rows.append(_row(record, _thumbnails(record, item, self._labels)))

    def end_series(self, record: Record, items: Sequence[tuple[Record, DecodedInput]]) -> None:
        """Takes in one series."""
        if len(self._series) < MOST_SHOWN:
            self._series.append(_row(record, f"{record['num_slices']} slices"))

    def close(self) -> None:
        """Writes the page, by way of a file beside it."""
        counts = ", ".join(f"{number} {name}" for name, number in sorted(self._counts.items()))
        shown = "" if self._num_scans <= MOST_SHOWN else f", the first {MOST_SHOWN} are shown"
        head = "<tr><th><th>label<th>probability<th>in domain<th>path</tr>"
        parts = [
            "<!doctype html><html lang=en><meta charset=utf-8><title>chestct</title>",
            f"<style>{STYLE}</style><h1>Chest-CT slices, classified</h1>",
            f"<p><b>{NOT_A_MEDICAL_DEVICE} This page holds images of patients.</b></p>",
            f"<p>{self._num_scans} scans{shown}: {html.escape(counts)}</p>",
            *(f"<p>{html.escape(text)}</p>" for text in self._models),
            *([f"<h2>Series</h2><table>{head}", *self._series, "</table>"] * bool(self._series)),
            f"<h2>Scans</h2><table>{head}",
            *self._rows,
            "</table></html>\n",
        ]
        unfinished = self._path.with_name(self._path.name + ".tmp")
        unfinished.write_text("\n".join(parts), encoding="utf-8")
        unfinished.replace(self._path)


def _row(record: Record, first: str) -> str:
    path = html.escape(plain_text(record["path"]))
    if record["status"] == "error":
        message = html.escape(plain_text(record["error"]["message"]))
        return f"<tr><td>{first}<td class=no>error<td><td><td>{path}<br>{message}</tr>"
    label = record["label"]
    why_not: Sequence[str] = record.get("reasons") or record.get("warnings") or ()
    reasons = "".join(f"<br>{html.escape(text)}" for text in why_not)
    is_in_domain = record.get("in_domain", True)
    return (
        f"<tr><td>{first}<td>{html.escape(label)}<td>{record['probabilities'][label]:.3f}"
        f"<td{'' if is_in_domain else ' class=no'}>{'yes' if is_in_domain else 'NO'}"
        f"<td>{path}{reasons}</tr>"
    )


def _thumbnails(record: Record, item: DecodedInput, labels: Sequence[str]) -> str:
    if item.pixels is None:
        return ""
    pictures = [Image.fromarray(item.pixels[:, :, 0])]
    if item.activation_map is not None:
        index = list(labels).index(record["label"])
        overlay = overlay_of(item.pixels[:, :, 0], item.activation_map, index)
        pictures.append(Image.fromarray(overlay))
    return "".join(map(_image_tag, pictures))


def _image_tag(picture: Image.Image) -> str:
    data = BytesIO()
    picture.resize((THUMBNAIL_PX, THUMBNAIL_PX)).save(data, "JPEG", quality=80)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" width={THUMBNAIL_PX} src="data:image/jpeg;base64,{text}">'
