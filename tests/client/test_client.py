"""Files, datasets, arrays and series, by both clients."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset

import chestct
from chestct.client import AsyncScanClient, ScanClient
from chestct.contract import Window
from chestct.errors import OutOfDomainError, ScanDecodeError
from chestct.imaging.prepare import inspect_scan
from training.data.phantom import dicom_from_phantom, make_phantom

WINDOW = Window(40.0, 400.0)  # not the default: a client that took this would answer otherwise
Call = Callable[..., Any]


@pytest.fixture
def url(grpc_peer: Any) -> str:
    grpc_peer.model.parameters |= {
        "window_center_hu": repr(WINDOW.center_hu),
        "window_width_hu": repr(WINDOW.width_hu),
    }
    return grpc_peer.url


@pytest.fixture(params=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest, url: str) -> Call:
    """Calls a method of a session."""

    def blocking(method: str, *arguments: Any, **options: Any) -> Any:
        with ScanClient(url) as client:
            found = getattr(client, method)(*arguments, **options)
            return list(found) if method == "classify_many" else found

    async def session(method: str, *arguments: Any, **options: Any) -> Any:
        async with AsyncScanClient(url) as client:
            assert client.metadata.window == WINDOW
            found = getattr(client, method)(*arguments, **options)
            return [each async for each in found] if method == "classify_many" else await found

    if request.param == "blocking":
        return blocking
    return lambda *arguments, **options: asyncio.run(session(*arguments, **options))


@pytest.fixture
def dataset() -> Dataset:
    return dicom_from_phantom(make_phantom("normal", 4, size=128))


@pytest.fixture
def file(tmp_path: Path, dataset: Dataset) -> Path:
    path = tmp_path / "slice.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("ms", "path")}


def expected_of(url: str, file: Path) -> dict[str, Any]:
    with ScanClient(url) as client:
        pixels = inspect_scan(file, WINDOW).pixels
        answer = client.infer(pixels[np.newaxis])
        return dict(zip(answer.metadata.class_names, answer.probabilities[0].tolist(), strict=True))


def test_a_file_by_path_bytes_and_stream(call: Call, url: str, file: Path) -> None:
    by_path = call("classify_file", file)
    assert (by_path["path"], by_path["status"]) == (str(file), "ok")
    assert by_path["probabilities"] == pytest.approx(expected_of(url, file), rel=1e-6)
    with file.open("rb") as stream:
        by_stream = call("classify_file", stream)
    assert by_stream["path"] == str(file)
    by_bytes = call("classify_file", file.read_bytes())
    assert by_bytes["path"] == call("classify_file", io.BytesIO(file.read_bytes()))["path"]
    assert without_times(by_path) == without_times(by_stream) == without_times(by_bytes)


def test_a_dataset_gives_what_its_file_gives(call: Call, file: Path, dataset: Dataset) -> None:
    record = call("classify_dataset", dataset)
    assert record["path"] == dataset.SOPInstanceUID
    assert without_times(record) == without_times(call("classify_file", file))


def test_a_dataset_that_cannot_be_written_names_the_remedy(call: Call, dataset: Dataset) -> None:
    del dataset.file_meta.TransferSyntaxUID
    with pytest.raises(ScanDecodeError, match=r"Set file_meta\.TransferSyntaxUID"):
        call("classify_dataset", dataset)


def test_a_dataset_of_another_kind(call: Call, dataset: Dataset) -> None:
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    with pytest.raises(OutOfDomainError):
        call("classify_dataset", dataset)


def test_an_array_is_shown_in_the_window_of_the_model(
    call: Call, file: Path, dataset: Dataset
) -> None:
    hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    record = call("classify_hu", hu)
    assert record["probabilities"] == call("classify_file", file)["probabilities"]
    for wrong in (hu[np.newaxis], np.full_like(hu, np.nan)):
        with pytest.raises(ValueError, match="expected finite values"):
            call("classify_hu", wrong)


def test_the_map_is_there_if_asked_for(call: Call, file: Path) -> None:
    assert "activation_map" not in call("classify_file", file)
    assert call("classify_file", file, with_map=True)["activation_map"].shape == (14, 14, 4)
    (record,) = call("classify_many", [file], with_map=True)
    assert record["activation_map"].shape == (14, 14, 4)


def test_many_files_folders_and_missing_ones(call: Call, file: Path, scan_folder: Path) -> None:
    missing = file.with_name("missing.png")
    records = call("classify_many", [file, scan_folder, missing])
    assert [records[0]["path"], records[-1]["path"]] == [str(file), str(missing)]
    assert len(records) == 9
    assert [record["status"] for record in records].count("error") == 3
    assert len(call("classify_many", str(scan_folder))) == 7


@pytest.fixture
def series(tmp_path: Path) -> Path:
    folder = tmp_path / "series"
    folder.mkdir()
    for index in range(3):
        dataset = dicom_from_phantom(make_phantom("normal", index, size=128))
        dataset.SeriesInstanceUID = "1.2.3"
        dataset.ImagePositionPatient = [0, 0, 5.0 * index]
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return folder


def test_a_series_by_folder_and_by_files(call: Call, series: Path) -> None:
    record = call("classify_series", series)
    assert (record["path"], record["num_slices"], record["num_failed"]) == (str(series), 3, 0)
    assert "series_uid" not in record
    by_files = call("classify_series", sorted(series.iterdir()), with_uids=True)
    assert by_files.pop("series_uid") == "1.2.3"
    assert by_files.pop("study_uid")
    assert by_files == record


def test_a_series_with_a_broken_slice_says_so(call: Call, series: Path) -> None:
    (series / "torn.dcm").write_bytes((series / "0.dcm").read_bytes()[:900])
    assert call("classify_series", series)["num_failed"] == 1


def test_several_series_and_none_are_refused(call: Call, series: Path, file: Path) -> None:
    with pytest.raises(ScanDecodeError, match="slices of 2 series can be read"):
        call("classify_series", [*series.iterdir(), file])
    (series / "only.dcm").write_bytes(b"nothing")
    with pytest.raises(ScanDecodeError, match="slices of 0 series can be read"):
        call("classify_series", series / "only.dcm")


def test_pictures_are_a_series_too(call: Call, tmp_path: Path, chest_slice: Any) -> None:
    for index in range(3):
        Image.fromarray(chest_slice(100, seed=index)).save(tmp_path / f"{index}.png")
    record = call("classify_series", tmp_path)
    assert record["num_slices"] == 3


def test_both_clients_have_the_same_methods_and_options() -> None:
    blocking, asyncio_ = (
        {name for name in dir(cls) if not name.startswith("_")}
        for cls in (chestct.ScanClient, chestct.AsyncScanClient)
    )
    # The others are of use to whoever builds a pipeline of requests only.
    assert blocking - asyncio_ == {"healthy_urls", "max_batch_size", "num_requests", "submit"}
    assert asyncio_ <= blocking
