"""Scan files made in memory, and what reading them gives."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from chestct.contract import Window
from chestct.errors import ScanDecodeError
from chestct.imaging.prepare import Scan, inspect_scan, inspect_scans
from chestct.imaging.sources import Source, list_sources

SIDE = 128  # of the phantoms
SOFT_WINDOW = Window(40.0, 400.0)


def hu_slice(height: int = 64, width: int = 48) -> np.ndarray:
    """int16 (H, W): a ramp over the lung window with noise, in HU."""
    ramp = np.linspace(-1400, 400, height * width).reshape(height, width)
    noise = np.random.default_rng(5).normal(0, 30, (height, width))
    return np.rint(ramp + noise).astype(np.int16)


def dicom_bytes(stored: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A valid DICOM file around stored values; `elements` replace or add attributes."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Modality = "CT"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.PixelData = stored.tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def picture_bytes(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def bytes_of(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of what is written here is wrong on purpose
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def saved(dataset: Dataset, path: Path) -> Path:
    path.write_bytes(bytes_of(dataset))
    return path


def scan_of(dataset: Dataset, path: Path) -> Scan:
    return inspect_scan(saved(dataset, path))


def names_in(root: Path) -> list[str]:
    return [source.name.removeprefix(f"{root}/") for source in list_sources(root)]


def error_of(source: Source) -> str:
    (only,) = inspect_scans(source)
    assert isinstance(only.scan, ScanDecodeError)
    assert only.name == source.name
    return str(only.scan)
