"""DICOM reports: what they say, that validators take them, and that they stay the same."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import highdicom
import numpy as np
import pytest
from pydicom import Dataset, dcmread

from chestct.batch.decode_pool import DecodePool
from chestct.client import ScanClient
from chestct.contract import LUNG_WINDOW, NOT_A_MEDICAL_DEVICE
from chestct.errors import ReportError
from chestct.imaging.body import body_box
from chestct.imaging.prepare import inspect_scan
from chestct.imaging.sources import Source
from chestct.pacs.reports import (
    CODING_SCHEME,
    DicomReports,
    SourceSlice,
    classify_series,
    secondary_capture,
    structured_report,
)
from chestct.results.overlays import overlay_of
from chestct.results.series import SeriesSlice, series_record
from training.data.phantom import dicom_from_phantom, make_phantom

LABELS = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")
MODEL = {"name": "chestct", "version": "3", "run": "run-7"}


def program(name: str) -> str:
    """A Debian program; pynetdicom installs others by the names of dcmtk into the environment."""
    found = shutil.which(name, path="/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if found is None:
        pytest.skip(f"no {name}: see .ci/run for the Debian packages")
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Five phantom slices of one series, 256 x 256, of a patient with an umlaut."""
    folder = tmp_path_factory.mktemp("series")
    for index in range(5):
        dataset = dicom_from_phantom(make_phantom("adenocarcinoma", 40 + index, size=256))
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName, dataset.PatientID, dataset.PatientSex = "SECRET^Jörg", "SECRET-1", "M"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20260102", "030405", "7"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1.5.1", "1.2.826.0.1.5.2"
        dataset.SOPInstanceUID = f"1.2.826.0.1.5.3.{index + 1}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber, dataset.SeriesNumber = index + 1, 4
        dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], 3.0 * index]
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


def record_of(path: Path, cancer: float, *, in_domain: bool = True) -> dict[str, Any]:
    values = (cancer, 0.0625, 0.875 - cancer, 0.0625)
    return {
        "path": str(path),
        "status": "ok",
        "label": LABELS[int(np.argmax(values))],
        "probabilities": dict(zip(LABELS, values, strict=True)),
        "in_domain": in_domain,
        **({} if in_domain else {"reasons": ["no lung in view: 0.1% of the body"]}),
        "domain_distance": 2.5,
        "model": MODEL,
    }


@pytest.fixture
def slices(files) -> list[SourceSlice]:
    """The third has the most evidence."""
    return [
        SourceSlice(dcmread(file, stop_before_pixels=True), record_of(file, cancer))
        for file, cancer in zip(files, (0.125, 0.25, 0.75, 0.5, 0.125), strict=True)
    ]


def series_of(slices: list[SourceSlice], files: list[Path], **options) -> dict[str, Any]:
    return series_record(
        [
            SeriesSlice.from_record(each.record, inspect_scan(file).metadata)
            for each, file in zip(slices, files, strict=False)
        ],
        **options,
    )


@pytest.fixture
def series(slices, files) -> dict[str, Any]:
    return series_of(slices, files)


@pytest.fixture
def capture(series, slices) -> Dataset:
    return secondary_capture(series, slices, np.full((256, 256, 3), 90, np.uint8))


def reread(dataset: Dataset, path: Path) -> Dataset:
    dataset.save_as(path, enforce_file_format=True)
    return dcmread(path)


def groups_of(report: Dataset) -> list[Any]:
    content = highdicom.sr.Comprehensive3DSR.from_dataset(report).content
    return content.get_image_measurement_groups()


def numbers(group: Any) -> dict[str, float]:
    return {found.name.meaning: float(found.value) for found in group.get_measurements()}


def codes(group: Any) -> list[tuple[str, str, str]]:
    return [
        (found.name.meaning, found.value.scheme_designator, found.value.meaning)
        for found in group.get_qualitative_evaluations()
    ]


def test_report_has_the_numbers_of_the_series_and_of_its_strongest_slice(
    series, slices, files, tmp_path
):
    report = reread(structured_report(series, slices), tmp_path / "sr.dcm")
    whole, chief = groups_of(report)
    for label in LABELS:
        name = f"Probability of {label.replace('.', ' ')}"
        assert numbers(whole)[name] == pytest.approx(series["probabilities"][label])
        assert numbers(chief)[name] == slices[2].record["probabilities"][label]
    assert numbers(whole)["Number of slices classified"] == 5
    assert numbers(chief)["Distance from training scans"] == 2.5
    assert ("Most probable class", "SCT", "Adenocarcinoma") in codes(chief)
    assert ("Input within domain of model", "SCT", "Yes") in codes(whole)
    assert ("Reason to doubt input", CODING_SCHEME, "few slices") in codes(whole)
    assert ("Intended use", CODING_SCHEME, NOT_A_MEDICAL_DEVICE) in codes(whole)
    sources = [image.referenced_sop_instance_uid for image in whole.source_images]
    assert sources == [f"1.2.826.0.1.5.3.{number}" for number in (1, 2, 3, 4, 5)]
    (reference,) = chief.source_images
    assert reference.referenced_sop_instance_uid == "1.2.826.0.1.5.3.3"


def test_report_lies_in_the_study_of_its_source_and_nobody_has_verified_it(series, slices):
    report = structured_report(series, slices)
    source = slices[0].header
    for keyword in ("PatientName", "PatientID", "PatientSex", "StudyInstanceUID", "StudyDate"):
        assert report[keyword].value == source[keyword].value
    assert report.SeriesInstanceUID != source.SeriesInstanceUID
    assert (report.VerificationFlag, report.CompletionFlag) == ("UNVERIFIED", "COMPLETE")
    assert report.PreliminaryFlag == "PRELIMINARY"
    assert "not a medical device" in report.SeriesDescription
    (scheme,) = report.CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == CODING_SCHEME


def test_report_names_model_version_run_and_client(series, slices):
    import chestct

    text = "\n".join(str(item.value) for item in structured_report(series, slices).iterall())
    for part in (
        "training run run-7",
        f"client chestct {chestct.__version__}",
        "mean of the slices",
    ):
        assert part in text


def test_report_of_a_series_with_unreadable_slices_is_partial(slices, files):
    report = structured_report(series_of(slices, files, num_failed=2), slices)
    assert report.CompletionFlag == "PARTIAL"
    assert numbers(groups_of(report)[0])["Number of slices unreadable"] == 2


def test_report_of_a_series_out_of_domain_says_so_and_gives_no_probability(slices, files):
    outside = [
        replace(each, record=record_of(Path(each.record["path"]), 0.5, in_domain=False))
        for each in slices
    ]
    (whole,) = groups_of(structured_report(series_of(outside, files), outside))
    assert not any("Probability" in name for name in numbers(whole))
    assert ("Input within domain of model", "SCT", "No") in codes(whole)
    assert ("Reason to doubt input", CODING_SCHEME, "no lung in view") in codes(whole)


def test_same_slices_give_the_same_identifiers_and_others_give_others(series, slices, files):
    first, again = structured_report(series, slices), structured_report(series, slices[::-1])
    assert first.SOPInstanceUID == again.SOPInstanceUID
    assert first.SeriesInstanceUID == again.SeriesInstanceUID
    fewer = structured_report(series_of(slices[:3], files), slices[:3])
    assert fewer.SOPInstanceUID != first.SOPInstanceUID
    assert fewer.SeriesInstanceUID == first.SeriesInstanceUID
    newer = [
        replace(each, record={**each.record, "model": {**MODEL, "run": "run-8"}}) for each in slices
    ]
    other = structured_report(series, newer)
    assert other.SeriesInstanceUID != first.SeriesInstanceUID
    assert other.SOPInstanceUID != first.SOPInstanceUID


def test_report_and_capture_are_two_objects_in_two_series(series, slices, capture):
    report = structured_report(series, slices)
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber"):
        assert report[keyword].value != capture[keyword].value
    assert report.StudyInstanceUID == capture.StudyInstanceUID


def test_capture_says_what_it_is_and_what_it_was_made_from(capture, tmp_path):
    capture = reread(capture, tmp_path / "sc.dcm")
    assert capture.ImageType[:2] == ["DERIVED", "SECONDARY"]
    assert "run run-7" in capture.DerivationDescription
    assert NOT_A_MEDICAL_DEVICE in capture.DerivationDescription
    (source,) = capture.SourceImageSequence
    assert source.ReferencedSOPInstanceUID == "1.2.826.0.1.5.3.3"
    assert capture.PatientOrientation == ["L", "P"]
    assert str(capture.PatientName) == "SECRET^Jörg"
    pixels = capture.pixel_array
    assert pixels.shape[1:] == (256, 3)
    assert (pixels[:256] == 90).all()  # nothing is written over the slice
    assert (pixels[256:] > 128).any()  # but below it


@pytest.mark.parametrize("flag", ["YES", "NO", None])
def test_capture_has_the_burned_in_flag_of_its_source(series, slices, flag):
    header = slices[2].header
    if flag is None:
        del header.BurnedInAnnotation
    else:
        header.BurnedInAnnotation = flag
    header.LossyImageCompression = "01"
    made = secondary_capture(series, slices, np.zeros((64, 64, 3), np.uint8))
    assert made.get("BurnedInAnnotation") == flag
    assert made.LossyImageCompression == "01"


def test_spacing_of_a_slice_that_is_turned_upright_is_turned_with_it(series, slices):
    slices[2].header.PixelSpacing = [0.5, 0.75]
    made = secondary_capture(series, slices, np.zeros((64, 64, 3), np.uint8))
    assert made.PixelSpacing == [0.5, 0.75]
    slices[2].header.ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
    made = secondary_capture(series, slices, np.zeros((64, 64, 3), np.uint8))
    assert made.PixelSpacing == [0.75, 0.5]


@pytest.mark.parametrize("kind", ["sr", "sc"])
def test_dciodvfy_finds_no_error(series, slices, capture, kind, tmp_path):
    made = structured_report(series, slices) if kind == "sr" else capture
    made.save_as(tmp_path / "made.dcm", enforce_file_format=True)
    done = subprocess.run(
        [program("dciodvfy"), tmp_path / "made.dcm"], capture_output=True, text=True, timeout=60
    )
    said = done.stdout + done.stderr
    assert ("Comprehensive3DSR" if kind == "sr" else "SCImage") in said
    assert "Error" not in said
    # The scheme is ours, and whether the part examined is one of a pair is not known.
    expected = (CODING_SCHEME, "<Laterality>")
    warned = [line for line in said.splitlines() if line.startswith("Warning")]
    assert [line for line in warned if not any(word in line for word in expected)] == []


def test_dsrdump_reads_the_report(series, slices, tmp_path):
    structured_report(series, slices).save_as(tmp_path / "sr.dcm", enforce_file_format=True)
    done = subprocess.run(
        [program("dsrdump"), "-Ee", tmp_path / "sr.dcm"],
        capture_output=True, timeout=60,
    )  # fmt: skip
    said = done.stdout.decode("latin-1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Patient             : SECRET^Jörg" in said
    assert "UNVERIFIED" in said
    assert said.count("Measurement Group") == 2


@pytest.mark.parametrize(
    "absent",
    ["PatientName", "PatientID", "PatientSex", "StudyDate", "StudyID", "AccessionNumber"],
)
def test_source_without_an_attribute_of_type_2_gives_an_empty_one(series, slices, absent):
    for each in slices:
        if absent in each.header:
            delattr(each.header, absent)
    assert str(structured_report(series, slices)[absent].value or "") == ""


def test_damaged_values_of_the_source_harm_nobody(series, slices):
    for each in slices:
        each.header.PatientSex = "MALE"
        each.header.SeriesNumber = None
    report = structured_report(series, slices)
    assert report.PatientSex == ""
    assert report.SeriesNumber > 0


@pytest.mark.parametrize("missing", ["SOPInstanceUID", "StudyInstanceUID"])
def test_slice_that_cannot_be_referred_to_is_an_error_that_says_so(series, slices, missing):
    delattr(slices[1].header, missing)
    with pytest.raises(ReportError, match=f"no {missing}"):
        structured_report(series, slices)


def test_slices_of_several_studies_are_refused(series, slices):
    slices[1].header.StudyInstanceUID = "1.2.3"
    with pytest.raises(ReportError, match="several StudyInstanceUIDs"):
        structured_report(series, slices)


def test_overlay_colours_the_place_of_the_evidence_and_nothing_else():
    grey = np.zeros((280, 280), np.uint8)
    grey[28:252, 28:252] = np.random.default_rng(0).integers(60, 200, (224, 224))
    evidence = np.zeros((14, 14, 2), np.float32)
    evidence[3, 10, 1] = 4.0  # rows first: high up, far right
    box = body_box(grey)
    shown = overlay_of(grey, evidence, 1, box).astype(int)
    coloured = shown[..., 0] - shown[..., 2]
    rows, columns = np.nonzero(coloured > 10)
    assert abs(rows.mean() - (28 + 16 * 3.5)) < 8
    assert abs(columns.mean() - (28 + 16 * 10.5)) < 8
    assert (shown[coloured == 0] == grey[coloured == 0][:, None]).all()
    # What holds for all classes alike says nothing for one of them.
    np.testing.assert_array_equal(overlay_of(grey, evidence + 7, 1, box), shown)


@pytest.fixture(scope="module")
def workers() -> Iterator[DecodePool]:
    with DecodePool(1, num_in_threads=0) as running:
        yield running


def test_output_of_a_batch_writes_both_files_and_again_the_same(
    series, slices, files, tmp_path, workers
):
    output = DicomReports(tmp_path / "reports", LUNG_WINDOW, workers)
    evidence = np.random.default_rng(1).normal(0, 1, (14, 14, 4)).astype(np.float32)
    items = [
        (
            each.record,
            SimpleNamespace(source=Source(file), scan=inspect_scan(file), activation_map=evidence),
        )
        for each, file in zip(slices, files, strict=True)
    ]
    output.end_series(series, items)
    written = sorted(path.name for path in (tmp_path / "reports").iterdir())
    assert [name.partition(".")[2] for name in written] == ["sc.dcm", "sr.dcm"]
    report, capture = (dcmread(tmp_path / "reports" / name) for name in written[::-1])
    assert report.Modality == "SR"
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.826.0.1.5.3.3"
    assert capture.Rows > capture.Columns == 256
    output.end_series(series, items)
    output.close()
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == written
    assert output.num_failed == 0


def test_output_of_a_batch_goes_on_after_a_series_that_cannot_be_reported(
    series, slices, files, tmp_path, caplog, workers
):
    dataset = dcmread(files[0])
    del dataset.StudyInstanceUID
    dataset.save_as(tmp_path / "bad.dcm")
    output = DicomReports(tmp_path / "reports", LUNG_WINDOW, workers)
    item = SimpleNamespace(
        source=Source(tmp_path / "bad.dcm"), scan=inspect_scan(files[0]), activation_map=None
    )
    one = series_of(slices[:1], files)
    output.end_series(one, [(slices[0].record, item)])
    assert output.num_failed == 1
    assert "no StudyInstanceUID" in caplog.text
    assert "SECRET" not in caplog.text


def test_output_of_a_batch_makes_no_report_of_a_part_of_a_series(
    series, slices, files, tmp_path, caplog, workers
):
    output = DicomReports(tmp_path / "reports", LUNG_WINDOW, workers)
    item = SimpleNamespace(
        source=Source(files[0]), scan=inspect_scan(files[0]), activation_map=None
    )
    output.end_series(series, [(slices[0].record, item)])
    assert "1 slices at hand, expected 5" in caplog.text
    assert list((tmp_path / "reports").iterdir()) == []


def test_copies_of_a_slice_count_once(grpc_peer, files, tmp_path):
    copy = tmp_path / "0 copy.dcm"
    copy.write_bytes(files[0].read_bytes())
    with ScanClient(grpc_peer.url) as client:
        whole = classify_series(client, files, checkpoint=nothing)
        again = classify_series(client, [copy, *files], checkpoint=nothing)
    for name, data in (("whole.dcm", whole["sr"]), ("again.dcm", again["sr"])):
        (tmp_path / name).write_bytes(data)
    first, second = dcmread(tmp_path / "whole.dcm"), dcmread(tmp_path / "again.dcm")
    assert first.SOPInstanceUID == second.SOPInstanceUID


def nothing() -> None:
    """A checkpoint that never ends the work."""


def test_series_is_classified_from_its_files(grpc_peer, files):
    with ScanClient(grpc_peer.url) as client:
        reports = classify_series(client, files, checkpoint=nothing)
        assert sum(count for count, _ in grpc_peer.model.requests) == len(files)  # each once
        numbers_alone = classify_series(client, files, checkpoint=nothing, with_capture=False)
    assert set(reports) == {"sr", "sc"}
    assert set(numbers_alone) == {"sr"}


def test_files_without_an_axial_slice_give_no_report(grpc_peer, files, tmp_path):
    scout = dcmread(files[0])
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.save_as(tmp_path / "scout.dcm")
    with ScanClient(grpc_peer.url) as client:
        assert classify_series(client, [tmp_path / "scout.dcm"], checkpoint=nothing) is None


def test_broken_files_are_counted_and_all_of_them_are_an_error(grpc_peer, files, tmp_path):
    torn = tmp_path / "torn.dcm"
    torn.write_bytes(files[0].read_bytes()[:2000])
    with ScanClient(grpc_peer.url) as client:
        reports = classify_series(client, [*files, torn], checkpoint=nothing)
        with pytest.raises(ReportError, match="none of 1 slices can be read"):
            classify_series(client, [torn], checkpoint=nothing)
    (tmp_path / "sr.dcm").write_bytes(reports["sr"])
    assert dcmread(tmp_path / "sr.dcm").CompletionFlag == "PARTIAL"


def test_checkpoint_ends_the_work(grpc_peer, files):
    class EndError(Exception):
        pass

    def end() -> None:
        raise EndError

    with ScanClient(grpc_peer.url) as client, pytest.raises(EndError):
        classify_series(client, files, checkpoint=end)
    assert not grpc_peer.model.requests


def test_nothing_of_the_patient_is_logged(grpc_peer, files, caplog):
    caplog.set_level(logging.DEBUG)
    with ScanClient(grpc_peer.url) as client:
        classify_series(client, files, checkpoint=nothing)
    assert "SECRET" not in caplog.text
    assert "1.2.826.0.1.5" not in caplog.text
