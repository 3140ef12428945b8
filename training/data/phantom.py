"""Draw synthetic axial chest slices in Hounsfield units, the default and test data.

Every slice is drawn from a seed: a body with skin, fat and muscle, ribs, spine, mediastinum, two
lungs with vessels and texture, a scanner table, noise, and the lesion of its class. They teach
nothing about patients; they let everything after them run on something that behaves like CT.
They say on themselves that they are synthetic: in the pixels, in the PNG's text and in the DICOM
attributes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin
from pydantic import Field, NonNegativeInt, PositiveInt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from tqdm import tqdm

from chestct.contract import LUNG_WINDOW
from chestct.imaging.window import apply_window
from training.common.atomic_io import replaced
from training.common.cli import command_parser, run_command
from training.common.config import Share, config_class, load_config
from training.data.dataset import SPLITS
from training.data.phantom_anatomy import (
    RESCALE_INTERCEPT_HU,
    Canvas,
    FloatArray,
    draw_anatomy_numbers,
)
from training.data.phantom_drawing import (
    add_lesion,
    add_scanner,
    burn_in_text,
    draw_body,
    draw_bones,
    draw_cavity,
    draw_table,
    lung_pixels,
)

LABELS = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")

NOTICE = "Synthetic phantom drawn by a program. Not a patient. Not for diagnosis."


@config_class
class PhantomConfig:
    """How many phantoms to write.

    Attributes:
        train: Slices of each class for training.
        valid: Slices of each class for validation.
        test: Slices of each class for testing.
        dicom_fraction: Part of the test slices of each class that is written as DICOM; the
            others are PNG, as in the real folder.
        variety: How much bodies differ: 1 is the whole range, less is easier to learn.
        lesion_scale: Factor on the radius of lesions: 1 is lifelike, more is easier to learn.
        seed: First number of the anatomies; the same seed writes the same bytes.
    """

    train: PositiveInt = 60
    valid: NonNegativeInt = 16
    test: NonNegativeInt = 24
    dicom_fraction: Share = 0.25
    variety: Annotated[float, Field(gt=0, le=1)] = 1.0
    lesion_scale: Annotated[float, Field(ge=0.5, le=2.5)] = 1.0
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class Phantom:
    """One synthetic slice.

    Attributes:
        label: One of `LABELS`.
        seed: The seed of its anatomy.
        hu: float32 (rows, columns) of whole Hounsfield units, -1024 to 3071, patient's right on
            the left.
        pixel_spacing_mm: Side of one pixel.
        lesion_box: (left, top, right, bottom) in pixels, right and bottom exclusive; None for
            the normal class.
    """

    label: str
    seed: int
    hu: FloatArray
    pixel_spacing_mm: float
    lesion_box: tuple[int, int, int, int] | None


def make_phantom(
    label: str, seed: int, *, size: int = 512, variety: float = 1.0, lesion_scale: float = 1.0
) -> Phantom:
    """A slice of the class `label` with the anatomy of `seed`.

    The anatomy is drawn before the lesion, from its own stream of random numbers: one seed gives
    the same body in every class. Size, fat, inflation and noise do not know the label.

    Args:
        label: One of `LABELS`.
        seed: Number of the anatomy, 0 or more.
        size: Rows and columns in pixels, at least 128.
        variety: See `PhantomConfig`.
        lesion_scale: See `PhantomConfig`.

    Raises:
        ValueError: An unknown label, a negative seed or a size too small to hold the anatomy.
    """
    if label not in LABELS:
        raise ValueError(f"label {label!r}: expected one of {', '.join(LABELS)}")
    if seed < 0 or size < 128:
        raise ValueError(f"seed {seed}, size {size}: expected seed >= 0 and size >= 128")
    rng = np.random.default_rng([seed, 0])
    anatomy = draw_anatomy_numbers(rng)
    if variety < 1:
        anatomy = anatomy.towards(draw_anatomy_numbers(np.random.default_rng(5)), 1 - variety)
    canvas = Canvas(size, anatomy)
    draw_table(canvas, anatomy, rng)
    draw_body(canvas, anatomy, rng)
    draw_bones(canvas, anatomy, rng)
    lung = draw_cavity(canvas, anatomy, rng)
    hu = canvas.pixels()
    hu[lung] = lung_pixels(canvas, anatomy, lung, rng)
    rng_of_lesion = np.random.default_rng([seed, 1])
    lesion = add_lesion(hu, canvas, anatomy, lung, label, lesion_scale, rng_of_lesion)
    hu = add_scanner(hu, anatomy, rng)
    burn_in_text(hu)
    return Phantom(
        label, seed, hu, anatomy.pixel_spacing_mm(size), None if lesion is None else _box(lesion)
    )


def _box(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def write_png(phantom: Phantom, path: Path) -> None:
    """The slice in the lung window as 8-bit grey PNG, with a text chunk that says what it is."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", NOTICE)
    text.add_text("Synthetic", f"label {phantom.label}, seed {phantom.seed}")
    picture = Image.fromarray(apply_window(phantom.hu, LUNG_WINDOW))
    picture.save(path, format="PNG", pnginfo=text, compress_level=4)


def dicom_from_phantom(phantom: Phantom) -> Dataset:
    """A CT Image Storage data set with all type 1 and 2 attributes (DICOM PS3.3 A.3).

    Unknown type 2 attributes are present and empty. UIDs follow from label and seed, so that the
    same phantom is the same file.
    """
    name = f"{phantom.label}/{phantom.seed}/{phantom.hu.shape[0]}"

    def uid(part: str) -> str:
        return str(generate_uid(entropy_srcs=["chest-ct phantom", name, part]))

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid("image")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    # SOP Common (C.12.1), Patient (C.7.1.1), General Study (C.7.2.1)
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.SyntheticData = "YES"
    dataset.PatientName = "SYNTHETIC^PHANTOM"
    dataset.PatientID = f"PHANTOM-{phantom.seed}"
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.PatientComments = NOTICE
    dataset.StudyInstanceUID = uid("study")
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = dataset.StudyID = ""
    # General Series (C.7.3.1), Frame of Reference (C.7.4.1), General Equipment (C.7.5.1)
    dataset.Modality = "CT"
    dataset.SeriesInstanceUID = uid("series")
    dataset.SeriesNumber = 1
    dataset.SeriesDescription = "SYNTHETIC chest phantom"
    dataset.PatientPosition = "HFS"
    dataset.FrameOfReferenceUID = uid("frame")
    dataset.PositionReferenceIndicator = ""
    dataset.Manufacturer = ""
    # General Image (C.7.6.1), Image Plane (C.7.6.2)
    rows, columns = phantom.hu.shape
    spacing = phantom.pixel_spacing_mm
    dataset.InstanceNumber = 1
    dataset.ImageComments = NOTICE
    dataset.BurnedInAnnotation = "YES"
    dataset.PixelSpacing = [spacing, spacing]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [
        round(-0.5 * (columns - 1) * spacing, 3),
        round(-0.5 * (rows - 1) * spacing, 3),
        0,
    ]
    dataset.SliceThickness = 3
    # CT Image (C.8.2.1), Image Pixel (C.7.6.3), VOI LUT (C.11.2)
    dataset.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    dataset.KVP = dataset.AcquisitionNumber = None
    dataset.RescaleIntercept = RESCALE_INTERCEPT_HU
    dataset.RescaleSlope = 1
    dataset.RescaleType = "HU"
    dataset.WindowCenter, dataset.WindowWidth = LUNG_WINDOW.center_hu, LUNG_WINDOW.width_hu
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    stored = (phantom.hu - RESCALE_INTERCEPT_HU).astype("<i2")
    dataset.PixelData = stored.tobytes()
    return dataset


def write_dicom(phantom: Phantom, path: Path) -> None:
    """The slice as a DICOM file: int16 pixels, rescale intercept -1024."""
    dicom_from_phantom(phantom).save_as(path, enforce_file_format=True)


def write_phantoms(
    folder: Path,
    *,
    per_class: Mapping[str, int],
    seed: int,
    dicom_fraction: float = 0.0,
    variety: float = 1.0,
    lesion_scale: float = 1.0,
) -> int:
    """Write `folder/train|valid|test/CLASS/*` whole or not at all; how many files it holds.

    No two files share an anatomy, so none is shared between splits or classes.

    Args:
        folder: What to write; an older folder is replaced.
        per_class: Slices of each class for `train`, `valid` and `test`; a split of 0 is left out.
        seed: The same seed gives the same bytes.
        dicom_fraction: Part of the test slices of each class written as DICOM.
        variety: See `PhantomConfig`.
        lesion_scale: See `PhantomConfig`.

    Raises:
        ValueError: `per_class` names something else than train, valid or test.
        OSError: The folder cannot be written.
    """
    if unknown := set(per_class) - set(SPLITS):
        raise ValueError(f"splits {sorted(unknown)}: expected {', '.join(SPLITS)}")
    plan = [
        (split, label, number)
        for split in SPLITS
        for label in LABELS
        for number in range(per_class.get(split, 0))
    ]
    with replaced(folder) as temporary:
        for count, (split, label, number) in enumerate(
            tqdm(plan, desc="phantoms", unit="slice", disable=None)
        ):
            phantom = make_phantom(
                label, seed * 1_000_000 + count, variety=variety, lesion_scale=lesion_scale
            )
            target = temporary / split / label
            target.mkdir(parents=True, exist_ok=True)
            stem = f"phantom_{phantom.seed:07d}"
            as_dicom = split == "test" and number < round(dicom_fraction * per_class["test"])
            if as_dicom:
                write_dicom(phantom, target / f"{stem}.dcm")
            else:
                write_png(phantom, target / f"{stem}.png")
    return len(plan)


def write_configured(folder: Path, config: PhantomConfig) -> int:
    """`write_phantoms` with the numbers of a config."""
    return write_phantoms(
        folder,
        per_class={"train": config.train, "valid": config.valid, "test": config.test},
        seed=config.seed,
        dicom_fraction=config.dicom_fraction,
        variety=config.variety,
        lesion_scale=config.lesion_scale,
    )


def main(argv: list[str] | None = None) -> int:
    """Write a folder of phantoms."""
    parser = command_parser("training phantom", main.__doc__, "configs/phantom.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, help="instead of the config's seed")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(PhantomConfig, arguments.config)
        if arguments.seed is not None:
            config = dataclasses.replace(config, seed=arguments.seed)
        count = write_configured(arguments.output, config)
        sys.stdout.write(f"{count} phantoms in {arguments.output}\n")

    return run_command(work)
