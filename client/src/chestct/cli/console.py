"""Console output: a table on stdout, progress and summary on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from chestct.contract import NOT_A_MEDICAL_DEVICE
from chestct.errors import OutOfDomainError
from chestct.inference.server_pool import ServerPool
from chestct.results.records import Record, plain_text

DONE, SOME_FAILED, WRONG_USAGE, NO_SERVER = 0, 1, 2, 3
INTERRUPTED, STDOUT_CLOSED = 130, 141  # 128 + the signal, as shells have it
PROGRESS_PERIOD_S = 0.1


class UsageError(Exception):
    """A mistake on the command line; the message is for the user."""


class Table:
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
            self._stream.write(printable(text, self._stream) + "\n")
        self._stream.flush()

    def _row(self, label: str, probability: str, in_domain: str, text: str) -> None:
        row = f"{label:<{self._width}}  {probability:>11}  {in_domain:<9}  {text}"
        self._stream.write(printable(row, self._stream) + "\n")


class Tally:
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

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            sys.stderr.write("\r\033[K")
        parts = [f"{count} {label}" for label, count in sorted(self._counts.items())]
        parts += [f"{self.num_failed} failed"] if self.num_failed else []
        say(f"{self._progress()}: {', '.join(parts) or 'nothing finished'}")
        for counts, text in (
            (self._series, "series"),
            (self._failures, "failed"),
            (self._skipped, "skipped, no axial CT slice by the DICOM tags"),
            (self._reasons, "out of domain, do not rely on their labels"),
        ):
            total = self._num_outside if counts is self._reasons else counts.total()
            if total:
                kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
                say(f"{total} {text}: {kinds}")
        if not self._is_signed:
            for text in self.signature:
                say(text)

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


def say(text: object) -> None:
    """One line on stderr."""
    sys.stderr.write(printable(str(text), sys.stderr) + "\n")


def print_json(value: Any) -> None:
    """One object on a line of stdout, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def printable(text: str, stream: TextIO) -> str:
    """Text without control characters (file names may hold any) that the stream can encode."""
    encoding = stream.encoding or "utf-8"
    return plain_text(text).encode(encoding, "backslashreplace").decode(encoding)


def abandon_stdout() -> None:
    """Keeps the interpreter from failing once more when it flushes stdout on its way out."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
