"""The way of `chestct.batch` on a Ray cluster: its machines decode, and ask the servers.

Sources go out and records come back through Ray Data, in the order of the sources, so that all
else (outputs, series, going on after a crash) is that of one machine.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from chestct.batch import DecodedFile, answered_files, decode_source, decoded_files, new_workers
from chestct.client import TLSOptions
from chestct.contract import Window
from chestct.errors import ServerError
from chestct.fleet import Fleet
from chestct.outputs import Finished, Item, Record
from chestct.sources import Source

__all__ = ["RayOptions", "classify_on_ray"]

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
        batch_size: How many scans go into one request.
        with_map: Whether items hold pixels and activation map.
    """

    address: str = ""
    num_decoders: int = 2
    num_senders: int = 1
    decode_limit_s: float = 60.0
    batch_size: int = 8
    with_map: bool = False


@dataclass(frozen=True)
class _Servers:
    urls: tuple[str, ...]
    model: str
    timeout_s: float
    connect_timeout_s: float
    tls: TLSOptions | None
    patience_s: float

    def fleet(self) -> Fleet:
        return Fleet(
            self.urls,
            self.model,
            timeout_s=self.timeout_s,
            connect_timeout_s=self.connect_timeout_s,
            tls=self.tls,
            patience_s=self.patience_s,
        )


def classify_on_ray(
    fleet: Fleet,
    sources: Iterable[Source | None],
    options: RayOptions,
    finished: Finished | None = None,
) -> Iterator[tuple[Record, Item]]:
    """Record and origin of each scan, in the order of `sources`: see `classify_sources`.

    A file that crashes its decoder is a record of that; the work of a machine that is lost is done
    again on another one. A `ServerError` on a machine comes back as Ray's error, which names it.

    Args:
        fleet: Connected servers; the machines of the cluster use the same addresses.
        sources: Scans; the machines have to see them under the same paths.
        options: How to work.
        finished: What an earlier run has written.

    Raises:
        ValueError: Ray is not installed.
        ServerError: The servers failed; what was finished before has been yielded.
    """
    ray = _started_ray(options)
    known = Finished() if finished is None else finished
    servers = _Servers(
        fleet.urls, fleet.model, fleet.timeout_s, fleet.connect_timeout_s, fleet.tls,
        fleet.patience_s,
    )  # fmt: skip
    coming = (source for source in sources if source is not None)
    try:
        while some := list(islice(coming, SOURCES_AT_ONCE)):
            yield from _classified(ray, some, servers, fleet.facts.window, options, known)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error.__cause__ or error).split())[-300:]
        raise ServerError(f"the Ray cluster gave up: {reason}") from error
    finally:
        if not options.address:
            ray.shutdown()


def _started_ray(options: RayOptions) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ValueError(
            'the engine ray needs Ray, which is not installed: pip install "chestct[ray]"'
        ) from error
    if ray.is_initialized():
        return ray
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


def _classified(
    ray: Any,
    sources: list[Source],
    servers: _Servers,
    window: Window,
    options: RayOptions,
    known: Finished,
) -> Iterator[tuple[Record, Item]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    rows = [{"source": pickle.dumps(source)} for source in sources]
    blocks = max(1, len(rows) // BLOCK_FILES)
    results = (
        ray.data.from_items(rows, override_num_blocks=blocks)
        .map_batches(
            _Decoder,
            fn_constructor_args=(window, options.decode_limit_s),
            batch_size=BLOCK_FILES,
            concurrency=options.num_decoders,
            num_cpus=1,
        )
        .map_batches(
            _Sender,
            fn_constructor_args=(servers, options.with_map),
            batch_size=options.batch_size,
            concurrency=options.num_senders,
            num_cpus=1,
        )
    )
    for row in results.iter_rows():
        record, item = pickle.loads(row["result"])
        path = record["path"]
        if path in known.pending:
            yield known.pending[path], item
        elif path not in known:
            yield record, item


class _Decoder:
    """Files in, slices out; decodes in a process of its own, which may crash."""

    def __init__(self, window: Window, limit_s: float) -> None:
        self._window = window
        self._workers = new_workers(1, limit_s=limit_s, num_in_threads=0)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        sources = [pickle.loads(each) for each in batch["source"]]
        decoding = [self._workers.submit(decode_source, each, self._window) for each in sources]
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


def _without_pixels(item: Item) -> Item:
    scan = item.scan and replace(item.scan, pixels=item.scan.pixels[:0])
    return Item(item.source, None, None, scan)
