"""A stream of files becomes a stream of records: decode ahead, send in batches, keep the order.

Files are decoded in processes (the first few in threads) while earlier ones are with the servers.
Records come in the order of the files. Everything between is bounded, so the files may be endless.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from chestct.batch.decode_pool import DecodedSlice, DecodePool
from chestct.errors import ScanDecodeError, ServerError
from chestct.imaging.scan import Scan, Slice
from chestct.imaging.sources import Source
from chestct.inference.client import Predictions, ScanClient
from chestct.inference.server_pool import Fleet
from chestct.results.records import error_line, result_line
from chestct.results.writers import Finished, Item, Record

__all__ = [
    "DecodedFile",
    "answered_files",
    "classify_paths",
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
    record: Record | None = None

    @property
    def is_to_be_sent(self) -> bool:
        """Whether the server has yet to say something of it."""
        return self.record is None and isinstance(self.slice.scan, Scan)


@dataclass
class _Group:
    """Files in their order, and the one request that holds the scans among them."""

    files: list[DecodedFile] = field(default_factory=list)
    num_scans: int = 0
    answer: Future[tuple[Predictions, float]] | None = None

    def add(self, file: DecodedFile) -> None:
        self.files.append(file)
        self.num_scans += file.is_to_be_sent

    def is_full(self, batch_size: int) -> bool:
        return self.num_scans == batch_size or len(self.files) == MOST_FILES * batch_size

    def send(self, fleet: Fleet, with_map: bool) -> None:
        if self.num_scans:
            pixels = [
                file.slice.scan.pixels
                for file in self.files
                if file.is_to_be_sent and isinstance(file.slice.scan, Scan)
            ]
            self.answer = fleet.submit(np.stack(pixels), with_map)

    def is_under_way(self) -> bool:
        return self.answer is not None and not self.answer.done()


def classify_paths(
    client: ScanClient, paths: Iterable[Path], batch_size: int = 8, workers: int | None = None
) -> Iterator[Record]:
    """One record for each scan file, in the order of `paths`.

    A file that cannot be decoded, or is no axial CT slice by its DICOM tags, becomes a record of
    its error, and the rest goes on. The same as `classify_sources` with one server.

    Args:
        client: A connected client; the requests go to its address by a session of their own.
        paths: Scan files; drawn from as needed, so it may be endless.
        batch_size: How many scans go into one request.
        workers: How many files are decoded at once; by default one for each processor.

    Yields:
        Records as made by `chestct.results.records`.

    Raises:
        ServerError: The server failed; what was finished before has been yielded.
        ValueError: `batch_size` or `workers` below 1.
    """
    with DecodePool(workers) as decoders, Fleet.like(client) as fleet:
        sources = map(Source, paths)
        for record, _ in classify_sources(fleet, sources, decoders, batch_size):
            yield record


def classify_sources(
    fleet: Fleet,
    sources: Iterable[Source | None],
    workers: DecodePool,
    batch_size: int = 8,
    *,
    with_map: bool = False,
    finished: Finished | None = None,
) -> Iterator[tuple[Record, Item]]:
    """Record and origin of each scan, in the order of `sources`.

    Held at once are: files that are being decoded or wait for their turn, four times as many as
    workers and scans in a batch together; and batches that are with the servers, or done and
    behind one that is not, at most four times as many as requests. The slices of one file are
    decoded together, 50 KB each.

    Args:
        fleet: Connected servers.
        sources: Scans; drawn from as needed, so it may be endless. A None among them says that
            the next may be long in coming: all before it is finished first.
        workers: Pool that decodes.
        batch_size: How many scans go into one request.
        with_map: Whether items hold the activation map.
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
    most_ahead = 4 * (workers.num_workers + batch_size)
    known = Finished() if finished is None else finished
    coming = iter(sources)
    ahead: deque[tuple[Source, Future[list[DecodedSlice]]]] = deque()
    decoded: deque[DecodedFile] = deque()
    sent: deque[_Group] = deque()
    group = _Group()
    is_paused = is_ended = False
    while True:
        while len(ahead) < most_ahead and not (is_paused or is_ended):
            try:
                source = next(coming)
            except StopIteration:
                is_ended = True
            else:
                is_paused = source is None
                if source is not None and not _is_done(source, known):
                    decoding = workers.submit(source, fleet.facts.window)
                    ahead.append((source, decoding))
        while sent and not sent[0].is_under_way():
            yield from _finished(sent.popleft())
        most_sent = fleet.num_requests + 2  # whichever comes back finds the next one waiting
        num_under_way = sum(each.is_under_way() for each in sent)
        has_room = num_under_way < most_sent and len(sent) < 4 * most_sent
        if has_room and ahead and not decoded:
            decoded.extend(decoded_files(*ahead.popleft(), known))
        while has_room and decoded and not group.is_full(batch_size):
            group.add(decoded.popleft())
        is_last = bool(group.files) and not (ahead or decoded)
        if has_room and (group.is_full(batch_size) or is_last):
            group.send(fleet, with_map)
            sent.append(group)
            group = _Group()
        elif sent and not (has_room and ahead):
            yield from _finished(sent.popleft())
        elif not (ahead or decoded or group.files):
            if is_ended:
                return
            is_paused = False


def _is_done(source: Source, known: Finished) -> bool:
    return source.name in known and source.name not in known.pending


def decoded_files(
    source: Source, decoding: Future[list[DecodedSlice]], known: Finished | None = None
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
    fleet: Fleet, files: list[DecodedFile], with_map: bool
) -> list[tuple[Record, Item]]:
    """Record and origin of each of some files, by one request.

    Raises:
        ServerError: The servers failed.
    """
    group = _Group(files, sum(file.is_to_be_sent for file in files))
    group.send(fleet, with_map)
    return list(_finished(group))


def _finished(group: _Group) -> Iterator[tuple[Record, Item]]:
    """Records and items of a group; without those of its scans when the servers failed."""
    failure: ServerError | None = None
    if group.answer is not None:
        try:
            predictions, infer_ms = group.answer.result()
        except ServerError as error:
            failure = error
    index = 0
    for file in group.files:
        name, scan = file.slice.name, file.slice.scan
        if isinstance(scan, ScanDecodeError):
            yield error_line(name, scan), Item(file.source)
        elif file.record is not None:
            yield file.record, Item(file.source, scan.pixels, None, scan)
        elif failure is None:
            maps = predictions.activation_map
            record = result_line(
                name,
                predictions,
                index,
                decode_ms=file.decode_ms,
                infer_ms=infer_ms / group.num_scans,
                reasons=scan.reasons,
            )
            yield (
                record,
                Item(file.source, scan.pixels, None if maps is None else maps[index], scan),
            )
            index += 1
    if failure is not None:
        raise failure
