"""The DICOM node against dcmtk: what it takes, what it refuses, what it sends, what it survives."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import ComprehensiveSRStorage, CTImageStorage, ExplicitVRLittleEndian

from chestct.errors import InferenceError, ReportError, ServerUnavailableError
from chestct.pacs import node as listen
from chestct.pacs.node import DicomNode, ListenConfig, Listener
from chestct.pacs.queue import spool_status
from tests.support.dcmtk import StoreScp, program
from tests.support.ports import free_port
from tests.support.waiting import until
from training.data.phantom import dicom_from_phantom, make_phantom

NAME = "SECRET^PATIENT"


@pytest.fixture(scope="session")
def phantom_series(tmp_path_factory) -> list[Path]:
    """Four slices of one series, 128 x 128, with a patient's name and ID."""
    folder = tmp_path_factory.mktemp("series")
    for index in range(4):
        dataset = dicom_from_phantom(make_phantom("normal", 5, size=128))
        dataset.PatientName, dataset.PatientID = NAME, "SECRET-ID"
        dataset.SOPInstanceUID = f"1.2.826.0.1.77.{index + 1}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = index + 1
        dataset.ImagePositionPatient[2] = 3 * index
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def answers() -> dict[str, bytes]:
    """Two objects to deliver; what they say does not matter here."""
    from io import BytesIO

    files = {}
    for name in ("sr", "sc"):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = ComprehensiveSRStorage, f"1.9.{len(name)}.1"
        dataset.SOPInstanceUID = {"sr": "1.9.1", "sc": "1.9.2"}[name]
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.9.3", "1.9.4"
        dataset.PatientName, dataset.PatientID, dataset.Modality = NAME, "SECRET-ID", "SR"
        buffer = BytesIO()
        from pydicom.dataset import FileMetaDataset

        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(buffer, enforce_file_format=True)
        files[name] = buffer.getvalue()
    return files


@pytest.fixture
def store_scp(tmp_path) -> Iterator[Callable[[], StoreScp]]:
    """Starts the peer that reports are sent to, always on the same port."""
    running: list[StoreScp] = []
    port = free_port()

    def start() -> StoreScp:
        running.append(StoreScp(tmp_path / "delivered", port))
        return running[-1]

    start.port = port
    yield start
    for server in running:
        server.stop()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(listen, "POLL_S", 0.02)
    monkeypatch.setattr(listen, "FIRST_PAUSE_S", 0.02)


@pytest.fixture
def config(tmp_path, store_scp) -> Callable[..., ListenConfig]:
    def make(**changes) -> ListenConfig:
        values = {
            "queue": tmp_path / "queue",
            "deliver_to": DicomNode("PACS", "127.0.0.1", store_scp.port),
            "port": 0,
            "at_release": True,  # a sender that stalls never splits its series
            "quiet_s": 3600.0,
            "longest_pause_s": 0.05,
        }
        return ListenConfig(**values | changes)

    return make


def send(port: int, *files: Path, caller: str = "SCANNER", options=()) -> str:
    """What went wrong, in storescu's words; empty when all was accepted. A700 ends it with 0xA7."""
    command = [program("storescu"), "-v", "-aet", caller, "-aec", "CHESTCT", *options]
    done = subprocess.run(
        [*command, "127.0.0.1", str(port), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode == 0xA7) == ("outofresources" in done.stderr.lower() and not options)
    said = (done.stdout + done.stderr).lower()
    return "" if done.returncode == 0 and said.count("(success)") == len(files) else said


def echo(port: int, caller: str = "SCANNER", called: str = "CHESTCT") -> bool:
    command = [program("echoscu"), "-aet", caller, "-aec", called, "127.0.0.1", str(port)]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def changed(source: Path, target: Path, **values) -> Path:
    dataset = dcmread(source)
    for keyword, value in values.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(target)
    return target


def test_echo_is_answered_to_those_on_the_list_who_name_the_node(config):
    with Listener(config(allowed=("SCANNER", "PACS")), lambda *_: None) as node:
        assert echo(node.port)
        assert echo(node.port, caller="PACS")
        assert not echo(node.port, caller="STRANGER")
        assert not echo(node.port, called="OTHER")
        assert node.counts["rejected associations"] == 2


def test_series_is_reported_once_complete_and_both_objects_arrive(
    config, store_scp, phantom_series, answers
):
    seen: list[set[str]] = []

    def report(files, _):
        seen.append({str(dcmread(file).SOPInstanceUID) for file in files})
        return answers

    peer = store_scp()
    with Listener(config(), report) as node:
        assert send(node.port, *phantom_series) == ""
        until(lambda: len(peer.files()) == 2)
        until(lambda: not any(spool_status(config().queue).values()))
    assert seen == [{f"1.2.826.0.1.77.{number}" for number in (1, 2, 3, 4)}]
    assert sorted(dcmread(file).SOPInstanceUID for file in peer.files()) == ["1.9.1", "1.9.2"]
    assert peer.num_requests == 2


def test_without_being_asked_for_release_completes_no_series_but_quiet_does(
    config, store_scp, phantom_series, answers
):
    """Of one object, which no stall of the sender can split."""
    peer = store_scp()
    with Listener(config(at_release=False, quiet_s=0.5), lambda *_: answers) as node:
        send(node.port, phantom_series[0])
        until(lambda: len(peer.files()) == 2)
    with Listener(config(at_release=False), lambda *_: answers) as node:
        send(node.port, phantom_series[1])
        until(lambda: not node._entity.active_associations, "the end of the association")
        assert node._spool.complete(config().quiet_s, at_release=False) is None
        assert node._spool.complete(config().quiet_s, at_release=True) is not None


def test_files_are_kept_if_asked_for(config, store_scp, phantom_series, answers):
    store_scp()
    with Listener(config(keep=True), lambda *_: answers) as node:
        send(node.port, *phantom_series)
        until(lambda: spool_status(config().queue)["kept"] == 1)
    kept = list(config().queue.glob("kept/*/*.dcm"))
    assert sorted(dcmread(file).InstanceNumber for file in kept) == [1, 2, 3, 4]
    assert len(list(config().queue.glob("kept/*/results/*.sent"))) == 2


def test_what_is_no_ct_image_is_refused_before_it_is_sent(config, tmp_path, answers):
    (tmp_path / "sr.dcm").write_bytes(answers["sr"])
    with Listener(config(), lambda *_: None) as node:
        assert "no presentation context" in send(node.port, tmp_path / "sr.dcm")
        assert node.counts["received"] == 0


def test_what_is_no_ct_image_is_dropped_if_asked_for(config, tmp_path, answers, phantom_series):
    (tmp_path / "sr.dcm").write_bytes(answers["sr"])
    with Listener(config(ignore_others=True, at_release=False), lambda *_: None) as node:
        assert send(node.port, tmp_path / "sr.dcm", phantom_series[0]) == ""
        assert (node.counts["ignored"], node.counts["received"]) == (1, 1)
        assert spool_status(config().queue)["objects"] == 1


def test_object_above_the_limit_is_refused_with_a700(config, phantom_series):
    limit = phantom_series[0].stat().st_size - 1000
    with Listener(config(max_object_bytes=limit), lambda *_: None) as node:
        assert "refused: outofresources" in send(node.port, phantom_series[0])
        assert (node.counts["refused"], node.counts["received"]) == (1, 0)
        assert spool_status(config().queue)["bytes"] == 0


def test_object_far_above_the_limit_ends_the_association_and_the_next_is_taken(
    config, phantom_series, tmp_path
):
    large = changed(phantom_series[0], tmp_path / "large.dcm", PixelData=bytes(4 * 2**20))
    with Listener(config(max_object_bytes=100_000, at_release=False), lambda *_: None) as node:
        assert "abort" in send(node.port, large)
        assert send(node.port, phantom_series[0]) == ""
        assert node.counts["received"] == 1


def test_small_objects_never_add_up_to_a_large_one(config, phantom_series):
    size = phantom_series[0].stat().st_size
    with Listener(config(max_object_bytes=size, at_release=False), lambda *_: None) as node:
        assert send(node.port, *phantom_series * 15) == ""  # 2 MB, and 1 MB is the slack
        assert node.counts["received"] == 60


def test_full_queue_refuses_with_a700_and_takes_again_when_there_is_room(
    config, store_scp, phantom_series, answers
):
    size = phantom_series[0].stat().st_size
    ready: list[bool] = []

    def report(files, _):
        if not ready:
            raise ServerUnavailableError("away")
        return answers

    peer = store_scp()
    with Listener(config(max_queue_bytes=3 * size + 100), report) as node:
        said = send(node.port, *phantom_series, options=["--no-halt"])
        assert "refused: outofresources" in said
        assert node.counts["received"] == 3
        assert send(node.port, phantom_series[3]) != ""
        ready.append(True)
        until(lambda: len(peer.files()) == 2)
        until(lambda: spool_status(config().queue)["bytes"] == 0)
        assert send(node.port, phantom_series[3]) == ""


def test_disk_that_cannot_be_written_refuses_with_a700(config, phantom_series):
    with Listener(config(), lambda *_: None) as node:
        shutil.rmtree(config().queue / "tmp")
        assert "refused: outofresources" in send(node.port, phantom_series[0])
        (config().queue / "tmp").mkdir()
        assert send(node.port, phantom_series[0]) == ""


def test_object_that_is_another_than_announced_or_has_no_series_is_refused(
    config, phantom_series, tmp_path
):
    from pynetdicom import AE

    entity = AE()
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    without = dcmread(changed(phantom_series[0], tmp_path / "x.dcm", SeriesInstanceUID=None))
    with Listener(config(), lambda *_: None) as node:
        association = entity.associate("127.0.0.1", node.port, ae_title="CHESTCT")
        assert association.send_c_store(without).Status == 0xC000
        whole = dcmread(phantom_series[0])
        assert association.send_c_store(whole).Status == 0x0000
        association.release()
        assert (node.counts["refused"], node.counts["received"]) == (1, 1)


# pynetdicom drops the socket of a refused connection without closing it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_reports_wait_for_a_peer_that_is_away(config, store_scp, phantom_series, answers, caplog):
    with Listener(config(), lambda *_: answers) as node:
        send(node.port, *phantom_series)
        until(lambda: spool_status(config().queue)["unsent"] == 2)
        until(lambda: caplog.text.count("Trying again") >= 3, "tries in vain")
        assert spool_status(config().queue)["unsent"] == 2
        peer = store_scp()
        until(lambda: len(peer.files()) == 2)
    assert peer.num_requests == 2


def test_series_wait_for_a_server_that_is_away_and_no_try_counts(
    config, store_scp, phantom_series, answers
):
    calls: list[int] = []

    def report(files, _):
        calls.append(len(files))
        if len(calls) <= 7:
            raise ServerUnavailableError("away")
        return answers

    peer = store_scp()
    with Listener(config(), report) as node:
        send(node.port, *phantom_series)
        until(lambda: len(peer.files()) == 2)
        assert node.counts["failed"] == 0
    assert calls == [4] * 8


def test_series_that_the_server_refuses_again_and_again_is_given_up(
    config, phantom_series, answers
):
    def report(files, _):
        raise InferenceError("no")

    with Listener(config(), report) as node:
        send(node.port, *phantom_series)
        until(lambda: spool_status(config().queue)["failed"] == 1)
        until(lambda: node.counts["failed"] == 1)
    (reason,) = config().queue.glob("failed/*/reason.txt")
    assert "after 5 tries" in reason.read_text()


@pytest.mark.parametrize("error", [ReportError("no StudyInstanceUID"), KeyError(NAME)])
def test_series_that_cannot_be_reported_is_put_aside_and_the_next_goes_on(
    config, store_scp, phantom_series, answers, tmp_path, error, caplog
):
    caplog.set_level(logging.INFO)
    other = changed(phantom_series[0], tmp_path / "other.dcm", SeriesInstanceUID="1.2.3.99")

    def report(files, _):
        if len(files) > 1:
            raise error
        return answers

    peer = store_scp()
    with Listener(config(), report) as node:
        send(node.port, *phantom_series)
        send(node.port, other)
        until(lambda: len(peer.files()) == 2)
        until(lambda: spool_status(config().queue)["failed"] == 1)
        until(lambda: node.counts["failed"] == 1)
    assert len(list(config().queue.glob("failed/*/*.dcm"))) == 4
    assert "SECRET" not in caplog.text


def test_series_with_nothing_to_report_on_leaves_nothing_behind(config, phantom_series):
    with Listener(config(), lambda *_: None) as node:
        send(node.port, *phantom_series)
        until(lambda: node.counts["skipped"] == 1)
    assert not any(spool_status(config().queue).values())


def test_stop_lets_an_open_association_finish_and_the_next_start_goes_on(
    config, store_scp, phantom_series, answers
):
    peer = store_scp()
    node = Listener(config(at_release=False), lambda *_: answers)
    node.start()
    send(node.port, *phantom_series)
    node.stop()
    assert spool_status(config().queue)["objects"] == 4
    with Listener(config(at_release=False, quiet_s=0.1), lambda *_: answers):
        until(lambda: len(peer.files()) == 2)


def test_log_has_no_patient_and_no_uid(config, store_scp, phantom_series, answers, caplog):
    caplog.set_level(logging.DEBUG, "chestct")
    peer = store_scp()
    with Listener(config(), lambda *_: answers) as node:
        send(node.port, *phantom_series)
        until(lambda: len(peer.files()) == 2)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("chestct")]
    assert any("classified, 4 objects" in line for line in ours)
    series = str(dcmread(phantom_series[0]).SeriesInstanceUID)
    assert not any("SECRET" in line or series in line or "1.2.826" in line for line in ours)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"host": "0.0.0.0"}, "--allow"),
        ({"ae_title": "SEVENTEEN-LETTERS"}, "AE title"),
        ({"ae_title": "A\\B"}, "AE title"),
        ({"allowed": ("",)}, "AE title"),
        ({"port": 70000}, "port 70000"),
        ({"quiet_s": 0.0}, "quiet_s"),
    ],
)
def test_configuration_that_cannot_work_is_refused(config, changes, expected):
    with pytest.raises(ValueError, match=expected):
        config(**changes)


def test_node_is_read_from_text():
    assert DicomNode.from_text("PACS@127.0.0.1:104") == DicomNode("PACS", "127.0.0.1", 104)
    assert DicomNode.from_text("PACS@[::1]:104").host == "::1"
    for wrong in ("PACS", "127.0.0.1:104", "PACS@host", "PACS@host:x", "@h:1", "P@h:70000"):
        with pytest.raises(ValueError, match=r"expected|AE title"):
            DicomNode.from_text(wrong)
