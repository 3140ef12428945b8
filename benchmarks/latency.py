"""How long one request takes: Keras, ONNX Runtime and Triton on the same scans in one run."""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.environment import environment
from chestct.client import ScanClient
from chestct.contract import INPUT_NAME, MODEL_NAME, ModelFacts
from chestct.scan import list_scans, load_scan
from export.parity import spread_scans
from serving.local import LocalTriton, LocalTritonError
from training.command import command_parser, run_command
from training.config import load_config
from training.files import replaced, write_json
from training.model import load_trained

logger = logging.getLogger(__name__)

Scans = npt.NDArray[np.uint8]
Infer = Callable[[Scans], Any]

PAUSE_S = 0.02  # idle worker threads of the engine before spin for a few milliseconds


@dataclass(frozen=True)
class LatencyConfig:
    """What `benchmarks.latency` is told.

    Attributes:
        model: Folder that `training.fit` wrote.
        onnx: The exported model.
        repository: Triton's model repository.
        scans: Folder of scans to send.
        rounds: Timed requests of each engine for a batch size, as {batch size: number}.
        seed: Of the order of engines within a round.
    """

    model: Path = Path("results/train")
    onnx: Path = Path("results/export/model.onnx")
    repository: Path = Path("model_repository")
    scans: Path = Path("data/scans")
    rounds: dict[int, int] = field(default_factory=lambda: {1: 60, 8: 12})
    seed: int = 7

    def __post_init__(self) -> None:
        """Refuse rounds that measure nothing.

        Raises:
            ValueError: A batch size or a number of rounds below 1.
        """
        for batch, count in self.rounds.items():
            if not (isinstance(batch, int) and isinstance(count, int) and min(batch, count) >= 1):
                raise ValueError(f"rounds is {self.rounds}; expected {{batch size: number}}")


@dataclass
class Timing:
    """What was measured of one engine at one batch size; times in milliseconds a request.

    `server_ms` holds, for a server, each request's time in the queue, in computing, and the rest:
    the wire, with what client and server do to put tensors on it.
    """

    engine: str
    variant: str
    batch: int
    latency_ms: list[float]
    server_ms: list[dict[str, float]]

    def row(self, decode_ms: float) -> dict[str, Any]:
        """The row of the result file; parts that the engine does not have are left out."""
        p50, p90, p99 = (float(q) for q in np.percentile(self.latency_ms, [50, 90, 99]))
        parts = {"decode": decode_ms * self.batch}
        if self.server_ms:
            for part in ("queue", "compute", "wire"):
                parts[part] = statistics.median(item[part] for item in self.server_ms)
        return {
            "engine": self.engine,
            "variant": self.variant,
            "batch": self.batch,
            "n": len(self.latency_ms),
            "p50_ms": round(p50, 3),
            "p90_ms": round(p90, 3),
            "p99_ms": round(p99, 3),
            "min_ms": round(min(self.latency_ms), 3),
            "scans_per_s": round(1000 * self.batch / p50, 2),
            "parts_ms": {part: round(value, 3) for part, value in parts.items()},
        }


def measure(config: LatencyConfig) -> dict[str, Any]:
    """Environment and one row for each engine and batch size, all from one interleaved run.

    In every round each engine gets one untimed and one timed request on the same scans, in an
    order drawn anew, so that a slow moment of the machine falls on all of them.

    Raises:
        ValueError: Model, repository or scans are missing.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
        serving.local.LocalTritonError: Triton does not start.
    """
    model, facts = load_trained(config.model)
    scans = spread_scans(config.scans, 64)
    decode_ms = _decode_ms(config.scans)
    with ExitStack() as stack:
        server = stack.enter_context(LocalTriton(config.repository))
        engines, max_batch_size = _engines(config, model, server, stack)
        rows = []
        if max(config.rounds) > max_batch_size:
            raise ValueError(
                f"rounds is {config.rounds}; the served model takes at most {max_batch_size} scans "
                "in one request"
            )
        for batch, rounds in config.rounds.items():
            timings = {name: Timing(name, facts.precision, batch, [], []) for name in engines}
            _run_rounds(engines, timings, scans, rounds, server.http_url, config.seed)
            rows += [timing.row(decode_ms) for timing in timings.values()]
    for row in rows:
        for baseline in ("keras_predict", "keras_compiled"):
            slow = next(r for r in rows if (r["engine"], r["batch"]) == (baseline, row["batch"]))
            row[f"times_faster_than_{baseline}"] = round(slow["p50_ms"] / row["p50_ms"], 2)
    return {
        "environment": environment(),
        "run": facts.run,
        "method": "interleaved rounds, one untimed request before each timed one; per request",
        "rows": rows,
    }


def _engines(
    config: LatencyConfig, model: Any, server: LocalTriton, stack: ExitStack
) -> tuple[dict[str, Infer], int]:
    """What is measured, by name, and the most scans that the server takes in one request."""
    import onnxruntime
    import tensorflow as tf

    compiled = tf.function(lambda scan: model(scan, training=False))
    session = onnxruntime.InferenceSession(
        str(config.onnx), providers=onnxruntime.get_available_providers()
    )
    grpc = stack.enter_context(ScanClient(server.grpc_url))
    http = stack.enter_context(ScanClient(server.http_url))
    shared = stack.enter_context(
        shared_memory_infer(server.grpc_url, grpc.facts, max(config.rounds))
    )
    engines: dict[str, Infer] = {
        "keras_predict": lambda scans: model.predict(scans, verbose=0),
        "keras_compiled": lambda scans: {k: v.numpy() for k, v in compiled(scans).items()},
        "onnxruntime": lambda scans: session.run(None, {INPUT_NAME: scans}),
        "triton_grpc": grpc.classify,
        "triton_http": http.classify,
        "triton_grpc_shm": shared,
    }
    return engines, grpc.max_batch_size


def _run_rounds(
    engines: dict[str, Infer],
    timings: dict[str, Timing],
    scans: Scans,
    rounds: int,
    http_url: str,
    seed: int,
) -> None:
    order = random.Random(seed)
    batch = next(iter(timings.values())).batch
    for number in tqdm(range(rounds), f"rounds of batch {batch}", disable=None):
        chosen = np.take(scans, range(number * batch, (number + 1) * batch), axis=0, mode="wrap")
        for name in order.sample(sorted(engines), len(engines)):
            infer, timing = engines[name], timings[name]
            served = name.startswith("triton")
            untouched = _server_statistics(http_url) if served else None
            infer(chosen)
            before = _statistics_after(http_url, untouched) if untouched else None
            started = time.perf_counter_ns()
            infer(chosen)
            timing.latency_ms.append((time.perf_counter_ns() - started) / 1e6)
            if before:
                after = _statistics_after(http_url, before)
                parts = {part: (after[part] - before[part]) / 1e6 for part in ("queue", "compute")}
                parts["wire"] = timing.latency_ms[-1] - sum(parts.values())
                timing.server_ms.append(parts)
            time.sleep(PAUSE_S)


def _server_statistics(http_url: str) -> dict[str, int]:
    """Requests that Triton has counted, and their nanoseconds in queue and compute."""
    address = f"{http_url}/v2/models/{MODEL_NAME}/stats"
    with urllib.request.urlopen(address, timeout=10) as answer:
        stats = json.load(answer)["model_stats"]
    totals = [item["inference_stats"] for item in stats]
    compute = ("compute_input", "compute_infer", "compute_output")
    return {
        "requests": sum(int(item["success"]["count"]) for item in totals),
        "queue": sum(int(item["queue"]["ns"]) for item in totals),
        "compute": sum(int(item[part]["ns"]) for item in totals for part in compute),
    }


def _statistics_after(http_url: str, before: dict[str, int]) -> dict[str, int]:
    """The statistics once one more request is counted, which Triton does after it has answered.

    Raises:
        ValueError: It is not counted within five seconds.
    """
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        statistics_now = _server_statistics(http_url)
        if statistics_now["requests"] == before["requests"] + 1:
            return statistics_now
        time.sleep(0.001)
    raise ValueError(
        f"{http_url}: {statistics_now['requests'] - before['requests']} requests were counted for "
        "one that was sent; another client must not use the server meanwhile"
    )


@contextmanager
def shared_memory_infer(grpc_url: str, facts: ModelFacts, max_batch: int) -> Iterator[Infer]:
    """Sends scans and takes answers through system shared memory; works on the server's host only.

    Both regions are registered once and reused; the answers are copied out of them.
    """
    import tritonclient.grpc as triton
    from tritonclient.utils import shared_memory as shm

    from chestct.contract import OUTPUT_NAMES, SCAN_SHAPE, output_specs

    source, target = (f"chestct_{os.getpid()}_{end}" for end in ("scan", "answer"))
    client = triton.InferenceServerClient(grpc_url.removeprefix("grpc://"))
    scan_bytes = max_batch * int(np.prod(SCAN_SHAPE))
    shapes = {spec.name: spec.shape[1:] for spec in output_specs(len(facts.labels))}
    sizes = {name: 4 * max_batch * int(np.prod(shape)) for name, shape in shapes.items()}
    total = sum(sizes.values())
    regions = {
        name: shm.create_shared_memory_region(name, f"/{name}", size)
        for name, size in ((source, scan_bytes), (target, total))
    }
    try:
        client.register_system_shared_memory(source, f"/{source}", scan_bytes)
        client.register_system_shared_memory(target, f"/{target}", total)

        def infer(scans: Scans) -> dict[str, npt.NDArray[np.float32]]:
            shm.set_shared_memory_region(regions[source], [scans])
            scan = triton.InferInput(INPUT_NAME, scans.shape, "UINT8")
            scan.set_shared_memory(source, scans.nbytes)
            requested, offsets, offset = [], {}, 0
            for name in OUTPUT_NAMES:
                output = triton.InferRequestedOutput(name)
                size = 4 * len(scans) * int(np.prod(shapes[name]))
                output.set_shared_memory(target, size, offset)
                requested.append(output)
                offsets[name] = offset
                offset += sizes[name]
            client.infer(MODEL_NAME, [scan], outputs=requested, client_timeout=60)
            return {
                name: shm.get_contents_as_numpy(
                    regions[target],
                    np.float32,
                    (len(scans), *shapes[name]),
                    offsets[name],
                ).copy()
                for name in OUTPUT_NAMES
            }

        yield infer
    finally:
        client.unregister_system_shared_memory()
        client.close()
        for region in regions.values():
            shm.destroy_shared_memory_region(region)


def _decode_ms(folder: Path) -> float:
    """Median milliseconds from a file on disk to a uint8 scan, over at most 200 files."""
    times = []
    for path in list(list_scans(folder))[:200]:
        started = time.perf_counter_ns()
        load_scan(path)
        times.append((time.perf_counter_ns() - started) / 1e6)
    return statistics.median(times)


def markdown(result: dict[str, Any]) -> str:
    """The result as a table, with its environment above."""
    place = result["environment"]
    lines = [
        f"{place['cpu']}, {place['cores']} cores, GPU: {place['gpu'] or 'none'}; "
        f"commit {place['commit'][:12]}, {place['date']}. {result['method']}.",
        "",
        "| engine | variant | batch | n | p50 ms | p90 ms | p99 ms | scans/s "
        "| against predict | against tf.function | queue + compute ms | wire ms |",
        "|" + " --- |" * 12,
    ]
    for row in result["rows"]:
        parts = row["parts_ms"]
        server = f"{parts['queue'] + parts['compute']:.1f}" if "queue" in parts else ""
        wire = f"{parts['wire']:.1f}" if "wire" in parts else ""
        lines.append(
            f"| {row['engine']} | {row['variant']} | {row['batch']} | {row['n']} "
            f"| {row['p50_ms']:.1f} | {row['p90_ms']:.1f} | {row['p99_ms']:.1f} "
            f"| {row['scans_per_s']:.1f} | {row['times_faster_than_keras_predict']:.2f} x "
            f"| {row['times_faster_than_keras_compiled']:.2f} x | {server} | {wire} |"
        )
    decode = result["rows"][0]["parts_ms"]["decode"] / result["rows"][0]["batch"]
    lines += ["", f"Decoding one file to a scan takes {decode:.1f} ms and comes on top."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure the latency of one request against the Keras baselines."""
    parser = command_parser("benchmarks.latency", main.__doc__, "configs/latency.yaml")
    parser.add_argument("--output", type=Path, required=True, help="JSON; a .md goes beside it")
    arguments = parser.parse_args(argv)

    def work() -> None:
        result = measure(load_config(LatencyConfig, arguments.config))
        write_json(arguments.output, result)
        with replaced(arguments.output.with_suffix(".md")) as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
        sys.stdout.write(markdown(result))

    return run_command(work, errors=(LocalTritonError,))


if __name__ == "__main__":
    sys.exit(main())
