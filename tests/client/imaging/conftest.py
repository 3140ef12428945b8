"""Fixtures: a phantom, its DICOM attributes, and grey levels of file contents."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from chestct.contract import LUNG_WINDOW, Window
from chestct.imaging.prepare import load_grey
from tests.support.scan_files import SIDE
from training.data.phantom import Phantom, dicom_from_phantom, make_phantom


@pytest.fixture
def grey(tmp_path: Path, grey_slice: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The grey values that `load_grey` gives for the bytes of a file."""

    def load(data: bytes, window: Window = LUNG_WINDOW) -> np.ndarray:
        path = tmp_path / "scan"
        path.write_bytes(data)
        return load_grey(path, window)

    return load


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom("adenocarcinoma", 4, size=SIDE)


@pytest.fixture
def tags(phantom: Phantom) -> Dataset:
    """An axial slice as DICOM, which tests bend."""
    return dicom_from_phantom(phantom)


@pytest.fixture(scope="module")
def slice_bytes() -> bytes:
    file = io.BytesIO()
    dicom_from_phantom(make_phantom("normal", 5, size=128)).save_as(file, enforce_file_format=True)
    return file.getvalue()
