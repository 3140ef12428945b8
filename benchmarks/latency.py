"""How long one request takes: Keras, ONNX Runtime, OpenVINO and Triton, every variant, one run."""

from __future__ import annotations

import importlib.util
import logging
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.encoded import compare_encoded, encoded_in_words
from benchmarks.engines import BASELINES, ENGINES, Infer, Scans, first_answer, open_engine
from benchmarks.environment import CPU_FLAGS, environment
from benchmarks.pareto import write_plot
from benchmarks.server import (
    answers_of,
    first_served_answer,
    statistics_after,
    statistics_of,
)
from benchmarks.variants import (
    MeasuredConfig,
    Variant,
    find_variants,
    median_interval,
    read_curve,
    scores_of,
)
from chestct.client import ScanClient
from chestct.imaging.scan import list_scans, load_scan
from export.check.parity import spread_scans
from serving.local import LocalTriton, LocalTritonError
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config
from training.data.dataset import ScanSet
from training.network.vgg16 import load_trained

logger = logging.getLogger(__name__)

PAUSE_S = 0.02  # idle worker threads of the engine before spin for a few milliseconds
MOST_REPEATS = 12
TURN_MS = 120.0  # the timed requests of a turn take up to about this long, if they are several
FILE_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # DICOM files need no suffix
PROTOCOLS = ("triton_grpc", "triton_http")
METHOD = (
    "interleaved rounds in random order; a turn is one to twelve untimed requests, the faster the "
    "more, and then as many timed ones; times are of one request; Triton's share is the median "
    "over rounds of the difference to the same engine in-process in the same round"
)


@dataclass(frozen=True)
class LatencyConfig(MeasuredConfig):
    """What `benchmarks latency` is told.

    Attributes:
        curve: What `export compress` tried, drawn into the plot where it is there.
        rounds: Most rounds for a batch size, as {batch size: number}.
        limit_s: No further round of a batch size begins after so many seconds.
        cold_starts: Starts of each engine and server; 0 leaves cold start and memory out.
    """

    curve: Path = Path("results/compressed/curve.json")
    rounds: dict[int, int] = field(default_factory=lambda: {1: 60, 8: 6})
    limit_s: float = 120.0
    cold_starts: int = 2

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing.

        Raises:
            ValueError: A batch size or a number of rounds below 1, or a limit that is none.
        """
        super().__post_init__()
        for batch, count in self.rounds.items():
            if not (isinstance(batch, int) and isinstance(count, int) and min(batch, count) >= 1):
                raise ValueError(f"rounds is {self.rounds}; expected {{batch size: number}}")
        if not self.rounds or self.limit_s <= 0 or self.cold_starts < 0:
            raise ValueError(
                f"rounds {self.rounds}, limit_s {self.limit_s}, cold_starts {self.cold_starts}: "
                "expected at least one round, a positive limit and no negative number"
            )


@dataclass(frozen=True)
class Subject:
    """What is timed.

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
    """What was measured of one subject at one batch size; times in milliseconds a request.

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
    """What a server adds to its engine, `ms` and `percent`, each a median with 95 % interval.

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


def measure(config: LatencyConfig) -> dict[str, Any]:
    """Environment and one row for each engine, variant and batch size, from one interleaved run.

    In every round each subject gets a turn on the same scans, in an order drawn anew, so that a
    slow moment of the machine falls on all of them. Accuracy, memory and cold start are taken
    before and after, not meanwhile.

    Raises:
        ValueError: Model, variants, repository or scans are missing or do not belong together.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
        serving.local.LocalTritonError: Triton does not start.
    """
    started = time.monotonic()
    _, facts = load_trained(config.model)
    variants, not_measured = find_variants(config.variants, config.repository)
    labelled = config.labelled(facts.window)
    scans = spread_scans(config.scans, 64)
    decode_times = decode_ms_by_kind(config.scans)
    decode_ms = statistics.median(ms for times in decode_times.values() for ms in times)
    with ExitStack() as stack:
        served = [variant for variant in variants if variant.config is not None]
        subjects, url = list(_in_process(config, variants, not_measured)), ""
        if served:
            names = tuple(variant.served_as for variant in served)
            server = stack.enter_context(LocalTriton(config.repository, models=names))
            subjects += _over_the_wire(config, served, server, stack)
            url = server.http_url
        worth = _worth(subjects, labelled)
        rows = []
        for batch in config.rounds:
            timings = _run_rounds(config, subjects, batch, scans, url)
            rows += _rows(subjects, timings, batch, decode_ms)
    for row in rows:
        row |= worth[row["runs_on"], row["variant"]]
    if config.cold_starts:
        _add_footprints(config, rows, variants)
    return {
        "environment": environment(),
        "run": facts.run,
        "method": METHOD,
        "scored_on": f"{len(labelled)} test scans of {config.split}",
        "num_scored": len(labelled),
        "variants": {
            variant.name: {
                "size_mb": round(variant.size_mb, 2),
                "served": variant.settings() if variant.config is not None else None,
            }
            for variant in variants
        },
        "not_measured": not_measured,
        "decode": {
            kind: {"n": len(times), "p50_ms": round(statistics.median(times), 3)}
            for kind, times in sorted(decode_times.items())
        },
        "encoded": compare_encoded(config.repository, config.scans, seed=config.seed),
        "rows": rows,
        "curve": read_curve(config.curve),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def _in_process(
    config: LatencyConfig, variants: list[Variant], not_measured: dict[str, str]
) -> Iterator[Subject]:
    """The Keras baselines, and each engine on each variant; what cannot run is written down."""
    for baseline in BASELINES:
        yield Subject(baseline, "fp32", open_engine(baseline, config.model), baseline)
    for engine in ENGINES:
        if engine != "onnxruntime" and importlib.util.find_spec("openvino") is None:
            not_measured[engine] = "the package openvino is not installed"
            continue
        if engine == "openvino_bf16" and not _has_bfloat16():
            not_measured[engine] = "this CPU has no bfloat16"
            continue
        for variant in variants:
            if engine != "openvino_bf16" or variant.name == "fp32":
                infer = open_engine(engine, variant.folder, _threads(variant, engine))
                yield Subject(engine, variant.name, infer, engine)


def _threads(variant: Variant, engine: str) -> int:
    """As the server has it, so that the two differ by the server alone."""
    if variant.config is None or variant.settings()["engine"] != engine:
        return 0
    return int(variant.settings()["threads"])


def _has_bfloat16() -> bool:
    names = {flag for flag in CPU_FLAGS if flag.endswith("bf16")}
    return bool(names & set(environment()["cpu_flags"]))


def _over_the_wire(
    config: LatencyConfig, served: list[Variant], server: LocalTriton, stack: ExitStack
) -> Iterator[Subject]:
    """Each served variant over gRPC and HTTP.

    Raises:
        ValueError: A batch size is more than a model takes.
    """
    for variant in served:
        settings, name = variant.settings(), variant.served_as
        if max(config.rounds) > settings["max_batch_size"]:
            raise ValueError(
                f"rounds is {config.rounds}; {name} takes at most {settings['max_batch_size']} "
                "scans in one request"
            )
        clients = (
            ScanClient(server.grpc_url, name),
            ScanClient(server.http_url, name),
        )
        for protocol, client in zip(PROTOCOLS, clients, strict=True):
            infer = answers_of(stack.enter_context(client))
            yield Subject(protocol, variant.name, infer, settings["engine"], name)


def _worth(subjects: list[Subject], labelled: ScanSet) -> dict[tuple[str, str], dict[str, Any]]:
    """Scores of each engine on each variant, computed once by engine and not once by protocol."""
    worth: dict[tuple[str, str], dict[str, Any]] = {}
    for subject in subjects:
        key = (subject.runs_on, subject.variant)
        if key not in worth and subject.engine != "keras_predict":
            worth[key] = scores_of(subject.infer, labelled, f"score {' '.join(key)}")
    # The same network in the same library, which takes long by `predict`.
    worth["keras_predict", "fp32"] = worth["keras_compiled", "fp32"]
    return worth


def _run_rounds(
    config: LatencyConfig, subjects: list[Subject], batch: int, scans: Scans, http_url: str
) -> list[Timing]:
    order = random.Random(config.seed)
    timings = [Timing() for _ in subjects]
    repeats = [_repeats(subject, scans[:batch]) for subject in subjects]
    deadline = time.monotonic() + config.limit_s
    rounds = config.rounds[batch]
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


def _rows(
    subjects: list[Subject], timings: list[Timing], batch: int, decode_ms: float
) -> list[dict[str, Any]]:
    """One row for each subject, with its ratios to the baselines and, for Triton, its share."""
    by_name = {
        (subject.engine, subject.variant): timing
        for subject, timing in zip(subjects, timings, strict=True)
    }
    slow_ms = {name: by_name[name, "fp32"].row(batch, 0)["p50_ms"] for name in BASELINES}
    rows = []
    for subject, timing in zip(subjects, timings, strict=True):
        about = {"engine": subject.engine, "variant": subject.variant, "batch": batch}
        row = about | {"runs_on": subject.runs_on} | timing.row(batch, decode_ms)
        for name, ms in slow_ms.items():
            row[f"times_faster_than_{name}"] = round(ms / row["p50_ms"], 2)
        beside = by_name.get((subject.runs_on, subject.variant))
        if subject.model and beside:
            row["share_of_triton"] = share_of_server(timing, beside)
        rows.append(row)
    return rows


def _add_footprints(
    config: LatencyConfig, rows: list[dict[str, Any]], variants: list[Variant]
) -> None:
    """Add size, cold start (median) and peak memory (largest) of engines and servers to rows."""
    by_name = {variant.name: variant for variant in variants}
    keras_mb = (config.model / "model.keras").stat().st_size / 1e6
    batch = max(config.rounds)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    wanted = [(row["engine"], row["variant"]) for row in rows if row["batch"] == batch]
    for _ in tqdm(range(config.cold_starts), "cold starts", disable=None):
        for engine, name in wanted:
            if engine == "triton_grpc":
                start = first_served_answer(config.repository, by_name[name].served_as, batch)
            elif engine in PROTOCOLS:
                continue
            elif engine in BASELINES:
                start = first_answer(engine, config.model, 0, batch)
            else:
                threads = _threads(by_name[name], engine)
                start = first_answer(engine, by_name[name].folder, threads, batch)
            found.setdefault((engine, name), []).append(start)
    for row in rows:
        engine = "triton_grpc" if row["engine"] in PROTOCOLS else row["engine"]
        starts = found[engine, row["variant"]]
        size_mb = keras_mb if engine in BASELINES else by_name[row["variant"]].size_mb
        row["model_mb"] = round(size_mb, 2)
        row["cold_start_s"] = round(statistics.median(seconds for seconds, _ in starts), 2)
        row["peak_memory_mb"] = round(max(memory_mb for _, memory_mb in starts), 1)


def decode_ms_by_kind(folder: Path) -> dict[str, list[float]]:
    """Milliseconds from a file on disk to a uint8 scan, by the kind that its name tells.

    Of at most 200 files, evenly spread; each is in the page cache when its time is taken.
    """
    paths = list(list_scans(folder))
    times: dict[str, list[float]] = {}
    for path in paths[:: -(-len(paths) // 200)]:
        load_scan(path)
        started = time.perf_counter_ns()
        load_scan(path)
        kind = FILE_KINDS.get(path.suffix.lower(), "DICOM")
        times.setdefault(kind, []).append((time.perf_counter_ns() - started) / 1e6)
    return times


def place_in_words(place: dict[str, Any]) -> str:
    """The environment of a result, as one sentence."""
    return (
        f"{place['cpu']} ({' '.join(place['cpu_flags'])}), {place['cores']} cores, GPU: "
        f"{place['gpu'] or 'none'}; commit {place['commit'][:12]}, {place['date']}."
    )


def interval_in_words(interval: dict[str, float | None]) -> str:
    """A value with its interval, `0.990 (0.981 to 0.998)`."""
    if interval["value"] is None or interval["low"] is None:
        return "undefined"
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def markdown(result: dict[str, Any]) -> str:
    """The result as tables: speed with accuracy, one for each batch size; parts; footprint."""
    rows = result["rows"]
    lines = [place_in_words(result["environment"]) + f" {result['method']}.", ""]
    for batch in dict.fromkeys(row["batch"] for row in rows):
        lines += [*speed_table(result, batch), ""]
    lines += _parts_table([row for row in rows if "wire" in row["parts_ms"]])
    if "cold_start_s" in rows[0]:
        lines += [
            "Footprint: cold start is from starting the process to its first answer; peak memory "
            f"after a request of {max(row['batch'] for row in rows)} scans:",
            "",
            "| engine | variant | model MB | cold start s | peak memory MB |",
            "|" + " --- |" * 5,
        ]
        lines += [
            f"| {_engine(row)} | {row['variant']} | {row['model_mb']:.1f} "
            f"| {row['cold_start_s']:.2f} | {row['peak_memory_mb']:.0f} |"
            for row in rows
            if row["batch"] == rows[0]["batch"] and row["engine"] not in PROTOCOLS[1:]
        ]
        lines.append("")
    decode = ", ".join(
        f"{item['p50_ms']:.1f} ms for {kind} (n = {item['n']})"
        for kind, item in result["decode"].items()
    )
    lines.append(
        f"Decoding one file to a scan comes on top: {decode}. The run took {result['minutes']} "
        "minutes."
    )
    if result.get("encoded"):
        lines.append(encoded_in_words(result["encoded"]))
    lines += [f"Not measured: {name}: {why}." for name, why in result["not_measured"].items()]
    return "\n".join(lines) + "\n"


def speed_table(result: dict[str, Any], batch: int) -> list[str]:
    """The lines of a table of the rows at one batch size, speed beside accuracy."""
    lines = [
        f"Batch {batch}, times of a request; accuracy on {result['scored_on']}, 95 % intervals:",
        "",
        "| engine | variant | n | p50 ms | p99 ms | scans/s | against predict "
        "| against tf.function | accuracy | macro AUROC |",
        "|" + " --- |" * 10,
    ]
    return lines + [
        f"| {_engine(row)} | {row['variant']} | {row['n']} | {row['p50_ms']:.1f} "
        f"| {row['p99_ms']:.1f} | {row['scans_per_s']:.1f} "
        f"| {row['times_faster_than_keras_predict']:.2f} x "
        f"| {row['times_faster_than_keras_compiled']:.2f} x "
        f"| {interval_in_words(row['accuracy'])} | {interval_in_words(row['macro_auroc'])} |"
        for row in result["rows"]
        if row["batch"] == batch
    ]


def _engine(row: dict[str, Any]) -> str:
    inside = row["engine"] in PROTOCOLS
    return f"{row['engine']} ({row['runs_on']})" if inside else str(row["engine"])


def _parts_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "Parts of a request to Triton, medians in ms, and what Triton adds to the same engine "
        "in-process, paired by round, with 95 % interval:",
        "",
        "| protocol | variant | batch | wire | queue | compute | Triton's share ms | % |",
        "|" + " --- |" * 8,
    ]
    for row in rows:
        parts, share = row["parts_ms"], row.get("share_of_triton")
        texts = ["not measured", ""]
        if share:
            texts = [
                f"{item['value']:.1f} ({item['low']:.1f} to {item['high']:.1f})"
                for item in (share["ms"], share["percent"])
            ]
        lines.append(
            f"| {row['engine']} | {row['variant']} | {row['batch']} | {parts['wire']:.2f} "
            f"| {parts['queue']:.2f} | {parts['compute']:.2f} | {' | '.join(texts)} |"
        )
    return [*lines, ""]


def main(argv: list[str] | None = None) -> int:
    """Measure the latency of one request against the Keras baselines."""
    parser = command_parser("benchmarks latency", main.__doc__, "configs/latency.yaml")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON; a .md and a .png go beside it"
    )
    arguments = parser.parse_args(argv)

    def work() -> None:
        result = measure(load_config(LatencyConfig, arguments.config))
        write_json(arguments.output, result)
        with replaced(arguments.output.with_suffix(".md")) as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
        write_plot(arguments.output.with_suffix(".png"), result)
        sys.stdout.write(markdown(result))

    return run_command(work, errors=(LocalTritonError,))
