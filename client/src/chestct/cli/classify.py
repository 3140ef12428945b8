"""`chestct classify`: from files and folders to records, in a table or in files."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from chestct.batch.decode_pool import DECODE_LIMIT_S, NUM_IN_THREADS, DecodePool
from chestct.batch.pipeline import classify_sources
from chestct.batch.selection import Flush, PathFilter, find_sources, listed_paths, watch_sources
from chestct.batch.series_collector import SeriesCollector
from chestct.cli.console import DONE, SOME_FAILED, Table, Tally, UsageError, printable, say
from chestct.cli.options import add_list, add_number, add_server_options, fleet_of
from chestct.cli.outputs import earlier_records, open_outputs
from chestct.imaging.limits import DECODE_MEMORY_BYTES
from chestct.imaging.sources import SCAN_SUFFIXES, Source
from chestct.inference.server_pool import ServerPool
from chestct.results.formats import FORMATS
from chestct.results.records import Record, SliceResult, json_text
from chestct.results.resume import ResumeIndex
from chestct.results.writers import DecodedInput, Output

if TYPE_CHECKING:
    from chestct.batch.ray_engine import RayCluster

LEAST_MEMORY_MB = 512  # an interpreter with numpy and the codecs takes half of it


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `chestct classify`."""
    add_server_options(parser)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help=f"a scan, a zip archive, or a folder searched for {', '.join(SCAN_SUFFIXES)}, "
        "archives and unnamed DICOM files; - reads a list of paths, one a line, from stdin",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--json", action="store_true", help="JSON lines on stdout, no table")
    results.add_argument("--output", type=Path, metavar="FILE", help="write the records to FILE")
    results.add_argument(
        "--format", choices=FORMATS, help="of --output (by its suffix: .csv, .parquet, else jsonl)"
    )
    results.add_argument("--resume", action="store_true", help="pass over the scans in --output")
    results.add_argument(
        "--retry-errors", action="store_true", help="with --resume, try failed scans again"
    )
    results.add_argument(
        "--overlays", type=Path, metavar="DIR", help="a PNG of each scan with its activation map"
    )
    results.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="one page with thumbnails; it holds images of patients",
    )
    results.add_argument(
        "--dicom-sr",
        type=Path,
        metavar="DIR",
        help="a DICOM SR and a Secondary Capture of each series; they hold the patient's name",
    )
    results.add_argument("--no-series", action="store_true", help="no records of whole series")
    results.add_argument(
        "--with-uids", action="store_true", help="DICOM UIDs in the records; none without"
    )
    which = parser.add_argument_group("which scans")
    add_list(which, "--include", "GLOB", "only scans whose path or name matches")
    add_list(which, "--exclude", "GLOB", "no scans whose path or name matches")
    which.add_argument("--limit", type=int, metavar="N", help="at most N files")
    which.add_argument("--fail-fast", action="store_true", help="stop at the first bad scan")
    which.add_argument(
        "--dry-run", action="store_true", help="list the files, and ask no server about them"
    )
    which.add_argument(
        "--watch", action="store_true", help="go on with new scans as they come, until Ctrl-C"
    )
    add_number(which, "--settle-s", "S", 2.0, "how long a folder has to be at rest under --watch")
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="scans in one request (%(default)s)"
    )
    speed.add_argument(
        "--workers", type=int, metavar="N", help="files decoded at once (one for each processor)"
    )
    add_number(
        speed, "--decode-limit-s", "S", DECODE_LIMIT_S, "how long one file may take to decode"
    )
    add_number(
        speed,
        "--decode-memory-mb",
        "MB",
        DECODE_MEMORY_BYTES / 1e6,
        "how much address space a decoding process may take",
    )
    speed.add_argument(
        "--isolate",
        action="store_true",
        help=f"decode the first {NUM_IN_THREADS} files in other processes too",
    )
    speed.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where to decode and to ask the servers from: here, or on a Ray cluster (%(default)s)",
    )
    speed.add_argument(
        "--ray-address",
        default="",
        metavar="ADDRESS",
        help="of the Ray cluster (one is started on this machine)",
    )
    speed.add_argument(
        "--unavailable-timeout-s",
        "--patience-s",
        type=float,
        metavar="S",
        help="how long all servers may be unavailable before the run ends (60; no limit with "
        "--watch)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Classifies scans and writes their records.

    Raises:
        UsageError: An option is wrong, or there are no scans.
        ServerError: No usable server.
        OSError: The results cannot be written.
    """
    for name in ("batch_size", "workers", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if arguments.watch and arguments.engine != "local":
        raise UsageError("--watch works with --engine local only")
    if arguments.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError('--engine ray needs Ray: pip install "chestct[ray]"')
    fleet, stdout = fleet_of(arguments), sys.stdout
    num_in_threads = 0 if arguments.isolate else NUM_IN_THREADS
    if not arguments.decode_memory_mb >= LEAST_MEMORY_MB:
        raise UsageError(
            f"--decode-memory-mb {arguments.decode_memory_mb:g}: expected at least "
            f"{LEAST_MEMORY_MB}"
        )
    try:
        workers = DecodePool(
            arguments.workers,
            limit_s=arguments.decode_limit_s,
            num_in_threads=num_in_threads,
            memory_bytes=round(arguments.decode_memory_mb * 1e6),
        )
    except ValueError as error:
        raise UsageError(f"--decode-limit-s: {error}") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        sources = _found_sources(arguments)
        records = earlier_records(arguments)
        if records is not None:
            stack.callback(records.close)
        finished = ResumeIndex() if records is None else records.finished
        left = _left(sources, finished)
        if arguments.limit is not None:
            left = islice(left, arguments.limit)
        if arguments.dry_run:
            return _list(left)
        first = list(islice(left, 1))  # before a server is asked
        if not first:
            say(f"nothing to do: all scans are in {arguments.output}")
            return DONE
        cluster = None
        if arguments.engine == "ray":
            cluster = stack.enter_context(_cluster(arguments, fleet, workers))
        stack.enter_context(workers)
        stack.enter_context(fleet)
        outputs = open_outputs(arguments, fleet, workers, records, stack)
        batch = _Run(arguments, fleet, outputs, finished, stack, stdout)
        chosen, with_map = chain(first, left), any(output.wants_maps for output in outputs)
        if cluster is not None:
            classified = cluster.classify(fleet, chosen, with_map=with_map, finished=finished)
        else:
            classified = classify_sources(
                fleet, chosen, workers, arguments.batch_size, with_map=with_map, finished=finished
            )
        for record, item in classified:
            if batch.take(record, item) and arguments.fail_fast:
                break
        else:
            batch.end_series(None)
    return SOME_FAILED if batch.tally.num_failed else DONE


def _cluster(arguments: argparse.Namespace, fleet: ServerPool, workers: DecodePool) -> RayCluster:
    from chestct.batch.ray_engine import RayCluster, RayOptions

    return RayCluster(
        RayOptions(
            arguments.ray_address,
            num_decoders=workers.num_workers,
            num_senders=len(fleet.urls),
            decode_limit_s=arguments.decode_limit_s,
            decode_memory_bytes=round(arguments.decode_memory_mb * 1e6),
            batch_size=arguments.batch_size,
        )
    )


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A service manager ends a run as Ctrl-C does: what was finished is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _found_sources(arguments: argparse.Namespace) -> Iterator[Source | Flush]:
    choice = PathFilter(tuple(arguments.include), tuple(arguments.exclude))
    roots = [Path(text) for text in arguments.paths if text != "-"]
    if arguments.watch:
        if len(roots) < len(arguments.paths) or not arguments.settle_s > 0:
            raise UsageError("--watch needs folders, and --settle-s above 0 seconds")
        return watch_sources(roots, choice, arguments.settle_s)
    for root in roots:
        if not os.path.lexists(root):
            raise UsageError(f"{root}: no such file or folder")
    parts = [
        find_sources(listed_paths(sys.stdin) if text == "-" else [Path(text)], choice)
        for text in arguments.paths
    ]
    found = chain.from_iterable(parts)
    first = next(found, None)
    if first is None:
        raise UsageError(
            f"no scans in {', '.join(map(str, roots)) or 'the list'}: expected "
            f"{', '.join(SCAN_SUFFIXES)}"
        )
    return chain([first], found)


def _left(sources: Iterable[Source | Flush], finished: ResumeIndex) -> Iterator[Source | Flush]:
    return (
        source
        for source in sources
        if isinstance(source, Flush) or not finished.is_complete(source.name)
    )


def _list(sources: Iterable[Source | Flush]) -> int:
    count = 0
    for source in sources:
        if isinstance(source, Flush):  # all that is there by now
            break
        count += 1
        sys.stdout.write(printable(source.name, sys.stdout) + "\n")
    say(f"{count} file{'s' * (count != 1)} would be classified")
    return DONE


class _Run:
    """Handle each record: series, outputs, stdout, summary."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        fleet: ServerPool,
        outputs: Sequence[Output],
        finished: ResumeIndex,
        stack: contextlib.ExitStack,
        stream: TextIO,
    ) -> None:
        self._outputs = outputs
        self._stream = stream
        self.finished = finished
        self._has_series = not arguments.no_series
        self._table = None if arguments.json else Table(fleet.metadata.class_names, stream)
        self.tally = stack.enter_context(
            Tally(fleet, arguments.paths, has_table=self._table is not None)
        )
        if self._table is not None:
            table = self._table
            stack.callback(lambda: table.sign(self.tally.signature))
        self._collector = SeriesCollector(
            finished,
            with_uids=arguments.with_uids,
            keeps_items=any(output.wants_series for output in outputs),
        )

    def take(self, record: SliceResult, item: DecodedInput) -> bool:
        """Hands a record to everyone; whether it is that of a scan that failed."""
        self.end_series(record["path"])
        is_new = record["path"] not in self.finished
        record = self._collector.add(record, item)
        if not is_new:
            return False
        for output in self._outputs:
            output.add(record, item)
        return self._show(record)

    def end_series(self, path: str | None) -> None:
        """Sums up the series that do not go on at a path."""
        for record, items in self._collector.left(path):
            if self._has_series:
                for output in self._outputs:
                    output.end_series(record, items if output.wants_series else ())
                self._show(record)

    def _show(self, record: Record) -> bool:
        if self._table is None:
            self._stream.write(json_text(record))
        else:
            self._table.write(record)
        self._stream.flush()
        return self.tally.add(record)
