"""Assign scans to training, validation and test splits, recorded as a file.

`official` keeps the folders train, valid and test of the source and records what they share.
`grouped` splits all scans anew so that no group (near duplicates, a numbered series, or a column
of a group file) falls on two sides; the classes are spread as evenly as the groups allow.
"""

from __future__ import annotations

import csv
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, NonNegativeInt

from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.data.dataset import SPLITS, ScanFile, list_scan_folder
from training.data.duplicates import group_equal, join_groups
from training.data.ingest import read_table

# Few series make a class, and one that validates is missed in training, while validation only
# cools the softmax and places the domain's threshold: so many parts are dealt, and the one that
# takes least of any class validates.
VALIDATION_FOLDS = 10

IntArray = npt.NDArray[np.int64]
StrArray = npt.NDArray[np.str_]


def _with_one_group(pattern: str) -> str:
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"expected a regular expression ({error})") from error
    if num_groups != 1:
        raise ValueError(f"has {num_groups} groups: expected one")
    return pattern


@config_class
class SplitConfig:
    """How scans are dealt.

    Attributes:
        scans: Folder that `training ingest` wrote.
        table: Its table, for the data hash.
        groups: Near-duplicate groups from `training audit`.
        output: Folder for split.csv and split.json.
        protocol: `official`, `grouped`, or `auto`: official where the source has train, valid
            and test, grouped elsewhere.
        group_pattern: Regular expression on the whole file name with one group; scans of one
            class with the same text there belong together. The default reads the series in
            `000108 (3).png`; `000108.png`, where the group takes no part, is of the one series
            without a number. Files that do not match form no such group.
        group_file: CSV with a column `path` and the `group_columns`; equal cells belong together.
        group_columns: Columns of `group_file`; empty cells join nothing.
        folds: The grouped scans are cut into so many parts: one tests, the others train, but for
            a tenth of them, group by group, which validates.
        fold: Which part tests, 0 to folds - 1.
        seed: Of the grouped dealing.
    """

    scans: Path = Path("data/scans")
    table: Path = Path("data/ingest.json")
    groups: Path = Path("results/audit/groups.csv")
    output: Path = Path("results/split")
    protocol: Literal["auto", "official", "grouped"] = "auto"
    group_pattern: Annotated[str, AfterValidator(_with_one_group)] = r"\d{6}(?: \((\d+)\))?\.\w+"
    group_file: Path | None = None
    group_columns: Annotated[tuple[str, ...], Field(min_length=1)] = ("group",)
    folds: Annotated[int, Field(ge=3)] = 5
    fold: NonNegativeInt = 0
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        """Refuse a fold that does not exist.

        Raises:
            ValueError: `fold` is not below `folds`.
        """
        if self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}: expected 0 to {self.folds - 1}")


def read_near_groups(path: Path, files: Sequence[ScanFile]) -> IntArray:
    """The near-duplicate group of each scan, int64 (N,), from the audit's groups.csv.

    Raises:
        ValueError: The file is missing or does not list exactly these scans.
    """
    groups = {row["path"]: row["near_dup_group"] for row in _read_csv(path, ("near_dup_group",))}
    if set(groups) != {file.path for file in files}:
        raise ValueError(f"{path}: lists other scans; run python -m training audit again")
    try:
        return np.array([int(groups[file.path]) for file in files], np.int64)
    except ValueError as error:
        raise ValueError(f"{path}: near_dup_group: expected whole numbers") from error


def read_group_file(
    path: Path, columns: Sequence[str], files: Sequence[ScanFile]
) -> list[IntArray]:
    """For each column, int64 (N,): equal numbers for equal cells, -1 for empty or absent ones.

    Raises:
        ValueError: The file or a column is missing, or no row names a scan.
    """
    rows = {row["path"]: row for row in _read_csv(path, columns)}
    if not any(file.path in rows for file in files):
        raise ValueError(f"{path}: no row names a scan; paths look like {files[0].path}")
    return [
        _number([rows.get(file.path, {}).get(column, "") for file in files]) for column in columns
    ]


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    missing = {"path", *columns} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path}: no column {sorted(missing)}; has {reader.fieldnames}")
    return rows


def group_series(files: Sequence[ScanFile], pattern: str) -> IntArray:
    """int64 (N,): equal numbers for scans of one class and series; -1 where none is named."""
    matches = [re.fullmatch(pattern, Path(file.path).name) for file in files]
    return _number(
        [
            f"{file.label}/{match[1] or ''}" if match else ""
            for file, match in zip(files, matches, strict=True)
        ]
    )


def _number(cells: Sequence[str]) -> IntArray:
    return np.where(np.array(cells) == "", -1, group_equal(cells))


def deal_grouped(labels: StrArray, groups: IntArray, config: SplitConfig) -> StrArray:
    """The split of each scan, (N,), no group in two of them.

    Args:
        labels: Label of each scan, (N,).
        groups: int64 (N,).
        config: Folds, fold and seed.

    Raises:
        ValueError: A class has fewer groups than three, so that it cannot be on all sides.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    for label in sorted(set(labels)):
        count = len(np.unique(groups[labels == label]))
        if count < len(SPLITS):
            raise ValueError(
                f"class {label} has {count} groups: expected at least 3, one a split; "
                "use protocol: official, or a narrower group_pattern"
            )
    smallest = min(Counter(labels.tolist()).values())
    if smallest < config.folds:
        raise ValueError(f"folds {config.folds}: the smallest class has only {smallest} scans")

    def parts(chosen: IntArray, folds: int) -> list[IntArray]:
        dealer = StratifiedGroupKFold(folds, shuffle=True, random_state=config.seed)
        dealt = dealer.split(chosen, labels[chosen], groups[chosen])
        return [chosen[inside] for _, inside in dealt]

    splits = np.full(len(labels), "train")
    splits[parts(np.arange(len(labels)), config.folds)[config.fold]] = "test"
    rest = np.flatnonzero(splits == "train")
    num_groups = [len(np.unique(groups[rest][labels[rest] == label])) for label in set(labels)]
    candidates = parts(rest, max(2, min(VALIDATION_FOLDS, *num_groups)))

    def largest_loss(part: IntArray) -> float:
        """The largest share of a class that training would lose to this part."""
        return max(float((labels[part] == label).sum() / (labels[rest] == label).sum())
                   for label in set(labels))  # fmt: skip

    splits[min((part for part in candidates if len(part)), key=largest_loss)] = "valid"
    return splits


def find_overlaps(splits: StrArray, groups: IntArray) -> dict[str, int]:
    """For each pair of splits, how many scans of the first have a group member in the second."""
    return {
        f"{first} in {second}": int(
            np.isin(groups[splits == first], groups[splits == second]).sum()
        )
        for first, second in (("test", "train"), ("test", "valid"), ("valid", "train"))
    }


def split_scans(
    files: Sequence[ScanFile], near: IntArray, listed: Sequence[IntArray], config: SplitConfig
) -> tuple[StrArray, IntArray, dict[str, Any]]:
    """Split and group of each scan, and the facts of split.json.

    The group is that of near duplicates joined with `listed`, and in a grouped split also with
    the series. An official split keeps its series apart from the groups, since it cuts through
    them by design: their overlap is recorded by itself.

    Args:
        files: N scans.
        near: int64 (N,), near-duplicate groups.
        listed: Further groupings, int64 (N,) each, -1 for none.
        config: The protocol and its numbers.

    Returns:
        Splits (N,); groups int64 (N,); the facts.

    Raises:
        ValueError: The source has no official split, or a class is missing in train.
    """
    labels = np.array([file.label for file in files])
    has_splits = {file.split for file in files} == set(SPLITS)
    protocol: str = config.protocol
    if protocol == "auto":
        protocol = "official" if has_splits else "grouped"
    if protocol == "official" and not has_splits:
        found = sorted({file.split or "none" for file in files})
        raise ValueError(
            f"the source has the splits {found}: protocol official needs train, valid and test; "
            "use protocol: grouped"
        )
    series = group_series(files, config.group_pattern)
    joined = join_groups(len(files), near, *listed)
    with_series = join_groups(len(files), joined, series)
    if protocol == "official":
        groups, splits = joined, np.array([str(file.split) for file in files])
    else:
        groups, splits = with_series, deal_grouped(labels, with_series, config)
    overlaps = find_overlaps(splits, groups)
    if protocol == "grouped" and any(overlaps.values()):
        raise ValueError(f"groups on two sides: {_shown(overlaps)}")
    counts = {
        split: {
            str(label): int(((splits == split) & (labels == label)).sum())
            for label in sorted(set(labels))
        }
        for split in SPLITS
    }
    if missing := [label for label, count in counts["train"].items() if not count]:
        raise ValueError(f"no scan of {', '.join(missing)} in train; change fold, seed or source")
    if empty := [split for split in SPLITS if not any(counts[split].values())]:
        raise ValueError(f"no scan in {', '.join(empty)}; change folds, seed or source")
    facts = {
        "protocol": protocol,
        **(
            {"folds": config.folds, "fold": config.fold, "seed": config.seed}
            if protocol == "grouped"
            else {}
        ),
        "counts": counts,
        "num_groups": int(groups.max()) + 1,
        "overlaps": overlaps,
        "overlaps_with_series": find_overlaps(splits, with_series),
    }
    return splits, groups, facts


def _shown(overlaps: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {pair}" for pair, count in overlaps.items() if count)


def write_split(config: SplitConfig) -> dict[str, Any]:
    """Split `config.scans`, write split.csv and split.json; the content of the latter.

    Raises:
        ValueError: See `split_scans`, `read_near_groups` and `read_group_file`.
        OSError: The output cannot be written.
    """
    files = list_scan_folder(config.scans)
    near = read_near_groups(config.groups, files)
    listed = (
        []
        if config.group_file is None
        else read_group_file(config.group_file, config.group_columns, files)
    )
    splits, groups, facts = split_scans(files, near, listed, config)
    table = read_table(config.table)
    facts["data_hash"] = table["data_hash"] if table else None
    with (
        replaced(config.output / "split.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as opened,
    ):
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["path", "label", "split", "group"])
        for file, split, group in zip(files, splits.tolist(), groups.tolist(), strict=True):
            writer.writerow([file.path, file.label, split, group])
    write_json(config.output / "split.json", facts)
    return facts


def describe(facts: Mapping[str, Any]) -> str:
    """The facts as lines of text."""
    lines = [f"protocol {facts['protocol']}, {facts['num_groups']} groups"]
    for split, by_label in facts["counts"].items():
        shown = ", ".join(f"{label} {count}" for label, count in by_label.items())
        lines.append(f"{split:6}{sum(by_label.values()):6d}  ({shown})")
    for key, title in (("overlaps", "near duplicates"), ("overlaps_with_series", "or series")):
        shown = _shown(facts[key]) or "none"
        lines.append(f"on two sides, {title}: {shown}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Deal the scans into train, valid and test."""
    parser = command_parser("training split", main.__doc__, "configs/split.yaml")
    parser.add_argument("--group-file", type=Path, help="instead of the config's")
    parser.add_argument("--group-columns", nargs="+", help="instead of the config's")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(SplitConfig, arguments.config)
        if arguments.group_file:
            config = dataclasses.replace(config, group_file=arguments.group_file)
        if arguments.group_columns:
            config = dataclasses.replace(config, group_columns=tuple(arguments.group_columns))
        sys.stdout.write(describe(write_split(config)))

    return run_command(work)
