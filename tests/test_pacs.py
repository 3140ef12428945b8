"""From a PACS and back: Orthanc or dcmtk, `chestct listen`, a real Triton, and reports in DICOM."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from pydicom import Dataset, dcmread

from chestct.client import ScanClient
from chestct.contract import LUNG_WINDOW, ModelFacts
from chestct.report import result_line
from chestct.scan import inspect_scan
from chestct.series import SeriesSlice, series_record
from chestct.sr import classify_series
from serving.local import LocalTriton
from training.phantom import dicom_from_phantom, make_phantom

pytestmark = pytest.mark.server
CHESTCT = Path(sys.executable).with_name("chestct")
LABELS = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")
FACTS = ModelFacts(LABELS, LUNG_WINDOW, 1.0, 1000.0, "run-7", "ab" * 32)
SECRETS = ("SECRET", "1.2.826.0.1.88")
NUM_SLICES = 6
COPIED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyInstanceUID", "AccessionNumber", "StudyID", "StudyDescription",
)  # fmt: skip


def program(name: str) -> str:
    """A Debian program; pynetdicom installs others by the names of dcmtk into the environment."""
    found = shutil.which(name, path="/usr/bin:/usr/sbin:/usr/local/bin:/opt/homebrew/bin")
    if found is None:
        pytest.skip(f"no {name}: see .ci/run for the Debian packages")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], Any], timeout_s: float = 90) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.1)
    return result


@pytest.fixture(scope="module")
def repository(tmp_path_factory, write_model) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    parameters = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}\n'
        for key, value in FACTS.to_parameters().items()
    )
    write_model(folder, "chestct", parameters, num_labels=len(FACTS.labels))
    return folder


@pytest.fixture(scope="module")
def triton(repository, triton_environment) -> Iterator[LocalTriton]:
    with LocalTriton(repository, environment=triton_environment, exit_timeout_s=5) as server:
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
                [*command, "--port", "0", "--quiet-s", "2", *options], stdout=log, stderr=log
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


class Orthanc:
    """A real PACS on this machine, reached by its REST interface."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.dicom_port, self.http_port = free_port(), free_port()
        config = {
            "Name": "test", "DicomAet": "ORTHANC", "DicomPort": self.dicom_port,
            "HttpPort": self.http_port, "RemoteAccessAllowed": False, "DicomCheckCalledAet": True,
            "AuthenticationEnabled": False, "Plugins": [], "DicomAlwaysAllowStore": True,
            "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "HttpsCACertificates": "", "StableAge": 1,
        }  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(config))
        self._log = (folder / "orthanc.log").open("wb")
        self._process = subprocess.Popen(
            [program("Orthanc"), folder / "orthanc.json"], stdout=self._log, stderr=self._log
        )
        until(self._is_up)

    def _is_up(self) -> bool:
        assert self._process.poll() is None, "Orthanc ended"
        try:
            return bool(self.get("/system"))
        except OSError:
            return False

    def call(self, path: str, data: bytes | None = None, method: str | None = None) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}{path}", data=data, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.call(path))

    def post(self, path: str, data: bytes) -> Any:
        return json.loads(self.call(path, data))

    def instances(self, modality: str) -> list[Dataset]:
        return [
            dcmread(BytesIO(self.call(f"/instances/{instance}/file")))
            for series in self.get("/series?expand")
            if series["MainDicomTags"]["Modality"] == modality
            for instance in series["Instances"]
        ]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        self._log.close()


@pytest.fixture
def orthanc(tmp_path) -> Iterator[Orthanc]:
    server = Orthanc(tmp_path / "orthanc")
    yield server
    server.stop()


def expected_series(url: str, files: list[Path]) -> dict[str, Any]:
    """The record of a series by another way: file by file, in one request."""
    with ScanClient(url) as client:
        scans = [inspect_scan(file, client.facts.window) for file in files]
        answer = client.classify(np.stack([scan.pixels for scan in scans]))
    lines = [
        result_line(str(file), answer, index, decode_ms=0, infer_ms=0, reasons=scan.reasons)
        for index, (file, scan) in enumerate(zip(files, scans, strict=True))
    ]
    return series_record(
        [SeriesSlice.from_record(line, scan.facts) for line, scan in zip(lines, scans, strict=True)]
    )


def numbers_of(group: Any) -> dict[str, float]:
    return {m.name.meaning: float(m.value) for m in group.get_measurements()}


def test_study_pushed_by_orthanc_comes_back_as_reports_in_the_same_study(
    triton, orthanc, study, start_node
):
    (study_id,) = {orthanc.post("/instances", file.read_bytes())["ParentStudy"] for file in study}
    node = start_node(triton.grpc_url, f"ORTHANC@127.0.0.1:{orthanc.dicom_port}")
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


class StoreScp:
    """dcmtk's storescp; its log has every request, its folder every object."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.port = folder, free_port()
        self._log = (folder.parent / "storescp.log").open("wb")
        self._process = subprocess.Popen(
            [program("storescp"), "-v", "-uf", "-od", folder, str(self.port)],
            stdout=self._log, stderr=self._log,
        )  # fmt: skip

    @property
    def num_requests(self) -> int:
        return (self.folder.parent / "storescp.log").read_text().count("Received Store Request")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        self._log.close()


@pytest.fixture
def store_scp(tmp_path) -> Iterator[StoreScp]:
    server = StoreScp(tmp_path / "delivered")
    yield server
    server.stop()


def send(port: int, files: list[Path]) -> int:
    """How many of the files storescu was told are stored, in their order."""
    done = subprocess.run(
        [program("storescu"), "-v", "-aec", "CHESTCT", "127.0.0.1", str(port), *files],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return (done.stdout + done.stderr).count("(Success)")


def test_kill_9_at_any_moment_loses_nothing_and_sends_nothing_twice(
    triton, store_scp, start_node, tmp_path
):
    """Killed while it receives, classifies and delivers; only what was acknowledged must count."""
    series = [write_series(tmp_path / f"series{number}", number, 3) for number in (2, 3, 4)]
    send_to = f"STORESCP@127.0.0.1:{store_scp.port}"
    moments = random.Random(7)
    num_kills = 0
    for files in series:
        left = files
        while left:
            node = start_node(triton.grpc_url, send_to, "--no-capture")
            left = left[send(node.port, left) :]
            time.sleep(moments.uniform(0.0, 5.0))
            node.stop(signal.SIGKILL)
            num_kills += 1
    node = start_node(triton.grpc_url, send_to, "--no-capture")
    until(lambda: not any(node.status().values()))
    assert node.stop() == 0
    reports = [dcmread(file) for file in store_scp.folder.iterdir()]
    assert {report.StudyInstanceUID for report in reports} == {
        f"1.2.826.0.1.88.{number}.1" for number in (2, 3, 4)
    }
    for report in reports:
        whole, _ = highdicom.sr.Comprehensive3DSR.from_dataset(
            report
        ).content.get_image_measurement_groups()
        assert len(whole.source_images) == 3
    assert len(reports) == 3
    # Between the peer's answer and our note of it a kill costs one more request of the same object.
    assert 3 <= store_scp.num_requests <= 3 + num_kills
    assert not any(secret in node.text() for secret in SECRETS)


def test_node_outlives_a_server_that_is_away(
    repository, triton_environment, study, store_scp, start_node
):
    grpc_port = free_port()
    node = start_node(
        f"grpc://127.0.0.1:{grpc_port}",
        f"STORESCP@127.0.0.1:{store_scp.port}",
        "--connect-timeout-s",
        "1",
    )
    assert send(node.port, study) == NUM_SLICES
    until(lambda: "Trying again" in node.text())
    assert node.status()["objects"] == NUM_SLICES
    with LocalTriton(
        repository, environment=triton_environment, grpc_port=grpc_port, exit_timeout_s=5
    ):
        until(lambda: len(list(store_scp.folder.iterdir())) == 2)
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
