"""What the model says of a series as DICOM objects that belong in the patient's study.

A Comprehensive 3D SR (template TID 1500, by highdicom) holds the numbers; a Secondary Capture
shows where the network looked on the slice with the most evidence. Both are for research, both
say so, and neither is verified by anybody.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from chestct.body import body_box
from chestct.contract import NOT_A_MEDICAL_DEVICE
from chestct.errors import ReportError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "CODING_SCHEME",
    "SOURCE_KEYWORDS",
    "Slice",
    "overlay_of",
    "secondary_capture",
    "structured_report",
]

CODING_SCHEME = "99CHESTCT"  # private: PS3.16 section 8.2 asks for 99 in front
# SNOMED CT, as PS3.16 has them in CID 6150 and 230; other labels get a private code.
CODE_OF_LABEL: Mapping[str, tuple[str, str]] = {
    "adenocarcinoma": ("1187332001", "Adenocarcinoma"),
    "large cell carcinoma": ("22687000", "Large cell carcinoma"),
    "squamous cell carcinoma": ("1162767002", "Squamous cell carcinoma"),
    "normal": ("17621005", "Normal"),
}
YES, NO = ("373066001", "Yes"), ("373067005", "No")
# Objects of one series share this space of names; version 5 UUIDs become UIDs by PS3.5 B.2.
NAMESPACE = uuid.UUID("6d0a5ea0-5d2e-5b35-9d3c-5f1a6f0b7c11")
FIRST_SERIES_NUMBER = 9000  # far behind those of scanners, in the order of the sources
DESCRIPTION = "chestct: research use only, not a medical device"
HEAT_OPACITY = 0.55
LETTERS = (("L", "R"), ("P", "A"), ("H", "F"))  # plus and minus of x, y, z: PS3.3 C.7.6.1.1.1

# What is read of a source slice: patient, study, and what references and geometry need.
SOURCE_KEYWORDS = (
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "TimezoneOffsetFromUTC",
    "PatientName", "PatientID", "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDsSequence", "PatientBirthDate", "PatientBirthTime", "PatientSex", "PatientAge",
    "PatientSize", "PatientWeight", "EthnicGroup", "PatientSpeciesDescription",
    "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence",
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription",
    "AccessionNumber", "IssuerOfAccessionNumberSequence", "ReferringPhysicianName",
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID", "ClinicalTrialSiteName", "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID", "ClinicalTrialTimePointID",
    "SeriesInstanceUID", "SeriesNumber", "Modality", "InstanceNumber", "FrameOfReferenceUID",
    "Manufacturer", "BodyPartExamined", "ImageOrientationPatient", "PixelSpacing",
    "NumberOfFrames", "BurnedInAnnotation", "RecognizableVisualFeatures",
    "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod",
)  # fmt: skip
# Type 2: present, and empty where the source has none (PS3.3 C.7.1.1 and C.7.2.1).
MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A classified slice of a series.

    Attributes:
        header: Those of `SOURCE_KEYWORDS` that its file has.
        record: Its record, as made by `chestct.report.result_line`.
        frame: Its number, from 1, in a file of several; None for a file of one.
    """

    header: Dataset
    record: Mapping[str, Any]
    frame: int | None = None


def structured_report(
    series: Mapping[str, Any], slices: Sequence[Slice], strongest: int, *, is_whole: bool = True
) -> Dataset:
    """The findings on a series as a Comprehensive 3D SR in the study of its slices.

    Two measurement groups (TID 1501): the whole series, and the slice with the most evidence.
    Each has a probability for each class, the most probable class, and whether the input is
    within the model's domain, with the kinds of doubt. Patient and study are copied from the
    first slice. UIDs follow from source series, slices, model and run, so that the same answer is
    the same object: what is made or sent again replaces itself in an archive and never
    multiplies.

    Args:
        series: `label`, `probabilities`, `in_domain`, and `reasons` if there are any.
        slices: The slices that it was made from.
        strongest: Index of the slice with the most evidence.
        is_whole: Whether all slices of the series could be classified; a report of a part gets
            the completion flag PARTIAL.

    Raises:
        ReportError: Slices of several series, or without the identifiers that a reference needs.
        ImportError: highdicom is not installed; the message says what to do.
    """
    _require_highdicom()
    from highdicom.sr import (
        Comprehensive3DSR,
        DeviceObserverIdentifyingAttributes,
        MeasurementReport,
        ObservationContext,
        ObserverContext,
    )
    from pydicom.sr.codedict import codes

    headers = _usable_headers(slices)
    model = slices[0].record["model"]
    ids = _Identifiers(headers, slices, model)
    observer = DeviceObserverIdentifyingAttributes(
        uid=_uid("device", model["name"], model["version"], model["run"]),
        name="chestct",
        manufacturer_name="chestct",
        model_name=f"{model['name']} {model['version']}",
        serial_number=model["run"],
    )
    context = ObservationContext(
        observer_device_context=ObserverContext(codes.DCM.Device, observer)
    )
    everything = _group("Series", ids.of("series"), series, model, slices)
    one = slices[strongest]
    strongest_group = _group("Slice with most evidence", ids.of("slice"), one.record, model, [one])
    with _quiet():
        content = MeasurementReport(
            observation_context=context,
            procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
            imaging_measurements=[everything, strongest_group],
            title=codes.DCM.ImagingMeasurementReport,
        )
        report = Comprehensive3DSR(
            evidence=headers,
            content=content,
            series_instance_uid=ids.series_of("sr"),
            series_number=ids.series_number,
            sop_instance_uid=ids.of("sr"),
            instance_number=1,
            is_complete=is_whole,
            series_description=DESCRIPTION,
            **_equipment(model),
        )
    return report


def secondary_capture(
    series: Mapping[str, Any],
    slices: Sequence[Slice],
    strongest: int,
    picture: npt.NDArray[np.uint8],
) -> Dataset:
    """A picture of the slice with the most evidence as a Secondary Capture in its study.

    Args:
        series: As for `structured_report`.
        slices: The slices that it was made from.
        strongest: Index of the slice that is shown.
        picture: uint8 (H, W, 3), RGB: what `overlay_of` gives.

    Raises:
        ReportError: As for `structured_report`.
        ImportError: highdicom is not installed; the message says what to do.
    """
    _require_highdicom()
    from highdicom.sc import SCImage
    from pydicom import Dataset
    from pydicom.sequence import Sequence as Items
    from pydicom.uid import ExplicitVRLittleEndian

    headers = _usable_headers(slices)
    header, one = headers[strongest], slices[strongest]
    model = one.record["model"]
    ids = _Identifiers(headers, slices, model)
    with _quiet():
        capture = SCImage.from_ref_dataset(
            header,
            pixel_array=_labelled(picture, series),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=_orientation(header),
            pixel_spacing=header.get("PixelSpacing"),
            series_instance_uid=ids.series_of("sc"),
            series_number=ids.series_number + 1,
            sop_instance_uid=ids.of("sc"),
            instance_number=1,
            transfer_syntax_uid=ExplicitVRLittleEndian,
            series_description=DESCRIPTION,
            **_equipment(model),
        )
        # from_ref_dataset copies what the standard demands; the study may say more.
        capture.copy_patient_and_study_information(header)
    capture.ConversionType = "WSD"  # by a workstation: PS3.3 C.8.6.1
    capture.DerivationDescription = (
        f"Class evidence of {model['name']} {model['version']}, run {model['run']}, for "
        f"{series['label']}, in colour over the windowed slice. {NOT_A_MEDICAL_DEVICE}"
    )
    if header.get("BodyPartExamined"):
        capture.BodyPartExamined = header.BodyPartExamined
    else:
        capture.Laterality = ""  # type 2C: whether the part is one of a pair is not known
    source = Dataset()
    source.ReferencedSOPClassUID = header.SOPClassUID
    source.ReferencedSOPInstanceUID = header.SOPInstanceUID
    if one.frame is not None:
        source.ReferencedFrameNumber = one.frame
    capture.SourceImageSequence = Items([source])
    # The flag tells whether the pixels identify the patient (PS3.3 C.7.6.1). What is written
    # here does not; what the source shows is shown again.
    for keyword in (
        "BurnedInAnnotation",
        "RecognizableVisualFeatures",
        "LossyImageCompression",
        "LossyImageCompressionRatio",
        "LossyImageCompressionMethod",
    ):
        if header.get(keyword):
            setattr(capture, keyword, header[keyword].value)
    return capture


def overlay_of(
    grey: npt.NDArray[np.uint8], activation_map: npt.NDArray[np.float32], class_index: int
) -> npt.NDArray[np.uint8]:
    """A slice in its own size with the evidence for a class in colour over it.

    The evidence is that for the class minus the mean over all classes, which is all of it that
    the probabilities depend on (softmax ignores what classes have in common). What speaks
    against the class is not coloured; the strongest place is yellow.

    Args:
        grey: uint8 (H, W), 0 = floor of the window, neither cropped nor resized.
        activation_map: float32 (14, 14, C), over `chestct.body.body_box` of the slice.
        class_index: Which of the C classes.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    evidence = activation_map[..., class_index] - activation_map.mean(axis=-1)
    heat = np.clip(evidence / max(float(evidence.max()), 1e-6), 0, 1).astype(np.float32)
    top, bottom, left, right = body_box(grey)
    size = (right - left, bottom - top)
    spread = np.zeros(grey.shape, np.float32)
    stretched = Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR)
    spread[top:bottom, left:right] = np.asarray(stretched)
    opacity = (HEAT_OPACITY * spread)[..., np.newaxis]
    colour = np.stack([np.full_like(spread, 255), 255 * spread, np.zeros_like(spread)], axis=-1)
    mixed: npt.NDArray[np.uint8] = np.round(
        (1 - opacity) * grey[..., np.newaxis] + opacity * colour
    ).astype(np.uint8)
    return mixed


def _labelled(picture: npt.NDArray[np.uint8], series: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """The picture with label and notice below it, where they hide nothing."""
    height, width, _ = picture.shape
    strip_px = 44
    canvas = Image.new("RGB", (width, height + strip_px))
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    label = series["label"]
    doubt = "" if series["in_domain"] else "  OUT OF DOMAIN"
    draw.text((6, height + 4), f"{label} {series['probabilities'][label]:.3f}{doubt}", "white")
    draw.text((6, height + 22), NOT_A_MEDICAL_DEVICE, "white")
    return np.asarray(canvas)


def _group(
    title: str,
    uid: str,
    record: Mapping[str, Any],
    model: Mapping[str, str],
    slices: Sequence[Slice],
) -> Any:
    from highdicom.sr import (
        AlgorithmIdentification,
        CodedConcept,
        Measurement,
        MeasurementsAndQualitativeEvaluations,
        QualitativeEvaluation,
        SourceImageForMeasurementGroup,
        TrackingIdentifier,
    )
    from pydicom.sr.codedict import codes

    from chestct import __version__

    def private(value: str, meaning: str) -> Any:
        return CodedConcept(value, CODING_SCHEME, meaning[:64])  # LO: 64 characters

    def snomed(code: tuple[str, str]) -> Any:
        return CodedConcept(code[0], "SCT", code[1])

    def label_code(label: str) -> Any:
        known = CODE_OF_LABEL.get(_plain(label))
        return snomed(known) if known else private(f"class.{label}", _plain(label))

    measurements = [
        Measurement(
            name=private(f"probability.{label}", f"Probability of {_plain(label)}"),
            value=value,
            unit=codes.UCUM.NoUnits,
        )
        for label, value in record["probabilities"].items()
    ]
    if "domain_distance" in record:
        measurements.append(
            Measurement(
                name=private("domain-distance", "Distance from training scans"),
                value=record["domain_distance"],
                unit=codes.UCUM.NoUnits,
            )
        )
    evaluations = [
        (private("most-probable", "Most probable class"), label_code(record["label"])),
        (
            private("in-domain", "Input within domain of model"),
            snomed(YES if record["in_domain"] else NO),
        ),
        *(
            (
                private("doubt", "Reason to doubt input"),
                private(f"doubt.{re.sub('[^a-z]+', '-', kind.lower())}", kind),
            )
            for kind in dict.fromkeys(
                reason.partition(":")[0].strip() for reason in record.get("reasons", ())
            )
        ),
        (
            private("intended-use", "Intended use"),
            private("research-only", NOT_A_MEDICAL_DEVICE),
        ),
    ]
    frames: dict[tuple[str, str], list[int] | None] = {}
    for each in slices:
        key = (str(each.header.SOPClassUID), str(each.header.SOPInstanceUID))
        if each.frame is None:
            frames[key] = None
        else:
            frames[key] = [*(frames.get(key) or ()), each.frame]
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=uid, identifier=title),
        algorithm_id=AlgorithmIdentification(
            name=model["name"],
            version=model["version"],
            parameters=[
                f"training run {model['run']}",
                f"client chestct {__version__}",
                NOT_A_MEDICAL_DEVICE,
            ],
        ),
        measurements=measurements,
        qualitative_evaluations=[
            QualitativeEvaluation(name=name, value=value) for name, value in evaluations
        ],
        source_images=[
            SourceImageForMeasurementGroup(sop_class, instance, numbers)
            for (sop_class, instance), numbers in frames.items()
        ],
    )


def _plain(label: str) -> str:
    """A label in words: `large.cell.carcinoma` and `large_cell_carcinoma` have dots for spaces."""
    return " ".join(re.split(r"[\s._-]+", label.strip().lower()))


def _equipment(model: Mapping[str, str]) -> dict[str, Any]:
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    from chestct import __version__

    return {
        "manufacturer": "chestct",
        "manufacturer_model_name": f"{model['name']} {model['version']}"[:64],
        "device_serial_number": model["run"][:64],
        "software_versions": __version__,
        "coding_schemes": [
            CodingSchemeIdentificationItem(
                CODING_SCHEME, name="Codes of chestct", responsible_organization="chestct"
            )
        ],
    }


class _Identifiers:
    """UIDs that follow from what the objects are made from."""

    def __init__(
        self, headers: Sequence[Dataset], slices: Sequence[Slice], model: Mapping[str, str]
    ) -> None:
        from chestct import __version__

        first = headers[0]
        # Late slices make another answer: another object, in the same series.
        parts = sorted(
            f"{h.SOPInstanceUID}/{s.frame}" for h, s in zip(headers, slices, strict=True)
        )
        self._source = (
            str(first.SeriesInstanceUID),
            model["name"],
            model["version"],
            model["run"],
            __version__,
        )
        self._instances = "\n".join(parts)
        number = first.get("SeriesNumber")
        self.series_number = FIRST_SERIES_NUMBER + 2 * min(abs(int(number or 0)), 10**6)

    def series_of(self, kind: str) -> str:
        return _uid(kind, *self._source)

    def of(self, kind: str) -> str:
        return _uid(kind, *self._source, self._instances)


def _uid(*parts: str) -> str:
    """A UID of the root 2.25 (PS3.5 B.2), the same for the same parts."""
    return f"2.25.{uuid.uuid5(NAMESPACE, chr(0).join(parts)).int}"


def _usable_headers(slices: Sequence[Slice]) -> list[Dataset]:
    """Copies of the headers with what every DICOM object needs, empty where that is allowed."""
    from pydicom import Dataset

    if not slices:
        raise ReportError("no slices to report on, expected at least one")
    headers = []
    for each in slices:
        header = Dataset(each.header)
        for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
            if not header.get(keyword):
                raise ReportError(
                    f"{each.record['path']}: no {keyword}, which a report has to refer to. "
                    "Send the slice as its scanner or archive stored it."
                )
        for keyword in MAY_BE_EMPTY:
            if keyword not in header or header[keyword].value is None:
                setattr(header, keyword, "")
        if header.PatientSex not in ("M", "F", "O", ""):  # all that PS3.3 C.7.1.1 knows
            header.PatientSex = ""
        headers.append(header)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        if len({str(header[keyword].value) for header in headers}) > 1:
            raise ReportError(f"slices with several {keyword}s, expected those of one series")
    return headers


def _orientation(header: Dataset) -> tuple[str, str]:
    """Where rows and columns lead (Patient Orientation, PS3.3 C.7.6.1.1.1), to the nearest axis."""
    cosines = np.array(header.get("ImageOrientationPatient") or (1, 0, 0, 0, 1, 0), float)
    letters = []
    for direction in (cosines[:3], cosines[3:]):
        axis = int(np.abs(direction).argmax())
        letters.append(LETTERS[axis][int(direction[axis] < 0)])
    return letters[0], letters[1]


def _quiet() -> Any:
    """No warnings of pydicom and highdicom, which quote what they find: names and UIDs."""
    import contextlib
    import logging
    import warnings

    @contextlib.contextmanager
    def silence() -> Any:
        for name in ("pydicom", "highdicom"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    return silence()


def _require_highdicom() -> None:
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise ImportError('DICOM reports need highdicom: pip install "chestct[sr]"') from error
