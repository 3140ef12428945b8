"""A stream of files becomes a stream of records: decode ahead, send in batches, keep the order.

Files are decoded in processes (the first few in threads) while earlier ones are with the servers.
Records come in the order of the files. Everything between is bounded, so the files may be endless.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from chestct.batch.decode_pool import DecodedSlice, DecodePool
from chestct.batch.selection import FLUSH, Flush
from chestct.contract import Window
from chestct.errors import ScanDecodeError, ServerError
from chestct.imaging.prepare import Scan, Slice
from chestct.imaging.sources import Source
from chestct.inference.predictions import Predictions
from chestct.inference.server_pool import ServerPool
from chestct.results.records import SliceResult, error_line, result_line
from chestct.results.resume import ResumeIndex
from chestct.results.writers import DecodedInput

__all__ = [
    "DecodedFile",
    "answered_files",
    "classify_sources",
    "decoded_files",
]

MOST_FILES = 4  # times the batch size: files in a group that holds few scans


@dataclass(frozen=True)
class DecodedFile:
    """One slice of a file.

    Attributes:
        source: The file.
        slice: The slice, or why there is none.
        decode_ms: Time to read, decode, window and resize it.
        record: What an earlier run has written of it; it is not sent again.
    """

    source: Source
    slice: Slice
    decode_ms: float
    record: SliceResult | None = None

    @property
    def is_to_be_sent(self) -> bool:
        """Whether the server has yet to say something of it."""
        return self.record is None and isinstance(self.slice.scan, Scan)


@dataclass
class _Batch:
    """Files in their order, and the one request that holds the scans among them."""

    files: list[DecodedFile] = field(default_factory=list)
    num_scans: int = 0
    answer: Future[tuple[Predictions, float]] | None = None

    def add(self, file: DecodedFile) -> None:
        self.files.append(file)
        self.num_scans += file.is_to_be_sent

    def is_full(self, batch_size: int) -> bool:
        return self.num_scans == batch_size or len(self.files) == MOST_FILES * batch_size

    def send(self, fleet: ServerPool, with_map: bool) -> None:
        if self.num_scans:
            pixels = [
                file.slice.scan.pixels
                for file in self.files
                if file.is_to_be_sent and isinstance(file.slice.scan, Scan)
            ]
            self.answer = fleet.submit(np.stack(pixels), with_map)

    def is_under_way(self) -> bool:
        return self.answer is not None and not self.answer.done()


def classify_sources(
    fleet: ServerPool,
    sources: Iterable[Source | Flush],
    workers: DecodePool,
    batch_size: int = 8,
    *,
    with_map: bool = False,
    finished: ResumeIndex | None = None,
) -> Iterator[tuple[SliceResult, DecodedInput]]:
    """Record and origin of each scan, in the order of `sources`.

    Held at once are: files that are being decoded or wait for their turn, four times as many as
    workers and scans in a batch together; and batches that are with the servers, or done and
    behind one that is not, at most four times as many as requests. The slices of one file are
    decoded together, 50 KB each.

    Args:
        fleet: Connected servers.
        sources: Scans; drawn from as needed, so it may be endless. `FLUSH` among them says that
            the next may be long in coming: all before it is finished first.
        workers: Pool that decodes.
        batch_size: How many scans go into one request.
        with_map: Whether inputs hold the activation map.
        finished: What an earlier run has written: it is passed over, but for slices whose series
            has no record yet. These are decoded and yielded with their old record.

    Yields:
        Records as made by `chestct.results.records`, and what they were made from.

    Raises:
        ServerError: The servers failed; what was finished before has been yielded.
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    batch_size = min(batch_size, fleet.max_batch_size)
    known = ResumeIndex() if finished is None else finished
    new = (each for each in sources if isinstance(each, Flush) or not known.is_complete(each.name))
    most_ahead = 4 * (workers.num_workers + batch_size)
    files = _decoded_ahead(new, fleet.metadata.window, workers, known, most_ahead)
    return _answered_in_order(files, fleet, batch_size, with_map)


def _decoded_ahead(
    sources: Iterable[Source | Flush],
    window: Window,
    workers: DecodePool,
    known: ResumeIndex,
    most_ahead: int,
) -> Iterator[DecodedFile | Flush]:
    """Slices in the order of their files, decoded while earlier ones are used; ends by `FLUSH`."""
    ahead: deque[tuple[Source, Future[list[DecodedSlice]]]] = deque()
    for source in chain(sources, [FLUSH]):
        if not isinstance(source, Flush):
            ahead.append((source, workers.submit(source, window)))
        while len(ahead) >= most_ahead or (ahead and source is FLUSH):
            yield from decoded_files(*ahead.popleft(), known)
        if source is FLUSH:
            yield FLUSH


def _answered_in_order(
    files: Iterable[DecodedFile | Flush], fleet: ServerPool, batch_size: int, with_map: bool
) -> Iterator[tuple[SliceResult, DecodedInput]]:
    """Records in the order of the slices, which go to the servers in batches side by side."""
    batch = _Batch()
    sent: deque[_Batch] = deque()
    for file in files:
        if not isinstance(file, Flush):
            batch.add(file)
        if batch.is_full(batch_size) or (batch.files and file is FLUSH):
            while not _has_room(sent, fleet):
                yield from _finished(sent.popleft())
            batch.send(fleet, with_map)
            sent.append(batch)
            batch = _Batch()
        while sent and (file is FLUSH or not sent[0].is_under_way()):
            yield from _finished(sent.popleft())


def _has_room(sent: Collection[_Batch], fleet: ServerPool) -> bool:
    most_sent = fleet.num_requests + 2  # whichever comes back finds the next one waiting
    num_under_way = sum(batch.is_under_way() for batch in sent)
    return num_under_way < most_sent and len(sent) < 4 * most_sent


def decoded_files(
    source: Source, decoding: Future[list[DecodedSlice]], known: ResumeIndex | None = None
) -> list[DecodedFile]:
    """The slices of a file, once they are decoded.

    Args:
        source: The file.
        decoding: From `DecodePool.submit`.
        known: What an earlier run has written; those of its slices are left out whose series has
            its record too.
    """
    slices = decoding.result()
    if known is None:
        return [DecodedFile(source, each, each.decode_ms) for each in slices]
    return [
        DecodedFile(source, each, each.decode_ms, known.pending.get(each.name))
        for each in slices
        if each.name not in known or each.name in known.pending
    ]


def answered_files(
    fleet: ServerPool, files: list[DecodedFile], with_map: bool
) -> list[tuple[SliceResult, DecodedInput]]:
    """Record and origin of each of some files, by one request.

    Raises:
        ServerError: The servers failed.
    """
    batch = _Batch(files, sum(file.is_to_be_sent for file in files))
    batch.send(fleet, with_map)
    return list(_finished(batch))


def _finished(batch: _Batch) -> Iterator[tuple[SliceResult, DecodedInput]]:
    """Records and items of a batch; without those of its scans when the servers failed."""
    failure: ServerError | None = None
    if batch.answer is not None:
        try:
            predictions, infer_ms = batch.answer.result()
        except ServerError as error:
            failure = error
    index = 0
    for file in batch.files:
        name, scan = file.slice.name, file.slice.scan
        if isinstance(scan, ScanDecodeError):
            yield error_line(name, scan), DecodedInput(file.source)
        elif file.record is not None:
            yield file.record, DecodedInput(file.source, scan.pixels, None, scan)
        elif failure is None:
            maps = predictions.activation_map
            record = result_line(
                name,
                predictions,
                index,
                decode_ms=file.decode_ms,
                infer_ms=infer_ms / batch.num_scans,
                reasons=scan.reasons,
            )
            yield (
                record,
                DecodedInput(file.source, scan.pixels, None if maps is None else maps[index], scan),
            )
            index += 1
    if failure is not None:
        raise failure
