from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from training.common.config import config_from_mapping
from training.data.dataset import ScanFile
from training.data.split import (
    SplitConfig,
    deal_grouped,
    find_overlaps,
    group_series,
    main,
    read_group_file,
    read_near_groups,
    split_scans,
    write_split,
)

CHECKOUT = Path(__file__).parents[3]
LABELS = ("a", "b", "normal")


def scan(path: str) -> ScanFile:
    *split, label, _ = path.split("/")
    return ScanFile(path, split[0] if split else None, label)


def numbered(per_class: int) -> list[ScanFile]:
    return [scan(f"{label}/{number:03d}.png") for label in LABELS for number in range(per_class)]


def official(per_split: int = 2) -> list[ScanFile]:
    return [
        scan(f"{split}/{label}/{number}.png")
        for split in ("test", "train", "valid")
        for label in LABELS
        for number in range(per_split)
    ]


def alone(files: list[ScanFile]) -> np.ndarray:
    return np.arange(len(files))


Folder = Callable[..., SplitConfig]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Write files and their near-duplicate groups; the config that reads them."""

    def write(files: list[ScanFile], near: np.ndarray, **settings: object) -> SplitConfig:
        for file in files:
            path = tmp_path / "scans" / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.path.encode())
        with (tmp_path / "groups.csv").open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["path", "near_dup_group"])
            writer.writerows(zip((file.path for file in files), near.tolist(), strict=True))
        (tmp_path / "ingest.json").write_text(
            '{"source": "here", "fingerprint": "f", "data_hash": "d1a2"}'
        )
        return SplitConfig(
            scans=tmp_path / "scans",
            table=tmp_path / "ingest.json",
            groups=tmp_path / "groups.csv",
            output=tmp_path / "results/split",
            **settings,  # type: ignore[arg-type]
        )

    return write


def rows_of(config: SplitConfig) -> list[dict[str, str]]:
    with (config.output / "split.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Groups


def test_series_is_read_from_the_file_name() -> None:
    files = [
        scan(f"a/{name}")
        for name in ("000108 (3).png", "000109 (3).png", "000108 (4).png", "n6 (3).png")
    ]
    files += [scan("b/000110 (3).png"), scan("b/10 (3).png")]
    files += [scan("a/000003.png"), scan("a/000108.png"), scan("b/000003.png")]
    groups = group_series(files, SplitConfig().group_pattern).tolist()
    # One series of a, another of a, the same number in b is another; two names form none.
    assert groups[0] == groups[1] >= 0
    assert len({groups[0], groups[2], groups[4]}) == 3
    assert groups[3] == groups[5] == -1
    # A name without a number is of its class's series without one.
    assert groups[6] == groups[7] >= 0
    assert len({*groups}) == 6
    assert groups[8] not in groups[:8]


def test_group_file_joins_equal_cells_of_each_column(tmp_path: Path) -> None:
    files = [scan(f"a/{number}.png") for number in range(4)]
    (tmp_path / "groups.csv").write_text(
        "path,slice,patient\na/0.png,N1,p\na/1.png,N1,\na/2.png,,p\nelsewhere.png,N1,p\n"
    )
    by_slice, by_patient = read_group_file(tmp_path / "groups.csv", ("slice", "patient"), files)
    assert by_slice[0] == by_slice[1] >= 0
    assert by_slice[2] == by_slice[3] == -1
    assert by_patient[0] == by_patient[2] >= 0
    assert by_patient[1] == by_patient[3] == -1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,other\na/0.png,1\n", r"no column \['group'\]; has \['path', 'other'\]"),
        ("path,group\nb/9.png,1\n", r"no row names a scan; paths look like a/0\.png"),
    ],
)
def test_group_file_that_says_nothing_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_group_file(tmp_path / "groups.csv", ("group",), [scan("a/0.png")])


def test_groups_of_other_scans_are_refused(tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_text("path,near_dup_group\na/0.png,0\n")
    with pytest.raises(ValueError, match=r"lists other scans; run python -m training audit again"):
        read_near_groups(tmp_path / "groups.csv", [scan("a/1.png")])
    with pytest.raises(ValueError, match="no such file"):
        read_near_groups(tmp_path / "missing.csv", [scan("a/1.png")])


# The official split


def test_official_split_keeps_the_folders() -> None:
    files = official()
    splits, groups, facts = split_scans(files, alone(files), [], SplitConfig())
    assert facts["protocol"] == "official"
    assert splits.tolist() == [file.split for file in files]
    assert len(set(groups.tolist())) == len(files)
    assert facts["overlaps"] == {"test in train": 0, "test in valid": 0, "valid in train": 0}
    assert facts["counts"]["train"] == dict.fromkeys(LABELS, 2)


def test_official_split_records_its_overlaps() -> None:
    files = official()
    near = alone(files)
    index = {file.path: number for number, file in enumerate(files)}
    near[index["test/a/0.png"]] = near[index["test/a/1.png"]] = near[index["train/a/0.png"]]
    near[index["valid/b/0.png"]] = near[index["test/b/0.png"]]
    facts = split_scans(files, near, [], SplitConfig())[2]
    assert facts["overlaps"] == {"test in train": 2, "test in valid": 1, "valid in train": 0}


def test_official_split_counts_its_series_apart() -> None:
    files = [
        scan(f"{split}/{label}/{number:06d} (1).png")
        for number, split in enumerate(("test", "train", "valid"))
        for label in LABELS
    ]
    _, groups, facts = split_scans(files, alone(files), [], SplitConfig())
    assert len(set(groups.tolist())) == 9
    assert facts["overlaps"]["test in train"] == 0
    assert facts["overlaps_with_series"]["test in train"] == 3


def test_official_needs_the_folders() -> None:
    for files in (numbered(4), [file for file in official() if file.split != "valid"]):
        with pytest.raises(ValueError, match="needs train, valid and test; use protocol: grouped"):
            split_scans(files, alone(files), [], SplitConfig(protocol="official"))


def test_class_missing_in_train_is_an_error() -> None:
    files = [file for file in official() if (file.split, file.label) != ("train", "b")]
    with pytest.raises(ValueError, match="no scan of b in train"):
        split_scans(files, alone(files), [], SplitConfig())


# The grouped split


def test_auto_groups_where_there_is_no_official_split() -> None:
    files = numbered(10)
    splits, _, facts = split_scans(files, alone(files), [], SplitConfig())
    assert facts["protocol"] == "grouped"
    # Five parts of 30 scans: one tests, one validates, three train; two of each class a part.
    assert {split: int((splits == split).sum()) for split in ("train", "valid", "test")} == {
        "train": 21,
        "valid": 3,
        "test": 6,
    }
    assert facts["counts"]["test"] == dict.fromkeys(LABELS, 2)


@pytest.mark.parametrize("fold", range(5))
def test_no_group_is_on_two_sides(fold: int) -> None:
    files = numbered(40)
    rng = np.random.default_rng(3)
    near = rng.integers(0, 45, len(files)) + 100 * np.repeat([0, 1, 2], 40)
    listed = np.where(np.arange(len(files)) % 9 == 0, np.arange(len(files)) // 27, -1)
    splits, groups, facts = split_scans(
        files, near, [listed], SplitConfig(protocol="grouped", fold=fold)
    )
    for grouping in (near, listed[listed >= 0], groups):
        sides = splits[listed >= 0] if len(grouping) < len(files) else splits
        for group in np.unique(grouping):
            assert len(set(sides[grouping == group])) == 1
    assert not any(facts["overlaps"].values())
    assert all(min(by_label.values()) > 0 for by_label in facts["counts"].values())


def test_series_stay_together_in_a_grouped_split() -> None:
    files = [
        scan(f"train/{label}/{number:06d} ({series}).png")
        for label in LABELS
        for series in range(8)
        for number in range(3)
    ]
    splits, _, facts = split_scans(files, alone(files), [], SplitConfig(protocol="grouped"))
    sides: dict[tuple[str, str], set[str]] = {}
    for file, split in zip(files, splits, strict=True):
        series = file.path.split("(")[1]
        sides.setdefault((file.label, series), set()).add(str(split))
    assert len(sides) == 24
    assert all(len(side) == 1 for side in sides.values())
    assert facts["num_groups"] == 24


def test_folds_test_every_scan_once() -> None:
    files = numbered(15)
    near = np.arange(len(files)) // 2
    tested = np.zeros(len(files), int)
    for fold in range(5):
        splits = split_scans(files, near, [], SplitConfig(protocol="grouped", fold=fold))[0]
        tested += splits == "test"
    assert tested.tolist() == [1] * len(files)


def test_seed_decides_the_dealing() -> None:
    files = numbered(20)
    first, again, other = (
        split_scans(files, alone(files), [], SplitConfig(protocol="grouped", seed=seed))[0].tolist()
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_class_with_too_few_groups_is_an_error() -> None:
    labels = np.repeat(["a", "b"], 10)
    groups = np.concatenate([np.arange(10), np.repeat([10, 11], 5)])
    with pytest.raises(ValueError, match="class b has 2 groups: expected at least 3"):
        deal_grouped(labels, groups, SplitConfig())


def test_more_folds_than_scans_is_an_error() -> None:
    labels = np.repeat(["a", "b"], [10, 4])
    with pytest.raises(ValueError, match="folds 5: the smallest class has only 4 scans"):
        deal_grouped(labels, np.arange(14), SplitConfig())


def test_overlaps_count_scans_not_groups() -> None:
    splits = np.array(["train", "test", "test", "valid", "valid", "train"])
    groups = np.array([0, 0, 0, 0, 1, 1])
    assert find_overlaps(splits, groups) == {
        "test in train": 2,
        "test in valid": 2,
        "valid in train": 2,
    }


# Files and command


def test_split_files_are_written(folder: Folder) -> None:
    files = official()
    config = folder(files, alone(files))
    facts = write_split(config)
    rows = rows_of(config)
    assert list(rows[0]) == ["path", "label", "split", "group"]
    assert {(row["path"], row["label"], row["split"]) for row in rows} == {
        (file.path, file.label, file.split) for file in files
    }
    assert all(row["group"].isdigit() for row in rows)
    assert json.loads((config.output / "split.json").read_text()) == facts
    assert facts["data_hash"] == "d1a2"
    before = (config.output / "split.csv").read_bytes()
    write_split(config)
    assert (config.output / "split.csv").read_bytes() == before


def test_group_file_of_the_config_is_used(folder: Folder, tmp_path: Path) -> None:
    files = numbered(10)
    listing = "".join(f"{file.path},{number % 5}\n" for number, file in enumerate(files))
    (tmp_path / "patients.csv").write_text("path,patient\n" + listing)
    config = folder(
        files,
        alone(files),
        group_file=tmp_path / "patients.csv",
        group_columns=("patient",),
    )
    assert write_split(config)["num_groups"] == 5


def test_split_that_cannot_be_made_fails_the_command_and_keeps_the_old_files(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = official()
    config = folder(files, alone(files))
    before = write_split(config)
    folder(files, np.zeros(len(files), int))
    (tmp_path / "split.yaml").write_text(
        f"scans: {config.scans}\ntable: {config.table}\ngroups: {config.groups}\n"
        f"output: {config.output}\nprotocol: grouped\n"
    )
    assert main(["--config", str(tmp_path / "split.yaml")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "class a has 1 groups: expected at least 3" in message
    assert json.loads((config.output / "split.json").read_text()) == before


def test_command_tells_the_counts(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = official()
    config = folder(files, alone(files))
    (tmp_path / "split.yaml").write_text(
        f"scans: {config.scans}\ntable: {config.table}\ngroups: {config.groups}\n"
        f"output: {config.output}\n"
    )
    assert main(["--config", str(tmp_path / "split.yaml")]) == 0
    told = capsys.readouterr().out
    assert "protocol official, 18 groups" in told
    assert "train      6  (a 2, b 2, normal 2)" in told


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"protocol": "random"}, "expected 'auto', 'official' or 'grouped'"),
        ({"group_pattern": "("}, "group_pattern"),
        ({"group_pattern": r"\d+"}, "has 0 groups: expected one"),
        ({"folds": 2}, "folds is 2: expected greater than or equal to 3"),
        ({"fold": 5}, "fold is 5: expected 0 to 4"),
        ({"group_columns": []}, "expected at least 1 item"),
    ],
)
def test_config_refuses_what_cannot_be_dealt(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_mapping(SplitConfig, wrong, Path("split.yaml"))


@pytest.mark.real_scans
def test_real_scans_by_source_slice(tmp_path: Path) -> None:
    root = Path(os.environ.get("CHESTCT_REAL_SCANS", CHECKOUT / "../shared/data")) / "chest-ct"
    if not root.is_dir():
        pytest.skip("set CHESTCT_REAL_SCANS to the folder that holds chest-ct/")
    with (root / "manifest.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
    files = [scan(row["path"]) for row in rows]
    near = np.array([int(row["near_dup_group"]) for row in rows])
    slices = read_group_file(root / "manifest.csv", ("normal_source_slice",), files)
    facts = split_scans(files, near, slices, SplitConfig())[2]
    # Every test normal shows a source slice that is also in train; no cancer is a near copy but
    # the one that the manifest's cropped comparison adds.
    assert facts["overlaps"]["test in train"] == 51
    grouped = split_scans(files, near, slices, SplitConfig(protocol="grouped"))[2]
    assert not any(grouped["overlaps"].values())
    assert all(min(by_label.values()) > 0 for by_label in grouped["counts"].values())
