"""NVIDIA's perf_analyzer on a running server: a load from C++, where ours is from Python."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS_US = {
    "queue": ("Server Queue",),
    "compute": ("Server Compute Input", "Server Compute Infer", "Server Compute Output"),
}
# A window ends with its requests, not with the clock, so that it fits a model of 4 ms and one of
# 140 ms, alone or behind fifteen others. 50 requests are perf_analyzer's own default.
LEAST_REQUESTS = 50
REQUESTS_OF_EACH = 4  # whole batches of 8 would have the say at the edges of a shorter window
MOST_WINDOWS = 6
STABLE_WITHIN_PERCENT = 25  # of latency and throughput in three windows; other work disturbs them
UNSTABLE = 2  # exit code where no three windows agree, and then nothing is written
TIMEOUT_S = 600.0


def find_perf_analyzer() -> list[str] | None:
    """The command that starts perf_analyzer: the words of `PERF_ANALYZER`, or the one on PATH.

    The variable may hold a loader in front, for systems with an older C library than it wants.
    None where there is no command that answers `--version` as perf_analyzer does: pip installs an
    empty placeholder of that name where the wheel does not fit.
    """
    named = os.environ.get("PERF_ANALYZER")
    command = shlex.split(named) if named else [shutil.which("perf_analyzer") or ""]
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return command if "Perf Analyzer" in done.stdout + done.stderr else None


def perf_analyzer_rows(
    command: Sequence[str], grpc_url: str, model: str, concurrency: Sequence[int]
) -> list[dict[str, Any]]:
    """One row for each concurrency, over gRPC, one scan a request, in the manner of our own rows.

    Where three windows never agree the row says `stable` false and holds no figures.

    Args:
        command: From `find_perf_analyzer`.
        grpc_url: Address of the server, `grpc://HOST:PORT`.
        model: Name of the model.
        concurrency: Requests in flight.

    Raises:
        ValueError: perf_analyzer failed, or took over ten minutes for one concurrency.
    """
    return [_row(command, grpc_url, model, number) for number in concurrency]


def _row(command: Sequence[str], grpc_url: str, model: str, concurrency: int) -> dict[str, Any]:
    about = {"model": model, "concurrency": concurrency}
    requests = max(LEAST_REQUESTS, REQUESTS_OF_EACH * concurrency)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        options = (
            f"-m {model} -u {grpc_url.removeprefix('grpc://')} -i grpc -b 1 "
            f"--concurrency-range {concurrency}:{concurrency} --measurement-mode count_windows "
            f"--measurement-request-count {requests} -r {MOST_WINDOWS} -s {STABLE_WITHIN_PERCENT} "
            f"-f {table}"
        )
        try:
            done = subprocess.run(
                [*command, *shlex.split(options)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                # The server is on this machine: no proxy stands between.
                env={k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"perf_analyzer did not end within {TIMEOUT_S:g} s at concurrency {concurrency}"
            ) from error
        if done.returncode == UNSTABLE:
            return about | {"stable": False}
        if done.returncode or not table.is_file():
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            raise ValueError(f"perf_analyzer exited with {done.returncode}: {said}")
        (row,) = rows_of_table(table.read_text())
        return about | {"stable": True} | row


def rows_of_table(text: str) -> list[dict[str, Any]]:
    """The rows of the CSV that perf_analyzer writes with `-f`; it tells times in microseconds.

    Raises:
        ValueError: A column is missing.
    """
    rows = []
    for line in csv.DictReader(text.splitlines()):
        try:
            rows.append(
                {
                    "concurrency": int(line["Concurrency"]),
                    "scans_per_s": round(float(line["Inferences/Second"]), 2),
                    "p50_ms": round(float(line["p50 latency"]) / 1000, 3),
                    "p99_ms": round(float(line["p99 latency"]) / 1000, 3),
                    "parts_ms": {
                        part: round(sum(float(line[name]) for name in names) / 1000, 3)
                        for part, names in PARTS_US.items()
                    },
                }
            )
        except KeyError as error:
            raise ValueError(
                f"perf_analyzer wrote no column {error}; it has {list(line)}"
            ) from error
    return rows
