from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.uid import UID

from chestct.imaging.prepare import load_grey, load_scan
from training.common.config import config_from_mapping
from training.common.metrics import auroc
from training.data.duplicates import measure_scans
from training.data.phantom import (
    LABELS,
    PhantomConfig,
    main,
    make_phantom,
    write_dicom,
    write_phantoms,
    write_png,
)

CHECKOUT = Path(__file__).parents[3]
SIZE = 192

# DICOM PS3.3 A.3: what the modules of the CT Image IOD demand, as far as their conditions hold.
TYPE_1 = [
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "FrameOfReferenceUID",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "PixelData",
    "WindowCenter",
    "WindowWidth",
    "PatientPosition",
]
TYPE_2 = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "SeriesNumber",
    "PositionReferenceIndicator",
    "Manufacturer",
    "InstanceNumber",
    "SliceThickness",
    "KVP",
    "AcquisitionNumber",
]


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_default_slice_is_512_float32_of_whole_hu() -> None:
    phantom = make_phantom("normal", 3)
    assert phantom.hu.shape == (512, 512)
    assert phantom.hu.dtype == np.float32
    assert np.array_equal(phantom.hu, np.rint(phantom.hu))
    assert phantom.hu.min() >= -1024
    assert phantom.hu.max() <= 3071


@pytest.mark.parametrize("seed", range(6))
def test_anatomy_has_air_lung_soft_tissue_and_bone(seed: int) -> None:
    hu = make_phantom("normal", seed, size=SIZE).hu
    body = hu[20:] > -300
    assert 0.15 < body.mean() < 0.7
    # The middle row crosses both lungs, so does a large part of the slice.
    lung = (hu > -980) & (hu < -650)
    assert 0.04 < lung.mean() < 0.4
    assert (hu > 500).mean() > 0.005  # cortical bone
    assert -1024 <= np.median(hu[:, -6:]) <= -950  # air at the edge


def test_heart_and_aorta_lie_on_the_right_of_the_picture() -> None:
    sides = []
    for seed in range(40):
        mask = make_phantom("normal", seed, size=128).hu[30:100, 34:94] > -300
        sides.append(mask[:, 30:].mean() - mask[:, :30].mean())
    assert np.mean(sides) > 0.03


def test_same_seed_same_slice_other_seed_other_body() -> None:
    first, again = (make_phantom("adenocarcinoma", 5, size=SIZE) for _ in range(2))
    other = make_phantom("adenocarcinoma", 6, size=SIZE)
    assert np.array_equal(first.hu, again.hu)
    assert first.lesion_box == again.lesion_box
    assert np.mean(first.hu != other.hu) > 0.5
    assert first.pixel_spacing_mm != other.pixel_spacing_mm


@pytest.mark.parametrize("label", [label for label in LABELS if label != "normal"])
def test_the_lesion_is_all_that_differs_from_the_normal_slice_of_a_seed(label: str) -> None:
    for seed in range(4):
        normal = make_phantom("normal", seed, size=SIZE)
        sick = make_phantom(label, seed, size=SIZE)
        assert normal.lesion_box is None
        assert sick.lesion_box is not None
        left, top, right, bottom = sick.lesion_box
        difference = np.abs(sick.hu - normal.hu)
        inside = difference[top:bottom, left:right]
        assert (inside > 200).mean() > 0.15
        # The scanner's blur carries the lesion a few pixels over its edge.
        difference[top - 4 : bottom + 4, left - 4 : right + 4] = 0
        assert difference.max() <= 1


def test_lesions_differ_in_size_place_and_cavity() -> None:
    def measured(label: str) -> tuple[float, float]:
        """Median diameter in mm, share of slices with air in the middle of the lesion."""
        sizes, hollow = [], []
        for seed in range(12):
            phantom = make_phantom(label, seed, size=SIZE)
            assert phantom.lesion_box is not None
            left, top, right, bottom = phantom.lesion_box
            sizes.append((right - left) * phantom.pixel_spacing_mm)
            middle = phantom.hu[(top + bottom) // 2 - 4 : (top + bottom) // 2 + 4]
            hollow.append(middle[:, (left + right) // 2 - 4 : (left + right) // 2 + 4].min() < -700)
        return float(np.median(sizes)), float(np.mean(hollow))

    nodule, mass, cavity = (
        measured(label)
        for label in ("adenocarcinoma", "large.cell.carcinoma", "squamous.cell.carcinoma")
    )
    assert 15 < nodule[0] < mass[0]
    assert mass[0] > 38
    assert cavity[1] >= 0.75
    assert mass[1] <= 0.1


def test_mean_grey_does_not_separate_the_classes() -> None:
    from chestct.contract import LUNG_WINDOW
    from chestct.imaging.window import apply_window

    seeds = range(20)
    grey = {
        label: np.array(
            [
                apply_window(make_phantom(label, seed, size=128).hu, LUNG_WINDOW).mean()
                for seed in seeds
            ],
            np.float32,
        )
        for label in LABELS
    }
    positive = np.repeat([True, False], len(seeds))
    for label in LABELS:
        if label != "normal":
            area = auroc(np.concatenate([grey[label], grey["normal"]]), positive)
            assert 0.35 < area < 0.65, label
    # What the lesion adds is small beside what the bodies differ by.
    added = np.abs(grey["large.cell.carcinoma"] - grey["normal"]).mean()
    assert added < 0.35 * grey["normal"].std()


def test_the_corner_says_synthetic_and_is_the_same_on_all(tmp_path: Path) -> None:
    corners = []
    for label in LABELS:
        for seed in (1, 2):
            phantom = make_phantom(label, seed)
            write_png(phantom, tmp_path / "scan.png")
            corners.append(load_grey(tmp_path / "scan.png")[:16, :88])
    assert all(np.array_equal(corner, corners[0]) for corner in corners)
    assert set(np.unique(corners[0])) == {60, 255}  # air: (-1000 + 1350) * 255 / 1499 = 59.54
    assert 0.1 < (corners[0] == 255).mean() < 0.5


def test_png_carries_the_notice(tmp_path: Path) -> None:
    write_png(make_phantom("normal", 1, size=SIZE), tmp_path / "scan.png")
    with Image.open(tmp_path / "scan.png") as picture:
        assert picture.mode == "L"
        assert "Synthetic phantom" in picture.text["Comment"]
        assert picture.text["Synthetic"] == "label normal, seed 1"


def test_dicom_and_png_of_a_phantom_are_the_same_scan(tmp_path: Path) -> None:
    phantom = make_phantom("squamous.cell.carcinoma", 9)
    write_png(phantom, tmp_path / "scan.png")
    write_dicom(phantom, tmp_path / "scan.dcm")
    assert np.array_equal(load_grey(tmp_path / "scan.png"), load_grey(tmp_path / "scan.dcm"))
    assert np.array_equal(load_scan(tmp_path / "scan.png"), load_scan(tmp_path / "scan.dcm"))


def test_dicom_holds_the_hounsfield_units_and_every_required_attribute(tmp_path: Path) -> None:
    phantom = make_phantom("large.cell.carcinoma", 11, size=SIZE)
    write_dicom(phantom, tmp_path / "scan.dcm")
    dataset = dcmread(tmp_path / "scan.dcm")
    assert [name for name in TYPE_1 if dataset.get(name) in (None, "")] == []
    assert [name for name in TYPE_2 if name not in dataset] == []
    assert dataset.pixel_array.dtype == np.int16
    assert dataset.RescaleIntercept == -1024
    assert np.array_equal(dataset.pixel_array - 1024.0, phantom.hu)
    assert dataset.SOPClassUID.name == "CT Image Storage"
    assert all(UID(dataset[name].value).is_valid for name in TYPE_1 if name.endswith("UID"))
    assert float(dataset.PixelSpacing[0]) == phantom.pixel_spacing_mm


def test_dicom_says_that_it_is_synthetic(tmp_path: Path) -> None:
    write_dicom(make_phantom("normal", 2, size=SIZE), tmp_path / "scan.dcm")
    dataset = dcmread(tmp_path / "scan.dcm")
    assert str(dataset.PatientName) == "SYNTHETIC^PHANTOM"
    assert dataset.SyntheticData == "YES"
    assert "ynthetic" in dataset.ImageComments
    assert "SYNTHETIC" in dataset.SeriesDescription


def test_folder_has_its_layout_and_no_anatomy_twice(tmp_path: Path) -> None:
    count = write_phantoms(
        tmp_path / "scans",
        per_class={"train": 3, "valid": 1, "test": 4},
        seed=0,
        dicom_fraction=0.25,
    )
    files = sorted(path for path in (tmp_path / "scans").rglob("*") if path.is_file())
    assert count == len(files) == 4 * 8
    for label in LABELS:
        found = sorted(path.suffix for path in (tmp_path / "scans/test" / label).iterdir())
        assert found == [".dcm", ".png", ".png", ".png"]
        assert len(list((tmp_path / "scans/train" / label).glob("*.png"))) == 3
    assert len({path.stem for path in files}) == len(files)
    facts = measure_scans(tmp_path / "scans")
    correlation = facts.thumbnails @ facts.thumbnails.T
    np.fill_diagonal(correlation, 0)
    assert correlation.max() < 0.99


def test_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_phantoms(
            tmp_path / name, per_class={"train": 1, "test": 1}, seed=seed, dicom_fraction=1
        )
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert not set(tree(tmp_path / "a").values()) & set(tree(tmp_path / "c").values())


@pytest.mark.parametrize(
    ("label", "seed", "size"), [("tumour", 0, 512), ("normal", -1, 512), ("normal", 0, 64)]
)
def test_bad_arguments_are_refused(label: str, seed: int, size: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        make_phantom(label, seed, size=size)


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected train, valid, test"):
        write_phantoms(tmp_path / "scans", per_class={"holdout": 1}, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"train": 0}, {"dicom_fraction": 1.5}, {"seed": -1}])
def test_config_refuses_what_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        config_from_mapping(PhantomConfig, wrong, Path("phantom.yaml"))


def test_command_writes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "phantom.yaml"
    config.write_text("train: 1\nvalid: 0\ntest: 1\n")
    assert main(["--output", str(tmp_path / "out"), "--config", str(config), "--seed", "4"]) == 0
    assert capsys.readouterr().out == f"8 phantoms in {tmp_path / 'out'}\n"
    assert (tmp_path / "out/train/normal/phantom_4000002.png").is_file()


def test_wrong_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "phantom.yaml"
    config.write_text("trains: 1\n")
    assert main(["--output", str(tmp_path / "out"), "--config", str(config)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "unknown keys ['trains']" in message


def test_full_disk_leaves_nothing_and_no_traceback(tmp_path: Path) -> None:
    # A limit of 16 blocks of 1 KiB on each file stands for a full disk: writing fails for real.
    ended = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -f 16; exec "$0" -m training phantom --output "$1/out"',
            sys.executable,
            str(tmp_path),
        ],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "too large" in ended.stderr
    assert not list(tmp_path.iterdir())
