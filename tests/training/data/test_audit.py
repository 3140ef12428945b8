from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.common.config import config_from_mapping
from training.data.audit import AuditConfig, audit, fit_threshold, main, write_audit
from training.data.audit_report import report
from training.data.duplicates import group_equal, group_near, join_groups, measure_scans
from training.data.phantom import make_phantom, write_dicom

CHECKOUT = Path(__file__).parents[3]


def textured(seed: int, *, brightness: int = 0) -> np.ndarray:
    """uint8 (60, 80): smooth bumps with noise, other bumps for another seed."""
    rng = np.random.default_rng(seed)
    bumps = Image.fromarray(rng.uniform(20, 170, (7, 9)).astype(np.float32))
    smooth = np.asarray(bumps.resize((80, 60), Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 5, smooth.shape) + brightness, 0, 255).astype(np.uint8)


def save(folder: Path, name: str, grey: np.ndarray, mode: str = "L") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).convert(mode).save(path)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Twelve pictures of which some are copies.

    One copy of the file (train a0 in test), one of the pixels in another mode (train b0 in
    valid, under another label), one near copy (train a1, noisier, in test).
    """
    folder = tmp_path / "scans"
    for number in range(3):
        save(folder, f"train/a/{number}.png", textured(number))
        save(folder, f"train/b/{number}.png", textured(10 + number))
    save(folder, "test/a/copy.png", textured(0))
    save(folder, "valid/a/colour.png", textured(10), "RGBA")
    noise = np.random.default_rng(5).integers(-6, 7, (60, 80))
    save(folder, "test/a/near.png", np.clip(textured(1) + noise, 0, 255).astype(np.uint8))
    save(folder, "test/b/other.png", textured(20))
    save(folder, "valid/b/other.png", textured(21))
    save(folder, "test/b/one grey.png", np.full((60, 80), 90, np.uint8))
    return folder


def test_equal_values_get_equal_numbers_in_order() -> None:
    assert group_equal(["x", "y", "x", "z", "y"]).tolist() == [0, 1, 0, 2, 1]


def test_joined_groups_follow_every_link() -> None:
    # 0-1 by the first, 1-2 by the second, 4-5 by a pair; -1 joins nothing.
    first = np.array([7, 7, 8, -1, -1, 9])
    second = np.array([0, 1, 1, -1, -1, -1])
    pairs = np.array([[5, 4]])
    assert join_groups(6, first, second, pairs=pairs).tolist() == [0, 0, 0, 1, 2, 2]
    assert join_groups(3).tolist() == [0, 1, 2]


def test_near_groups_chain_at_the_threshold() -> None:
    # Unit vectors of mean 0 in a plane, at 0, 5, 10 and 90 degrees: cos 5 = 0.9962 joins,
    # cos 10 = 0.9848 does not by itself, but its neighbour in between does.
    axes = np.array([[1, -1, 0, 0], [0, 0, 1, -1]]) / np.sqrt(2)
    degrees = np.radians([0, 5, 10, 90])
    vectors = (np.stack([np.cos(degrees), np.sin(degrees)], axis=1) @ axes).astype(np.float32)
    assert group_near(vectors, 0.99).tolist() == [0, 0, 0, 1]
    assert group_near(vectors[[0, 2, 3]], 0.99).tolist() == [0, 1, 2]
    assert group_near(vectors, 0.9999).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("scores", "positive", "threshold"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 2.5),
        ([4, 1, 3, 2], [1, 0, 1, 0], 2.5),
        ([1, 2, 3, 4], [0, 1, 0, 1], 1.5),  # 3 of 4 at 1.5 and at 3.5: the lower one
        ([1, 2, 3], [0, 0, 0], 3.5),  # nothing is positive: above the highest
        ([1, 2, 2, 3], [0, 0, 1, 1], 1.5),  # never between equal scores
    ],
)
def test_threshold_has_the_best_accuracy(
    scores: list[float], positive: list[int], threshold: float
) -> None:
    found = fit_threshold(np.array(scores, np.float32), np.array(positive, bool))
    assert found == threshold


def test_scans_are_measured(scans: Path) -> None:
    save(scans, "train/a/photo.jpg", textured(40), "RGB")
    write_dicom(make_phantom("normal", 1, size=128), scans / "train/a/slice.dcm")
    facts = measure_scans(scans)
    by_path = {file.path: index for index, file in enumerate(facts.files)}
    assert facts.formats[by_path["train/a/photo.jpg"]] == "JPEG RGB"
    assert facts.formats[by_path["train/a/slice.dcm"]] == "DICOM"
    assert facts.formats[by_path["valid/a/colour.png"]] == "PNG RGBA"
    assert facts.sizes[by_path["train/a/0.png"]].tolist() == [80, 60]
    assert facts.mean_grey[by_path["train/a/0.png"]] == pytest.approx(textured(0).mean())
    lengths = np.linalg.norm(facts.thumbnails, axis=1)
    flat = by_path["test/b/one grey.png"]
    assert lengths[flat] == 0
    assert np.allclose(np.delete(lengths, flat), 1, atol=1e-5)


def test_copies_are_found_within_and_across_splits(scans: Path) -> None:
    findings, near = audit(measure_scans(scans), 0.99)
    duplicates = findings["duplicates"]
    assert duplicates["exact_files"]["groups"] == [["test/a/copy.png", "train/a/0.png"]]
    assert duplicates["exact_pixels"]["groups"] == [
        ["test/a/copy.png", "train/a/0.png"],
        ["train/b/0.png", "valid/a/colour.png"],
    ]
    assert duplicates["near"]["groups"] == [
        ["test/a/copy.png", "train/a/0.png"],
        ["test/a/near.png", "train/a/1.png"],
        ["train/b/0.png", "valid/a/colour.png"],
    ]
    pixels = duplicates["exact_pixels"]
    assert (pixels["num_distinct"], pixels["num_redundant"], pixels["num_groups"]) == (10, 2, 2)
    assert pixels["num_groups_across_splits"] == 2
    assert duplicates["near"]["shared"]["test in train"] == {
        "a": {"copied": 2, "n": 2},
        "b": {"copied": 0, "n": 2},
    }
    assert len(set(near.tolist())) == 9


def test_one_picture_with_two_labels_is_a_conflict(scans: Path) -> None:
    findings, _ = audit(measure_scans(scans), 0.99)
    conflicts = findings["duplicates"]["exact_pixels"]["label_conflicts"]
    assert conflicts == [["train/b/0.png", "valid/a/colour.png"]]
    assert findings["duplicates"]["exact_files"]["num_label_conflicts"] == 0


def test_format_that_gives_the_class_away(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path, f"a/{number}.png", textured(number))
        save(tmp_path, f"b/{number}.png", textured(10 + number), "RGB")
    told = audit(measure_scans(tmp_path), 0.99)[0]["formats"]
    assert told["by_label"] == {"a": {"PNG L": 4}, "b": {"PNG RGB": 4}}
    assert told["label_from_format"]["accuracy"] == 1
    assert told["label_from_format"]["majority_accuracy"] == 0.5


def brightness_folder(folder: Path, added: int) -> Path:
    """`normal` brighter by `added` than two other classes; a test normal copied from train."""
    for split, first, each in (("train", 0, 6), ("test", 100, 4)):
        for index, label in enumerate(("normal", "x", "y")):
            for number in range(each):
                seed = first + 20 * index + number
                grey = textured(seed, brightness=added if label == "normal" else 0)
                save(folder, f"{split}/{label}/{number}.png", grey)
    save(folder, "test/normal/copy.png", textured(0, brightness=added))
    return folder


def test_brightness_shortcut_is_measured_on_test(tmp_path: Path) -> None:
    findings, _ = audit(measure_scans(brightness_folder(tmp_path, 60)), 0.99)
    found = findings["brightness"]
    assert (found["label"], found["brighter"], found["fitted_n"]) == ("normal", True, 18)
    as_it_is, without = found["measured"]["test"], found["measured"]["test_without_duplicates"]
    assert (as_it_is["n"], as_it_is["n_positive"]) == (13, 5)
    assert (without["n"], without["n_positive"]) == (12, 4)
    assert as_it_is["auroc"] > 0.95
    assert as_it_is["accuracy"] > 0.9 > as_it_is["majority_accuracy"]
    low, high = as_it_is["accuracy_95"]
    assert 0.6 < low < as_it_is["accuracy"] <= high <= 1


def test_darker_normals_count_by_their_darkness(tmp_path: Path) -> None:
    found = audit(measure_scans(brightness_folder(tmp_path, -50)), 0.99)[0]["brightness"]
    assert found["brighter"] is False
    assert found["measured"]["test"]["auroc"] > 0.95
    assert 20 < found["threshold_grey"] < 110


def test_majority_answers_the_most_frequent_label_of_train(scans: Path) -> None:
    save(scans, "train/b/more.png", textured(50))
    found = audit(measure_scans(scans), 0.99)[0]["majority"]
    assert found["label"] == "b"
    assert found["measured"]["test"]["n"] == 4
    assert found["measured"]["test"]["accuracy"] == 0.5


def test_folder_without_splits_is_measured_where_it_was_fitted(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path, f"a/{number}.png", textured(number, brightness=70))
        save(tmp_path, f"b/{number}.png", textured(10 + number))
    found = audit(measure_scans(tmp_path), 0.99)[0]
    assert list(found["brightness"]["measured"]) == ["fitted_on"]
    assert found["brightness"]["label"] in ("a", "b")
    assert found["duplicates"]["near"]["shared"] == {}


def test_files_are_written_and_readable(scans: Path, tmp_path: Path) -> None:
    config = AuditConfig(scans, tmp_path / "ingest.json", tmp_path / "results/audit")
    config.table.write_text('{"source": "here", "fingerprint": "f", "data_hash": "d1a2"}')
    findings = write_audit(config)
    assert findings["data_hash"] == "d1a2"
    assert json.loads((config.output / "audit.json").read_text()) == findings
    with (config.output / "groups.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    groups = {row["path"]: row["near_dup_group"] for row in rows}
    assert groups["test/a/near.png"] == groups["train/a/1.png"] != groups["train/a/2.png"]
    text = (config.output / "audit.md").read_text()
    assert text == report(findings)
    assert "| test in train | 2 of 2 | 0 of 2 |" in text
    assert "`train/b/0.png`, `valid/a/colour.png`" in text
    before = {path.name: path.read_bytes() for path in config.output.iterdir()}
    write_audit(config)
    assert {path.name: path.read_bytes() for path in config.output.iterdir()} == before


def test_missing_scans_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "audit.yaml").write_text(f"scans: {tmp_path / 'nothing'}\n")
    assert main(["--config", str(tmp_path / "audit.yaml")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "no scans; run python -m training ingest first" in message


def test_scan_that_does_not_decode_names_the_remedy(scans: Path) -> None:
    (scans / "train/a/late.png").write_bytes(b"broken after ingest")
    with pytest.raises(ValueError, match=r"late\.png: .*run python -m training ingest again"):
        measure_scans(scans)


@pytest.mark.parametrize("value", [0.0, 1.01, -1.0])
def test_config_refuses_a_threshold_that_joins_everything_or_nothing(value: float) -> None:
    with pytest.raises(ValueError, match=f"near_correlation is {value}: expected"):
        config_from_mapping(AuditConfig, {"near_correlation": value}, Path("audit.yaml"))


@pytest.mark.real_scans
def test_real_scans_have_the_faults_that_are_known(tmp_path: Path) -> None:
    root = Path(os.environ.get("CHESTCT_REAL_SCANS", CHECKOUT / "../shared/data")) / "chest-ct"
    if not root.is_dir():
        pytest.skip("set CHESTCT_REAL_SCANS to the folder that holds chest-ct/")
    scans = tmp_path / "scans"
    scans.mkdir()
    for split in ("train", "valid", "test"):
        (scans / split).symlink_to((root / split).resolve())
    with (root / "manifest.csv").open(newline="") as file:
        manifest = {row["path"]: row for row in csv.DictReader(file)}

    facts = measure_scans(scans)
    findings, near = audit(facts, 0.99)
    paths = [file.path for file in facts.files]
    assert sorted(paths) == sorted(manifest)

    # Exact copies: our groups are those of the manifest, one to one.
    pixels = group_equal(facts.pixel_hashes).tolist()
    known = [manifest[path]["pixel_md5"] for path in paths]
    assert len(set(zip(pixels, known, strict=True))) == len(set(pixels)) == len(set(known)) == 804
    exact = findings["duplicates"]["exact_pixels"]
    assert (exact["num_redundant"], exact["num_groups"]) == (153, 59)
    assert exact["num_groups_across_splits"] == 22
    normals = {row["pixel_md5"] for row in manifest.values() if row["class"] == "normal"}
    assert exact["distinct_by_label"]["normal"] == len(normals) == 62
    assert exact["label_conflicts"] == [
        ["train/large.cell.carcinoma/l4.png", "train/squamous.cell.carcinoma/sq2.png"]
    ]

    # Near copies: each of our groups lies within one of the manifest's, which joins more by
    # comparing cropped bodies as well.
    pairs = {
        (group, manifest[path]["near_dup_group"])
        for group, path in zip(near.tolist(), paths, strict=True)
    }
    assert len(pairs) == len(set(near.tolist())) == 775
    shared = findings["duplicates"]["near"]["shared"]
    assert shared["test in train"]["normal"] == {"copied": 47, "n": 50}
    assert shared["valid in train"]["normal"] == {"copied": 10, "n": 13}
    assert all(
        cell["copied"] == 0 for name, cell in shared["test in train"].items() if name != "normal"
    )

    # Normals come from other sources: brightness alone tells them.
    assert findings["brightness"]["measured"]["test"]["auroc"] > 0.9
