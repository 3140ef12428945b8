"""DICOM attributes of a slice: position, identifiers, and files that are not axial CT slices."""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    EncapsulatedPDFStorage,
    EnhancedCTImageStorage,
    EnhancedSRStorage,
    MRImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
    XRayAngiographicImageStorage,
    XRayRadiationDoseSRStorage,
)

from chestct.contract import LUNG_WINDOW
from chestct.errors import OutOfDomainError, ScanDecodeError
from chestct.imaging import dicom, metadata
from chestct.imaging.metadata import dicom_reasons
from chestct.imaging.prepare import Scan, inspect_bytes, inspect_scan, inspect_scans, load_scan
from chestct.imaging.window import apply_window
from tests.support.scan_files import bytes_of, saved, scan_of
from training.data.phantom import Phantom


def turned(tilt_deg: float) -> list[float]:
    """Orientation of an axial slice whose gantry leans about the patient's left-right axis."""
    tilt = math.radians(tilt_deg)
    return [1, 0, 0, 0, math.cos(tilt), math.sin(tilt)]


CORONAL, SAGITTAL = [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]


@pytest.mark.parametrize(
    ("orientation", "position", "expected"),
    [
        ([1, 0, 0, 0, 1, 0], [-10, -20, 35.5], 35.5),
        ([-1, 0, 0, 0, 1, 0], [-10, -20, 35.5], 35.5),  # its normal points to the feet
        ([-1, 0, 0, 0, -1, 0], [-10, -20, -80.25], -80.25),
        ([1, 0, 0, 0, 0.96, 0.28], [0, 0, 100], 96),  # gantry leans: normal (0, -0.28, 0.96)
        ([1, 0, 0, 0, 0.96, 0.28], [0, 50, 100], 82),
        (None, [0, 0, 100], 7.5),  # no orientation: Slice Location
        ([1, 0, 0, 0, 1, 0], [0, 0], 7.5),
        ([1, 0, 0, 0, 1, 0], None, 7.5),
    ],
)
def test_position_lies_along_the_normal(
    tags: Dataset, tmp_path: Path, orientation: Any, position: Any, expected: float
) -> None:
    tags.ImageOrientationPatient = orientation
    tags.ImagePositionPatient = position
    tags.SliceLocation = 7.5
    found = scan_of(tags, tmp_path / "scan.dcm").metadata
    assert found is not None
    assert found.position_mm == pytest.approx(expected, abs=1e-6)


def test_metadata_hold_the_series_and_nothing_of_the_patient(tags: Dataset, tmp_path: Path) -> None:
    tags.PatientName, tags.PatientID, tags.PatientBirthDate = "Doe^Jane", "MRN-77", "19500203"
    tags.AccessionNumber, tags.InstitutionName = "ACC-1", "General"
    tags.ConvolutionKernel, tags.SliceThickness, tags.InstanceNumber = "B70f", "1.25", 12
    tags.BodyPartExamined = "CHEST"
    found = scan_of(tags, tmp_path / "scan.dcm").metadata
    assert found is not None
    assert (found.study_uid, found.series_uid) == (tags.StudyInstanceUID, tags.SeriesInstanceUID)
    assert found.sop_uid == tags.SOPInstanceUID
    assert found.frame_of_reference_uid == tags.FrameOfReferenceUID
    assert (found.kernel, found.thickness_mm, found.body_part) == ("B70f", 1.25, "CHEST")
    assert (found.instance, found.frame) == (12, 0)
    assert not any(word in repr(found) for word in ("Doe", "MRN", "1950", "ACC", "General"))
    assert pickle.loads(pickle.dumps(found)) == found
    identifying = {"PatientName", "PatientID", "PatientBirthDate", "AccessionNumber"}
    assert not identifying.intersection(dicom.FILE_KEYWORDS)


def test_a_picture_has_no_metadata(phantom: Phantom, tmp_path: Path) -> None:
    Image.fromarray(apply_window(phantom.hu, LUNG_WINDOW)).save(tmp_path / "scan.png")
    (only,) = inspect_scans(tmp_path / "scan.png")
    assert isinstance(only.scan, Scan)
    assert only.scan.metadata is None
    assert only.name == str(tmp_path / "scan.png")


@pytest.mark.parametrize("keyword", metadata.SLICE_KEYWORDS)
def test_broken_attributes_cost_no_slice(tags: Dataset, tmp_path: Path, keyword: str) -> None:
    """Each tag in turn with bytes that its type does not allow."""
    if keyword in ("ModalityLUTSequence", "PhotometricInterpretation"):
        return  # without them a slice cannot be shown
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    tag, kind = Tag(tag_for_keyword(keyword)), dictionary_VR(tag_for_keyword(keyword))
    kind = "US" if " or " in kind else kind
    tags[tag] = RawDataElement(tag, kind, 5, b"\xff\x00\\\xfe?", 0, False, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = bytes_of(tags)
        except Exception:
            pytest.skip("pydicom cannot write it")
    (tmp_path / "scan.dcm").write_bytes(data)
    (only,) = inspect_scans(tmp_path / "scan.dcm")
    if not keyword.startswith(("Rescale", "PixelPadding")):
        assert isinstance(only.scan, Scan | OutOfDomainError), only.scan


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("Modality", "MR", "another modality: Modality (0008,0060) is MR, expected CT"),
        ("Modality", "PT", "another modality: Modality (0008,0060) is PT, expected CT"),
        (
            "SOPClassUID",
            MRImageStorage,
            "another kind of object: SOP Class (0008,0016) is MR Image Storage, expected CT Image "
            "Storage",
        ),
        (
            "SOPClassUID",
            SecondaryCaptureImageStorage,
            "another kind of object: SOP Class (0008,0016) is Secondary Capture Image Storage, "
            "expected CT Image Storage",
        ),
        (
            "ImageType",
            ["ORIGINAL", "PRIMARY", "LOCALIZER"],
            "a localizer: Image Type (0008,0008) is ORIGINAL PRIMARY LOCALIZER, expected a slice",
        ),
        (
            "ImageOrientationPatient",
            CORONAL,
            "not axial: by Image Orientation (0020,0037) the plane is coronal, 90 degrees from "
            "axial, expected at most 30",
        ),
        (
            "ImageOrientationPatient",
            SAGITTAL,
            "not axial: by Image Orientation (0020,0037) the plane is sagittal, 90 degrees from "
            "axial, expected at most 30",
        ),
        (
            "ImageOrientationPatient",
            turned(45),
            "not axial: by Image Orientation (0020,0037) the plane is oblique, 45 degrees from "
            "axial, expected at most 30",
        ),
        (
            "ImageOrientationPatient",
            turned(65),
            "not axial: by Image Orientation (0020,0037) the plane is coronal, 65 degrees from "
            "axial, expected at most 30",
        ),
        (
            "ImageOrientationPatient",
            turned(31),
            "not axial: by Image Orientation (0020,0037) the plane is oblique, 31 degrees from "
            "axial, expected at most 30",
        ),
    ],
)
def test_tags_of_something_else(tags: Dataset, keyword: str, value: Any, reason: str) -> None:
    assert dicom_reasons(tags) == []
    setattr(tags, keyword, value)
    assert dicom_reasons(tags) == [reason]


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("Modality", "CT "),
        ("Modality", ""),
        ("Modality", None),
        ("SOPClassUID", ""),
        ("SOPClassUID", "1.2.840.113619.4.2"),  # a maker's own; the standard does not know it
        ("SOPClassUID", EnhancedCTImageStorage),
        ("ImageType", ["DERIVED", "SECONDARY", "AXIAL"]),
        ("ImageType", ["DERIVED", "PRIMARY", "MPR"]),
        ("ImageType", ""),
        ("ImageOrientationPatient", None),
        ("ImageOrientationPatient", [1, 0, 0, 0, 1]),
        ("ImageOrientationPatient", [0, 0, 0, 0, 0, 0]),
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),  # no plane
        ("ImageOrientationPatient", [0, 1, 0, 0, 0, 9]),  # no unit vector
        ("ImageOrientationPatient", turned(29)),
        ("ImageOrientationPatient", turned(-29)),
        ("ImageOrientationPatient", [-1, 0, 0, 0, -1, 0]),  # prone
        ("ImageOrientationPatient", [-1, 0, 0, 0, 1, 0]),  # seen from the head
        ("ImageOrientationPatient", [0, 1, 0, -1, 0, 0]),  # lying on the side
    ],
)
def test_tags_that_tell_nothing_against_a_slice(tags: Dataset, keyword: str, value: Any) -> None:
    setattr(tags, keyword, value)
    assert dicom_reasons(tags) == []
    delattr(tags, keyword)
    assert dicom_reasons(tags) == []


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [
        (b"CS\x02\x00CT", b"CS\x02\x00ct"),
        (b"CS\x02\x00CT", b"US\x02\x00CT"),  # a number
        (b"CS\x02\x00CT", b"FL\x02\x00CT"),  # too short for a number: pydicom raises
        (b"CS\x02\x00CT", b"ZZ\x02\x00CT"),  # no such type: pydicom raises
        (b"DS\x18\x001.0", b"DS\x18\x00one"),
        (b"DS\x18\x001.0", b"DS\x18\x00nan"),
        (b"UI\x1a\x001.2.840.10008.5.1.4.1.1.2", b"UI\x1a\x00?.2.840.10008.5.1.4.1.1.2"),
    ],
)
def test_damaged_tags_tell_nothing_against_a_slice(
    tags: Dataset, whole: bytes, damaged: bytes
) -> None:
    file = io.BytesIO()
    tags.save_as(file, enforce_file_format=True)
    data = file.getvalue()
    head, rest = data[:300], data[300:]  # the class stands in the file's head, too
    assert rest.count(whole) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scan = inspect_bytes(head + rest.replace(whole, damaged), "scan")
    assert scan.pixels.shape == (224, 224, 1)


def test_a_message_is_one_line_of_bounded_length(tags: Dataset) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tags.Modality = "M\n" + "R " * 5000
    (reason,) = dicom_reasons(tags)
    assert "\n" not in reason
    assert len(reason) < 200


def test_file_is_refused_with_all_its_reasons_before_its_pixels_are_decoded(
    tags: Dataset, tmp_path: Path
) -> None:
    tags.Modality = "XA"
    tags.SOPClassUID = tags.file_meta.MediaStorageSOPClassUID = XRayAngiographicImageStorage
    tags.ImageOrientationPatient = CORONAL
    tags.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    tags.NumberOfFrames = 30
    tags.PixelData = b"\0\0"
    path = tmp_path / "run.dcm"
    tags.save_as(path, enforce_file_format=True)
    with pytest.raises(OutOfDomainError) as refusal:
        load_scan(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: no axial CT slice: another modality: ")
    assert message.endswith(". Send an axial slice of a chest CT.")
    assert message.count("; ") == 3
    assert "\n" not in message
    for load in (inspect_scan, lambda path: inspect_bytes(path.read_bytes(), str(path)).pixels):
        with pytest.raises(OutOfDomainError, match=f"^{re.escape(message)}$"):
            load(path)
    assert issubclass(OutOfDomainError, ScanDecodeError)


@pytest.mark.parametrize(
    ("elements", "kind"),
    [
        ({"SOPClassUID": BasicTextSRStorage, "Modality": "SR"}, "structured report"),
        ({"SOPClassUID": EnhancedSRStorage, "Modality": "SR"}, "structured report"),
        ({"SOPClassUID": XRayRadiationDoseSRStorage, "Modality": "SR"}, "structured report"),
        ({"SOPClassUID": "", "Modality": "SR"}, "structured report"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "secondary capture"),
        (
            {"SOPClassUID": MultiFrameGrayscaleWordSecondaryCaptureImageStorage},
            "secondary capture",
        ),
        ({"SOPClassUID": EncapsulatedPDFStorage, "Modality": "DOC"}, "other object"),
        ({"SOPClassUID": MRImageStorage, "Modality": "MR"}, "other modality"),
        ({"Modality": "PT"}, "other modality"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        (
            {
                "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"],
                "ImageOrientationPatient": [1, 0, 0, 0, 0, -1],
            },
            "localizer",
        ),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "coronal"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "sagittal"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.7071, 0.7071]}, "oblique"),
    ],
)
def test_each_kind_of_what_is_skipped_is_told_apart(
    tags: Dataset, tmp_path: Path, elements: dict[str, Any], kind: str
) -> None:
    for keyword, value in elements.items():
        setattr(tags, keyword, value)
    if kind == "structured report":
        for keyword in ("PixelData", "Rows", "Columns"):
            delattr(tags, keyword)
    (only,) = inspect_scans(saved(tags, tmp_path / "scan.dcm"))
    assert isinstance(only.scan, OutOfDomainError)
    assert only.scan.kind == kind
    again = pickle.loads(pickle.dumps(only.scan))
    assert (str(again), again.kind) == (str(only.scan), kind)
    assert "\n" not in str(again)
