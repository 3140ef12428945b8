"""Group streamed slices into series; emit a series when its folder or archive is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from chestct.results.records import SeriesResult, SliceResult
from chestct.results.resume import ResumeIndex, folder_of
from chestct.results.series import SeriesSlice, series_record
from chestct.results.writers import DecodedInput

__all__ = ["SeriesCollector"]


@dataclass
class _Folder:
    """What is held of a folder or archive until the last file in it."""

    numbers: dict[str, int] = field(default_factory=dict)  # of each series, by its UID
    slices: dict[str, list[SeriesSlice]] = field(default_factory=dict)
    items: dict[str, list[tuple[SliceResult, DecodedInput]]] = field(default_factory=dict)
    num_failed: int = 0


class SeriesCollector:
    """Collects the slices of the folders that are being walked through.

    Held are a few hundred bytes for each slice of the folder at hand and of those above it, and
    the items themselves only if asked for. Series are numbered from 1 within their folder or
    archive, in the order of their first slices: the number tells them apart without their UIDs.
    """

    def __init__(self, finished: ResumeIndex, *, with_uids: bool, keeps_items: bool) -> None:
        """Starts empty.

        Args:
            finished: What an earlier run has written; its numbers are not given again.
            with_uids: Whether records carry UIDs.
            keeps_items: Whether records and items are to be handed out with their series.
        """
        self._finished = finished
        self._with_uids = with_uids
        self._keeps_items = keeps_items
        self._open: dict[str, _Folder] = {}

    def add(self, record: SliceResult, item: DecodedInput) -> SliceResult:
        """The record with the number of its series, and its UIDs if those are asked for.

        Args:
            record: Of one slice, as made by `chestct.results.records`; others stay as they are.
            item: What it was made from.
        """
        facts = None if item.scan is None else item.scan.metadata
        folder_name = folder_of(record["path"])
        folder = self._open.setdefault(folder_name, _Folder())
        if facts is None or not facts.series_uid or record["status"] != "ok":
            is_unreadable = record.get("error", {}).get("type") == "ScanDecodeError"
            folder.num_failed += is_unreadable
            return record
        uid = facts.series_uid
        number = record.get("series") or folder.numbers.get(uid)
        if number is None:
            number = len(folder.numbers) + 1
            while number in folder.numbers.values() or self._finished.has_series(
                folder_name, number
            ):
                number += 1
        folder.numbers[uid] = number
        record = {**record, "series": number}
        if self._with_uids:
            record["study_uid"], record["series_uid"] = facts.study_uid, uid
            record["sop_uid"] = facts.sop_uid
        folder.slices.setdefault(uid, []).append(SeriesSlice.from_record(record, facts))
        if self._keeps_items:
            folder.items.setdefault(uid, []).append((record, item))
        return record

    def left(
        self, path: str | None
    ) -> Iterator[tuple[SeriesResult, Sequence[tuple[SliceResult, DecodedInput]]]]:
        """Record and items of each series of the folders that do not hold a path.

        Args:
            path: Of the next record; None for the end.
        """
        here = None if path is None else folder_of(path)
        for name in [name for name in self._open if here is None or not holds(name, here)][::-1]:
            folder = self._open.pop(name)
            is_only = len(folder.slices) == 1
            for uid, slices in folder.slices.items():
                number = folder.numbers[uid]
                if self._finished.has_series(name, number):
                    continue
                num_failed = folder.num_failed if is_only else 0
                record = series_record(slices, num_failed=num_failed, with_uids=self._with_uids)
                record["path"], record["series"] = name, number
                yield record, folder.items.get(uid, [])


def holds(folder: str, other: str) -> bool:
    """Whether a folder is another one or lies above it."""
    return folder in (other, ".") or other.startswith(folder.rstrip(os.sep) + os.sep)
