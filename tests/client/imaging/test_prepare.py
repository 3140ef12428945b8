"""From any file to the network's input, and every way that it can fail."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset

from chestct.contract import LUNG_WINDOW
from chestct.errors import ScanDecodeError
from chestct.imaging import limits
from chestct.imaging._warnings import without_warnings
from chestct.imaging.prepare import inspect_bytes, inspect_scan, load_grey, load_scan, resize_scan
from chestct.imaging.window import apply_window
from tests.support.scan_files import dicom_bytes, hu_slice, picture_bytes
from training.data.phantom import Phantom


def test_resize_averages_when_it_reduces() -> None:
    # Columns 0 and 255 in turn: a resize that only picks pixels gives 0 or 255, a mean 127.5.
    stripes = np.tile(np.array([0, 255], np.uint8), (896, 448))
    resized = resize_scan(stripes)
    assert resized.shape == (224, 224, 1)
    assert resized.dtype == np.uint8
    assert np.abs(resized[:, 4:-4].astype(int) - 127).max() < 12


def test_resize_keeps_a_scan_of_the_right_size(grey_slice: Callable[..., np.ndarray]) -> None:
    whole = grey_slice(100, 224, 224)
    np.testing.assert_array_equal(resize_scan(whole)[..., 0], whole)


@pytest.mark.parametrize("wrong", [np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.int16)])
def test_resize_refuses_other_arrays(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W\)"):
        resize_scan(wrong)


def test_kind_is_told_by_content(tmp_path: Path, grey_slice: Callable[..., np.ndarray]) -> None:
    picture = Image.fromarray(grey_slice(100))
    jpeg = picture_bytes(picture, "JPEG", quality=95)
    named_png = tmp_path / "n7.png"
    named_png.write_bytes(jpeg)
    assert np.abs(load_grey(named_png).astype(int) - np.asarray(picture)).max() < 25
    (tmp_path / "slice.jpg").write_bytes(dicom_bytes(hu_slice()))
    np.testing.assert_array_equal(
        load_grey(tmp_path / "slice.jpg"), apply_window(hu_slice(), LUNG_WINDOW)
    )


def test_threads_leave_the_warning_filters_alone() -> None:
    before = list(warnings.filters)
    data = dicom_bytes(hu_slice())
    threads = [
        threading.Thread(target=lambda: [inspect_bytes(data, "slice.dcm") for _ in range(10)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert warnings.filters == before


def test_warnings_are_silent_until_the_last_thread_is_done() -> None:
    def come_and_go() -> None:
        with without_warnings:
            pass

    with without_warnings:
        thread = threading.Thread(target=come_and_go)
        thread.start()
        thread.join(timeout=30)
        warnings.warn("unheard", stacklevel=1)
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_threads_decode_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=30)  # breaks where one would wait for the other
    read, outcomes = pydicom.dcmread, []

    def read_together(*arguments: Any, **options: Any) -> Any:
        together.wait()
        return read(*arguments, **options)

    monkeypatch.setattr(pydicom, "dcmread", read_together)
    data = dicom_bytes(hu_slice())
    threads = [
        threading.Thread(
            target=lambda: outcomes.append(inspect_bytes(data, "slice.dcm").pixels.shape)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert outcomes == [(224, 224, 1)] * 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "DICOM"])
def test_every_truncation_is_a_decode_error(
    kind: str, grey_slice: Callable[..., np.ndarray]
) -> None:
    if kind == "DICOM":
        data = dicom_bytes(hu_slice())
    else:
        data = picture_bytes(Image.fromarray(grey_slice(100)), kind)
    # A PNG that lacks only its last chunk holds the whole picture.
    whole = len(data) - (12 if kind == "PNG" else 2)
    for length in [*range(0, 200, 7), *range(200, whole, 97)]:
        with pytest.raises(ScanDecodeError, match=r"^torn: "):
            inspect_bytes(data[:length], "torn")


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["png", "jpeg", "dicom", "bare"]))
def test_any_bytes_give_a_decode_error(noise: bytes, kind: str) -> None:
    start = {
        "png": b"\x89PNG\r\n\x1a\n",
        "jpeg": b"\xff\xd8\xff",
        "dicom": b"\0" * 128 + b"DICM",
        "bare": b"\x08\x00",
    }[kind]
    with pytest.raises(ScanDecodeError, match=r"^noise: "):
        inspect_bytes(start + noise, "noise")


def test_file_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.dcm"
    with path.open("wb") as file:
        file.truncate(257 * 2**20)  # a sparse file: nothing is written
    with pytest.raises(ScanDecodeError, match=r"257 MiB, expected at most 256 MiB"):
        load_scan(path)
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ScanDecodeError, match="expected at most"):
        inspect_bytes(dicom_bytes(hu_slice()), "slice.dcm")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    text = tmp_path / "text.png"
    text.write_text("not a picture, whatever its name says")
    for path, message in (
        (tmp_path, "a folder, expected a file"),
        (tmp_path / "missing.png", "cannot be read: no such file"),
        (tmp_path / "empty.png", "the file is empty"),
        (tmp_path / "pipe.png", "not a regular file"),
        (text, "neither PNG, JPEG nor DICOM by its content"),
        ("nul\0.png", "not a file name"),
    ):
        with pytest.raises(ScanDecodeError, match=message):
            load_scan(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind, not root")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(dicom_bytes(hu_slice()))
    path.chmod(0)
    with pytest.raises(ScanDecodeError, match="cannot be read: permission denied"):
        load_scan(path)


@pytest.mark.real_scans
def test_real_pictures_decode(real_scans: Path) -> None:
    paths = sorted((real_scans / "chest-ct").rglob("*.png"))[::40]
    assert len(paths) > 10
    for path in paths:
        assert load_scan(path).std() > 5


def test_inspection_warns_nobody(tmp_path: Path, phantom: Phantom, tags: Dataset) -> None:
    """A palette with transparency makes Pillow warn, small letters in a code make pydicom warn."""
    palette = Image.fromarray(apply_window(phantom.hu, LUNG_WINDOW)).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes([0] + [255] * 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tags.BodyPartExamined = "Chest"
        tags.save_as(tmp_path / "chest.dcm", enforce_file_format=True)
    for path in tmp_path.iterdir():
        assert inspect_scan(path).reasons == ()
