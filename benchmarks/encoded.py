"""Decoding by the server (`chestct_encoded`) against decoding by the client, in milliseconds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.variants import median_interval
from chestct.client import ScanClient
from chestct.imaging.prepare import inspect_scan
from chestct.imaging.sources import list_scans
from export.publish.settings import ENCODED
from export.publish.versions import served_version
from serving.local import LocalTriton

MOST_FILES = 40
LIMIT_S = 30.0
METHOD = (
    "one file a request, page cache warm, over gRPC without the activation map; both ways on the "
    "same file in turn, order drawn anew; the difference is the median over pairs, 95 % interval"
)


def compare_encoded(
    repository: Path, scans: Path, *, limit_s: float = 60.0, seed: int = 7
) -> dict[str, Any] | None:
    """Milliseconds from a file to its answer, decoded by the client and decoded by the server.

    Args:
        repository: Triton's model repository.
        scans: Folder of scans; at most 40 of them are sent, evenly spread.
        limit_s: No further file is sent after so many seconds.
        seed: Of the order within a pair.

    Returns:
        Medians of both ways and of their difference; None where `chestct_encoded` is not there.

    Raises:
        serving.local.LocalTritonError: Triton does not start.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
    """
    if served_version(repository / ENCODED) is None:
        return None
    import tritonclient.grpc

    paths = list(list_scans(scans))
    paths = paths[:: -(-len(paths) // MOST_FILES)]
    order, deadline = random.Random(seed), time.monotonic() + limit_s
    pairs: list[dict[str, float]] = []
    with (
        LocalTriton(repository, models=[ENCODED]) as server,
        ScanClient(server.grpc_url) as client,
        tritonclient.grpc.InferenceServerClient(
            server.grpc_url.removeprefix("grpc://"), channel_args=[("grpc.enable_http_proxy", 0)]
        ) as raw,
    ):

        def here(path: Path) -> None:
            client.infer(inspect_scan(path, client.metadata.window).pixels[np.newaxis])

        def there(path: Path) -> None:
            tensor = tritonclient.grpc.InferInput("file", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[path.read_bytes()]], dtype=object))
            names = ("probabilities", "domain_distance", "reasons", "labels")
            wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in names]
            raw.infer(ENCODED, [tensor], outputs=wanted, client_timeout=LIMIT_S)

        ways: dict[str, Callable[[Path], None]] = {"client": here, "server": there}
        for path in tqdm(paths, "client-side against server-side decoding", disable=None):
            times = {}
            for name in order.sample(list(ways), len(ways)):
                ways[name](path)
                started = time.perf_counter_ns()
                ways[name](path)
                times[name] = (time.perf_counter_ns() - started) / 1e6
            pairs.append(times)
            if time.monotonic() > deadline:
                break
    return {
        "method": METHOD,
        "n": len(pairs),
        **{f"{name}_p50_ms": round(statistics.median(p[name] for p in pairs), 3) for name in ways},
        "difference_ms": median_interval([pair["server"] - pair["client"] for pair in pairs]),
    }


def describe_encoded(result: dict[str, Any]) -> str:
    """The comparison as one sentence."""
    more = result["difference_ms"]
    return (
        f"From a file to its answer by `chestct`: {result['client_p50_ms']:.1f} ms decoded by the "
        f"client, {result['server_p50_ms']:.1f} ms as a whole file to `{ENCODED}`, "
        f"{more['value']:+.1f} ms ({more['low']:+.1f} to {more['high']:+.1f}); n = {result['n']} "
        f"({result['method']})."
    )
