"""A running Triton under measurement: its own statistics and its cold start."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from benchmarks.engines import Infer
from chestct.client import ScanClient
from chestct.contract import SCAN_SHAPE
from serving.local import LocalTriton

COUNTED_WITHIN_S = 5.0


def predictions_of(client: ScanClient) -> Infer:
    """A function from scans, uint8 (N, 224, 224, 1), to the outputs of a served model, by name."""
    return lambda scans: vars(client.infer(scans, with_map=True))


def statistics_of(http_url: str, model: str) -> dict[str, int]:
    """Triton's counters of a model: requests, scans, executions, and nanoseconds by part.

    `queue_ns` and `compute_ns` are sums over requests; the latter holds Triton's compute_input,
    compute_infer and compute_output.

    Raises:
        ValueError: The server refuses to tell.
        OSError: It does not answer.
    """
    from tritonclient.http import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    try:
        with InferenceServerClient(http_url.removeprefix("http://")) as client:
            stats = client.get_inference_statistics(model)["model_stats"]
    except InferenceServerException as error:
        raise ValueError(f"{http_url}: no statistics of {model}: {error.message()}") from error
    totals = [item["inference_stats"] for item in stats]
    compute = ("compute_input", "compute_infer", "compute_output")
    return {
        "requests": sum(int(item["success"]["count"]) for item in totals),
        "scans": sum(int(item["inference_count"]) for item in stats),
        "executions": sum(int(item["execution_count"]) for item in stats),
        "queue_ns": sum(int(item["queue"]["ns"]) for item in totals),
        "compute_ns": sum(int(item[part]["ns"]) for item in totals for part in compute),
    }


def statistics_after(
    http_url: str, model: str, before: dict[str, int], requests: int
) -> dict[str, int]:
    """The statistics once `requests` more are counted, which Triton does after it has answered.

    Raises:
        ValueError: Another number is counted after five seconds.
    """
    deadline = time.monotonic() + COUNTED_WITHIN_S
    while time.monotonic() < deadline:
        now = statistics_of(http_url, model)
        if now["requests"] == before["requests"] + requests:
            return now
        time.sleep(0.001)
    raise ValueError(
        f"{http_url}: {now['requests'] - before['requests']} requests to {model} were counted for "
        f"{requests} that were sent; another client must not use the server meanwhile"
    )


def first_served_answer(repository: Path, model: str, batch: int) -> tuple[float, float]:
    """Seconds from starting a server with one model to its first answer, and its peak memory in MB.

    The answer goes over gRPC to a client that connects as any other. The peak is read after a
    further request of `batch` scans; it holds the server and its backend processes.

    Raises:
        serving.local.LocalTritonError: Triton does not start.
        chestct.errors.ChestCTError: The server fails.
    """
    started = time.perf_counter()
    with (
        LocalTriton(repository, models=(model,)) as server,
        ScanClient(server.grpc_url, model) as client,
    ):
        client.infer(np.zeros((1, *SCAN_SHAPE), np.uint8), with_map=True)
        seconds = time.perf_counter() - started
        client.infer(np.zeros((batch, *SCAN_SHAPE), np.uint8), with_map=True)
        return seconds, server.peak_memory_mb()
