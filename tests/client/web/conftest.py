"""A real Triton with a small model, the real page in front of it, and phantoms to send."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from chestct.contract import LUNG_WINDOW, ModelMetadata
from serving.local import LocalTriton
from tests.support.triton import LABELS, config_parameters, serve

CHECKOUT = Path(__file__).parents[3]
CARD = {
    "run": "run-7",
    "protocol": "grouped_distinct",
    "n": 804,
    "groups": 65,
    "balanced_accuracy": [0.705, 0.5959, 0.7956],
    "notice": "Research use only. Not a medical device.",
}
FACTS = ModelMetadata(
    LABELS, LUNG_WINDOW, 1.0, 1e3, "run-7", "ab" * 32, "fp32", json.dumps(CARD)
)  # fmt: skip


def write_repository(
    write_model: Callable[..., Path], folder: Path, facts: ModelMetadata = FACTS, without: str = ""
) -> Path:
    """A model repository; `without` names a parameter that is left out."""
    parameters = config_parameters(facts, without)
    write_model(folder, "chestct", parameters + "dynamic_batching { }", num_labels=len(LABELS))
    return folder


@pytest.fixture(scope="session")
def small_repository(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Path:
    return write_repository(write_model, tmp_path_factory.mktemp("web") / "repository")


@pytest.fixture(scope="session")
def small_triton(small_repository: Path, triton_environment: Path) -> Iterator[LocalTriton]:
    with serve(small_repository, triton_environment) as server:
        yield server


@dataclass
class Page:
    """A running `chestct web`."""

    url: str
    process: subprocess.Popen[str]

    @property
    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split()]


# The page as it is, but for limits that a test would otherwise wait for.
PROGRAM = """
import functools, sys
from chestct.cli.__main__ import main
from chestct.cli import web as command
from chestct.web import model_session as link
link.LOOK_EVERY_S, link.LOOK_TIMEOUT_S = 0.2, 1.0
command.WebSettings = functools.partial(command.WebSettings, {settings})
sys.exit(main())
"""


def start_page(triton_url: str, *options: str, settings: str = "", **environment: str) -> Page:
    """A page; `settings` are further arguments of `WebSettings`, as Python text."""
    process = subprocess.Popen(
        [
            sys.executable, "-c", PROGRAM.format(settings=settings),
            "web", "--port", "0", "--url", triton_url, *options,
        ],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "CHESTCT_WEB_TOKEN": "", **environment},
    )  # fmt: skip
    said = process.stderr.readline()
    found = re.search(r"http://\S+", said)
    assert found, said + process.stderr.read()
    return Page(found[0], process)


def stop_page(page: Page) -> None:
    page.process.send_signal(signal.SIGINT)
    try:
        page.process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        page.process.kill()
        raise


@pytest.fixture(scope="session")
def page(small_triton: LocalTriton) -> Iterator[Page]:
    """The page for all tests that leave it as it is."""
    running = start_page(small_triton.grpc_url, "--requests-a-minute", "60000")
    wait_for_model(running)
    yield running
    stop_page(running)


def wait_for_model(page: Page, is_up: bool = True, timeout_s: float = 60) -> dict[str, Any]:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{page.url}/api/model", timeout=5) as answer:
                found = json.load(answer)
            if is_up:
                return found
        except urllib.error.HTTPError as error:
            with error:
                found = json.load(error)
            if not is_up and error.code == 503:
                return found
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the model is not {'up' if is_up else 'down'}: {found}")


def phantom_png(label: str, seed: int, size: int = 256) -> bytes:
    from chestct.imaging.window import apply_window
    from training.data.phantom import make_phantom

    grey = apply_window(make_phantom(label, seed, size=size).hu, LUNG_WINDOW)
    return png_of(Image.fromarray(grey))


def png_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def phantom_dicom(label: str, seed: int, size: int = 256, **tags: Any) -> bytes:
    from training.data.phantom import dicom_from_phantom, make_phantom

    dataset = dicom_from_phantom(make_phantom(label, seed, size=size))
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of every kind by name."""
    with Image.open(io.BytesIO(phantom_png("normal", 5))) as picture:
        coloured = png_of(ImageOps.colorize(picture, "navy", "gold"))
    series = io.BytesIO()
    with zipfile.ZipFile(series, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(5):
            slice_ = phantom_dicom(
                "normal", 20 + i, 128, SeriesInstanceUID="1.2.3", InstanceNumber=i + 1,
                ImagePositionPatient=[0, 0, -5.0 * i],
            )  # fmt: skip
            # By name from foot to head, so that only positions give the order.
            archive.writestr(f"IM{9 - i}.dcm", slice_)
    contents = {
        "chest.png": phantom_png("normal", 1),
        "other.png": phantom_png("adenocarcinoma", 2),
        "chest.dcm": phantom_dicom("adenocarcinoma", 3),
        "coronal.dcm": phantom_dicom("normal", 4, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
        "coloured.png": coloured,
        "torn.png": phantom_png("normal", 6)[:900],
        "notes.txt": b"not a scan\n",
        "series.zip": series.getvalue(),
    }
    folder = tmp_path_factory.mktemp("files")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


@pytest.fixture
def make_page(small_triton: LocalTriton) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def make(*options: str, url: str = "", settings: str = "", **environment: str) -> Page:
        url = url or small_triton.grpc_url
        pages.append(start_page(url, *options, settings=settings, **environment))
        return pages[-1]

    yield make
    for running in pages:
        stop_page(running)
