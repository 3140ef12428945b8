"""Every example runs against a real Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from chestct.contract import LUNG_WINDOW, ModelMetadata
from export.publish.repository import write_encoded
from serving.local import LocalTriton
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.triton import LABELS, config_parameters, serve
from tests.support.waiting import until
from training.data.phantom import dicom_from_phantom, make_phantom

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("examples")]
EXAMPLES = Path(__file__).parents[2] / "examples"
FACTS = ModelMetadata(LABELS, LUNG_WINDOW, 1.0, 1000.0, "run-7", "ab" * 32)
NUM_SLICES = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory, triton_environment, write_model) -> Iterator[LocalTriton]:
    repository = tmp_path_factory.mktemp("repository")
    policy = "version_policy { specific { versions: [1] } }\n"
    extra = policy + config_parameters(FACTS)
    write_model(repository, "chestct", extra, num_labels=len(LABELS))
    write_encoded(repository)
    with serve(repository, triton_environment, models=["chestct_encoded"]) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A series of slices, and a file that is broken."""
    root = tmp_path_factory.mktemp("scans")
    for index in range(NUM_SLICES):
        dataset = dicom_from_phantom(make_phantom("normal", index, size=128))
        dataset.PatientID, dataset.StudyInstanceUID = "1", "1.2.2"
        dataset.SeriesInstanceUID = "1.2.3"
        dataset.ImagePositionPatient = [0, 0, 5.0 * index]
        dataset.save_as(root / f"{index}.dcm", enforce_file_format=True)
    (root / "torn.dcm").write_bytes((root / "0.dcm").read_bytes()[:900])
    return root


def run(*command: object) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["sync.py", "async.py"])
def test_a_folder(server: LocalTriton, folder: Path, name: str) -> None:
    lines = run(sys.executable, EXAMPLES / name, folder, server.grpc_url).splitlines()
    of_files = [line.split(" ", 2) for line in lines if line.startswith(str(folder))]
    assert {line[0] for line in of_files} == {str(path) for path in folder.iterdir()}
    for path, label, *_ in of_files:
        assert (label == "ERROR") if path.endswith("torn.dcm") else label in LABELS


def test_curl(server: LocalTriton, folder: Path) -> None:
    answer = json.loads(run(EXAMPLES / "curl.sh", folder / "0.dcm", server.http_url))
    assert answer["labels"] == list(LABELS)
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_fastapi(server: LocalTriton, folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "fastapi_app:app"]

    def post(path: Path) -> dict:
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.dcm"\r\n\r\n'
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/classify",
            head + path.read_bytes() + b"\r\n--x--\r\n",
            {"Content-Type": "multipart/form-data; boundary=x"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def answers() -> bool:
        assert process.poll() is None
        try:
            return bool(post(folder / "0.dcm"))
        except urllib.error.HTTPError:
            raise
        except OSError:
            return False

    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | {"CHESTCT_URL": server.grpc_url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            until(answers, "the service")
            record = post(folder / "1.dcm")
            assert (record["path"], record["status"]) == ("a.dcm", "ok")
            with pytest.raises(urllib.error.HTTPError, match="422"):
                post(folder / "torn.dcm")
        finally:
            process.terminate()


def test_orthanc(server: LocalTriton, folder: Path, tmp_path: Path) -> None:
    orthanc = Orthanc(tmp_path / "orthanc")
    try:
        for path in sorted(folder.glob("[0-9].dcm")):
            orthanc.post("/instances", path.read_bytes())
        url = f"http://127.0.0.1:{orthanc.http_port}"
        (line,) = run(sys.executable, EXAMPLES / "orthanc.py", url, server.grpc_url).splitlines()
    finally:
        orthanc.stop()
    record = json.loads(line)
    assert (record["status"], record["num_slices"], record["num_failed"]) == ("ok", NUM_SLICES, 0)
    assert record["label"] in LABELS


def test_every_example_is_run_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    text = Path(__file__).read_text()
    assert names == {name for name in names if name.removesuffix(".py") in text}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}`" in listed for name in names)
