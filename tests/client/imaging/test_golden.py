"""Golden hashes of drawn scans: pixels, reasons and metadata stay the same in every version.

`python tests/client/imaging/test_golden.py` writes `golden.json` anew. Models are trained on these
tensors: a change of `tensor` needs another `chestct.contract.PREPARATION`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from chestct.contract import LUNG_WINDOW, Window
from chestct.errors import ScanDecodeError
from chestct.imaging.prepare import Scan, inspect_scans, load_grey, load_scan
from chestct.imaging.sources import Source
from chestct.imaging.window import apply_window
from tests.support.scan_files import dicom_bytes, picture_bytes

GOLDEN = Path(__file__).with_name("golden.json")
WINDOWS = {"lung": LUNG_WINDOW, "soft": Window(40.0, 400.0)}
UIDS = {
    name: f"1.2.826.0.1.3680043.8.498.{number}"
    for number, name in enumerate(
        ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"), start=1
    )
}


def chest_hu() -> np.ndarray:
    """int16 (200, 260): a body with two lungs and waves, air around it."""
    rows, columns = np.mgrid[-1:1:200j, -1:1:260j]
    lungs = rows**2 / 0.4 + (np.abs(columns) - 0.4) ** 2 / 0.06 < 1
    waves = 60 * np.sin(9 * rows + 5 * columns) * np.cos(14 * columns)
    hu = np.where(lungs, -820, 40) + waves
    return np.rint(np.where(rows**2 + columns**2 < 0.95, hu, -1000)).astype(np.int16)


def scan_files() -> dict[str, bytes]:
    """File contents by name."""
    hu = chest_hu()
    grey = apply_window(hu, LUNG_WINDOW)
    picture = Image.fromarray(grey)
    coloured = Image.merge("RGB", [picture, picture.point(lambda level: level // 2), picture])
    translucent = picture.convert("RGBA")
    opacity = np.tile((np.arange(260) * 255 // 259).astype(np.uint8), (200, 1))
    translucent.putalpha(Image.fromarray(opacity))
    stored = (hu + 1024).astype(np.uint16)
    rescale: dict[str, Any] = {"RescaleIntercept": -1024, **UIDS}
    padded = np.where(np.arange(260) < 9, 3000, stored).astype(np.uint16)
    frame_tags = {"InstanceNumber": 7, "ConvolutionKernel": "B70f", "SliceThickness": "1.25"}
    return {
        "grey.png": picture_bytes(picture),
        "grey-16.png": picture_bytes(Image.fromarray(grey.astype(np.uint16) * 257)),
        "coloured.png": picture_bytes(coloured),
        "translucent.png": picture_bytes(translucent),
        "grey.jpg": picture_bytes(picture, "JPEG", quality=90),
        "flat.jpg": picture_bytes(picture.resize((260, 64)), "JPEG", quality=75),
        "unsigned.dcm": dicom_bytes(stored, **rescale, **frame_tags),
        "signed.dcm": dicom_bytes(hu, **UIDS, BodyPartExamined="HEAD"),
        "half-steps.dcm": dicom_bytes(2 * stored, **rescale | {"RescaleSlope": 0.5}),
        "wide.dcm": dicom_bytes(hu.astype(np.int32), **UIDS),
        "inverted.dcm": dicom_bytes(stored, **rescale, PhotometricInterpretation="MONOCHROME1"),
        "padded.dcm": dicom_bytes(padded, **rescale, PixelPaddingValue=3000),
        "prone.dcm": dicom_bytes(
            stored[::-1, ::-1].copy(),
            **rescale,
            ImageOrientationPatient=[-1, 0, 0, 0, -1, 0],
            ImagePositionPatient=[0, 0, -40.5],
        ),
        "frames.dcm": dicom_bytes(
            np.concatenate([stored, stored + 100, stored]),
            Rows=200,
            NumberOfFrames=3,
            PerFrameFunctionalGroupsSequence=[
                frame_groups(-1024, [1, 0, 0, 0, 1, 0]),
                frame_groups(-1124, [1, 0, 0, 0, -1, 0]),
                frame_groups(-1024, [1, 0, 0, 0, 0, -1]),
            ],
            **UIDS,
        ),
    }


def frame_groups(intercept: int, orientation: list[int]) -> Dataset:
    """Functional groups of a frame: its rescale and its plane."""
    group = Dataset()
    group.PixelValueTransformationSequence = [Dataset()]
    group.PixelValueTransformationSequence[0].RescaleSlope = 1
    group.PixelValueTransformationSequence[0].RescaleIntercept = intercept
    group.PlaneOrientationSequence = [Dataset()]
    group.PlaneOrientationSequence[0].ImageOrientationPatient = orientation
    return group


def short_hash(array: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {digest[:16]}"


def record(folder: Path, name: str, data: bytes) -> list[dict[str, Any]]:
    """What each window gives for each slice of a file, hashed, as JSON gives it back."""
    path = folder / name
    path.write_bytes(data)
    records: list[dict[str, Any]] = []
    for window_name, window in WINDOWS.items():
        slices = list(inspect_scans(path, window, with_original=True))
        for number, item in enumerate(slices, start=1):
            about = {"window": window_name, "name": item.name.removeprefix(f"{folder}/")}
            if not isinstance(item.scan, Scan):
                assert isinstance(item.scan, ScanDecodeError)
                error = str(item.scan).removeprefix(f"{folder}/")
                records.append({**about, "error": error, "type": type(item.scan).__name__})
                continue
            if len(slices) == 1:
                np.testing.assert_array_equal(load_scan(path, window), item.scan.pixels)
            grey = load_grey(Source(path), window, frame=number if len(slices) > 1 else 0)
            metadata, original = item.scan.metadata, item.scan.original
            assert original is not None
            records.append(
                {
                    **about,
                    "grey": short_hash(grey),
                    "tensor": short_hash(item.scan.pixels),
                    "original": [short_hash(original.pixels), *original.box, original.is_inverted],
                    "reasons": list(item.scan.reasons),
                    "metadata": None if metadata is None else dataclasses.asdict(metadata),
                }
            )
    return records


@pytest.mark.parametrize("name", scan_files())
def test_slices_are_those_of_every_version(tmp_path: Path, name: str) -> None:
    assert record(tmp_path, name, scan_files()[name]) == json.loads(GOLDEN.read_text())[name]


def test_every_golden_scan_is_made() -> None:
    assert set(json.loads(GOLDEN.read_text())) == set(scan_files())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = {name: record(Path(temporary), name, data) for name, data in scan_files().items()}
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
