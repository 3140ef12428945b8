"""How many scans a second: under load by layout of the server, and from files to JSON lines."""

from __future__ import annotations

import logging
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.batch_limits import limits_in_words, near_limits
from benchmarks.engines import BASELINES, Infer, Scans, open_engine
from benchmarks.environment import environment
from benchmarks.latency import interval_in_words, place_in_words
from benchmarks.layouts import Layout, layouts_of, write_layouts
from benchmarks.perf_analyzer import (
    STABLE_WITHIN_PERCENT,
    find_perf_analyzer,
    perf_analyzer_rows,
)
from benchmarks.server import answers_of, statistics_of
from benchmarks.variants import MeasuredConfig, Variant, find_variants, scores_of
from chestct.client import ScanClient
from chestct.contract import ModelMetadata
from chestct.imaging.scan import list_scans, load_scan
from chestct.results.records import json_text
from export.check.parity import spread_scans
from serving.local import LocalTriton, LocalTritonError
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config
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
LOOPS = {
    "keras_predict": "loop of load_scan and model.predict",
    "keras_compiled": "loop of load_scan and compiled tf.function",
}
SCORES = ("accuracy", "macro_auroc")
Way = Callable[[list[Path], Path], None]  # classifies files and writes a line for each


@dataclass(frozen=True)
class ThroughputConfig(MeasuredConfig):
    """What `benchmarks throughput` is told.

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

    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    instances: tuple[int, ...] = (1, 2)
    seconds: float = 1.5
    warm_up_s: float = 0.3
    passes: int = 2
    num_files: int = 64
    file_passes: int = 3
    batch_size: int = 8
    batch_seconds: float = 8.0
    batch_passes: int = 5

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing.

        Raises:
            ValueError: A number below 1, no concurrency or layout, or a time that is none.
        """
        super().__post_init__()
        passes = (self.passes, self.file_passes, self.batch_passes)
        counts = (*self.concurrency, *self.instances, *passes, self.num_files, self.batch_size)
        if min(counts) < 1 or not (self.concurrency and self.instances):
            raise ValueError("expected at least 1 for each number and in each list")
        if min(self.seconds, self.batch_seconds) <= 0 or self.warm_up_s < 0:
            raise ValueError(
                f"seconds {self.seconds}, batch_seconds {self.batch_seconds}, warm_up_s "
                f"{self.warm_up_s}: expected times"
            )


@dataclass
class Cell:
    """What was measured of a layout at a concurrency, over all passes."""

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
            layout: _seconds_of(answers_of(client), scans) for layout, client in clients.items()
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


def _seconds_of(infer: Infer, scans: Scans) -> float:
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
            answers[variant.name] = answers_of(client)
            ways[variant.name] = _classify(client, config.batch_size)
        # The same network in the same library, which takes long by `predict`.
        del answers["keras_predict"]
        labelled = config.labelled(facts.window)
        worth = {
            name: scores_of(infer, labelled, f"score {name}") for name, infer in answers.items()
        }
        worth["keras_predict"] = worth["keras_compiled"]
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
    rows = [row | worth[row["way"]] for row in file_rows(seconds, len(paths))]
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
    """The rows of NVIDIA's perf_analyzer, and what it could not measure, as {what: why}."""
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
    worth = {row["way"]: {key: row[key] for key in SCORES} for row in files["rows"]}
    rows = [row | worth[row["variant"]] for row in rows]
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


def markdown(result: dict[str, Any]) -> str:
    """The result as tables: files to JSON lines, then layouts under load for each variant."""
    files = result["files"]
    lines = [
        place_in_words(result["environment"]),
        "",
        f"{files['num_files']} scans {result['files_method']}; accuracy on {result['scored_on']}, "
        "95 % intervals:",
        "",
        "| way | scans/s | against load + predict | against load + tf.function | accuracy "
        "| macro AUROC |",
        "|" + " --- |" * 6,
    ]
    for row in files["rows"]:
        accuracy, area = (interval_in_words(row[key]) for key in SCORES)
        way = LOOPS.get(row["way"], f"`chestct classify`, {row['way']}")
        lines.append(
            f"| {way} | {row['scans_per_s']:.1f} | {row['times_faster_than_keras_predict']:.1f} x "
            f"| {row['times_faster_than_keras_compiled']:.1f} x | {accuracy} | {area} |"
        )
    lines += limits_in_words(result["limits"])
    lines += ["", f"Under load: {result['method']}."]
    for variant, settings in result["served"].items():
        lines += _load_tables(variant, settings, result["rows"])
    if result["perf_analyzer"]:
        lines += [
            "",
            "NVIDIA's perf_analyzer, whose load comes from C++, on the models as they are "
            f"published; latency and throughput of three windows lie within {STABLE_WITHIN_PERCENT}"
            " %:",
            "",
            "| model | concurrency | scans/s | p50 ms | p99 ms |",
            "|" + " --- |" * 5,
        ]
        lines += [_analyzed_in_words(row) for row in result["perf_analyzer"]]
    lines += ["", f"The run took {result['minutes']} minutes."]
    lines += [f"Not measured: {name}: {why}." for name, why in result["not_measured"].items()]
    return "\n".join(lines) + "\n"


def _load_tables(variant: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Two tables of a variant, a line for each concurrency and a column for each layout."""
    mine = [row for row in rows if row["variant"] == variant]
    names = list(dict.fromkeys(_layout_in_words(row) for row in mine))
    cell = {(_layout_in_words(row), row["concurrency"]): row for row in mine}
    numbers = list(dict.fromkeys(row["concurrency"] for row in mine))
    accuracy, area = (interval_in_words(mine[0][key]) for key in SCORES)
    lines = []
    for title, text in (
        ("scans/s (mean batch executed; cores that the client took)", _speed_in_words),
        ("p50 / p99 in ms", _times_in_words),
    ):
        lines += [
            "",
            f"{variant} by {settings['engine']}, accuracy {accuracy}, macro AUROC {area}; {title}:",
            "",
            f"| concurrency | {' | '.join(names)} |",
            "|" + " --- |" * (1 + len(names)),
        ]
        lines += [
            f"| {number} | {' | '.join(text(cell[name, number]) for name in names)} |"
            for number in numbers
        ]
    quickest = min((row for row in mine if row["concurrency"] == min(numbers)), key=_p50)
    most = max(mine, key=lambda row: float(row["scans_per_s"]))
    return [
        *lines,
        "",
        f"Quickest answer: {_layout_in_words(quickest)}, {quickest['p50_ms']:.1f} ms. Most scans: "
        f"{_layout_in_words(most)} at concurrency {most['concurrency']}, "
        f"{most['scans_per_s']:.1f} a second.",
    ]


def _analyzed_in_words(row: dict[str, Any]) -> str:
    start = f"| {row['model']} | {row['concurrency']} |"
    if not row["stable"]:
        return f"{start} not stable | | |"
    return f"{start} {row['scans_per_s']:.1f} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} |"


def _speed_in_words(row: dict[str, Any]) -> str:
    return f"{row['scans_per_s']:.1f} ({row['mean_batch']:.1f}; {row['client_cores']:.1f})"


def _times_in_words(row: dict[str, Any]) -> str:
    return f"{row['p50_ms']:.1f} / {row['p99_ms']:.1f}"


def _p50(row: dict[str, Any]) -> float:
    return float(row["p50_ms"])


def _layout_in_words(row: dict[str, Any]) -> str:
    batching = "batching" if row["dynamic_batching"] else "no batching"
    return f"{row['instances']}x{row['threads']}, {batching}"


def main(argv: list[str] | None = None) -> int:
    """Measure scans a second under load, and from files to JSON lines."""
    parser = command_parser("benchmarks throughput", main.__doc__, "configs/throughput.yaml")
    parser.add_argument("--output", type=Path, required=True, help="JSON; a .md goes beside it")
    arguments = parser.parse_args(argv)

    def work() -> None:
        result = measure(load_config(ThroughputConfig, arguments.config))
        write_json(arguments.output, result)
        with replaced(arguments.output.with_suffix(".md")) as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
        sys.stdout.write(markdown(result))

    return run_command(work, errors=(LocalTritonError,))
