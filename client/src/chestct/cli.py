"""The command `chestct`: results on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from chestct import __version__
from chestct.batch import classify_paths, finished_paths
from chestct.client import ScanClient, TLSOptions
from chestct.contract import MODEL_NAME, NOT_A_MEDICAL_DEVICE
from chestct.errors import OutOfDomainError, ServerError
from chestct.report import json_text
from chestct.scan import SCAN_SUFFIXES, list_scans
from chestct.web import command as web

__all__ = ["entry_point", "main"]

DONE, SOME_FAILED, WRONG_USAGE, NO_SERVER = 0, 1, 2, 3
INTERRUPTED, STDOUT_CLOSED = 130, 141  # 128 + the signal, as shells have it


class _UsageError(Exception):
    """A mistake on the command line; the message is for the user."""


def entry_point() -> None:
    """The console script."""
    # gRPC's own log would stand between our lines; its reasons are in our errors already.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(main())


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

    classify = command("classify", "classify scan files and folders of them", _classify)
    classify.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help=f"a scan, or a folder searched for {', '.join(SCAN_SUFFIXES)} and unnamed DICOM files",
    )
    classify.add_argument("--json", action="store_true", help="JSON lines on stdout, no table")
    classify.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines to FILE")
    classify.add_argument("--resume", action="store_true", help="pass over the scans in --output")
    classify.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="scans in one request (%(default)s)"
    )
    classify.add_argument("--fail-fast", action="store_true", help="stop at the first bad scan")
    command("health", "send one synthetic slice and tell how the model answers", _health)
    web.add_options(command("web", "serve a page where scans can be dropped and looked at", _web))
    return parser


def _client(arguments: argparse.Namespace) -> ScanClient:
    if arguments.url.startswith("http"):
        import tritonclient.http  # noqa: F401

        # Comes with the line above, and would print an interrupt before it raises it.
        sys.modules["gevent"].get_hub().exception_stream = None
    try:
        return ScanClient(
            arguments.url,
            arguments.model,
            timeout_s=arguments.timeout_s,
            connect_timeout_s=arguments.connect_timeout_s,
            tls=_tls(arguments),
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


def _classify(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise _UsageError(f"--batch-size {arguments.batch_size}: expected at least 1")
    client = _client(arguments)
    paths = _found_scans(arguments.paths)
    finished = _finished(arguments.output, arguments.resume)
    left = (path for path in paths if str(path) not in finished)
    first = next(left, None)
    if first is None:
        _say(f"nothing to do: all scans are in {arguments.output}")
        return DONE
    with client, contextlib.ExitStack() as stack:
        outputs = [sys.stdout] if arguments.json else []
        if arguments.output is not None:
            # Line-buffered: after a crash at most the last line is torn.
            opened = arguments.output.open("a", buffering=1, encoding="ascii", newline="\n")
            outputs.append(stack.enter_context(opened))
        table = None if arguments.json else _Table(client.facts.labels)
        tally = stack.enter_context(_Tally(client, has_table=table is not None))
        if table is not None:
            stack.callback(lambda: table.sign(tally.signature))
        for line in classify_paths(client, chain([first], left), arguments.batch_size):
            for output in outputs:
                output.write(json_text(line))
            if table is not None:
                table.write(line)
            sys.stdout.flush()
            tally.add(line)
            if arguments.fail_fast and line["status"] == "error":
                break
    return SOME_FAILED if tally.num_errors else DONE


def _found_scans(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        if not root.exists():
            raise _UsageError(f"{root}: no such file or folder")
    found = chain.from_iterable(list_scans(root) for root in roots)
    first = next(found, None)
    if first is None:
        raise _UsageError(
            f"no scans in {', '.join(map(str, roots))}: expected {', '.join(SCAN_SUFFIXES)}"
        )
    return chain([first], found)


def _finished(output: Path | None, resume: bool) -> set[str]:
    if output is None:
        if resume:
            raise _UsageError("--resume needs --output FILE")
        return set()
    if not output.parent.is_dir():
        raise _UsageError(f"{output}: the folder {output.parent} is not there")
    if output.is_dir():
        raise _UsageError(f"{output}: a folder, expected a file to write to")
    if not output.is_file():
        return set()
    if not resume:
        raise _UsageError(f"{output}: exists. Add --resume to go on, or name another file.")
    try:
        return finished_paths(output)
    except (ValueError, OSError) as error:
        raise _UsageError(f"cannot resume: {error}") from error


class _Table:
    """Rows on stdout; path and reasons stand last, so that they align without knowing all."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._width = max(len(label) for label in (*labels, "label"))
        self._row("label", "probability", "in domain", "path")

    def write(self, line: dict[str, Any]) -> None:
        """One row for a record."""
        if line["status"] == "error":
            self._row("ERROR", "-", "NO" if _is_refused(line) else "-", line["error"]["message"])
            return
        probability = f"{line['probabilities'][line['label']]:.3f}"
        if line["in_domain"]:
            self._row(line["label"], probability, "yes", line["path"])
        else:
            text = f"{line['path']}: {'; '.join(line['reasons'])}"
            self._row(line["label"], probability, "NO", text)

    def sign(self, signature: Sequence[str]) -> None:
        """Ends the table: it may be kept without what stderr says."""
        for text in signature:
            sys.stdout.write(_printable(text, sys.stdout) + "\n")
        sys.stdout.flush()

    def _row(self, label: str, probability: str, in_domain: str, text: str) -> None:
        row = f"{label:<{self._width}}  {probability:>11}  {in_domain:<9}  {text}"
        sys.stdout.write(_printable(row, sys.stdout) + "\n")


class _Tally:
    """Counts what was done; shows progress on a terminal and a summary at the end."""

    def __init__(self, client: ScanClient, *, has_table: bool) -> None:
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._num_outside = 0
        self._num_refused = 0
        self.num_errors = 0
        self._asked = _model_text(client.model, client.model_version, client.facts.run)
        self._answered: dict[str, None] = {}
        self._start_s = time.perf_counter()
        # Rows that scroll by on the same terminal are progress enough.
        self._is_shown = sys.stderr.isatty() and not sys.stdout.isatty()
        self._is_signed = has_table and sys.stderr.isatty() and sys.stdout.isatty()

    def __enter__(self) -> _Tally:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            sys.stderr.write("\r\033[K")
        parts = [f"{count} {label}" for label, count in sorted(self._counts.items())]
        parts += [f"{self.num_errors} failed"] if self.num_errors else []
        _say(f"{self._progress()}: {', '.join(parts) or 'nothing finished'}")
        if self._num_refused:
            _say(f"{self._num_refused} refused: no axial CT slice by the DICOM tags")
        if self._num_outside:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._reasons.most_common())
            _say(f"{self._num_outside} out of domain, do not rely on their labels: {kinds}")
        if not self._is_signed:
            for text in self.signature:
                _say(text)

    @property
    def signature(self) -> list[str]:
        """What made the results, and what they are not."""
        return [*(self._answered or [self._asked]), NOT_A_MEDICAL_DEVICE]

    def add(self, line: dict[str, Any]) -> None:
        """Counts one record."""
        if line["status"] == "error":
            self.num_errors += 1
            self._num_refused += _is_refused(line)
        else:
            self._counts[line["label"]] += 1
            self._num_outside += not line["in_domain"]
            self._reasons.update(reason.partition(":")[0] for reason in line.get("reasons", ()))
            self._answered[_model_text(**line["model"])] = None
        if self._is_shown:
            sys.stderr.write(f"\r{self._progress()}")
            sys.stderr.flush()

    def _progress(self) -> str:
        num_scans = self._counts.total() + self.num_errors
        rate = num_scans / (time.perf_counter() - self._start_s)
        return f"{num_scans} scan{'s' * (num_scans != 1)}, {rate:.1f} scans/s"


def _model_text(name: str, version: str, run: str) -> str:
    return f"model {name} version {version}, run {run}"


def _is_refused(line: dict[str, Any]) -> bool:
    return bool(line["error"]["type"] == OutOfDomainError.__name__)


def _say(text: object) -> None:
    sys.stderr.write(_printable(str(text), sys.stderr) + "\n")


def _fail(reason: object, code: int) -> int:
    _say(f"chestct: {reason}")
    return code


def _printable(text: str, stream: TextIO) -> str:
    """Text without control characters (file names may hold any) that the stream can encode."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = stream.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _abandon_stdout() -> None:
    """Keeps the interpreter from failing once more when it flushes stdout on its way out."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
