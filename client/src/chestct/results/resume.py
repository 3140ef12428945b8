"""Which scans an earlier run has finished: the index behind `--resume`, and watching folders."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import cast

from chestct.results.records import Record, SliceResult, plain_text

__all__ = ["ResumeIndex", "folder_of"]

_FRAME = re.compile(r"#\d+$")  # of a slice in a file of several frames


class ResumeIndex:
    """Records that an earlier run has written: a digest of 16 bytes for each, not the records.

    Attributes:
        pending: Records of slices, by path, whose series had no record yet when the run ended.
        retried: Paths whose error has a new record by now.
    """

    def __init__(self, *, retry_errors: bool = False) -> None:
        """Starts with nothing.

        Args:
            retry_errors: Whether slices that could not be classified count as not done.
        """
        self.pending: dict[str, SliceResult] = {}
        self.retried: set[str] = set()
        self._retry_errors = retry_errors
        self._digests: set[bytes] = set()
        self._failed: set[bytes] = set()
        self._paths_of: dict[bytes, list[str]] = {}  # in `pending`, by series

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, path: str) -> bool:
        return _digest(path) in self._digests

    def is_complete(self, path: str) -> bool:
        """Whether nothing is left to do for a slice: its series, if any, has its record too."""
        return path in self and path not in self.pending

    def has_series(self, folder: str, number: int) -> bool:
        """Whether the series of a folder has its record."""
        return _series_digest(folder, number) in self._digests

    def has_record(self, record: Record) -> bool:
        """Whether a record of the same slice or series was taken in, or this error of it."""
        key = _key(record)
        return key in self._digests or (record["status"] == "error" and key in self._failed)

    def note_retry(self, path: str) -> None:
        """Says that a slice has a new record; nothing happens unless the old one is an error.

        The error may be that of its file, as long as nobody knew of frames, or of its archive.
        """
        if self._failed:
            names = (path, _FRAME.sub("", path), folder_of(path))
            self.retried.update(name for name in names if _digest(name) in self._failed)

    def without_retried(self, records: Iterable[Record]) -> Iterator[Record]:
        """Leaves out the first error of each of the paths in `retried`, and forgets them."""
        for record in records:
            if record["status"] == "error" and record["path"] in self.retried:
                self.retried.remove(record["path"])
            else:
                yield record

    def take(self, record: Record) -> None:
        """Takes in one record, in the order of the run."""
        path, number, key = record["path"], record.get("series"), _key(record)
        if "num_slices" in record:
            for done in self._paths_of.pop(key, ()):
                del self.pending[done]
        elif self._retry_errors and record["status"] == "error":
            self._failed.add(key)
            return
        elif number is not None and not self.has_series(folder_of(path), number):
            if path not in self.pending:
                self._paths_of.setdefault(_series_digest(folder_of(path), number), []).append(path)
            self.pending[path] = cast(SliceResult, record)
        self._digests.add(key)


def folder_of(path: str) -> str:
    """The folder or archive that holds the scan of a record, by the `path` of the record."""
    file = _FRAME.sub("", path)
    archive, mark, _ = file.partition(".zip!") if ".zip!" in file else file.partition(".ZIP!")
    if mark:
        return archive + mark[:-1]
    return os.path.dirname(file) or "."


def _key(record: Record) -> bytes:
    if "num_slices" in record:
        return _series_digest(record["path"], record["series"])
    return _digest(record["path"])


def _series_digest(folder: str, number: int) -> bytes:
    return _digest(f"{folder}\0{number}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(plain_text(text).encode(), digest_size=16).digest()
