"""Batches against real servers: killed clients, killed servers, and nothing lost or done twice."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.local import LocalTriton
from tests.support.triton import serve
from tests.support.waiting import until
from training.data.phantom import dicom_from_phantom, make_phantom

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("serving")]
COMMAND = [
    sys.executable,
    "-m",
    "chestct.cli",
    "classify",
]
NUM_PICTURES, NUM_SLICES = 90, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, two series of slices in folders among them, and three files that are broken."""
    root = tmp_path_factory.mktemp("scans")
    noise = np.random.default_rng(0)
    for index in range(NUM_PICTURES):
        grey = noise.integers(0, 60, (120, 160)) + np.linspace(0, 150, 160)
        Image.fromarray(grey.astype(np.uint8)).save(root / f"{index:03}.png")
    for series in (1, 2):
        inside = root / f"{30 * series:03} series"
        inside.mkdir()
        for index in range(NUM_SLICES // 2):
            dataset = dicom_from_phantom(make_phantom("normal", 10 * series + index, size=128))
            dataset.SeriesInstanceUID = f"1.2.3.{series}"
            dataset.ImagePositionPatient = [0, 0, 5.0 * index]
            dataset.save_as(inside / f"{index}.dcm", enforce_file_format=True)
    for index in (10, 40, 80):
        (root / f"{index:03} torn.png").write_bytes((root / "000.png").read_bytes()[:900])
    return root


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole_lines(path: Path) -> int:
    """How many lines are whole; each of these can be read, and only the last may be torn."""
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]
    for line in lines:
        if path.suffix != ".csv":
            json.loads(line)
        else:
            next(csv.reader([line.decode()], strict=True))
    return len(lines)


def assert_everything_once(path: Path, folder: Path) -> None:
    rows = rows_of(path)
    slices = Counter(row["path"] for row in rows if not row.get("num_slices"))
    expected = {str(file) for file in folder.rglob("*") if file.is_file()}
    assert set(slices) == expected
    assert set(slices.values()) == {1}
    series = Counter(row["path"] for row in rows if row.get("num_slices"))
    assert series == dict.fromkeys(map(str, folder.glob("* series")), 1)
    assert {int(row["num_slices"]) for row in rows if row.get("num_slices")} == {NUM_SLICES // 2}


@pytest.mark.parametrize(
    "suffix",
    ["jsonl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("csv", "parquet"))],
)
def test_killed_again_and_again_nothing_is_lost_or_done_twice(
    server: LocalTriton, folder: Path, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"out.{suffix}"
    written = tmp_path / f"out.{suffix}.journal" if suffix == "parquet" else output
    command = [*COMMAND, str(folder), "--url", server.grpc_url, "--model", "whole"]
    command += ["--batch-size", "1", "--output", str(output)]
    for num_new in (1, 5, 20):
        before = whole_lines(written)
        with subprocess.Popen(
            [*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            until(
                lambda before=before, new=num_new: whole_lines(written) >= before + new,
                f"{num_new} more lines",
            )
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert before + num_new <= whole_lines(written) < NUM_PICTURES + NUM_SLICES
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 1, done.stderr  # three files are broken
    assert_everything_once(output, folder)
    assert sorted(os.listdir(tmp_path)) == [f"out.{suffix}"]


@pytest.fixture
def two_servers(repository: Path, environment: Path) -> Iterator[list[LocalTriton]]:
    with (
        serve(repository, environment, models=("whole",)) as first,
        serve(repository, environment, models=("whole",)) as second,
    ):
        yield [first, second]


def test_one_of_two_servers_is_killed(
    two_servers: list[LocalTriton], folder: Path, tmp_path: Path
) -> None:
    """The other one does the rest; then both are gone, and the run ends with what is done."""
    output = tmp_path / "out.jsonl"
    command = [*COMMAND, str(folder), "--model", "whole", "--batch-size", "1"]
    command += [part for server in two_servers for part in ("--url", server.grpc_url)]
    command += ["--output", str(output)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: whole_lines(output) >= 5, "the first lines")
        os.kill(two_servers[1].pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=180)
    assert process.returncode == 1, errors  # three files are broken
    assert_everything_once(output, folder)
    os.kill(two_servers[0].pid, signal.SIGKILL)
    again = tmp_path / "again.jsonl"
    options = ["--connect-timeout-s", "2", "--output", str(again)]
    done = subprocess.run(
        [*command[:-2], *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3
    assert not again.exists()


def test_a_restart_of_the_only_server_does_not_end_the_batch(
    repository: Path, environment: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    with serve(repository, environment, models=("whole",)) as server:
        command = [*COMMAND, str(folder), "--model", "whole", "--batch-size", "1"]
        command += ["--url", server.grpc_url, "--output", str(output)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            until(lambda: whole_lines(output) >= 5, "the first lines")
            os.kill(server.pid, signal.SIGKILL)
            before = whole_lines(output)
            server.restart()
            _, errors = process.communicate(timeout=180)
    assert before < NUM_PICTURES
    assert process.returncode == 1, errors  # three files are broken
    assert "healthy again" in errors
    assert_everything_once(output, folder)


def test_watching_goes_on_over_a_restart(
    repository: Path, environment: Path, folder: Path, tmp_path: Path
) -> None:
    """Files come while the server is away; nothing ends, and nothing is lost."""
    output, incoming = tmp_path / "out.jsonl", tmp_path / "incoming"
    incoming.mkdir()
    shutil.copy(folder / "000.png", incoming)
    with serve(repository, environment, models=("whole",)) as server:
        command = [*COMMAND, str(incoming), "--watch", "--settle-s", "0.2", "--model", "whole"]
        command += ["--url", server.grpc_url, "--output", str(output)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            until(lambda: whole_lines(output) == 1, "the first line")
            os.kill(server.pid, signal.SIGKILL)
            for index in range(1, 4):
                shutil.copy(folder / f"{index:03}.png", incoming)
            time.sleep(2)
            assert process.poll() is None
            server.restart()
            until(lambda: whole_lines(output) == 4, "the lines of the other files")
            process.terminate()
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert {row["status"] for row in rows_of(output)} == {"ok"}


def test_slow_and_fast_way_give_the_same_answers(
    server: LocalTriton, folder: Path, tmp_path: Path
) -> None:
    """One worker and scans one by one, or processes and full batches."""
    answers = []
    for options in (
        ["--batch-size", "1", "--workers", "1"],
        ["--batch-size", "8", "--workers", "2", "--isolate"],
    ):
        command = [*COMMAND, str(folder), "--json", "--url", server.grpc_url, "--model", "whole"]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 1, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        answers.append([(line["path"], line.get("probabilities")) for line in lines])
    assert [path for path, _ in answers[0]] == [path for path, _ in answers[1]]
    for (_, one), (_, other) in zip(*answers, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(list(one.values()), list(other.values()), atol=1e-6)
