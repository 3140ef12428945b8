"""Measure the latency of one request: Keras, ONNX Runtime, OpenVINO and Triton, every variant."""

from __future__ import annotations

import importlib.util
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm

from benchmarks.encoded import compare_encoded
from benchmarks.engines import BASELINES, ENGINES, first_answer, open_engine
from benchmarks.environment import CPU_FLAGS, environment
from benchmarks.pareto import write_plot
from benchmarks.reports import latency_report
from benchmarks.rounds import METHOD, Subject, Timing, run_rounds, share_of_server
from benchmarks.server import first_served_answer, predictions_of
from benchmarks.variants import (
    MeasuredConfig,
    Variant,
    find_variants,
    read_curve,
    scores_of,
)
from chestct.client import ScanClient
from chestct.imaging.prepare import load_scan
from chestct.imaging.sources import list_scans
from export.check.parity import spread_scans
from serving.local import LocalTriton, LocalTritonError
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.data.dataset import ScanSet
from training.network.vgg16 import load_trained

logger = logging.getLogger(__name__)

FILE_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # DICOM files need no suffix
PROTOCOLS = ("triton_grpc", "triton_http")


@config_class
class LatencyConfig(MeasuredConfig):
    """Settings of `benchmarks latency`.

    Attributes:
        curve: What `export compress` tried, drawn into the plot where it is there.
        rounds: Most rounds for a batch size, as {batch size: number}.
        limit_s: No further round of a batch size begins after so many seconds.
        cold_starts: Starts of each engine and server; 0 leaves cold start and memory out.
    """

    curve: Path = Path("results/compressed/curve.json")
    rounds: Annotated[dict[PositiveInt, PositiveInt], Field(min_length=1)] = field(
        default_factory=lambda: {1: 60, 8: 6}
    )
    limit_s: PositiveFloat = 120.0
    cold_starts: NonNegativeInt = 2


def measure(config: LatencyConfig) -> dict[str, Any]:
    """Environment and one row for each engine, variant and batch size, from one interleaved run.

    Accuracy, memory and cold start are taken before and after the rounds, not meanwhile.

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
        scores = _scores(subjects, labelled)
        rows = []
        for batch in config.rounds:
            timings = run_rounds(
                subjects,
                scans,
                batch,
                rounds=config.rounds[batch],
                limit_s=config.limit_s,
                seed=config.seed,
                http_url=url,
            )
            rows += _rows(subjects, timings, batch, decode_ms)
    for row in rows:
        row |= scores[row["runs_on"], row["variant"]]
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
            infer = predictions_of(stack.enter_context(client))
            yield Subject(protocol, variant.name, infer, settings["engine"], name)


def _scores(subjects: list[Subject], labelled: ScanSet) -> dict[tuple[str, str], dict[str, Any]]:
    """Scores of each engine on each variant, computed once by engine and not once by protocol."""
    scores: dict[tuple[str, str], dict[str, Any]] = {}
    for subject in subjects:
        key = (subject.runs_on, subject.variant)
        if key not in scores and subject.engine != "keras_predict":
            scores[key] = scores_of(subject.infer, labelled, f"score {' '.join(key)}")
    # The same network in the same library, which takes long by `predict`.
    scores["keras_predict", "fp32"] = scores["keras_compiled", "fp32"]
    return scores


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
        report = latency_report(result)
        with replaced(arguments.output.with_suffix(".md")) as temporary:
            temporary.write_text(report, encoding="utf-8")
        write_plot(arguments.output.with_suffix(".png"), result)
        sys.stdout.write(report)

    return run_command(work, errors=(LocalTritonError,))
