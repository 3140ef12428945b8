"""The whole way of a scan: files, thin client, real Triton, and the answers of Keras beside it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image, ImageOps

from chestct.client import AsyncScanClient, ScanClient
from chestct.contract import NOT_A_MEDICAL_DEVICE, ModelMetadata
from chestct.errors import ContractError, ServerUnavailableError
from chestct.imaging.prepare import load_scan
from chestct.imaging.sources import list_scans
from export.check.parity import Tolerance, compare
from export.check.runners import keras_runner, triton_runner
from export.publish.config_pbtxt import parsed_config
from export.publish.repository import write_repository
from export.publish.settings import RepositoryConfig
from tests.support.triton import serve
from tests.support.waiting import until
from training.common.atomic_io import sha256_of
from training.data.phantom import dicom_from_phantom, make_phantom, write_png
from training.network.vgg16 import load_trained

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("end-to-end")]
CHESTCT = Path(sys.executable).with_name("chestct")


@pytest.fixture(scope="module")
def repository(trained, exported, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    (folder / "parity.json").write_text(
        json.dumps({"holds": True, "onnx_sha256": sha256_of(exported)})
    )
    config = RepositoryConfig(
        exported, trained.model, folder / "parity.json", folder / "model_repository"
    )
    assert write_repository(config) == 1
    return config.repository


@pytest.fixture(scope="module")
def triton(repository, triton_environment):
    with serve(repository, triton_environment) as server:
        yield server


def run_chestct(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CHESTCT, *arguments],
        capture_output=True, text=True, timeout=180, **options,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_served_model_answers_as_the_trained_one(triton, trained, scan_batch, protocol):
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    with ScanClient(url) as client:
        report = compare(
            scan_batch,
            ("keras", keras_runner(load_trained(trained.model)[0])),
            (f"triton {protocol}", triton_runner(client)),
            Tolerance(),
        )
    assert report, report.describe()
    assert report.num_scans == len(scan_batch)


def test_client_reads_the_facts_from_the_server(triton, trained):
    stored = json.loads((trained.model / "facts.json").read_text())
    with ScanClient(triton.grpc_url) as client:
        assert client.metadata == ModelMetadata.from_parameters(stored)
        assert client.model_version == "1"
        assert client.max_batch_size == 32


def test_more_scans_than_a_batch_holds_come_back_in_order(triton, scan_batch):
    many = np.concatenate([scan_batch] * 3)
    with ScanClient(triton.grpc_url) as client:
        single = client.infer(scan_batch, with_map=True)
        got = client.infer(many, with_map=True)
    assert got.probabilities.shape == (36, 4)
    np.testing.assert_allclose(got.probabilities, np.tile(single.probabilities, (3, 1)), atol=1e-5)


def test_asyncio_client_gives_the_same_answers(triton, scan_batch):
    async def classify() -> np.ndarray:
        async with AsyncScanClient(triton.grpc_url) as client:
            answers = await asyncio.gather(
                *(client.infer(scan_batch[i : i + 3], with_map=True) for i in (0, 3))
            )
        return np.concatenate([answer.probabilities for answer in answers])

    with ScanClient(triton.http_url) as client:
        expected = client.infer(scan_batch[:6]).probabilities
    np.testing.assert_allclose(asyncio.run(classify()), expected, atol=1e-5)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_directory_with_bad_files_is_classified_to_the_end(triton, trained, tmp_path, protocol):
    """Every kind of broken file costs one error line, and exit code 1; the good ones are done."""
    scans = sorted(list_scans(trained.scans / "test"))
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.png").write_bytes(b"")
    (bad / "text.png").write_text("not a picture")
    (bad / "truncated.png").write_bytes(
        next(s for s in scans if s.suffix == ".png").read_bytes()[:900]
    )
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    done = run_chestct("classify", str(trained.scans / "test"), str(bad), "--url", url, "--json")
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if "num_slices" not in line]
    errors = {Path(x["path"]).name: x["error"]["type"] for x in lines if x["status"] == "error"}
    assert errors == dict.fromkeys(("empty.png", "text.png", "truncated.png"), "ScanDecodeError")
    good = {x["path"]: x for x in lines if x["status"] == "ok"}
    assert len(good) == len(scans) == 12
    model, facts = load_trained(trained.model)
    expected = model.predict_on_batch(np.stack([load_scan(Path(path)) for path in good]))
    for row, line in zip(expected["probabilities"], good.values(), strict=True):
        assert list(line["probabilities"]) == list(facts.class_names)
        np.testing.assert_allclose(list(line["probabilities"].values()), row, atol=1e-5)
        assert line["model"] == {"name": "chestct", "version": "1", "run": facts.run}
        assert set(line["ms"]) == {"decode", "infer"}
    assert "not a medical device" in done.stderr.lower()


def test_what_is_no_axial_chest_ct_is_refused_or_flagged(triton, trained, tmp_path):
    """Each with its reasons in words; those of the file come before that of the network."""
    phantom = make_phantom("normal", 5)
    write_png(phantom, tmp_path / "chest.png")
    with Image.open(tmp_path / "chest.png") as chest:
        ImageOps.colorize(chest.convert("L"), "blue", "yellow").save(tmp_path / "coloured.png")
    coronal = dicom_from_phantom(phantom)
    coronal.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    coronal.save_as(tmp_path / "coronal.dcm", enforce_file_format=True)
    done = run_chestct("classify", str(tmp_path), "--url", triton.grpc_url, "--json")
    assert done.returncode == 0, done.stderr
    lines = {Path(x["path"]).name: x for x in map(json.loads, done.stdout.splitlines())}
    assert lines["coronal.dcm"]["error"]["type"] == "OutOfDomainError"
    assert "the plane is coronal" in lines["coronal.dcm"]["error"]["message"]
    assert lines["coloured.png"]["in_domain"] is False
    assert lines["coloured.png"]["reasons"][0].startswith("coloured: ")
    threshold = load_trained(trained.model)[1].domain_threshold
    for name in ("chest.png", "coloured.png"):
        line = lines[name]
        said = [reason.partition(":")[0] for reason in line.get("reasons", [])]
        assert ("unlike the training scans" in said) == (line["domain_distance"] > threshold)
        assert line["in_domain"] is (said == [])
    assert {line["notice"] for line in lines.values()} == {NOT_A_MEDICAL_DEVICE}
    assert "1 skipped, no axial CT slice by the DICOM tags: 1 coronal" in done.stderr
    assert "1 coloured" in done.stderr


def test_health_is_a_real_inference(triton):
    done = run_chestct("health", "--url", triton.http_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("chestct version 1, run ")
    assert done.stdout.endswith(f"\n{NOT_A_MEDICAL_DEVICE}\n")


def test_resume_finishes_the_rest(triton, trained, tmp_path):
    output = tmp_path / "lines.jsonl"
    command = ["classify", str(trained.scans / "test"), "--url", triton.grpc_url]
    command += ["--output", str(output)]
    assert run_chestct(*command).returncode == 0
    whole = output.read_text().splitlines()
    output.write_text("\n".join(whole[:5]) + "\n" + whole[5][:20])  # torn in the sixth line
    done = run_chestct(*command, "--resume")
    assert done.returncode == 0, done.stderr
    paths = [json.loads(line)["path"] for line in output.read_text().splitlines()]
    assert paths == [json.loads(line)["path"] for line in whole]


def test_real_slices_of_hospitals_are_classified(triton, real_scans):
    folder = real_scans / "dicom" / "lung-pet-ct-dx"
    done = run_chestct("classify", str(folder), "--url", triton.grpc_url, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines() if "num_slices" not in line]
    assert done.returncode == 0, done.stderr
    assert len(lines) == 36
    assert {line["status"] for line in lines} == {"ok"}


def test_killed_backend_is_noticed_and_the_next_answer_is_right(repository, triton_environment):
    """Triton itself stays ready when its backend process dies; a real inference does not."""
    import threading

    stop = threading.Event()
    with serve(repository, triton_environment) as server:
        watcher = threading.Thread(target=server.watch, args=(stop,), kwargs={"period_s": 0.5})
        watcher.start()
        try:
            before = server.pid
            for stub in stub_processes(before):
                os.kill(stub, signal.SIGKILL)
            until(lambda: server.pid != before, "the restart")
            with ScanClient(server.grpc_url, connect_timeout_s=60) as client:
                assert client.infer(np.zeros((1, 224, 224, 1), np.uint8)).predicted_labels
        finally:
            stop.set()
            watcher.join(timeout=60)
    assert not watcher.is_alive()


def stub_processes(server: int) -> list[int]:
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    found = [int(child) for child in children]
    assert found, "Triton has no backend process"
    return found


def test_server_that_goes_away_ends_the_batch_with_exit_code_3(
    repository, triton_environment, trained, tmp_path
):
    """What was answered before is kept, whole line by whole line."""
    many = tmp_path / "many"
    many.mkdir()
    scan = next(list_scans(trained.scans / "test")).read_bytes()
    for number in range(400):
        (many / f"{number:04}.png").write_bytes(scan)
    output = tmp_path / "lines.jsonl"
    with serve(repository, triton_environment) as server:
        running = subprocess.Popen(
            [
                CHESTCT, "classify", str(many),
                "--url", server.grpc_url, "--output", str(output), "--patience-s", "0.5",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until(lambda: output.exists() and output.stat().st_size, "the first line")
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 3, said
    assert "Traceback" not in said
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert 0 < len(lines) < 400
    assert {line["status"] for line in lines} == {"ok"}


def test_no_server_is_exit_code_3_and_one_line(trained):
    done = run_chestct(
        "classify", str(trained.scans), "--url", "grpc://127.0.0.1:9", "--connect-timeout-s", "1"
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(ServerUnavailableError):
        ScanClient("grpc://127.0.0.1:9", connect_timeout_s=1).connect()


def test_model_with_another_contract_is_refused_before_a_pixel_is_sent(
    repository, triton_environment, tmp_path
):
    import shutil

    other = tmp_path / "repository"
    shutil.copytree(repository, other)
    config = other / "chestct" / "config.pbtxt"
    described = parsed_config(config.read_text())
    del described.parameters["training_run"]
    described.parameters["input_size"].string_value = "299"
    config.write_text(text_format.MessageToString(described))
    with (
        serve(other, triton_environment) as server,
        pytest.raises(
            ContractError, match=r"(?s)training_run.*input_size|input_size.*training_run"
        ),
    ):
        ScanClient(server.grpc_url).connect()
