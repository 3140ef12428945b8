"""Find the scans of a run: under paths, in a list, filtered by name, or in watched folders."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path, PurePath

from chestct.errors import ScanDecodeError
from chestct.imaging.sources import Source, list_sources
from chestct.results.resume import ResumeIndex, folder_of

__all__ = ["FLUSH", "Flush", "PathFilter", "find_sources", "listed_paths", "watch_sources"]


class Flush(Enum):
    """A mark in a stream of sources: finish all before it, the next may be long in coming."""

    FLUSH = "flush"


FLUSH = Flush.FLUSH
LIST_PART = 0.1  # of the time that watching may spend on listing


@dataclass(frozen=True)
class PathFilter:
    """Patterns of names, as shells have them, for the whole path or its last part.

    Attributes:
        include: A scan has to match one of these; none for all.
        exclude: And none of these.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, source: Source) -> bool:
        """Whether a scan is chosen."""
        name = source.name
        last = PurePath(source.member or name).name

        def matches(patterns: Sequence[str]) -> bool:
            return any(fnmatch(name, each) or fnmatch(last, each) for each in patterns)

        return (not self.include or matches(self.include)) and not matches(self.exclude)


def listed_paths(lines: Iterable[str]) -> Iterator[Path]:
    """The paths of a list, one a line; empty lines are passed over."""
    for line in lines:
        if text := line.rstrip("\r\n"):
            yield Path(text)


def find_sources(roots: Iterable[Path], chosen: PathFilter) -> Iterator[Source]:
    """The chosen scans under some files and folders, in the order of `list_sources`.

    One that is not there is yielded itself, so that reading it tells why.
    """
    for root in roots:
        try:
            yield from filter(chosen.takes, list_sources(root))
        except ScanDecodeError:
            yield Source(root)


def watch_sources(
    roots: Sequence[Path],
    chosen: PathFilter,
    settle_s: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Source | Flush]:
    """Watch folders; yield each file once its folder has stopped changing.

    A folder or archive is yielded as a whole when none of its new files has changed its size or
    time for `settle_s`, so that a series is complete. What comes into it later is yielded later.
    Held are 16 bytes of digest for each file that was yielded, and its name only until then.

    Args:
        roots: Files and folders; they may appear later.
        chosen: Which scans to take.
        settle_s: How long a folder has to be left alone.
        sleep: How to wait.

    Yields:
        Scans, and `FLUSH` where nothing is to be had for now.
    """
    done = ResumeIndex()
    waiting: dict[str, tuple[int, int]] = {}  # size and time of change when last looked at
    while True:
        started_s = time.monotonic()
        folders: dict[str, list[tuple[Source, bool]]] = {}
        for source in find_sources([root for root in roots if root.exists()], chosen):
            name = source.name
            if name in done:
                continue
            state = _state(source.path)
            if state is None:  # vanished again
                waiting.pop(name, None)
                continue
            is_at_rest = waiting.get(name) == state
            waiting[name] = state
            folders.setdefault(folder_of(name), []).append((source, is_at_rest))
        for found in folders.values():
            if all(is_at_rest for _, is_at_rest in found):
                for source, _ in found:
                    done.take({"path": source.name})
                    del waiting[source.name]
                    yield source
        yield FLUSH
        # Listing a large archive of files takes long; most of the time is left to others.
        sleep(max(settle_s, (time.monotonic() - started_s) * LIST_PART))


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
