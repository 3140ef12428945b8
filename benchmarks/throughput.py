"""Measure scans a second: under load by layout of the server, and from files to JSON lines."""

from __future__ import annotations

import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from tqdm import tqdm

from benchmarks.batch_limits import near_limits
from benchmarks.engines import BASELINES, Infer, open_engine
from benchmarks.environment import environment
from benchmarks.layouts import layouts_of, write_layouts
from benchmarks.load import Cell, load, seconds_of
from benchmarks.perf_analyzer import find_perf_analyzer, perf_analyzer_rows
from benchmarks.reports import throughput_report
from benchmarks.server import predictions_of
from benchmarks.variants import SCORES, MeasuredConfig, Variant, find_variants, scores_of
from chestct.client import ScanClient
from chestct.contract import ModelMetadata
from chestct.imaging.prepare import load_scan
from chestct.imaging.sources import list_scans
from chestct.results.records import json_text
from export.check.parity import spread_scans
from serving.local import LocalTriton, LocalTritonError
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.network.vgg16 import load_trained

logger = logging.getLogger(__name__)

# A window holds at least so many requests of each client, or a slow model would give whole
# batches at its edges the say.
LEAST_REQUESTS = 6
LONGEST_WINDOW_S = 10.0
METHOD = (
    "closed loop over gRPC, one scan a request: each of so many threads sends its next request "
    "when it has its answer; cells in random order in each pass. The client shares the cores with "
    "the server; its part of them stands beside each figure"
)
FILES_METHOD = (
    "from files on disk to JSON lines in a file, decoding included, process start not; files are "
    "in the page cache; ways in random order in each pass; ratios are medians over passes"
)
Way = Callable[[list[Path], Path], None]  # classifies files and writes a line for each


Counts = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


@config_class
class ThroughputConfig(MeasuredConfig):
    """Settings of `benchmarks throughput`.

    Attributes:
        concurrency: Requests in flight.
        instances: Layouts of the server: so many instances, which share the cores between them.
        seconds: Of a cell in each pass, after `warm_up_s`; up to ten for slow models.
        warm_up_s: Load before a cell is measured.
        passes: How often each cell is measured.
        num_files: At most so many files, evenly spread, on the way from files to JSON lines.
        file_passes: How often each way from files to JSON lines is measured.
        batch_size: Scans in a request on that way; 8 is what `chestct classify` takes.
        batch_seconds: Least time of a pass where that way is held against its limits.
        batch_passes: How many of these passes.
    """

    concurrency: Counts = (1, 2, 4, 8, 16)
    instances: Counts = (1, 2)
    seconds: PositiveFloat = 1.5
    warm_up_s: NonNegativeFloat = 0.3
    passes: PositiveInt = 2
    num_files: PositiveInt = 64
    file_passes: PositiveInt = 3
    batch_size: PositiveInt = 8
    batch_seconds: PositiveFloat = 8.0
    batch_passes: PositiveInt = 5


def under_load(config: ThroughputConfig, variants: list[Variant]) -> list[dict[str, Any]]:
    """One row for each layout and concurrency.

    Raises:
        ValueError: A worker of the load failed.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
        serving.local.LocalTritonError: Triton does not start.
    """
    scans = spread_scans(config.scans, 64)
    layouts = layouts_of(variants, config.instances)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_layouts(folder, {variant.name: variant for variant in variants}, layouts)
        # One after the other: a dozen at once can hold up each other's start beyond its time-out.
        one_by_one = ("--model-load-thread-count=1",)
        server = stack.enter_context(
            LocalTriton(folder, ready_timeout_s=300, extra_args=one_by_one)
        )
        clients = {
            layout: stack.enter_context(ScanClient(server.grpc_url, layout.model))
            for layout in layouts
        }
        alone_s = {
            layout: seconds_of(predictions_of(client), scans) for layout, client in clients.items()
        }
        cells = {(layout, number): Cell() for layout in layouts for number in config.concurrency}
        order = random.Random(config.seed)
        plan = [key for _ in range(config.passes) for key in order.sample(list(cells), len(cells))]
        for layout, number in tqdm(plan, "cells", disable=None):
            enough_s = min(LEAST_REQUESTS * number * alone_s[layout], LONGEST_WINDOW_S)
            load(
                clients[layout],
                scans,
                number,
                warm_up_s=config.warm_up_s,
                window_s=max(config.seconds, enough_s),
                http_url=server.http_url,
                into=cells[layout, number],
            )
    return [cell.row(layout, number) for (layout, number), cell in cells.items()]


def from_files(
    config: ThroughputConfig,
    variants: list[Variant],
    facts: ModelMetadata,
    paths: list[Path],
    grpc_url: str,
) -> dict[str, Any]:
    """Scans a second from files to JSON lines, for each baseline and each served variant, scored.

    The variants go the way of `chestct classify`: `classify_many` decodes ahead and sends
    batches, `json_text` writes a line. The baselines are plain loops: load a file by the
    same fast `load_scan`, ask the model, write a line.

    Raises:
        ValueError: A way left out a file.
        chestct.errors.ChestCTError: The server fails.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        answers = {name: open_engine(name, config.model) for name in BASELINES}
        ways = {name: _loop(infer, facts) for name, infer in answers.items()}
        for variant in variants:
            client = stack.enter_context(ScanClient(grpc_url, variant.served_as))
            answers[variant.name] = predictions_of(client)
            ways[variant.name] = _classify(client, config.batch_size)
        # The same network in the same library, which takes long by `predict`.
        del answers["keras_predict"]
        labelled = config.labelled(facts.window)
        scores = {
            name: scores_of(infer, labelled, f"score {name}") for name, infer in answers.items()
        }
        scores["keras_predict"] = scores["keras_compiled"]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way(paths[: 2 * config.batch_size], folder / "lines.jsonl")
        order = random.Random(config.seed)
        for _ in tqdm(range(config.file_passes), "passes over the files", disable=None):
            for name in order.sample(list(ways), len(ways)):
                started = time.perf_counter()
                ways[name](paths, folder / "lines.jsonl")
                seconds[name].append(time.perf_counter() - started)
                lines = (folder / "lines.jsonl").read_text().splitlines()
                if len(lines) != len(paths):
                    raise ValueError(f"{name} wrote {len(lines)} lines for {len(paths)} files")
    rows = [row | scores[row["way"]] for row in file_rows(seconds, len(paths))]
    return {
        "num_files": len(paths),
        "num_scored": len(labelled),
        "rows": rows,
    }


def _loop(infer: Infer, facts: ModelMetadata) -> Way:
    def way(paths: list[Path], output: Path) -> None:
        with output.open("w") as file:
            for path in paths:
                answer = infer(load_scan(path, facts.window)[np.newaxis])
                values = (float(value) for value in answer["probabilities"][0])
                probabilities = dict(zip(facts.class_names, values, strict=True))
                file.write(json_text({"path": str(path), "probabilities": probabilities}))

    return way


def _classify(client: ScanClient, batch_size: int) -> Way:
    def way(paths: list[Path], output: Path) -> None:
        with output.open("w") as file:
            for line in client.classify_many(paths, batch_size=batch_size):
                file.write(json_text(line))

    return way


def file_rows(seconds: Mapping[str, list[float]], num_files: int) -> list[dict[str, Any]]:
    """One row for each way, from its seconds in each pass; ratios are paired by pass."""
    rows = []
    for name, times in seconds.items():
        row: dict[str, Any] = {
            "way": name,
            "scans_per_s": round(num_files / statistics.median(times), 2),
            "scans_per_s_by_pass": [round(num_files / time_s, 2) for time_s in times],
        }
        for baseline in BASELINES:
            pairs = zip(seconds[baseline], times, strict=True)
            ratio = statistics.median(slow / fast for slow, fast in pairs)
            row[f"times_faster_than_{baseline}"] = round(ratio, 2)
        rows.append(row)
    return rows


def by_perf_analyzer(
    variants: list[Variant], concurrency: tuple[int, ...], grpc_url: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of NVIDIA's perf_analyzer, and the reason for each that is missing."""
    command = find_perf_analyzer()
    if command is None:
        return [], {"perf_analyzer": "not installed; name it with PERF_ANALYZER"}
    rows, failures = [], {}
    for variant in variants:
        logger.info("perf_analyzer on %s", variant.served_as)
        try:
            rows += perf_analyzer_rows(command, grpc_url, variant.served_as, concurrency)
        except ValueError as error:  # all else is measured by now, and is not to be lost
            failures[f"perf_analyzer on {variant.served_as}"] = str(error)
    return rows, failures


def measure(config: ThroughputConfig) -> dict[str, Any]:
    """Environment, the table of layouts under load, and scans a second from files.

    Raises:
        ValueError: Model, variants, repository or scans are missing or do not belong together.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
        serving.local.LocalTritonError: Triton does not start.
    """
    started = time.monotonic()
    _, facts = load_trained(config.model)
    variants, not_measured = find_variants(config.variants, config.repository)
    served = [variant for variant in variants if variant.config is not None]
    if not served:
        raise ValueError(
            f"{config.repository} serves none of {list(config.variants)}; run python -m "
            "export repository"
        )
    rows = under_load(config, served)
    every = list(list_scans(config.scans))
    paths = every[:: max(1, len(every) // config.num_files)][: config.num_files]
    names = tuple(variant.served_as for variant in served)
    with LocalTriton(config.repository, models=names) as server:
        files = from_files(config, served, facts, paths, server.grpc_url)
        analyzed, failures = by_perf_analyzer(served, config.concurrency, server.grpc_url)
    limits = near_limits(
        served,
        paths,
        batch_size=config.batch_size,
        passes=config.batch_passes,
        seconds=config.batch_seconds,
    )
    scores = {row["way"]: {key: row[key] for key in SCORES} for row in files["rows"]}
    rows = [row | scores[row["variant"]] for row in rows]
    return {
        "environment": environment(),
        "run": facts.run,
        "method": METHOD,
        "scored_on": f"{files['num_scored']} test scans of {config.split}",
        "served": {variant.name: variant.settings() for variant in served},
        "not_measured": not_measured | failures,
        "rows": rows,
        "files_method": FILES_METHOD,
        "files": files,
        "limits": limits,
        "perf_analyzer": analyzed,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure scans a second under load, and from files to JSON lines."""
    parser = command_parser("benchmarks throughput", main.__doc__, "configs/throughput.yaml")
    parser.add_argument("--output", type=Path, required=True, help="JSON; a .md goes beside it")
    arguments = parser.parse_args(argv)

    def work() -> None:
        result = measure(load_config(ThroughputConfig, arguments.config))
        write_json(arguments.output, result)
        report = throughput_report(result)
        with replaced(arguments.output.with_suffix(".md")) as temporary:
            temporary.write_text(report, encoding="utf-8")
        sys.stdout.write(report)

    return run_command(work, errors=(LocalTritonError,))
