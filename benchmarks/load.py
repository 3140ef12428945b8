"""Load on a server: requests in flight, and the counts of a window of time."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.engines import Infer, Scans
from benchmarks.layouts import Layout
from benchmarks.server import statistics_of
from chestct.client import ScanClient


@dataclass
class Cell:
    """Measurements of a layout at a concurrency, over all passes."""

    latency_ms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    scans: int = 0
    executions: int = 0
    client_cpu_s: float = 0.0

    def row(self, layout: Layout, concurrency: int) -> dict[str, Any]:
        """The row of the result file."""
        p50, p99 = (float(q) for q in np.percentile(self.latency_ms, [50, 99]))
        return {
            "variant": layout.variant,
            "instances": layout.instances,
            "threads": layout.threads,
            "dynamic_batching": layout.batching,
            "concurrency": concurrency,
            "n": sum(self.counts),
            "scans_per_s": round(sum(self.counts) / sum(self.seconds), 2),
            "scans_per_s_by_pass": [
                round(count / seconds, 2)
                for count, seconds in zip(self.counts, self.seconds, strict=True)
            ],
            "p50_ms": round(p50, 3),
            "p99_ms": round(p99, 3),
            "mean_batch": round(self.scans / max(self.executions, 1), 2),
            "client_cores": round(self.client_cpu_s / sum(self.seconds), 2),
        }


def seconds_of(infer: Infer, scans: Scans) -> float:
    """Seconds of one request of one scan, after an untimed one."""
    infer(scans[:1])
    started = time.perf_counter()
    infer(scans[:1])
    return time.perf_counter() - started


def load(
    client: ScanClient,
    scans: Scans,
    concurrency: int,
    *,
    warm_up_s: float,
    window_s: float,
    http_url: str,
    into: Cell,
) -> None:
    """Keep `concurrency` requests of one scan in flight, and add those of the window to a cell.

    A request counts if it is answered within the window; batches and CPU time are those between
    its ends.

    Raises:
        chestct.errors.ServerError: The first error of a worker.
    """
    answered: list[tuple[float, float]] = []  # when, and after how many ms
    errors: list[Exception] = []
    stop = threading.Event()

    def work(place: int) -> None:
        try:
            while not stop.is_set():
                started = time.perf_counter()
                client.infer(scans[place % len(scans)][np.newaxis], with_map=True)
                ended = time.perf_counter()
                answered.append((ended, 1000 * (ended - started)))
                place += concurrency
        except Exception as error:  # raised below, in the thread that waits
            errors.append(error)
            stop.set()

    workers = [threading.Thread(target=work, args=(place,)) for place in range(concurrency)]
    for worker in workers:
        worker.start()
    try:
        stop.wait(warm_up_s)
        before = statistics_of(http_url, client.model)
        began, cpu_s = time.perf_counter(), time.process_time()
        stop.wait(window_s)
        while not (stop.is_set() or any(when >= began for when, _ in answered)):
            stop.wait(0.1)  # a cell without an answer would have no latency
        ended, spent_s = time.perf_counter(), time.process_time() - cpu_s
        after = statistics_of(http_url, client.model)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
    inside = [ms for when, ms in answered if began <= when <= ended]
    into.latency_ms += inside
    into.counts.append(len(inside))
    into.seconds.append(ended - began)
    into.scans += after["scans"] - before["scans"]
    into.executions += after["executions"] - before["executions"]
    into.client_cpu_s += spent_s
