"""The same run on a local Ray cluster of two decoders, one of which is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.local import LocalTriton

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.xdist_group("serving")]
COMMAND = [
    sys.executable,
    "-m",
    "chestct.cli",
    "classify",
]
NUM_FILES = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scans")
    noise = np.random.default_rng(0)
    for index in range(NUM_FILES):
        grey = noise.integers(0, 60, (120, 160)) + np.linspace(0, 150, 160)
        Image.fromarray(grey.astype(np.uint8)).save(root / f"{index:03}.png")
    (root / "150 torn.png").write_bytes((root / "000.png").read_bytes()[:900])
    return root


def rows_of(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def children_of(pid: int) -> list[int]:
    found = [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]
    return found + [grandchild for child in found for grandchild in children_of(child)]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def test_same_results_as_here_and_a_killed_decoder_is_survived(
    server: LocalTriton, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    command = [*COMMAND, str(folder), "--url", server.grpc_url, "--model", "whole"]
    command += ["--workers", "2", "--output"]
    done = subprocess.run(
        [*command, str(here)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1, done.stderr  # one file is broken
    process = subprocess.Popen(
        [*command, str(there), "--engine", "ray"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    killed = 0
    deadline = time.monotonic() + 200
    while not killed and process.poll() is None and time.monotonic() < deadline:
        for pid in children_of(process.pid):
            if "_Decoder" in _read(f"/proc/{pid}/cmdline"):
                os.kill(pid, signal.SIGKILL)
                killed = pid
                break
        time.sleep(0.05)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 1, errors
    assert killed
    assert not [pid for pid in children_of(os.getpid()) if "ray" in _read(f"/proc/{pid}/cmdline")]
    expected, found = rows_of(here), rows_of(there)
    assert [row["path"] for row in found] == [row["path"] for row in expected]
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"ms.decode", "ms.infer"}:
            if isinstance(one[key], float):
                assert other[key] == pytest.approx(one[key], rel=1e-6, abs=1e-6)
            else:
                assert other[key] == one[key]
