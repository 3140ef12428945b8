"""Interleaved rounds: every subject is timed once a round, in random order."""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.engines import Infer, Scans
from benchmarks.server import statistics_after, statistics_of
from benchmarks.variants import median_interval

logger = logging.getLogger(__name__)

PAUSE_S = 0.02  # idle worker threads of the engine before spin for a few milliseconds
MOST_REPEATS = 12
TURN_MS = 120.0  # the timed requests of a turn take up to about this long, if they are several
METHOD = (
    "interleaved rounds in random order; a turn is one to twelve untimed requests, the faster the "
    "more, and then as many timed ones; times are of one request; Triton's share is the median "
    "over rounds of the difference to the same engine in-process in the same round"
)


@dataclass(frozen=True)
class Subject:
    """An engine or server that is timed.

    Attributes:
        engine: `keras_predict`, `openvino`, `triton_grpc`, ...
        variant: Name of the variant.
        infer: Answers one request.
        runs_on: For Triton, the engine inside it; else the engine itself.
        model: For Triton, the name of the model.
    """

    engine: str
    variant: str
    infer: Infer
    runs_on: str
    model: str | None = None


@dataclass
class Timing:
    """Times of one subject at one batch size, in milliseconds a request.

    `rounds` holds the timed requests of each round. `server_ms` holds, for a server and each
    round, the time of a request in the queue, in computing, and the rest: the wire, with what
    client and server do to put tensors on it.
    """

    rounds: list[list[float]] = field(default_factory=list)
    server_ms: list[dict[str, float]] = field(default_factory=list)

    def row(self, batch: int, decode_ms: float) -> dict[str, Any]:
        """The times of a row; parts that the engine does not have are left out."""
        times = [ms for turn in self.rounds for ms in turn]
        p50, p90, p99 = (float(q) for q in np.percentile(times, [50, 90, 99]))
        parts = {"decode": decode_ms * batch}
        if self.server_ms:
            for part in ("wire", "queue", "compute"):
                parts[part] = statistics.median(item[part] for item in self.server_ms)
        return {
            "n": len(times),
            "p50_ms": round(p50, 3),
            "p90_ms": round(p90, 3),
            "p99_ms": round(p99, 3),
            "min_ms": round(min(times), 3),
            "scans_per_s": round(1000 * batch / p50, 2),
            "parts_ms": {part: round(value, 3) for part, value in parts.items()},
        }


def share_of_server(served: Timing, in_process: Timing) -> dict[str, dict[str, float]]:
    """Overhead of a server over its engine, `ms` and `percent`, medians with 95 % intervals.

    Paired by round: both answered the same scans within the same seconds, so a slow moment of the
    machine cancels out, as it would not between two medians.
    """
    pairs = [
        (statistics.median(over), statistics.median(under))
        for over, under in zip(served.rounds, in_process.rounds, strict=True)
    ]
    return {
        "ms": median_interval([over - under for over, under in pairs]),
        "percent": median_interval([100 * (over / under - 1) for over, under in pairs]),
    }


def run_rounds(
    subjects: Sequence[Subject],
    scans: Scans,
    batch: int,
    *,
    rounds: int,
    limit_s: float,
    seed: int,
    http_url: str = "",
) -> list[Timing]:
    """The timings of each subject, in the order of `subjects`.

    In every round each subject gets a turn on the same scans, so that a slow moment of the machine
    falls on all of them.

    Args:
        subjects: Timed in turn.
        scans: uint8 (N, 224, 224, 1), sent round after round.
        batch: Scans in a request.
        rounds: Most rounds.
        limit_s: No further round begins after so many seconds.
        seed: Of the order.
        http_url: Address of the server, for subjects that have a model.

    Raises:
        ValueError: Another client uses the server meanwhile.
        chestct.errors.ChestCTError: The server fails.
    """
    order = random.Random(seed)
    timings = [Timing() for _ in subjects]
    repeats = [_repeats(subject, scans[:batch]) for subject in subjects]
    deadline = time.monotonic() + limit_s
    for number in tqdm(range(rounds), f"rounds of batch {batch}", disable=None):
        chosen = np.take(scans, range(number * batch, (number + 1) * batch), axis=0, mode="wrap")
        for place in order.sample(range(len(subjects)), len(subjects)):
            _turn(subjects[place], timings[place], chosen, repeats[place], http_url)
        if time.monotonic() > deadline:
            logger.info("batch %d: %d of %d rounds, limit_s is over", batch, number + 1, rounds)
            break
    return timings


def _repeats(subject: Subject, scans: Scans) -> int:
    subject.infer(scans)
    started = time.perf_counter()
    subject.infer(scans)
    elapsed_ms = 1000 * (time.perf_counter() - started)
    return max(1, min(MOST_REPEATS, int(TURN_MS / elapsed_ms)))


def _turn(subject: Subject, timing: Timing, scans: Scans, repeats: int, http_url: str) -> None:
    model = subject.model
    untouched = statistics_of(http_url, model) if model else None
    for _ in range(repeats):  # the caches are another subject's
        subject.infer(scans)
    before = statistics_after(http_url, model, untouched, repeats) if model and untouched else None
    times = []
    for _ in range(repeats):
        started = time.perf_counter_ns()
        subject.infer(scans)
        times.append((time.perf_counter_ns() - started) / 1e6)
    timing.rounds.append(times)
    if model and before:
        after = statistics_after(http_url, model, before, repeats)
        parts = {
            part: (after[f"{part}_ns"] - before[f"{part}_ns"]) / 1e6 / repeats
            for part in ("queue", "compute")
        }
        parts["wire"] = statistics.mean(times) - sum(parts.values())
        timing.server_ms.append(parts)
    time.sleep(PAUSE_S)
