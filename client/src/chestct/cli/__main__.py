"""The command `chestct`: results on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from chestct import __version__
from chestct.batch.pipeline import DECODE_LIMIT_S, NUM_IN_THREADS, classify_sources, new_workers
from chestct.batch.selection import Choice, find_sources, listed_paths, watch_sources
from chestct.batch.series_collector import SeriesGatherer
from chestct.batch.workers import Workers
from chestct.cli import web
from chestct.client import ScanClient
from chestct.contract import MODEL_NAME, NOT_A_MEDICAL_DEVICE
from chestct.errors import OutOfDomainError, ServerError, SpoolError
from chestct.imaging.limits import DECODE_MEMORY_BYTES
from chestct.imaging.scan import SCAN_SUFFIXES
from chestct.imaging.sources import Source
from chestct.inference.server_pool import UNAVAILABLE_TIMEOUT_S, ServerPool
from chestct.inference.wires import TLSOptions
from chestct.results.records import json_text, plain_text
from chestct.results.writers import (
    FORMATS,
    Finished,
    Item,
    Output,
    ParquetFile,
    Record,
    RecordFile,
    format_of,
    journal_of,
    open_records,
)

if TYPE_CHECKING:
    from chestct.batch.ray_engine import RayCluster

__all__ = ["entry_point", "main"]

DONE, SOME_FAILED, WRONG_USAGE, NO_SERVER = 0, 1, 2, 3
PROGRESS_PERIOD_S = 0.1
LISTEN_CONNECT_TIMEOUT_S = 5.0
LEAST_MEMORY_MB = 512  # an interpreter with numpy and the codecs takes half of it
INTERRUPTED, STDOUT_CLOSED = 130, 141  # 128 + the signal, as shells have it


class _UsageError(Exception):
    """A mistake on the command line; the message is for the user."""


def entry_point() -> None:
    """The console script."""
    # gRPC's own log would stand between our lines; its reasons are in our errors already.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    code = main()
    if code == INTERRUPTED:
        # Ctrl-C can leave a lock taken (python/cpython issue 74174); a thread that waits for it
        # would keep the interpreter from ending.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives back its exit code.

    Returns:
        0 all done, 1 some scans failed or the results could not be written, 2 wrong usage,
        3 no usable server, 130 interrupted, 141 the reader of stdout went away.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except _UsageError as error:
        return _fail(error, WRONG_USAGE)
    except ServerError as error:
        return _fail(error, NO_SERVER)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept", INTERRUPTED)
    except BrokenPipeError:
        _abandon_stdout()
        return STDOUT_CLOSED
    except OSError as error:
        _abandon_stdout()
        return _fail(f"cannot write the results: {error.strerror or error}", SOME_FAILED)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chestct",
        description=f"Classify chest-CT slices with a Triton server. {NOT_A_MEDICAL_DEVICE}",
    )
    version = f"chestct {__version__} ({NOT_A_MEDICAL_DEVICE})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    server = argparse.ArgumentParser(add_help=False)
    server.add_argument(
        "--url",
        action=_Addresses,
        default=os.environ.get("CHESTCT_URL", "grpc://127.0.0.1:8001"),
        help="grpc://HOST:8001, grpcs://, http://HOST:8000 or https:// (%(default)s; "
        "the variable CHESTCT_URL changes this default)",
    )
    server.add_argument("--model", default=MODEL_NAME, help="name of the model (%(default)s)")
    server.add_argument(
        "--timeout-s",
        type=float,
        default=30.0,
        metavar="S",
        help="deadline of one request (%(default)s)",
    )
    server.add_argument(
        "--connect-timeout-s",
        type=float,
        default=30.0,
        metavar="S",
        help="how long to wait for the server (%(default)s)",
    )
    for name, text in (
        ("ca", "authorities to trust, a PEM file (those of the system)"),
        ("cert", "the client's own certificate, a PEM file (none)"),
        ("key", "key of that certificate, a PEM file (none)"),
    ):
        server.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=text)

    def command(name: str, text: str, run: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {NOT_A_MEDICAL_DEVICE}",
            parents=[server],
        )
        added.set_defaults(run=run)
        return added

    _add_classify_arguments(
        command("classify", "classify scan files and folders of them", _classify)
    )
    listen = command("listen", "take CT series by DICOM, send reports back", _listen)
    listen.add_argument(
        "--queue", type=Path, required=True, metavar="DIR", help="folder that survives a crash"
    )
    listen.add_argument(
        "--status", action="store_true", help="tell what the queue holds, as JSON, and end"
    )
    listen.add_argument("--send-to", metavar="AET@HOST:PORT", help="the node that gets the reports")
    listen.add_argument("--ae-title", default="CHESTCT", help="title of this node (%(default)s)")
    listen.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    listen.add_argument("--port", type=int, default=11112, help="0 for a free one (%(default)s)")
    listen.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="AET",
        help="an AE title that may call; may be repeated (all, but only on this machine)",
    )
    listen.add_argument(
        "--quiet-s",
        type=float,
        default=30.0,
        metavar="S",
        help="a series is complete when nothing of it came for so long (%(default)s)",
    )
    listen.add_argument(
        "--at-release",
        action="store_true",
        help="a series is also complete when the association that sent it is released",
    )
    listen.add_argument(
        "--max-object-mb",
        type=float,
        default=256.0,
        metavar="MB",
        help="refuse larger objects (%(default)s)",
    )
    listen.add_argument(
        "--max-queue-gb",
        type=float,
        default=20.0,
        metavar="GB",
        help="refuse objects while the queue holds so much (%(default)s)",
    )
    listen.add_argument("--no-capture", action="store_true", help="no picture, the numbers alone")
    listen.add_argument("--keep", action="store_true", help="keep the files after delivery")
    listen.add_argument(
        "--ignore-others",
        action="store_true",
        help="accept and drop what is no CT image, instead of refusing it",
    )
    command("health", "send one synthetic slice and tell how the model answers", _health)
    web.add_options(command("web", "serve a page where scans can be dropped and looked at", _web))
    return parser


class _Addresses(argparse.Action):
    """`url` is the last address, `urls` holds all."""

    def __call__(self, parser: object, namespace: Any, values: Any, *_: object) -> None:
        namespace.url = values
        namespace.urls = [*getattr(namespace, "urls", ()), values]


def _add_classify_arguments(classify: argparse.ArgumentParser) -> None:
    classify.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help=f"a scan, a zip archive, or a folder searched for {', '.join(SCAN_SUFFIXES)}, "
        "archives and unnamed DICOM files; - reads a list of paths, one a line, from stdin",
    )
    results = classify.add_argument_group("results")
    results.add_argument("--json", action="store_true", help="JSON lines on stdout, no table")
    results.add_argument("--output", type=Path, metavar="FILE", help="write the records to FILE")
    results.add_argument(
        "--format",
        choices=FORMATS,
        help="of --output (by its suffix: .csv, .parquet, else jsonl)",
    )
    results.add_argument("--resume", action="store_true", help="pass over the scans in --output")
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
    which = classify.add_argument_group("which scans")
    which.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="only scans whose path or name matches; may be repeated",
    )
    which.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="no scans whose path or name matches; may be repeated",
    )
    which.add_argument("--limit", type=int, metavar="N", help="at most N files")
    which.add_argument("--fail-fast", action="store_true", help="stop at the first bad scan")
    which.add_argument(
        "--dry-run", action="store_true", help="list the files, and ask no server about them"
    )
    which.add_argument(
        "--watch", action="store_true", help="go on with new scans as they come, until Ctrl-C"
    )
    which.add_argument(
        "--settle-s",
        type=float,
        default=2.0,
        metavar="S",
        help="how long a folder has to be at rest under --watch (%(default)s)",
    )
    speed = classify.add_argument_group("speed")
    speed.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="scans in one request (%(default)s)"
    )
    speed.add_argument(
        "--workers", type=int, metavar="N", help="files decoded at once (one for each processor)"
    )
    speed.add_argument(
        "--decode-limit-s",
        type=float,
        default=DECODE_LIMIT_S,
        metavar="S",
        help="how long one file may take to decode (%(default)s)",
    )
    speed.add_argument(
        "--decode-memory-mb",
        type=float,
        default=DECODE_MEMORY_BYTES / 1e6,
        metavar="MB",
        help="how much address space a decoding process may take (%(default).0f)",
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


def _client(arguments: argparse.Namespace) -> ScanClient:
    try:
        return ScanClient(
            arguments.url,
            arguments.model,
            timeout_s=arguments.timeout_s,
            connect_timeout_s=arguments.connect_timeout_s,
            unavailable_timeout_s=0,  # `health` tells it, and the node waits by itself
            tls=_tls(arguments),
        )
    except ValueError as error:
        raise _UsageError(error) from error


def _fleet(arguments: argparse.Namespace) -> ServerPool:
    urls = getattr(arguments, "urls", None) or arguments.url.split(",")
    unavailable_timeout_s = arguments.unavailable_timeout_s
    if unavailable_timeout_s is None:
        unavailable_timeout_s = math.inf if arguments.watch else UNAVAILABLE_TIMEOUT_S
    try:
        return ServerPool(
            urls,
            arguments.model,
            timeout_s=arguments.timeout_s,
            connect_timeout_s=arguments.connect_timeout_s,
            tls=_tls(arguments),
            unavailable_timeout_s=unavailable_timeout_s,
        )
    except ValueError as error:
        raise _UsageError(error) from error


def _tls(arguments: argparse.Namespace) -> TLSOptions | None:
    files = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key)
    return TLSOptions(*files) if any(files) else None


def _health(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        health = client.health()
    sys.stdout.write(
        f"{health.model} version {health.version}, run {health.run}: "
        f"answered in {health.latency_ms:.1f} ms\n{health.notice}\n"
    )
    return DONE


def _web(arguments: argparse.Namespace) -> int:
    try:
        return web.run(arguments, _tls(arguments))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise _UsageError(error) from error


def _listen(arguments: argparse.Namespace) -> int:
    from chestct.pacs.queue import spool_status

    if arguments.status:
        if not arguments.queue.is_dir():
            raise _UsageError(f"{arguments.queue}: no such folder")
        sys.stdout.write(json.dumps(spool_status(arguments.queue)) + "\n")
        return DONE
    if arguments.send_to is None:
        raise _UsageError("--send-to AET@HOST:PORT is missing: the node that gets the reports")
    from chestct.pacs.node import DicomNode, ListenConfig, Listener
    from chestct.pacs.reports import classify_series

    try:
        config = ListenConfig(
            queue=arguments.queue,
            deliver_to=DicomNode.from_text(arguments.send_to),
            ae_title=arguments.ae_title,
            host=arguments.host,
            port=arguments.port,
            allowed=tuple(arguments.allow),
            quiet_s=arguments.quiet_s,
            at_release=arguments.at_release,
            max_object_bytes=round(arguments.max_object_mb * 1e6),
            max_queue_bytes=round(arguments.max_queue_gb * 1e9),
            keep=arguments.keep,
            ignore_others=arguments.ignore_others,
        )
    except ValueError as error:
        raise _UsageError(error) from error
    # The node waits by itself, and must be able to stop meanwhile.
    arguments.connect_timeout_s = min(arguments.connect_timeout_s, LISTEN_CONNECT_TIMEOUT_S)
    with contextlib.closing(_client(arguments)):
        pass  # wrong usage is told now, not with the first series

    def report(files: Sequence[Path], checkpoint: Callable[[], None]) -> Any:
        with _client(arguments) as client:
            return classify_series(
                client,
                files,
                checkpoint=checkpoint,
                with_capture=not arguments.no_capture,
                workers=workers,
            )

    _log_to_stderr()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        # What others send is decoded apart: it may crash, hang, or ask for all the memory.
        with new_workers(num_in_threads=0) as workers, Listener(config, report):
            stopped.wait()
    except (SpoolError, ImportError) as error:
        raise _UsageError(error) from error
    except OSError as error:
        raise _UsageError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
        ) from error
    return DONE


def _log_to_stderr() -> None:
    """Our lines alone: the libraries below quote names and UIDs of patients in theirs."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    for name in ("pynetdicom", "pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")


def _classify(arguments: argparse.Namespace) -> int:
    for name in ("batch_size", "workers", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise _UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if arguments.watch and arguments.engine != "local":
        raise _UsageError("--watch works with --engine local only")
    if arguments.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise _UsageError('--engine ray needs Ray: pip install "chestct[ray]"')
    fleet, stdout = _fleet(arguments), sys.stdout
    num_in_threads = 0 if arguments.isolate else NUM_IN_THREADS
    if not arguments.decode_memory_mb >= LEAST_MEMORY_MB:
        raise _UsageError(
            f"--decode-memory-mb {arguments.decode_memory_mb:g}: expected at least "
            f"{LEAST_MEMORY_MB}"
        )
    try:
        workers = new_workers(
            arguments.workers,
            limit_s=arguments.decode_limit_s,
            num_in_threads=num_in_threads,
            memory_bytes=round(arguments.decode_memory_mb * 1e6),
        )
    except ValueError as error:
        raise _UsageError(f"--decode-limit-s: {error}") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        sources = _found_sources(arguments)
        records = _earlier_records(arguments)
        if records is not None:
            stack.callback(records.close)
        finished = Finished() if records is None else records.finished
        left = _left(sources, finished)
        if arguments.limit is not None:
            left = islice(left, arguments.limit)
        if arguments.dry_run:
            return _list(left)
        first = list(islice(left, 1))  # before a server is asked
        if not first:
            _say(f"nothing to do: all scans are in {arguments.output}")
            return DONE
        cluster = None
        if arguments.engine == "ray":
            cluster = stack.enter_context(_cluster(arguments, fleet, workers))
        stack.enter_context(workers)
        stack.enter_context(fleet)
        outputs = _outputs(arguments, fleet, records, stack)
        run = _Run(arguments, fleet, outputs, finished, stack, stdout)
        chosen, with_map = chain(first, left), any(output.wants_maps for output in outputs)
        if cluster is not None:
            classified = cluster.classify(fleet, chosen, with_map=with_map, finished=finished)
        else:
            classified = classify_sources(
                fleet, chosen, workers, arguments.batch_size, with_map=with_map, finished=finished
            )
        for record, item in classified:
            if run.take(record, item) and arguments.fail_fast:
                break
        else:
            run.end_series(None)
    return SOME_FAILED if run.tally.num_failed else DONE


def _cluster(arguments: argparse.Namespace, fleet: ServerPool, workers: Workers) -> RayCluster:
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


def _found_sources(arguments: argparse.Namespace) -> Iterator[Source | None]:
    choice = Choice(tuple(arguments.include), tuple(arguments.exclude))
    roots = [Path(text) for text in arguments.paths if text != "-"]
    if arguments.watch:
        if len(roots) < len(arguments.paths) or not arguments.settle_s > 0:
            raise _UsageError("--watch needs folders, and --settle-s above 0 seconds")
        return watch_sources(roots, choice, arguments.settle_s)
    for root in roots:
        if not os.path.lexists(root):
            raise _UsageError(f"{root}: no such file or folder")
    parts = [
        find_sources(listed_paths(sys.stdin) if text == "-" else [Path(text)], choice)
        for text in arguments.paths
    ]
    found = chain.from_iterable(parts)
    first = next(found, None)
    if first is None:
        raise _UsageError(
            f"no scans in {', '.join(map(str, roots)) or 'the list'}: expected "
            f"{', '.join(SCAN_SUFFIXES)}"
        )
    return chain([first], found)


def _left(sources: Iterable[Source | None], finished: Finished) -> Iterator[Source | None]:
    return (
        source
        for source in sources
        if source is None or source.name not in finished or source.name in finished.pending
    )


def _list(sources: Iterable[Source | None]) -> int:
    count = 0
    for source in sources:
        if source is None:  # all that is there by now
            break
        count += 1
        sys.stdout.write(_printable(source.name, sys.stdout) + "\n")
    _say(f"{count} file{'s' * (count != 1)} would be classified")
    return DONE


def _earlier_records(arguments: argparse.Namespace) -> RecordFile | ParquetFile | None:
    """The file of an earlier run, if there is one to go on with."""
    output: Path | None = arguments.output
    if output is None:
        if arguments.resume:
            raise _UsageError("--resume needs --output FILE")
        return None
    if not output.parent.is_dir():
        raise _UsageError(f"{output}: the folder {output.parent} is not there")
    if output.is_dir():
        raise _UsageError(f"{output}: a folder, expected a file to write to")
    form = format_of(output, arguments.format)
    is_begun = output.is_file() or journal_of(output).is_file()
    if not is_begun or (form != "parquet" and not output.is_file()):
        return None
    if not arguments.resume:
        raise _UsageError(f"{output}: exists. Add --resume to go on, or name another file.")
    try:
        return open_records(output, form, resume=True)
    except (ValueError, OSError) as error:
        raise _UsageError(f"cannot resume: {error}") from error


def _outputs(
    arguments: argparse.Namespace,
    fleet: ServerPool,
    records: RecordFile | ParquetFile | None,
    stack: contextlib.ExitStack,
) -> list[Output]:
    """Everything that is written to; the records come last, see `chestct.results.writers`."""
    labels = fleet.metadata.class_names
    outputs: list[Output] = []
    if arguments.overlays is not None or arguments.html is not None:
        from chestct.results.overlays import HtmlReport, OverlayPngs

        if arguments.overlays is not None:
            outputs.append(OverlayPngs(arguments.overlays, labels))
        if arguments.html is not None:
            outputs.append(HtmlReport(arguments.html, labels))
    if arguments.dicom_sr is not None:
        if arguments.no_series:
            raise _UsageError("--dicom-sr reports on series, which --no-series leaves out")
        from chestct.pacs.reports import DicomReports

        try:
            outputs.append(DicomReports(arguments.dicom_sr, fleet.metadata.window))
        except ImportError as error:
            raise _UsageError(error) from error
    for output in outputs:
        stack.callback(output.close)
    try:
        if records is None and arguments.output is not None:
            form = format_of(arguments.output, arguments.format)
            records = open_records(arguments.output, form)
            stack.callback(records.close)
        if records is not None:
            records.start(labels)
            outputs.append(records)
    except ValueError as error:
        raise _UsageError(error) from error
    return outputs


class _Run:
    """What happens to every record: series, outputs, stdout, and the summary."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        fleet: ServerPool,
        outputs: Sequence[Output],
        finished: Finished,
        stack: contextlib.ExitStack,
        stream: TextIO,
    ) -> None:
        self._outputs = outputs
        self._stream = stream
        self.finished = finished
        self._has_series = not arguments.no_series
        self._table = None if arguments.json else _Table(fleet.metadata.class_names, stream)
        self.tally = stack.enter_context(
            _Tally(fleet, arguments.paths, has_table=self._table is not None)
        )
        if self._table is not None:
            table = self._table
            stack.callback(lambda: table.sign(self.tally.signature))
        self._gatherer = SeriesGatherer(
            finished,
            with_uids=arguments.with_uids,
            keeps_items=any(output.wants_series for output in outputs),
        )

    def take(self, record: Record, item: Item) -> bool:
        """Hands a record to everyone; whether it is that of a scan that failed."""
        self.end_series(record["path"])
        is_new = record["path"] not in self.finished
        record = self._gatherer.add(record, item)
        if not is_new:
            return False
        for output in self._outputs:
            output.add(record, item)
        return self._show(record)

    def end_series(self, path: str | None) -> None:
        """Sums up the series that do not go on at a path."""
        for record, items in self._gatherer.left(path):
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


class _Table:
    """Rows on stdout; path and reasons stand last, so that they align without knowing all."""

    def __init__(self, labels: Sequence[str], stream: TextIO) -> None:
        self._stream = stream
        self._width = max(len(label) for label in (*labels, "label"))
        self._row("label", "probability", "in domain", "path")

    def write(self, line: Record) -> None:
        """One row for a record."""
        is_series = "num_slices" in line
        text = f"series {line['series']} of {line['path']}" if is_series else line["path"]
        why_not = line.get("warnings" if is_series else "reasons", ())
        if line["status"] == "error":
            message = line["error"]["message"]
            text = f"{text}: {message}" if is_series else message
            self._row("ERROR", "-", "NO" if _is_skipped(line) else "-", text)
            return
        if why_not:
            text = f"{text}: {'; '.join(why_not)}"
        probability = f"{line['probabilities'][line['label']]:.3f}"
        in_domain = "-" if is_series else "yes" if line["in_domain"] else "NO"
        self._row(line["label"], probability, in_domain, text)

    def sign(self, signature: Sequence[str]) -> None:
        """Ends the table: it may be kept without what stderr says."""
        for text in signature:
            self._stream.write(_printable(text, self._stream) + "\n")
        self._stream.flush()

    def _row(self, label: str, probability: str, in_domain: str, text: str) -> None:
        row = f"{label:<{self._width}}  {probability:>11}  {in_domain:<9}  {text}"
        self._stream.write(_printable(row, self._stream) + "\n")


class _Tally:
    """Counts what was done; shows progress on a terminal and a summary at the end."""

    def __init__(self, fleet: ServerPool, paths: Sequence[str], *, has_table: bool) -> None:
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._series: Counter[str] = Counter()
        self._num_outside = 0
        # Who names a file wants to know about it; a folder may hold anything.
        self._named = {path for path in paths if os.path.isfile(path)}
        self._asked = _model_text(fleet.model, fleet.model_version, fleet.metadata.run)
        self._answered: dict[str, None] = {}
        self._start_s = time.perf_counter()
        self._shown_s = -PROGRESS_PERIOD_S
        # Rows that scroll by on the same terminal are progress enough.
        self._is_shown = sys.stderr.isatty() and not sys.stdout.isatty()
        self._is_signed = has_table and sys.stderr.isatty() and sys.stdout.isatty()

    def __enter__(self) -> _Tally:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            sys.stderr.write("\r\033[K")
        parts = [f"{count} {label}" for label, count in sorted(self._counts.items())]
        parts += [f"{self.num_failed} failed"] if self.num_failed else []
        _say(f"{self._progress()}: {', '.join(parts) or 'nothing finished'}")
        for counts, text in (
            (self._series, "series"),
            (self._failures, "failed"),
            (self._skipped, "skipped, no axial CT slice by the DICOM tags"),
            (self._reasons, "out of domain, do not rely on their labels"),
        ):
            total = self._num_outside if counts is self._reasons else counts.total()
            if total:
                kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
                _say(f"{total} {text}: {kinds}")
        if not self._is_signed:
            for text in self.signature:
                _say(text)

    @property
    def num_failed(self) -> int:
        """How many scans are not classified and should have been."""
        return self._failures.total()

    @property
    def signature(self) -> list[str]:
        """What made the results, and what they are not."""
        return [*(self._answered or [self._asked]), NOT_A_MEDICAL_DEVICE]

    def add(self, line: Record) -> bool:
        """Counts one record; whether it is that of a scan that failed."""
        has_failed = False
        if "num_slices" in line:
            self._series[line.get("label", "out of domain")] += 1
        elif line["status"] == "error":
            has_failed = not _is_skipped(line) or line["path"] in self._named
            if has_failed:
                self._failures[line["error"]["type"]] += 1
            else:
                self._skipped[line["error"].get("kind", "unknown")] += 1
        else:
            self._counts[line["label"]] += 1
            self._num_outside += not line["in_domain"]
            self._reasons.update(reason.partition(":")[0] for reason in line.get("reasons", ()))
            self._answered[_model_text(**line["model"])] = None
        if self._is_shown and time.perf_counter() - self._shown_s >= PROGRESS_PERIOD_S:
            self._shown_s = time.perf_counter()
            sys.stderr.write(f"\r{self._progress()}")
            sys.stderr.flush()
        return has_failed

    def _progress(self) -> str:
        num_scans = self._counts.total() + self.num_failed + self._skipped.total()
        rate = num_scans / (time.perf_counter() - self._start_s)
        return f"{num_scans} scan{'s' * (num_scans != 1)}, {rate:.1f} scans/s"


def _model_text(name: str, version: str, run: str) -> str:
    return f"model {name} version {version}, run {run}"


def _is_skipped(line: Record) -> bool:
    return bool(line["error"]["type"] == OutOfDomainError.__name__)


def _say(text: object) -> None:
    sys.stderr.write(_printable(str(text), sys.stderr) + "\n")


def _fail(reason: object, code: int) -> int:
    _say(f"chestct: {reason}")
    return code


def _printable(text: str, stream: TextIO) -> str:
    """Text without control characters (file names may hold any) that the stream can encode."""
    encoding = stream.encoding or "utf-8"
    return plain_text(text).encode(encoding, "backslashreplace").decode(encoding)


def _abandon_stdout() -> None:
    """Keeps the interpreter from failing once more when it flushes stdout on its way out."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    entry_point()
