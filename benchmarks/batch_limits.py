"""`chestct classify` against the limits set by decoding alone and by the server alone."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.layouts import Layout, write_layouts
from benchmarks.variants import Variant, median_interval
from chestct.batch.decode_pool import DecodePool
from chestct.batch.pipeline import classify_sources
from chestct.imaging.prepare import Scan
from chestct.imaging.sources import Source
from chestct.inference.server_pool import ServerPool
from chestct.results.records import json_text
from serving.local import LocalTriton

TOGETHER, APART = "together", "apart"
PLACES = {
    TOGETHER: "decoding and server share all cores, so their times add up",
    APART: "the server on half of the cores, decoding and all else on the others",
}


def near_limits(
    variants: Sequence[Variant],
    paths: Sequence[Path],
    *,
    batch_size: int,
    passes: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """One row for each place and variant: decoding, server, both, in scans a second.

    `bound` is what the first two allow: where each has cores of its own the slower one, where they
    share them 1 / (1 / decoding + 1 / server). `part` is both over that bound, taken within each
    turn, so that a machine that is slower for a while is so for both sides of the ratio.

    Args:
        variants: Served ones.
        paths: Scan files.
        batch_size: Scans in a request.
        passes: How often each is measured, in turns; all figures are medians over turns.
        seconds: Of a pass at least, over the same files again and again: the longer, the less the
            first batch, before which no server has work, and the last one count.

    Raises:
        chestct.errors.ChestCTError: The server fails.
        serving.local.LocalTritonError: Triton does not start.
    """
    own = sorted(os.sched_getaffinity(0))
    half = len(own) // 2
    places = {TOGETHER: (set(own), set(own))}
    if half:
        places[APART] = (set(own[half:]), set(own[:half]))
    rows = []
    for place, (of_server, of_client) in places.items():
        layouts = {
            variant.name: Layout(variant.name, 1, len(of_server), batching=True)
            for variant in variants
        }
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_layouts(folder, {variant.name: variant for variant in variants}, layouts.values())
            with _only_on(of_server):
                server = stack.enter_context(LocalTriton(folder, ready_timeout_s=300))
            stack.enter_context(_only_on(of_client))
            for name, layout in tqdm(layouts.items(), f"batches, {place}", disable=None):
                with ServerPool([server.grpc_url], layout.model) as fleet:
                    turns = _turns(
                        fleet, [Source(path) for path in paths], batch_size, passes, seconds
                    )
                rows.append({"place": place, "variant": name} | _row(turns, place))
    return rows


@contextlib.contextmanager
def _only_on(allowed: Set[int]) -> Iterator[None]:
    """Restrict this thread, and threads and processes that it starts, to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _turns(
    fleet: ServerPool, sources: list[Source], batch_size: int, passes: int, seconds: float
) -> list[dict[str, float]]:
    """For each turn, scans a second of decoding, of the server, and of a batch that does both."""
    window = fleet.metadata.window
    with DecodePool(num_in_threads=0) as workers:

        def decode() -> list[Any]:
            futures = [workers.submit(source, window) for source in sources]
            return [each.scan.pixels for future in futures for each in future.result()
                    if isinstance(each.scan, Scan)]  # fmt: skip

        def serve() -> None:
            for answer in [fleet.submit(batch) for batch in batches]:
                answer.result()

        def batch() -> None:
            for record, _ in classify_sources(fleet, sources, workers, batch_size):
                json_text(record)

        def seconds_of(work: Any) -> float:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

        batches = _batches(decode(), batch_size)  # and the processes are warm
        serve()
        slower_s = max(seconds_of(decode), seconds_of(serve))
        sources = sources * math.ceil(seconds / slower_s)
        pixels = decode()
        batches = _batches(pixels, batch_size)
        steps = {"decode": decode, "server": serve, "both": batch}
        return [
            {name: len(pixels) / seconds_of(work) for name, work in steps.items()}
            for _ in range(passes)
        ]


def _batches(pixels: list[Any], batch_size: int) -> list[Any]:
    starts = range(0, len(pixels), batch_size)
    return [np.stack(pixels[start : start + batch_size]) for start in starts]


def _row(turns: Sequence[dict[str, float]], place: str) -> dict[str, Any]:
    bounds = [
        min(turn["decode"], turn["server"])
        if place == APART
        else 1 / (1 / turn["decode"] + 1 / turn["server"])
        for turn in turns
    ]
    rates = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    rates["bound"] = statistics.median(bounds)
    parts = [turn["both"] / bound for turn, bound in zip(turns, bounds, strict=True)]
    return {name: round(rate, 1) for name, rate in rates.items()} | {"part": median_interval(parts)}
