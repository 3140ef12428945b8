"""DICOM Structured Report and Secondary Capture of a classified series.

A Comprehensive 3D SR (template TID 1500, by highdicom) holds the numbers; a Secondary Capture
shows where the network looked on the slice with the most evidence. Both are for research, both
say so, and neither is verified by anybody.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from chestct.batch.decode_pool import DecodePool
from chestct.batch.pipeline import classify_sources
from chestct.client import ScanClient
from chestct.contract import NOT_A_MEDICAL_DEVICE, Window
from chestct.errors import OutOfDomainError, ReportError, ScanDecodeError
from chestct.imaging._warnings import without_warnings
from chestct.imaging.body import body_box
from chestct.imaging.metadata import SliceMetadata
from chestct.imaging.sources import Source
from chestct.results.overlays import overlay_of
from chestct.results.records import SeriesResult, SliceResult
from chestct.results.series import SeriesSlice, series_record

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "CODING_SCHEME",
    "DicomReports",
    "SourceSlice",
    "classify_series",
    "secondary_capture",
    "structured_report",
]

logger = logging.getLogger(__name__)

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

CARRIED_TO_CAPTURE = (
    "BurnedInAnnotation",
    "RecognizableVisualFeatures",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)

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
class SourceSlice:
    """A classified slice of a series.

    Attributes:
        header: Those of `SOURCE_KEYWORDS` that its file has.
        record: Its record, as made by `chestct.results.records.result_line`.
        frame: Its number, from 1, in a file of several; 0 for a file of one.
    """

    header: Dataset
    record: Mapping[str, Any]
    frame: int = 0


class DicomReports:
    """A folder of reports: for each series `KEY.sr.dcm` and, with a slice in domain, `KEY.sc.dcm`.

    An output of `chestct.batch.pipeline`. KEY is the same for the same slices, model and run. A
    series that cannot be reported is a warning in the log, and the rest goes on.

    Attributes:
        num_failed: How many series could not be reported.
    """

    wants_maps = True
    wants_series = True

    def __init__(self, folder: Path, window: Window, workers: DecodePool) -> None:
        """Makes the folder.

        Args:
            folder: Where the files go.
            window: In which slices are shown; that of the model.
            workers: Pool that decodes the pictured slices.

        Raises:
            ImportError: highdicom is not installed; the message says what to do.
            OSError: The folder cannot be made.
        """
        _require_highdicom()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._window = window
        self._workers = workers
        self.num_failed = 0

    def add(self, record: SliceResult, item: Any) -> None:
        """Nothing: slices are reported with their series."""

    def end_series(self, record: SeriesResult, items: Sequence[tuple[SliceResult, Any]]) -> None:
        """Writes the reports of a series."""
        if not items:
            return
        try:
            found = [(line, item.source, item.scan.metadata) for line, item in items if item.scan]
            slices = _source_slices(found)
            if len(slices) != record["num_slices"]:
                raise ReportError(
                    f"{len(slices)} slices at hand, expected {record['num_slices']}. "
                    "Classify the series again without --resume."
                )
            objects = {"sr": structured_report(record, slices)}
            if record["status"] == "ok":
                chief = record["slice"]["path"]
                item = next(item for line, item in items if line["path"] == chief)
                frame = item.scan.metadata.frame
                grey = self._workers.load_grey(item.source, self._window, frame=frame)
                picture = _picture(record, grey, item.activation_map)
                objects["sc"] = secondary_capture(record, slices, picture)
        except (ReportError, ScanDecodeError) as error:
            self.num_failed += 1
            logger.warning("no DICOM report of a series: %s", error)
            return
        key = hashlib.sha256(str(objects["sr"].SOPInstanceUID).encode()).hexdigest()[:16]
        for kind, dataset in objects.items():
            half = self._folder / f".{key}.{kind}.half"
            half.write_bytes(_file_bytes(dataset))
            half.replace(self._folder / f"{key}.{kind}.dcm")

    def close(self) -> None:
        """Nothing: every file is whole already."""


def classify_series(
    client: ScanClient,
    files: Sequence[Path],
    *,
    checkpoint: Callable[[], None],
    with_capture: bool = True,
    workers: DecodePool | None = None,
) -> dict[str, bytes] | None:
    """The reports on one series, as DICOM files.

    Args:
        client: A connected client.
        files: All files of the series.
        checkpoint: Called after each slice; may raise to end the work.
        with_capture: Whether to make the Secondary Capture too.
        workers: Pool that decodes; by default one of its own.

    Returns:
        Files by name, `sr` and `sc`; None where no file holds an axial CT slice.

    Raises:
        ServerError: The server failed.
        ReportError: No slice can be read, or a report cannot refer to them.
        ImportError: highdicom is not installed; the message says what to do.
    """
    _require_highdicom()
    window = client.metadata.window
    found: list[tuple[SliceResult, Source, SliceMetadata]] = []
    maps: dict[str, npt.NDArray[np.float32] | None] = {}
    num_failed = num_refused = 0
    with contextlib.ExitStack() as stack:
        decoders = workers or stack.enter_context(DecodePool())
        checkpoint()
        sources = map(Source, files)
        for record, item in classify_sources(client, sources, decoders, with_map=with_capture):
            checkpoint()
            if item.scan is not None:
                found.append((record, item.source, item.scan.metadata or SliceMetadata()))
                maps[record["path"]] = item.activation_map
            elif record["error"]["type"] == OutOfDomainError.__name__:
                num_refused += 1
            else:
                num_failed += 1
        if not found:
            if num_failed:
                raise ReportError(f"none of {num_failed + num_refused} slices can be read")
            return None
        series = series_record(
            [SeriesSlice.from_record(line, facts) for line, _, facts in found],
            num_failed=num_failed,
        )
        slices = _source_slices(found)
        objects = {"sr": structured_report(series, slices)}
        if series["status"] == "ok" and with_capture:
            checkpoint()
            path = series["slice"]["path"]
            source, facts = next(
                (source, facts) for line, source, facts in found if line["path"] == path
            )
            evidence = maps[path]
            if evidence is not None:
                grey = decoders.load_grey(source, window, frame=facts.frame)
                objects["sc"] = secondary_capture(series, slices, _picture(series, grey, evidence))
    return {kind: _file_bytes(dataset) for kind, dataset in objects.items()}


def structured_report(series: Mapping[str, Any], slices: Sequence[SourceSlice]) -> Dataset:
    """The findings on a series as a Comprehensive 3D SR in the study of its slices.

    Two measurement groups (TID 1501): the whole series, and the slice with the most evidence.
    Each has a probability for each class, the most probable class, whether the input is within
    the model's domain, and the kinds of doubt. A series without a slice in domain has the first
    group alone, without probabilities. Patient and study are copied from the first slice. UIDs
    follow from source series, slices, model and run, so that the same answer is the same object:
    what is made or sent again takes its own place in an archive and never multiplies.

    Args:
        series: As made by `chestct.results.series.series_record`. Where slices of the series
            could not be read, the report gets the completion flag PARTIAL.
        slices: The slices that it was made from.

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
    ids = _Identifiers(slices, model)
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
    groups = [_group("Series", ids.of("series"), _series_findings(series, slices), model, slices)]
    if series["status"] == "ok":
        chief = slices[_chief(series, slices)]
        findings = _slice_findings(chief.record)
        groups.append(_group("Slice with most evidence", ids.of("slice"), findings, model, [chief]))
    with without_warnings:
        content = MeasurementReport(
            observation_context=context,
            procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )
        report: Dataset = Comprehensive3DSR(
            evidence=headers,
            content=content,
            series_instance_uid=ids.series_of("sr"),
            series_number=ids.series_number,
            sop_instance_uid=ids.of("sr"),
            instance_number=1,
            is_complete=series["num_failed"] == 0,
            series_description=DESCRIPTION,
            **_equipment(model),
        )
    return report


def secondary_capture(
    series: Mapping[str, Any], slices: Sequence[SourceSlice], picture: npt.NDArray[np.uint8]
) -> Dataset:
    """A picture of the slice with the most evidence as a Secondary Capture in its study.

    Args:
        series: As for `structured_report`, with a slice in domain.
        slices: The slices that it was made from.
        picture: uint8 (H, W, 3), RGB: the overlay of the slice with most evidence.

    Raises:
        ReportError: As for `structured_report`.
        ImportError: highdicom is not installed; the message says what to do.
    """
    _require_highdicom()
    from highdicom.sc import SCImage
    from pydicom import Dataset
    from pydicom.sequence import Sequence as Items
    from pydicom.uid import ExplicitVRLittleEndian

    index = _chief(series, slices)
    header, chief = _usable_headers(slices)[index], slices[index]
    model = chief.record["model"]
    ids = _Identifiers(slices, model)
    with without_warnings:
        capture: Dataset = SCImage.from_ref_dataset(
            header,
            pixel_array=_labelled(picture, series),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),  # as `chestct.imaging.dicom` turns every slice
            pixel_spacing=_upright_spacing_mm(header),
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
    if chief.frame:
        source.ReferencedFrameNumber = chief.frame
    capture.SourceImageSequence = Items([source])
    # The flag tells whether the pixels identify the patient (PS3.3 C.7.6.1). What is written
    # here does not; what the source shows is shown again.
    for keyword in CARRIED_TO_CAPTURE:
        if header.get(keyword):
            setattr(capture, keyword, header[keyword].value)
    return capture


def _labelled(picture: npt.NDArray[np.uint8], series: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """The picture with label and notice below it, where they hide nothing."""
    height, width, _ = picture.shape
    strip_px = 44
    canvas = Image.new("RGB", (width, height + strip_px))
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    label = series["label"]
    outside = f"{series['num_out_of_domain']} of {series['num_slices']} slices out of domain"
    text = f"{label} {series['probabilities'][label]:.3f}, {outside}"
    draw.text((6, height + 4), text, "white")
    draw.text((6, height + 22), NOT_A_MEDICAL_DEVICE, "white")
    return np.asarray(canvas)


@dataclass(frozen=True)
class _Findings:
    """Content of one measurement group.

    Attributes:
        numbers: Measurements without a unit: code, meaning, value.
        label: The most probable class, if there is one.
        in_domain: Whether the input is within the model's domain.
        doubts: Kinds of doubt, in words.
        notes: Further parameters of the algorithm.
    """

    numbers: Sequence[tuple[str, str, float]]
    label: str | None
    in_domain: bool
    doubts: Sequence[str]
    notes: Sequence[str] = ()


def _series_findings(series: Mapping[str, Any], slices: Sequence[SourceSlice]) -> _Findings:
    counts = [
        ("num-slices", "Number of slices classified", series["num_slices"]),
        ("num-out-of-domain", "Number of slices out of domain", series["num_out_of_domain"]),
        ("num-failed", "Number of slices unreadable", series["num_failed"]),
    ]
    if series["status"] == "ok":
        used = series["aggregation"]
        note = f"{used['rule']}: {used['num_slices']} slices"
        return _Findings(
            [*_probabilities(series), *counts],
            series["label"],
            True,
            _kinds(series["warnings"]),
            [note],
        )
    reasons = [reason for each in slices for reason in each.record.get("reasons", ())]
    return _Findings(counts, None, False, _kinds([*reasons, *series["warnings"]]))


def _slice_findings(record: Mapping[str, Any]) -> _Findings:
    distance = ("domain-distance", "Distance from training scans", record["domain_distance"])
    return _Findings(
        [*_probabilities(record), distance],
        record["label"],
        record["in_domain"],
        _kinds(record.get("reasons", ())),
    )


def _probabilities(record: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    return [
        (f"probability.{label}", f"Probability of {_plain(label)}", value)
        for label, value in record["probabilities"].items()
    ]


def _kinds(sentences: Sequence[str]) -> list[str]:
    """Kinds of the reasons, without duplicates."""
    return list(dict.fromkeys(sentence.partition(":")[0].strip() for sentence in sentences))


def _group(
    title: str,
    uid: str,
    findings: _Findings,
    model: Mapping[str, str],
    slices: Sequence[SourceSlice],
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

    evaluations = []
    if findings.label is not None:
        known = CODE_OF_LABEL.get(_plain(findings.label))
        value = snomed(known) if known else private(f"class.{findings.label}", findings.label)
        evaluations.append((private("most-probable", "Most probable class"), value))
    in_domain = snomed(YES if findings.in_domain else NO)
    evaluations.append((private("in-domain", "Input within domain of model"), in_domain))
    for kind in findings.doubts:
        code = private(f"doubt.{re.sub('[^a-z]+', '-', kind.lower())}", kind)
        evaluations.append((private("doubt", "Reason to doubt input"), code))
    research = private("research-only", NOT_A_MEDICAL_DEVICE)
    evaluations.append((private("intended-use", "Intended use"), research))

    frames: dict[tuple[str, str], list[int]] = {}
    for each in slices:
        key = (str(each.header.SOPClassUID), str(each.header.SOPInstanceUID))
        frames.setdefault(key, []).extend([each.frame] if each.frame else [])
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=uid, identifier=title),
        algorithm_id=AlgorithmIdentification(
            name=model["name"],
            version=model["version"],
            parameters=[
                f"training run {model['run']}",
                f"client chestct {__version__}",
                *findings.notes,
                NOT_A_MEDICAL_DEVICE,
            ],
        ),
        measurements=[
            Measurement(name=private(code, meaning), value=value, unit=codes.UCUM.NoUnits)
            for code, meaning, value in findings.numbers
        ],
        qualitative_evaluations=[
            QualitativeEvaluation(name=name, value=value) for name, value in evaluations
        ],
        source_images=[
            SourceImageForMeasurementGroup(sop_class, instance, sorted(numbers) or None)
            for (sop_class, instance), numbers in frames.items()
        ],
    )


def _source_slices(
    found: Sequence[tuple[Mapping[str, Any], Source, SliceMetadata]],
) -> list[SourceSlice]:
    """Copies of a slice count once, as in the record of the series."""
    headers: dict[Source, Dataset] = {}
    slices: dict[tuple[str, int], SourceSlice] = {}
    for record, source, facts in found:
        if source not in headers:
            headers[source] = _read_header(source)
        slices[facts.sop_uid or record["path"], facts.frame] = SourceSlice(
            headers[source], record, facts.frame
        )
    return list(slices.values())


def _read_header(source: Source) -> Dataset:
    from pydicom import dcmread

    with without_warnings:
        return dcmread(
            BytesIO(source.read()),
            stop_before_pixels=True,
            force=True,
            specific_tags=list(SOURCE_KEYWORDS),
        )


def _picture(
    series: Mapping[str, Any], grey: npt.NDArray[np.uint8], evidence: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    class_index = list(series["probabilities"]).index(series["label"])
    return overlay_of(grey, evidence, class_index, body_box(grey))


def _file_bytes(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    with without_warnings:
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _chief(series: Mapping[str, Any], slices: Sequence[SourceSlice]) -> int:
    """Index of the slice with most evidence."""
    paths = [each.record["path"] for each in slices]
    return paths.index(series["slice"]["path"])


def _plain(label: str) -> str:
    """A label in words: `large.cell.carcinoma` is a large cell carcinoma."""
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

    def __init__(self, slices: Sequence[SourceSlice], model: Mapping[str, str]) -> None:
        from chestct import __version__

        first = slices[0].header
        # Late slices make another answer: another object, in the same series.
        parts = sorted(f"{each.header.SOPInstanceUID}/{each.frame}" for each in slices)
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


def _usable_headers(slices: Sequence[SourceSlice]) -> list[Dataset]:
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


def _upright_spacing_mm(header: Dataset) -> Any:
    """Pixel Spacing (0028,0030), rows first, of a slice turned by `chestct.imaging.dicom`."""
    spacing = header.get("PixelSpacing")
    if not spacing or len(spacing) != 2:
        return None
    cosines = header.get("ImageOrientationPatient") or (1, 0)
    is_turned = abs(cosines[1]) > abs(cosines[0])
    return [float(value) for value in (reversed(spacing) if is_turned else spacing)]


def _require_highdicom() -> None:
    try:
        import highdicom  # noqa: F401

        # Its log quotes names and UIDs.
        logging.getLogger("highdicom").setLevel(logging.CRITICAL)
    except ImportError as error:
        raise ImportError('DICOM reports need highdicom: pip install "chestct[sr]"') from error
