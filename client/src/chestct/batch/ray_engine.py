"""The way of `chestct.batch.pipeline` on a Ray cluster: its machines decode, and ask the servers.

Sources go out and records come back through Ray Data, in the order of the sources, so that all
else (outputs, series, going on after a crash) is that of one machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

from chestct.batch.decode_pool import DECODE_LIMIT_S, DecodePool
from chestct.batch.pipeline import DecodedFile, answered_files, decoded_files
from chestct.batch.selection import Flush
from chestct.contract import Window
from chestct.errors import ServerError
from chestct.imaging.limits import DECODE_MEMORY_BYTES
from chestct.imaging.sources import Source
from chestct.inference.server_pool import ServerPool
from chestct.inference.wires import TLSOptions
from chestct.results.records import SliceResult
from chestct.results.resume import ResumeIndex
from chestct.results.writers import DecodedInput

__all__ = ["RayCluster", "RayOptions"]

SOURCES_AT_ONCE = 10_000  # of which Ray knows the names: what bounds the memory of this process
BLOCK_FILES = 32  # what goes to a decoder at a time, and is done again when its machine is lost
OBJECT_STORE_BYTES = 256 * 2**20  # of a cluster that is started for the run


@dataclass(frozen=True)
class RayOptions:
    """How to work on a cluster.

    Attributes:
        address: Of a cluster, as `ray.init` takes it; empty to start one on this machine.
        num_decoders: Processes that decode.
        num_senders: Processes that ask the servers.
        decode_limit_s: How long one file may take to decode.
        decode_memory_bytes: Address space of a process that decodes.
        batch_size: How many scans go into one request.
    """

    address: str = ""
    num_decoders: int = 2
    num_senders: int = 1
    decode_limit_s: float = DECODE_LIMIT_S
    decode_memory_bytes: int = DECODE_MEMORY_BYTES
    batch_size: int = 8


@dataclass(frozen=True)
class _Servers:
    urls: tuple[str, ...]
    model: str
    timeout_s: float
    connect_timeout_s: float
    tls: TLSOptions | None
    unavailable_timeout_s: float

    def fleet(self) -> ServerPool:
        return ServerPool(
            self.urls,
            self.model,
            timeout_s=self.timeout_s,
            connect_timeout_s=self.connect_timeout_s,
            tls=self.tls,
            unavailable_timeout_s=self.unavailable_timeout_s,
        )


class RayCluster:
    """A connection to a Ray cluster, or one started on this machine, as a context manager.

    It has to be entered before any server is asked over gRPC: Ray starts its processes by a fork,
    which does not end well in a process with threads of gRPC. While it is entered, `sys.stdout` is
    `sys.stderr`: Ray prints there what befalls its processes.
    """

    def __init__(self, options: RayOptions) -> None:
        """Connects to nothing yet."""
        self._options = options
        self._ray: Any = None

    def __enter__(self) -> Self:
        self._ray = _started_ray(self._options)
        self._redirection = contextlib.redirect_stdout(sys.stderr)
        self._redirection.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._redirection.__exit__(None, None, None)
        self._ray.shutdown()

    def classify(
        self,
        fleet: ServerPool,
        sources: Iterable[Source | Flush],
        *,
        with_map: bool = False,
        finished: ResumeIndex | None = None,
    ) -> Iterator[tuple[SliceResult, DecodedInput]]:
        """Record and origin of each scan, in the order of `sources`: see `classify_sources`.

        A file that crashes its decoder is a record of that; the work of a process or machine that
        is lost is done again by another one.

        Args:
            fleet: Connected servers; the machines of the cluster ask the same addresses.
            sources: Scans; the machines have to see them under the same paths.
            with_map: Whether items hold pixels and activation map.
            finished: What an earlier run has written.

        Raises:
            ServerError: Servers or cluster failed; what was finished before has been yielded.
        """
        known = ResumeIndex() if finished is None else finished
        servers = _Servers(
            fleet.urls, fleet.model, fleet.timeout_s, fleet.connect_timeout_s, fleet.tls,
            fleet.unavailable_timeout_s,
        )  # fmt: skip
        coming = (source for source in sources if isinstance(source, Source))
        try:
            while some := list(islice(coming, SOURCES_AT_ONCE)):
                for record, item in self._results(some, servers, fleet.metadata.window, with_map):
                    path = record["path"]
                    if path in known.pending:
                        yield known.pending[path], item
                    elif path not in known:
                        yield record, item
        except self._ray.exceptions.RayError as error:
            reason = " ".join(str(error.__cause__ or error).split())[-300:]
            raise ServerError(f"the Ray cluster gave up: {reason}") from error

    def _results(
        self, sources: list[Source], servers: _Servers, window: Window, with_map: bool
    ) -> Iterator[tuple[SliceResult, DecodedInput]]:
        options, data = self._options, self._ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        rows = [{"source": pickle.dumps(source)} for source in sources]
        num_blocks = min(len(rows), max(options.num_decoders, len(rows) // BLOCK_FILES))
        results = (
            data.from_items(rows, override_num_blocks=num_blocks)
            .map_batches(
                _Decoder,
                fn_constructor_args=(window, options.decode_limit_s, options.decode_memory_bytes),
                batch_size=BLOCK_FILES,
                concurrency=options.num_decoders,
                num_cpus=1,
            )
            .map_batches(
                _Sender,
                fn_constructor_args=(servers, with_map),
                batch_size=options.batch_size,
                concurrency=options.num_senders,
                num_cpus=1,
            )
        )
        for row in results.iter_rows():
            yield pickle.loads(row["result"])


def _started_ray(options: RayOptions) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ValueError(
            'the engine ray needs Ray, which is not installed: pip install "chestct[ray]"'
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if options.address:
        ray.init(address=options.address, **quiet)
        return ray
    ray.init(
        num_cpus=options.num_decoders + options.num_senders,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
        **quiet,
    )
    return ray


class _Decoder:
    """Files in, slices out; decodes in a process of its own, which may crash."""

    def __init__(self, window: Window, limit_s: float, memory_bytes: int) -> None:
        self._window = window
        pool = DecodePool(1, limit_s=limit_s, num_in_threads=0, memory_bytes=memory_bytes)
        self._pool = pool.start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        sources = [pickle.loads(each) for each in batch["source"]]
        decoding = [self._pool.submit(each, self._window) for each in sources]
        files = [
            file
            for source, future in zip(sources, decoding, strict=True)
            for file in decoded_files(source, future)
        ]
        return {"file": [pickle.dumps(file) for file in files]}


class _Sender:
    """Slices in, records out."""

    def __init__(self, servers: _Servers, with_map: bool) -> None:
        self._with_map = with_map
        self._fleet = servers.fleet()
        self._fleet.connect()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        files: list[DecodedFile] = [pickle.loads(each) for each in batch["file"]]
        results = [
            (record, item if self._with_map else _without_pixels(item))
            for record, item in answered_files(self._fleet, files, self._with_map)
        ]
        return {"result": [pickle.dumps(result) for result in results]}


def _without_pixels(item: DecodedInput) -> DecodedInput:
    scan = item.scan and replace(item.scan, pixels=item.scan.pixels[:0])
    return DecodedInput(item.source, None, None, scan)
