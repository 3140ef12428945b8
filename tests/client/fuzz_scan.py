"""Fuzzes decoding: `python tests/client/fuzz_scan.py SECONDS [FOLDER]` (Linux on x86-64).

Starts from phantoms as PNG, JPEG and DICOM in all encodings that can be written here, damages
them, and ends with 0 if nothing came of it but slices and `ScanDecodeError`. A crash of a native
codec, an input that takes longer than 30 seconds, or a memory above 1 GiB ends it otherwise, with
the input in FOLDER.
"""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["chestct", "pydicom"]):
    import pydicom
    from pydicom.uid import (
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        ImplicitVRLittleEndian,
        JPEG2000Lossless,
        RLELossless,
    )

    from chestct.contract import LUNG_WINDOW
    from chestct.errors import ScanDecodeError
    from chestct.imaging.prepare import _inspected, _opened
    from chestct.imaging.window import apply_window

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training.data.phantom import dicom_from_phantom, make_phantom

SIDE = 40
TIMEOUT_S = 30  # by the clock, on a machine that may be busy
MEMORY_MIB = 1024
MAX_SEED_FRAMES = 4
# Inputs a process: the fuzzer itself keeps some 50 kB of each, decoding alone keeps nothing.
ROUND = 5000


def seeds() -> Iterator[bytes]:
    """Whole files of a few kilobytes: small ones are damaged in more ways a second."""
    phantom = make_phantom("adenocarcinoma", 3, size=128)
    hu = phantom.hu[::3, ::3][:SIDE, :SIDE]
    grey = apply_window(hu, LUNG_WINDOW)
    for picture, kind in (
        (Image.fromarray(grey), "PNG"),
        (Image.fromarray(grey).convert("P"), "PNG"),
        (Image.fromarray(grey).convert("RGBA"), "PNG"),
        (Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        (Image.fromarray(grey), "JPEG"),
        (Image.fromarray(grey).convert("CMYK"), "JPEG"),
    ):
        file = io.BytesIO()
        picture.save(file, kind)
        yield file.getvalue()
    stored = (hu + 1024).clip(0, 4095).astype(np.int16)
    for syntax in (
        None,
        ImplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        RLELossless,
        JPEG2000Lossless,
    ):
        for frames in (1, 2):
            dataset = dicom_from_phantom(phantom)
            dataset.Rows, dataset.Columns = stored.shape
            dataset.PixelData = stored.tobytes() * frames
            if frames > 1:
                dataset.NumberOfFrames = frames
                groups = [pydicom.Dataset() for _ in range(frames)]
                for place, group in enumerate(groups):
                    group.PlanePositionSequence = [pydicom.Dataset()]
                    group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, place]
                dataset.PerFrameFunctionalGroupsSequence = groups
            file = io.BytesIO()
            if syntax in (RLELossless, JPEG2000Lossless):
                dataset.compress(syntax)
                dataset.save_as(file, enforce_file_format=True)
            elif syntax is None:
                dataset.save_as(file, enforce_file_format=True)
            else:
                dataset["PixelData"].VR = "OW"
                dataset.file_meta.TransferSyntaxUID = syntax
                pydicom.dcmwrite(
                    file, dataset, enforce_file_format=True,
                    implicit_vr=syntax == ImplicitVRLittleEndian,
                    little_endian=syntax != ExplicitVRBigEndian,
                )  # fmt: skip
            yield file.getvalue()


def decode(data: bytes) -> None:
    """What `inspect_scans` does with the bytes of a file, of its first frames."""
    try:
        file = _opened(data, "scan")
    except ScanDecodeError:
        return
    for frame in range(min(file.num_frames, MAX_SEED_FRAMES)):
        try:
            scan = _inspected(file, frame, "scan", LUNG_WINDOW)
        except ScanDecodeError:
            continue
        if scan.pixels.shape != (224, 224, 1) or scan.pixels.dtype != np.uint8:
            raise TypeError(f"{scan.pixels.dtype} {scan.pixels.shape}")


def main() -> None:
    seconds = float(sys.argv[1])
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    if sys.argv[3:] == ["round"]:
        fuzz(seconds, folder, corpus)
    for place, seed in enumerate(seeds()):
        (corpus / f"seed{place:02}").write_bytes(seed)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 1:
        command = [sys.executable, __file__, str(left), str(folder), "round"]
        if code := subprocess.run(command, timeout=left + 120).returncode:
            sys.exit(code)


def fuzz(seconds: float, folder: Path, corpus: Path) -> None:
    """One round in this process, which ends with it."""
    logging.disable()  # pydicom tells of every oddity
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-max_total_time={max(int(seconds), 1)}",
            f"-runs={ROUND}",
            f"-timeout={TIMEOUT_S}",
            f"-rss_limit_mb={MEMORY_MIB}",
            "-max_len=16384",
            f"-artifact_prefix={folder}/",
            "-print_final_stats=1",
        ],
        decode,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
