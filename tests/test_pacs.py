"""From a PACS and back: Orthanc or dcmtk, `chestct listen`, a real Triton, and reports in DICOM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from pydicom import dcmread

from chestct.client import ScanClient
from chestct.contract import LUNG_WINDOW, ModelMetadata
from chestct.imaging.prepare import inspect_scan
from chestct.pacs.reports import classify_series
from chestct.results.records import result_line
from chestct.results.series import SeriesSlice, series_record
from serving.local import LocalTriton
from tests.support.dcmtk import StoreScp, program
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.triton import LABELS, config_parameters, serve
from tests.support.waiting import until
from training.data.phantom import dicom_from_phantom, make_phantom

pytestmark = pytest.mark.server
CHESTCT = Path(sys.executable).with_name("chestct")
FACTS = ModelMetadata(LABELS, LUNG_WINDOW, 1.0, 1000.0, "run-7", "ab" * 32)
SECRETS = ("SECRET", "1.2.826.0.1.88")
NUM_SLICES = 6
# A sender that stalls never splits its series.
AT_RELEASE = ("--at-release", "--quiet-s", "3600")
COPIED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyInstanceUID", "AccessionNumber", "StudyID", "StudyDescription",
)  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory, write_model) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write_model(folder, "chestct", config_parameters(FACTS), num_labels=len(LABELS))
    return folder


@pytest.fixture(scope="module")
def triton(repository, triton_environment) -> Iterator[LocalTriton]:
    with serve(repository, triton_environment) as server:
        yield server


def write_series(folder: Path, number: int, num_slices: int = NUM_SLICES) -> list[Path]:
    """A series of phantom slices of a patient with a name, in a study of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    root = f"1.2.826.0.1.88.{number}"
    for index in range(num_slices):
        phantom = make_phantom("adenocarcinoma", 100 * number + index, size=256)
        dataset = dicom_from_phantom(phantom)
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName, dataset.PatientID = "SECRET^Jörg", "SECRET-1"
        dataset.PatientBirthDate, dataset.PatientSex = "19500101", "M"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20260102", "030405", "7"
        dataset.AccessionNumber, dataset.StudyDescription = "SECRET-2", "SECRET chest"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{root}.1", f"{root}.2"
        dataset.FrameOfReferenceUID = f"{root}.3"
        dataset.SOPInstanceUID = f"{root}.4.{index + 1}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = index + 1
        dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], 3.0 * index]
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("study"), 1)


class Node:
    """`chestct listen` as a process; its log goes to a file."""

    def __init__(self, folder: Path, url: str, send_to: str, *options: str) -> None:
        self.queue, self.log = folder / "queue", folder / "listen.log"
        folder.mkdir(exist_ok=True)
        before = self.text().count("listens on")
        command = [CHESTCT, "listen", "--queue", self.queue, "--url", url, "--send-to", send_to]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0", *options], stdout=log, stderr=log
            )
        until(lambda: self.text().count("listens on") > before or self.process.poll() is not None)
        assert self.process.poll() is None, self.text()
        self.port = int(self.text().rpartition("listens on 127.0.0.1:")[2].split()[0])

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def status(self) -> dict[str, int]:
        done = subprocess.run(
            [CHESTCT, "listen", "--queue", self.queue, "--status"],
            capture_output=True, check=True, timeout=60,
        )  # fmt: skip
        return json.loads(done.stdout)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture
def start_node(tmp_path) -> Iterator[Callable[..., Node]]:
    started: list[Node] = []

    def start(url: str, send_to: str, *options: str) -> Node:
        started.append(Node(tmp_path / "node", url, send_to, *options))
        return started[-1]

    yield start
    for node in started:
        if node.process.poll() is None:
            node.stop(signal.SIGKILL)


@pytest.fixture
def orthanc(tmp_path) -> Iterator[Orthanc]:
    server = Orthanc(tmp_path / "orthanc")
    yield server
    server.stop()


def expected_series(url: str, files: list[Path]) -> dict[str, Any]:
    """The record of a series by another way: file by file, in one request."""
    with ScanClient(url) as client:
        scans = [inspect_scan(file, client.metadata.window) for file in files]
        answer = client.infer(np.stack([scan.pixels for scan in scans]), with_map=True)
    lines = [
        result_line(str(file), answer, index, decode_ms=0, infer_ms=0, reasons=scan.reasons)
        for index, (file, scan) in enumerate(zip(files, scans, strict=True))
    ]
    return series_record(
        [
            SeriesSlice.from_record(line, scan.metadata)
            for line, scan in zip(lines, scans, strict=True)
        ]
    )


def numbers_of(group: Any) -> dict[str, float]:
    return {m.name.meaning: float(m.value) for m in group.get_measurements()}


def test_study_pushed_by_orthanc_comes_back_as_reports_in_the_same_study(
    triton, orthanc, study, start_node
):
    (study_id,) = {orthanc.post("/instances", file.read_bytes())["ParentStudy"] for file in study}
    node = start_node(triton.grpc_url, f"ORTHANC@127.0.0.1:{orthanc.dicom_port}", *AT_RELEASE)
    peer = {"AET": "CHESTCT", "Host": "127.0.0.1", "Port": node.port}
    orthanc.call("/modalities/chestct", json.dumps(peer).encode(), "PUT")
    orthanc.post("/modalities/chestct/echo", b"{}")
    orthanc.post("/modalities/chestct/store", study_id.encode())
    until(lambda: len(orthanc.instances("SR")) == 1 and len(orthanc.instances("OT")) == 1)
    assert len(orthanc.get("/studies")) == 1
    until(lambda: not any(node.status().values()))

    (report,), (capture,) = orthanc.instances("SR"), orthanc.instances("OT")
    source = dcmread(study[0])
    for made in (report, capture):
        for keyword in COPIED:
            assert made[keyword].value == source[keyword].value
        assert "not a medical device" in made.SeriesDescription
    content = highdicom.sr.Comprehensive3DSR.from_dataset(report).content
    whole, chief = content.get_image_measurement_groups()
    expected = expected_series(triton.grpc_url, study)
    got = numbers_of(whole)
    assert got["Number of slices classified"] == NUM_SLICES
    for label, value in expected["probabilities"].items():
        assert got[f"Probability of {label.replace('.', ' ')}"] == pytest.approx(value, abs=1e-5)
    chief_file = dcmread(expected["slice"]["path"])
    (reference,) = chief.source_images
    assert reference.referenced_sop_instance_uid == chief_file.SOPInstanceUID
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == chief_file.SOPInstanceUID

    # The same again is the same again: nothing multiplies.
    instance = orthanc.get("/series?expand")
    (ct,) = [one["ID"] for one in instance if one["MainDicomTags"]["Modality"] == "CT"]
    before = node.text().count("delivered")
    orthanc.post("/modalities/chestct/store", ct.encode())
    until(lambda: node.text().count("delivered") > before)
    assert [one.SOPInstanceUID for one in orthanc.instances("SR")] == [report.SOPInstanceUID]
    assert len(orthanc.get("/instances")) == NUM_SLICES + 2
    assert node.stop() == 0
    assert not any(secret in node.text() for secret in SECRETS)
    assert "Traceback" not in node.text()


@pytest.fixture
def store_scp(tmp_path) -> Iterator[StoreScp]:
    server = StoreScp(tmp_path / "delivered", free_port())
    yield server
    server.stop()


def send(port: int, files: list[Path]) -> int:
    """How many of the files storescu was told are stored, in their order."""
    done = subprocess.run(
        [program("storescu"), "-v", "-aec", "CHESTCT", "127.0.0.1", str(port), *files],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return (done.stdout + done.stderr).count("(Success)")


def in_state(node: Node, state: str) -> list[Path]:
    """The series that lie in one state of the node's queue."""
    return list((node.queue / state).glob("*/*.dcm"))


def test_kill_9_in_every_state_loses_nothing_and_sends_nothing_twice(
    triton, store_scp, start_node, tmp_path
):
    """Killed while it receives, has classified, delivers: only what it acknowledged must count.

    The server or the peer is stopped meanwhile, so that the state lasts until the kill.
    """
    series = {number: write_series(tmp_path / f"series{number}", number, 3) for number in range(4)}
    send_to = f"STORESCP@127.0.0.1:{store_scp.port}"
    # Killed with the second object on its way; what was not acknowledged is sent again.
    node = start_node(triton.grpc_url, send_to, "--no-capture", "--quiet-s", "3600")
    assert send(node.port, series[0][:1]) == 1
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, node.port, series[0][1:])
        until(lambda: len(in_state(node, "incoming")) > 1, "the second object")
        node.stop(signal.SIGKILL)
        num_sent = 1 + sending.result()
    # In the middle of classifying.
    node = start_node(triton.grpc_url, send_to, "--no-capture", *AT_RELEASE)
    os.kill(triton.pid, signal.SIGSTOP)
    try:
        assert send(node.port, series[1]) == 3
        until(lambda: in_state(node, "classifying"), "a series that is classified")
        node.stop(signal.SIGKILL)
    finally:
        os.kill(triton.pid, signal.SIGCONT)
    # Classified, not yet delivered; the peer hangs in the middle of taking the report.
    node = start_node(triton.grpc_url, send_to, "--no-capture", *AT_RELEASE)
    store_scp.signal(signal.SIGSTOP)
    try:
        assert send(node.port, series[2]) == 3
        until(lambda: list((node.queue / "sending").glob("*/results/*.dcm")), "a report")
        node.stop(signal.SIGKILL)
    finally:
        store_scp.signal(signal.SIGCONT)
    # As soon as the peer has taken one.
    before = store_scp.num_requests
    node = start_node(triton.grpc_url, send_to, "--no-capture", *AT_RELEASE)
    assert send(node.port, series[3]) == 3
    until(lambda: store_scp.num_requests > before, "a delivery")
    node.stop(signal.SIGKILL)

    node = start_node(triton.grpc_url, send_to, "--no-capture", *AT_RELEASE)
    assert send(node.port, series[0][num_sent:]) == 3 - num_sent
    node.stop()
    node = start_node(triton.grpc_url, send_to, "--no-capture", "--quiet-s", "0.1")
    until(lambda: not any(node.status().values()), "the end of the work")
    assert node.stop() == 0
    reports = [dcmread(file) for file in store_scp.files()]
    assert sorted(report.StudyInstanceUID for report in reports) == [
        f"1.2.826.0.1.88.{number}.1" for number in series
    ]
    for report in reports:
        whole, _ = highdicom.sr.Comprehensive3DSR.from_dataset(
            report
        ).content.get_image_measurement_groups()
        assert len(whole.source_images) == 3
    # Between the peer's answer and our note of it a kill costs one more request of the same object,
    # and a peer that was stopped finds the request of a node that is dead.
    assert 4 <= store_scp.num_requests <= 4 + 2
    assert not any(secret in node.text() for secret in SECRETS)


def test_node_outlives_a_server_that_is_away(
    repository, triton_environment, study, store_scp, start_node
):
    grpc_port = free_port()
    node = start_node(
        f"grpc://127.0.0.1:{grpc_port}",
        f"STORESCP@127.0.0.1:{store_scp.port}",
        *("--connect-timeout-s", "1", *AT_RELEASE),
    )
    assert send(node.port, study) == NUM_SLICES
    until(lambda: "Trying again" in node.text())
    assert node.status()["objects"] == NUM_SLICES
    with serve(repository, triton_environment, grpc_port=grpc_port):
        until(lambda: len(store_scp.files()) == 2)
    assert node.stop() == 0


def test_batch_writes_the_same_report_as_the_node_would_send(triton, study, tmp_path):
    options = ["--url", triton.grpc_url, "--json", "--dicom-sr", tmp_path / "reports"]
    done = subprocess.run(
        [CHESTCT, "classify", study[0].parent, *options],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report_file, capture_file = sorted((tmp_path / "reports").iterdir(), reverse=True)
    assert (report_file.name[-7:], capture_file.name[-7:]) == (".sr.dcm", ".sc.dcm")
    with ScanClient(triton.grpc_url) as client:
        sent = classify_series(client, study, checkpoint=lambda: None)
    report, other = dcmread(report_file), dcmread(BytesIO(sent["sr"]))
    assert report.SOPInstanceUID == other.SOPInstanceUID
    assert report.ContentSequence == other.ContentSequence
    assert dcmread(capture_file).pixel_array.any()
    assert not any(secret in done.stderr for secret in SECRETS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--send-to"),
        (["--send-to", "PACS"], "AE_TITLE@HOST:PORT"),
        (["--send-to", "PACS@127.0.0.1:104", "--host", "0.0.0.0"], "--allow"),
        (["--send-to", "PACS@127.0.0.1:104", "--quiet-s", "0"], "quiet_s"),
        (["--status"], "no such folder"),
    ],
)
def test_wrong_usage_is_told_at_once(tmp_path, options, expected):
    done = subprocess.run(
        [CHESTCT, "listen", "--queue", tmp_path / "queue", *options],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert expected in done.stderr
