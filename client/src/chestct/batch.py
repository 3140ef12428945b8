"""A stream of files becomes a stream of records: decode ahead, send in batches, keep the order."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from chestct.client import ScanClient
from chestct.contract import Window
from chestct.errors import ScanDecodeError, ServerError
from chestct.report import error_line, result_line
from chestct.scan import Scan, inspect_scan

__all__ = ["classify_paths", "finished_paths"]

NUM_REQUESTS = 2
MAX_WORKERS = 8
LINE_START = b'{"path": '  # how `report.json_text` begins every record


@dataclass(frozen=True)
class _Decoded:
    path: str
    scan: Scan | ScanDecodeError
    decode_ms: float


_Outcome = tuple[list[dict[str, Any]], ServerError | None]


def classify_paths(
    client: ScanClient, paths: Iterable[Path], batch_size: int = 8, workers: int | None = None
) -> Iterator[dict[str, Any]]:
    """One record for each scan file, in the order of `paths`.

    Files are decoded by threads while earlier ones are on the wire. Over gRPC two requests are
    under way at once, so that a server always has the next one and one with several instances has
    work for two; over HTTP it is one, because a connection belongs to one thread. At most four
    batches are held. A file that cannot be decoded, or is no axial CT slice by its DICOM tags,
    becomes a record of its error, and the rest goes on.

    Args:
        client: A connected client.
        paths: Scan files; drawn from as needed, so it may be endless.
        batch_size: How many files go into one request.
        workers: How many threads decode; by default one for each processor, but at most 8.

    Yields:
        Records as made by `chestct.report`.

    Raises:
        ServerError: The server failed; what was finished before has been yielded.
        ValueError: `batch_size` or `workers` below 1.
    """
    workers = min(os.cpu_count() or 1, MAX_WORKERS) if workers is None else workers
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size {batch_size}, workers {workers}: expected at least 1 each")
    window = client.facts.window
    coming = iter(paths)
    ahead: deque[Future[_Decoded]] = deque()
    sent: deque[Callable[[], _Outcome]] = deque()
    max_sent = NUM_REQUESTS if client.url.startswith("grpc") else 1
    decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    senders = ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="send")
    try:
        while True:
            while len(ahead) < 2 * batch_size and (path := next(coming, None)) is not None:
                ahead.append(decoders.submit(_decode, path, window))
            if ahead and len(sent) < max_sent:
                batch = [ahead.popleft().result() for _ in range(min(batch_size, len(ahead)))]
                if max_sent == 1:
                    sent.append(partial(_classified, client, batch))
                else:
                    sent.append(senders.submit(_classified, client, batch).result)
            elif sent:
                lines, error = sent.popleft()()
                yield from lines
                if error is not None:
                    raise error
            else:
                return
    finally:
        senders.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)


def _decode(path: Path, window: Window) -> _Decoded:
    start = time.perf_counter()
    scan: Scan | ScanDecodeError
    try:
        scan = inspect_scan(path, window)
    except ScanDecodeError as error:
        scan = error
    return _Decoded(str(path), scan, 1000 * (time.perf_counter() - start))


def _classified(client: ScanClient, batch: list[_Decoded]) -> _Outcome:
    """The records of a batch in its order, those of its errors alone when the server failed."""
    lines: dict[int, dict[str, Any]] = {}
    scans: dict[int, Scan] = {}
    for place, item in enumerate(batch):
        if isinstance(item.scan, ScanDecodeError):
            lines[place] = error_line(item.path, item.scan)
        else:
            scans[place] = item.scan
    if scans:
        start = time.perf_counter()
        try:
            pixels = np.stack([scan.pixels for scan in scans.values()])
            predictions = client.classify(pixels, with_map=False)
        except ServerError as error:
            return list(lines.values()), error
        infer_ms = 1000 * (time.perf_counter() - start) / len(scans)
        for index, (place, scan) in enumerate(scans.items()):
            lines[place] = result_line(
                batch[place].path,
                predictions,
                index,
                decode_ms=batch[place].decode_ms,
                infer_ms=infer_ms,
                reasons=scan.reasons,
            )
    return [lines[place] for place in range(len(batch))], None


def finished_paths(output: Path) -> set[str]:
    """The paths with a whole record in an output file, so that a later run can pass over them.

    A last line that was torn by a crash is cut off the file, which can be appended to after that.

    Args:
        output: File of JSON lines; a missing one holds nothing.

    Returns:
        `path` of each record, whether its status is `ok` or `error`.

    Raises:
        ValueError: The file holds something else; it is left as it is.
        OSError: The file cannot be read or cut.
    """
    finished: set[str] = set()
    if not output.exists():
        return finished
    whole_bytes = 0
    with output.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                if not line.startswith(LINE_START) and not LINE_START.startswith(line):
                    raise _foreign(output, number)
                break
            try:
                record = json.loads(line)
                if record["status"] not in ("ok", "error"):
                    raise _foreign(output, number)
                finished.add(record["path"])
            except (ValueError, TypeError, KeyError):
                raise _foreign(output, number) from None
            whole_bytes += len(line)
    if whole_bytes < output.stat().st_size:
        os.truncate(output, whole_bytes)
    return finished


def _foreign(output: Path, number: int) -> ValueError:
    return ValueError(f"{output}: line {number} is not a record of chestct classify")
