"""What is refused or flagged, each reason in its words, and what lies just on the other side."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from chestct.contract import LUNG_WINDOW, Window
from chestct.errors import OutOfDomainError, ScanDecodeError
from chestct.imaging.metadata import dicom_reasons, slice_metadata
from chestct.imaging.plausibility import picture_reasons, slice_reasons
from chestct.imaging.prepare import inspect_scan, load_scan
from chestct.imaging.sources import list_scans
from chestct.imaging.window import apply_window
from training.data.phantom import (
    LABELS,
    Phantom,
    dicom_from_phantom,
    make_phantom,
    write_dicom,
    write_png,
)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom("normal", 11, size=256)


@pytest.fixture
def tags(phantom: Phantom) -> Dataset:
    """The DICOM attributes of an axial chest-CT slice; tests bend them."""
    return dicom_from_phantom(phantom)


@pytest.fixture
def grey(phantom: Phantom) -> np.ndarray:
    """uint8 (256, 256): the same slice as a picture."""
    return apply_window(phantom.hu, LUNG_WINDOW)


def reasons_of(grey: np.ndarray) -> list[str]:
    picture = Image.fromarray(grey)
    return picture_reasons(picture, grey)


def reasons_in_colour(picture: Image.Image) -> list[str]:
    return picture_reasons(picture, np.asarray(picture.convert("L")))


def reasons_by_tags(tags: Dataset, grey: np.ndarray, window: Window = LUNG_WINDOW) -> list[str]:
    body_part = slice_metadata(tags, 0).body_part
    is_inverted = tags.PhotometricInterpretation == "MONOCHROME1"
    return slice_reasons(grey, window, body_part=body_part, is_inverted=is_inverted)


@pytest.mark.parametrize(
    "part", ["HEAD", "BRAIN", "ABDOMEN", "Pelvis", "ABDOMEN_PELVIS", "Abd/Pel", "EXTREMITY"]
)
def test_another_body_part_is_flagged(tags: Dataset, grey: np.ndarray, part: str) -> None:
    with warnings.catch_warnings():  # small letters are not allowed in this tag
        warnings.simplefilter("ignore")
        tags.BodyPartExamined = part
        assert dicom_reasons(tags) == []
        assert reasons_by_tags(tags, grey) == [
            f"another body part: Body Part Examined (0018,0015) is {part}, expected the chest"
        ]


@pytest.mark.parametrize(
    "part",
    ["", None, "CHEST", "Thorax", "LUNG", "HEART", "CHESTABDPELVIS", "CHEST/ABDOMEN/PELVIS",
     "NECKCHEST", "NECK CHEST", "TSPINE", "WHOLEBODY", "SHOULDER", "BODY", "HEAD FIRST", "-"],
)  # fmt: skip
def test_other_words_for_the_body_part_pass(tags: Dataset, grey: np.ndarray, part: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tags.BodyPartExamined = part
        assert reasons_by_tags(tags, grey) == []


# By the pixels


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("seed", range(6))
def test_phantoms_pass(tmp_path: Path, label: str, seed: int) -> None:
    drawn = make_phantom(label, seed, size=(128, 256, 512)[seed % 3])
    write_png(drawn, tmp_path / "scan.png")
    write_dicom(drawn, tmp_path / "scan.dcm")
    for path in tmp_path.iterdir():
        scan = inspect_scan(path)
        assert scan.reasons == ()
        np.testing.assert_array_equal(scan.pixels, load_scan(path))


def test_reasons_come_with_the_scan(tmp_path: Path, phantom: Phantom, grey: np.ndarray) -> None:
    Image.fromarray(grey).resize((256, 80)).save(tmp_path / "flat.png")
    tags = dicom_from_phantom(phantom)
    tags.BodyPartExamined = "HEAD"
    tags.save_as(tmp_path / "head.dcm", enforce_file_format=True)
    kinds = {
        path.name: [reason.partition(":")[0] for reason in inspect_scan(path).reasons]
        for path in tmp_path.iterdir()
    }
    assert kinds == {"flat.png": ["small", "elongated"], "head.dcm": ["another body part"]}
    assert load_scan(tmp_path / "flat.png").shape == (224, 224, 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_coloured_picture(grey: np.ndarray, mode: str) -> None:
    shades = np.stack([grey, grey // 2, 255 - grey], axis=-1)
    (reason,) = reasons_in_colour(Image.fromarray(shades).convert(mode))
    assert re.fullmatch(
        r"coloured: \d+% of the picture is strongly coloured, expected at most 3%", reason
    )


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK"])
def test_grey_picture_of_any_mode_is_not_coloured(grey: np.ndarray, mode: str) -> None:
    picture = Image.fromarray(grey)
    picture = picture.convert("RGB").convert(mode) if mode == "CMYK" else picture.convert(mode)
    assert reasons_in_colour(picture) == []


def test_annotations_and_a_cast_are_not_coloured(grey: np.ndarray) -> None:
    picture = Image.fromarray(grey).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((60, 90, 120, 140), outline=(0, 255, 0), width=2)
    draw.line((20, 30, 200, 60), fill=(255, 0, 0), width=3)
    draw.text((5, 240), "R 512 mm", fill=(255, 255, 0))
    assert reasons_in_colour(picture) == []
    large = Image.fromarray(grey).convert("RGB").resize((1024, 1024))
    draw = ImageDraw.Draw(large)
    for x in range(250, 850, 60):  # 10 thin lines, each 0.1 % of the picture
        draw.line((x, 250, x, 750), fill=(255, 0, 0), width=2)
    assert reasons_in_colour(large) == []
    cast = np.clip(np.stack([grey, grey, grey + np.int16(20)], axis=-1), 0, 255)
    assert reasons_in_colour(Image.fromarray(cast.astype(np.uint8))) == []


def test_blank_picture(grey: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(-2, 3, grey.shape)
    flat = (100 + noise).astype(np.uint8)
    for nearly_blank in (np.full_like(grey, 7), flat, 100 + grey // 10):
        (reason,) = reasons_of(nearly_blank)
        assert re.fullmatch(
            r"blank: nearly all of it lies within \d+ of 255 grey levels, expected at least 32",
            reason,
        )
    assert reasons_of(grey // 6) == []  # a slice as dim as 40 of 255


@pytest.mark.parametrize("size", [(1200, 300), (200, 400)])
def test_elongated_picture(grey: np.ndarray, size: tuple[int, int]) -> None:
    stretched = np.asarray(Image.fromarray(grey).resize(size))
    width, height = size
    assert reasons_of(stretched)[0] == (
        f"elongated: {width} x {height} pixels, expected 0.75 to 2.75 times as wide as tall"
    )


@pytest.mark.parametrize("size", [(384, 256), (256, 256), (600, 230)])
def test_usual_aspects_pass(grey: np.ndarray, size: tuple[int, int]) -> None:
    assert reasons_of(np.asarray(Image.fromarray(grey).resize(size))) == []


def test_small_picture(grey: np.ndarray) -> None:
    def resized(width: int, height: int) -> list[str]:
        return reasons_of(np.asarray(Image.fromarray(grey).resize((width, height))))

    assert resized(120, 90) == ["small: 120 x 90 pixels, expected at least 96 a side"]
    assert resized(96, 96) == []


def text_page(width: int, height: int, font_px: int, *, is_dark: bool) -> np.ndarray:
    page = Image.new("L", (width, height), 25 if is_dark else 245)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(font_px)
    rng = np.random.default_rng(4)
    for y in range(font_px, height - 2 * font_px, round(1.5 * font_px)):
        words = ["".join(rng.choice(list("abdegimnorst"), rng.integers(2, 9))) for _ in range(40)]
        draw.text((font_px, y), " ".join(words), fill=230 if is_dark else 20, font=font)
    return np.asarray(page)


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize(
    ("width", "height", "font_px"),
    [(640, 480, 14), (1200, 1400, 22), (1920, 1080, 20), (400, 200, 16)],
)
def test_text(width: int, height: int, font_px: int, is_dark: bool) -> None:
    reasons = reasons_of(text_page(width, height, font_px, is_dark=is_dark))
    assert re.fullmatch(
        r"lines of text: \d+ rows of marks with empty rows between them, expected at most 4",
        reasons[0],
    )


def test_lettering_on_a_slice_is_no_text(grey: np.ndarray) -> None:
    framed = Image.new("L", (400, 400))
    framed.paste(Image.fromarray(grey), (72, 72))
    draw = ImageDraw.Draw(framed)
    for y in (4, 18, 32, 384):
        draw.text((8, y), "SYNTHETIC  W 1500 L -600  DFOV 36 cm", fill=255)
    assert reasons_of(np.asarray(framed)) == []


def test_fine_pattern(grey: np.ndarray) -> None:
    wall = np.full((256, 256), 150, np.uint8)
    wall[:, ::10] = wall[:, 1::10] = 60
    for pattern in (wall, wall.T):
        (reason,) = reasons_of(np.ascontiguousarray(pattern))
        assert re.fullmatch(
            r"fine pattern: a line across meets \d\d borders between dark and bright, "
            r"expected at most 20",
            reason,
        )
    wide = np.full((256, 256), 150, np.uint8)
    wide[:, ::32] = wide[:, 1::32] = 60
    assert not any(reason.startswith("fine pattern") for reason in reasons_of(wide))


def test_no_body(grey: np.ndarray) -> None:
    sky = np.random.default_rng(1).normal(60, 3, (256, 256))
    sky[100:140, 100:165] += 120  # 4 % of the picture
    assert reasons_of(sky.astype(np.uint8)) == [
        "no body: bright tissue encloses 4% of the picture, expected at least 5%"
    ]
    far = Image.new("L", (512, 512))
    far.paste(Image.fromarray(grey).resize((170, 170)), (171, 171))
    assert reasons_of(np.asarray(far)) == []


def test_taller_than_wide(grey: np.ndarray) -> None:
    (reason,) = reasons_of(np.ascontiguousarray(grey.T))
    assert re.fullmatch(
        r"taller than wide: the body is 0\.\d\d times as wide as tall, expected at least 0\.95",
        reason,
    )
    # A table and a letter far from the body do not count for its shape.
    framed = np.zeros((400, 256), np.uint8)
    framed[60:316] = grey
    framed[380:383, 30:220] = 200
    framed[10:20, 100:104] = 255
    assert reasons_of(framed[:330]) == []
    assert reasons_of(np.ascontiguousarray(framed[:340])) == []


def test_shape_is_that_of_the_picture_not_of_the_raster(grey: np.ndarray) -> None:
    head = np.ascontiguousarray(grey.T)
    assert reasons_of(np.asarray(Image.fromarray(head).resize((512, 256)))) == []


# By Hounsfield units


def without_lungs(phantom: Phantom, hu: float) -> np.ndarray:
    """Its HU with everything in the cavity that is as light as lung made as dense as `hu`."""
    filled = phantom.hu.copy()
    size = len(filled)
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    inside = (rows / 0.6) ** 2 + (columns / 0.75) ** 2 < 1
    filled[inside & (filled < -300)] = hu
    return filled


def lung_reasons(
    tags: Dataset, hu: np.ndarray, window: Window = LUNG_WINDOW, *, inverted: bool = False
) -> list[str]:
    grey = apply_window(hu, window)
    tags.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    return reasons_by_tags(tags, 255 - grey if inverted else grey, window)


@pytest.mark.parametrize("filling_hu", [40.0, -100.0, -1000.0])
def test_no_lung_in_view(tags: Dataset, phantom: Phantom, filling_hu: float) -> None:
    """Neither tissue nor fat is lung, and neither is gas, as in a bowel."""
    (reason,) = lung_reasons(tags, without_lungs(phantom, filling_hu))
    assert re.fullmatch(
        r"no lung in view: 0\.[0-4]% of the body is as dense as lung \(-940 to -400 HU\), "
        r"expected at least 0\.5%",
        reason,
    )


@pytest.mark.parametrize("filling_hu", [-920.0, -860.0, -700.0, -450.0])
def test_emphysema_and_ground_glass_are_lung(
    tags: Dataset, phantom: Phantom, filling_hu: float
) -> None:
    assert lung_reasons(tags, without_lungs(phantom, filling_hu)) == []


def test_a_small_tip_of_lung_is_enough(tags: Dataset, phantom: Phantom) -> None:
    hu = without_lungs(phantom, 40.0)
    rows, columns = np.mgrid[-1:1:256j, -1:1:256j]
    hu[(rows / 0.09) ** 2 + ((columns - 0.3) / 0.09) ** 2 < 1] = -850
    assert lung_reasons(tags, hu) == []


def test_a_blanket_around_the_body_holds_no_lung(tags: Dataset, phantom: Phantom) -> None:
    """Cloth and foam are as light as lung, and a thin hem is around them."""
    hu = without_lungs(phantom, 40.0)
    rows, columns = np.mgrid[-1:1:256j, -1:1:256j]
    radius = np.hypot(rows / 0.85, columns)
    air = hu < -600
    hu[air & (radius < 0.97)] = -700
    hu[air & (radius >= 0.97) & (radius < 0.985)] = 0
    assert [reason.partition(":")[0] for reason in lung_reasons(tags, hu)] == ["no lung in view"]


def test_lungs_are_not_looked_for_where_the_window_hides_them(
    tags: Dataset, phantom: Phantom
) -> None:
    hu = without_lungs(phantom, 40.0)
    assert lung_reasons(tags, hu, Window(40.0, 400.0)) == []
    assert lung_reasons(tags, hu, Window(-900.0, 400.0)) == []
    assert len(lung_reasons(tags, hu, Window(-500.0, 2000.0))) == 1
    assert not any("lung" in reason for reason in lung_reasons(tags, hu, inverted=True))


# On real scans


@pytest.mark.real_scans
@pytest.mark.parametrize(
    ("folder", "most"),
    [
        ("chest-ct/train", 0.01),
        ("chest-ct/valid", 0.01),
        ("chest-ct/test", 0.01),
        ("external-ct", 0.02),  # shown in a bone window, which tears the body into pieces
    ],
)
def test_real_chest_pictures_pass(real_scans: Path, folder: str, most: float) -> None:
    paths = list(list_scans(real_scans / folder))
    assert len(paths) >= 70
    flagged = {str(path): scan.reasons for path in paths if (scan := inspect_scan(path)).reasons}
    assert len(flagged) <= most * len(paths), flagged


@pytest.mark.real_scans
@pytest.mark.parametrize(
    ("folder", "least"), [("photo-and-other", 8), ("brain-mri", 6), ("chest-xray", 0)]
)
def test_real_pictures_of_other_things_are_flagged(
    real_scans: Path, folder: str, least: int
) -> None:
    """The rules know no X-ray and not every photograph: those are left to `domain_distance`."""
    reasons = [inspect_scan(path).reasons for path in list_scans(real_scans / "ood" / folder)]
    assert sum(map(bool, reasons)) >= least


@pytest.mark.real_scans
def test_real_chest_slices_are_never_refused(real_scans: Path) -> None:
    """Not one is refused; flagged are only those from the neck or the belly, without lung."""
    num_read = 0
    for folder in ("lung-pet-ct-dx", "covid-19-ny-sbu", "transfer-syntaxes"):
        for path in (real_scans / "dicom" / folder).rglob("*.dcm"):
            try:
                reasons = inspect_scan(path).reasons
            except OutOfDomainError:
                raise
            except ScanDecodeError:  # its codec is not installed
                continue
            num_read += 1
            assert all(reason.startswith("no lung in view") for reason in reasons)
    assert num_read >= 50


@pytest.mark.real_scans
def test_real_dicom_of_other_things_is_refused_or_flagged(real_scans: Path) -> None:
    """Refused if its tags say so (read here by hand), else flagged for what it shows."""
    outcomes: dict[str, str | tuple[str, ...]] = {}
    for path in (real_scans / "ood" / "dicom").glob("*.dcm"):
        try:
            outcomes[path.name] = inspect_scan(path).reasons
        except OutOfDomainError as error:
            outcomes[path.name] = str(error)
            continue
        tags = pydicom.dcmread(path, stop_before_pixels=True)
        assert (tags.Modality, tags.SOPClassUID.name) == ("CT", "CT Image Storage")
        assert [round(abs(float(x))) for x in tags.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0]
    assert len(outcomes) >= 10
    assert all(outcomes.values()), outcomes
    words = {
        "brain-mr": "is MR, expected CT",
        "coronal": "the plane is coronal",
        "sagittal": "the plane is sagittal",
        "chest-xray": "is CR, expected CT",
        "ultrasound": "is US, expected CT",
        "pelvis": "Secondary Capture",
    }
    for part, word in words.items():
        (outcome,) = (outcome for name, outcome in outcomes.items() if part in name)
        assert isinstance(outcome, str)
        assert word in outcome
