"""The CPU is the default of the local server, on a machine with an NVIDIA driver too."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chestct.client import ScanClient
from chestct.contract import LUNG_WINDOW, SCAN_SHAPE, ModelMetadata
from serving.local import LocalTriton, uses_gpu

PROVIDER = "lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Puts an `nvidia-smi` on PATH that ends with a code, and notes that it was called."""

    def install(code: int) -> Path:
        folder = tmp_path / "driver"
        folder.mkdir()
        program = folder / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\necho \"$@\" >> '{folder}/calls'\n"
            f"echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\nexit {code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return folder / "calls"

    return install


def environ_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def backend_processes(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.parametrize(
    ("device", "built_for_cuda", "code", "expected"),
    [
        ("gpu", True, 0, True),
        ("gpu", True, 9, False),
        ("gpu", False, 0, False),
        ("cpu", True, 0, False),
        (None, True, 0, False),
    ],
)
def test_gpu_is_used_only_if_asked_for_and_usable(
    device, built_for_cuda, code, expected, driver, tmp_path, monkeypatch
):
    driver(code)
    if built_for_cuda:
        (tmp_path / PROVIDER).parent.mkdir(parents=True)
        (tmp_path / PROVIDER).touch()
    if device is None:
        monkeypatch.delenv("DEVICE", raising=False)
    else:
        monkeypatch.setenv("DEVICE", device)
    assert uses_gpu(tmp_path) is expected


@pytest.mark.server
@pytest.mark.parametrize("device", [None, "gpu"])
def test_gpu_is_hidden_from_the_server_and_its_backends(
    device, driver, write_model, triton_environment, tmp_path, monkeypatch, caplog
):
    """In a folder, and with temporary files, whose names hold spaces and umlauts."""
    driver(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("DEVICE", raising=False)
    if device:
        monkeypatch.setenv("DEVICE", device)
    folder = tmp_path / "Prüf stand" / "ct demo"
    (folder / "tmp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    (folder / ".venv-triton").symlink_to(triton_environment)
    facts = ModelMetadata(("a", "b", "c"), LUNG_WINDOW, 1.0, 10.0, "run-7", "ab" * 32)
    parameters = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}\n'
        for key, value in facts.to_parameters().items()
    )
    kind = "instance_group [{ kind: KIND_AUTO }]\n"  # as `export repository` writes it
    write_model(folder / "model repository", "chestct", kind + parameters)
    repository, environment = folder / "model repository", folder / ".venv-triton"
    server = LocalTriton(repository, environment=environment, ready_timeout_s=30)
    with caplog.at_level(logging.WARNING, "serving.local"), server:
        pids = backend_processes(server.pid)
        assert pids
        for pid in (server.pid, *pids):
            assert environ_of(pid)["CUDA_VISIBLE_DEVICES"] == "-1"
        with ScanClient(server.grpc_url) as client:
            answer = client.infer(np.zeros((1, *SCAN_SHAPE), np.uint8), with_map=True)
        assert answer.run == "run-7"
    assert ("models are served on the CPU" in caplog.text) == (device == "gpu")


def test_driver_that_hangs_counts_as_none(driver, tmp_path, monkeypatch):
    driver(0)
    (tmp_path / "driver" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setenv("DEVICE", "gpu")
    (tmp_path / PROVIDER).parent.mkdir(parents=True)
    (tmp_path / PROVIDER).touch()
    monkeypatch.setattr("serving.local.installation.DRIVER_TIMEOUT_S", 0.2)
    assert uses_gpu(tmp_path) is False
