"""Whole files sent to the server: the same answers as the client's own decoding gives."""

from __future__ import annotations

import base64
import io
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from chestct.client import ScanClient
from chestct.contract import NOT_A_MEDICAL_DEVICE, OUTPUT_NAMES, ModelMetadata, Window
from chestct.errors import ScanDecodeError
from chestct.imaging.limits import DECODE_MEMORY_BYTES
from chestct.imaging.prepare import inspect_bytes, inspect_scan
from chestct.imaging.sources import list_scans
from export.publish.repository import write_encoded
from serving.local import LocalTriton
from tests.client.swelling import dicom_that_swells
from tests.support.triton import config_parameters, serve

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("encoded")]

CHECKOUT = Path(__file__).parents[2]
LIMIT_S = 30.0
# Not the default window: a step that read no parameters would give other numbers for DICOM.
FACTS = ModelMetadata(("a", "b", "größer"), Window(-300.0, 900.0), 1.0, 10.0, "run-7", "ab" * 32)


@pytest.fixture(scope="module")
def encoded(
    tmp_path_factory: pytest.TempPathFactory, environment: Path, write_model: Callable[..., Path]
) -> Iterator[LocalTriton]:
    """A server that has `chestct` and `chestct_encoded`."""
    repository = tmp_path_factory.mktemp("encoded")
    policy = "version_policy { specific { versions: [1] } }\n"
    write_model(repository, "chestct", policy + config_parameters(FACTS))
    write_encoded(repository)
    # Naming the ensemble alone loads its steps too.
    with serve(repository, environment, models=["chestct_encoded"]) as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, phantoms: Any) -> dict[str, Path]:
    """One slice as PNG, JPEG, DICOM and compressed DICOM, and a coloured picture."""
    from pydicom import dcmread
    from pydicom.uid import JPEG2000Lossless

    folder = tmp_path_factory.mktemp("files")
    paths = list(list_scans(phantoms.scans))
    found = {
        "png": next(path for path in paths if path.suffix == ".png"),
        "dicom": next(path for path in paths if path.suffix == ".dcm"),
    }
    grey = Image.open(found["png"])
    found["jpeg"] = folder / "slice.jpg"
    grey.convert("L").save(found["jpeg"], quality=90)
    found["coloured"] = folder / "coloured.png"
    gradient = np.linspace(0, 255, 128 * 128 * 3).reshape(3, 128, 128).transpose(1, 2, 0)
    Image.fromarray(gradient.astype(np.uint8)[:, :, [2, 0, 1]]).save(found["coloured"])
    dataset = dcmread(found["dicom"])
    dataset.compress(JPEG2000Lossless)
    found["jpeg 2000"] = folder / "compressed.dcm"
    dataset.save_as(found["jpeg 2000"])
    return found


def infer_grpc(server: LocalTriton, contents: list[bytes]) -> dict[str, np.ndarray]:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as client:
        tensor = tritonclient.grpc.InferInput("file", [len(contents), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(contents, dtype=object)[:, np.newaxis])
        answer = client.infer("chestct_encoded", [tensor], client_timeout=LIMIT_S)
        return {out.name: answer.as_numpy(out.name) for out in answer.get_response().outputs}


def infer_http(server: LocalTriton, contents: list[bytes]) -> dict[str, np.ndarray]:
    with tritonclient.http.InferenceServerClient(server.http_url.removeprefix("http://")) as client:
        tensor = tritonclient.http.InferInput("file", [len(contents), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(contents, dtype=object)[:, np.newaxis])
        answer = client.infer("chestct_encoded", [tensor])
        return {
            out["name"]: answer.as_numpy(out["name"]) for out in answer.get_response()["outputs"]
        }


@pytest.mark.parametrize("infer", [infer_grpc, infer_http])
def test_a_file_gives_the_numbers_of_the_clients_own_decoding(
    encoded: LocalTriton, files: dict[str, Path], infer: Any
) -> None:
    got = infer(encoded, [path.read_bytes() for path in files.values()])
    scans = [inspect_scan(path, FACTS.window) for path in files.values()]
    with ScanClient(encoded.grpc_url) as client:
        expected = client.infer(np.stack([scan.pixels for scan in scans]), with_map=True)
    for name in OUTPUT_NAMES:
        want = np.asarray(getattr(expected, name)).reshape(got[name].shape)
        np.testing.assert_array_equal(got[name], want, err_msg=name)
    assert [json.loads(row[0]) for row in got["reasons"]] == [list(s.reasons) for s in scans]
    assert any("coloured" in row[0].decode() for row in got["reasons"])
    assert [[item.decode() for item in row] for row in got["labels"]] == [
        list(FACTS.class_names)
    ] * 5
    assert got["domain_threshold"].ravel().tolist() == [FACTS.domain_threshold] * 5
    assert {row[0].decode() for row in got["notice"]} == {NOT_A_MEDICAL_DEVICE}


def test_the_window_of_the_model_shows_the_dicom_slice(files: dict[str, Path]) -> None:
    """The test above would not see a step that took the default window, if this were equal."""
    data = files["dicom"].read_bytes()
    shown = inspect_bytes(data, "slice", FACTS.window).pixels
    assert (shown != inspect_bytes(data, "slice").pixels).mean() > 0.1


def broken_files(files: dict[str, Path]) -> dict[str, bytes]:
    coronal = io.BytesIO()
    from pydicom import dcmread

    dataset = dcmread(files["dicom"])
    dataset.Modality = "MR"
    dataset.save_as(coronal)
    return {
        "empty": b"",
        "text": b"no picture at all, and no base64",
        "cut": files["png"].read_bytes()[:300],
        "other modality": coronal.getvalue(),
        "base64 of nothing": base64.b64encode(b"nothing"),
    }


@pytest.mark.parametrize("case", ["empty", "text", "cut", "other modality", "base64 of nothing"])
def test_bad_bytes_are_the_callers_error_in_the_clients_words(
    encoded: LocalTriton, files: dict[str, Path], case: str
) -> None:
    data = broken_files(files)[case]
    plain = b"nothing" if case == "base64 of nothing" else data
    with pytest.raises(ScanDecodeError) as expected:
        inspect_bytes(plain, "file", FACTS.window)
    message = f"{expected.type.__name__}: {expected.value}"
    for infer, status in ((infer_grpc, "StatusCode.INVALID_ARGUMENT"), (infer_http, "400")):
        with pytest.raises(InferenceServerException) as refused:
            infer(encoded, [data])
        assert message in refused.value.message()
        assert refused.value.status() == status


def test_a_bad_file_among_others_is_named_and_costs_no_other_request(
    encoded: LocalTriton, files: dict[str, Path]
) -> None:
    good = files["png"].read_bytes()
    with pytest.raises(InferenceServerException, match=r"ScanDecodeError: file 2 of 3: the file"):
        infer_grpc(encoded, [good, b"", good])
    assert infer_grpc(encoded, [good])["probabilities"].shape == (1, 3)
    assert encoded.check() == []


def test_a_file_that_swells_in_memory_is_the_callers_error(
    encoded: LocalTriton, files: dict[str, Path]
) -> None:
    good = files["png"].read_bytes()
    pids = steps_of(encoded)
    assert pids
    for pid in pids:
        assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == DECODE_MEMORY_BYTES
        # Less than it is allowed, so that a file of 8 MB, and not one of 50, is too much.
        status = Path(f"/proc/{pid}/status").read_text()
        now = int(re.findall(r"VmSize:\s+(\d+) kB", status)[0]) * 1024
        resource.prlimit(pid, resource.RLIMIT_AS, (now + 100 * 2**20, DECODE_MEMORY_BYTES))
    try:
        with pytest.raises(InferenceServerException, match="needs more memory") as refused:
            infer_grpc(encoded, [dicom_that_swells(1_000_000)])
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert infer_grpc(encoded, [good])["probabilities"].shape == (1, 3)
    finally:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_AS, (DECODE_MEMORY_BYTES,) * 2)


def steps_of(server: LocalTriton) -> list[int]:
    """The processes of a server that run the decoding step."""
    children = (path.read_text() for path in Path("/proc").glob(f"{server.pid}/task/*/children"))
    pids = [int(pid) for text in children for pid in text.split()]
    return [pid for pid in pids if b"chestct_scan" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def curl_commands() -> list[str]:
    """The `curl` commands of the README that send a file."""
    text = (CHECKOUT / "README.md").read_text().replace("\\\n", " ")
    return [line for line in re.findall(r"^.*curl.*$", text, re.MULTILINE) if "generate" in line]


@pytest.mark.parametrize("kind", ["png", "jpeg", "dicom"])
def test_the_curl_command_of_the_readme_classifies_a_file(
    encoded: LocalTriton, files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    shutil.copy(files[kind], tmp_path / "slice.dcm")
    (command,) = curl_commands()
    done = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8000", encoded.http_url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    answer = json.loads(done.stdout)
    expected = infer_grpc(encoded, [files[kind].read_bytes()])
    np.testing.assert_allclose(answer["probabilities"], expected["probabilities"][0], rtol=1e-6)
    assert answer["labels"] == list(FACTS.class_names)
    assert answer["notice"] == NOT_A_MEDICAL_DEVICE
    assert json.loads(answer["reasons"]) == json.loads(expected["reasons"][0, 0])
