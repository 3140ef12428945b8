"""Streams of files: order, look-ahead, bad files among good ones, and going on after a crash."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chestct.batch.decode_pool import DecodePool
from chestct.batch.pipeline import (
    classify_sources,
    decoded_files,
)
from chestct.batch.selection import FLUSH, Flush
from chestct.client import ScanClient
from chestct.contract import LUNG_WINDOW, Window
from chestct.errors import InferenceError, ServerUnavailableError
from chestct.imaging.prepare import Slice, inspect_scans
from chestct.imaging.sources import Source, list_scans
from tests.client.batch.faults import faulty, install
from tests.client.swelling import dicom_that_swells


@pytest.fixture
def client(grpc_peer: Any) -> Iterator[ScanClient]:
    with ScanClient(grpc_peer.url, unavailable_timeout_s=0) as connected:
        yield connected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("workers", [1, 4])
def test_lines_keep_the_order_and_bad_files_stop_nothing(
    client: ScanClient, scan_folder: Path, batch_size: int, workers: int
) -> None:
    paths = list(list_scans(scan_folder))
    lines = list(client.classify_many(paths, batch_size=batch_size, workers=workers))
    assert [line["path"] for line in lines] == [str(path) for path in paths]
    outcomes = [(Path(line["path"]).name, line.get("label", line["status"])) for line in lines]
    assert outcomes == [
        ("0 (1).png", "adenocarcinoma"),
        ("1 (1).png", "large_cell"),
        ("2 (1).png", "normal"),
        ("2 text.png", "error"),
        ("2 torn.png", "error"),
        ("3 (1).png", "squamous_cell"),
        ("a.PNG", "adenocarcinoma"),
    ]
    assert all(line["ms"]["infer"] > 0 for line in lines if line["status"] == "ok")


def test_reasons_stay_with_their_files(
    client: ScanClient, scan_folder: Path, grey_slice: Callable[..., np.ndarray]
) -> None:
    """What the file tells comes before what the network tells, in the one batch of both."""
    Image.fromarray(grey_slice(100)).save(scan_folder / "1 small.png")
    Image.fromarray(np.full((200, 200), 90, np.uint8)).save(scan_folder / "3 flat.png")
    names = ("0 (1).png", "1 small.png", "2 text.png", "3 flat.png")
    lines = dict(
        zip(names, client.classify_many([scan_folder / name for name in names]), strict=True)
    )
    kinds = {
        name: [reason.partition(":")[0] for reason in line.get("reasons", [])]
        for name, line in lines.items()
    }
    assert kinds == {
        "0 (1).png": [],
        "1 small.png": ["small"],
        "2 text.png": [],
        "3 flat.png": ["blank", "unlike the training scans"],
    }
    assert [line.get("in_domain") for line in lines.values()] == [True, False, None, False]


def test_scans_are_sent_in_batches_without_maps(
    client: ScanClient, grpc_peer: Any, scan_folder: Path
) -> None:
    list(client.classify_many(list_scans(scan_folder), batch_size=3))
    # Seven files, less the two that are broken, in threes.
    names = ("probabilities", "domain_distance")
    assert sorted(grpc_peer.model.requests) == [(2, names), (3, names)]


def test_only_broken_files_need_no_request(
    client: ScanClient, grpc_peer: Any, scan_folder: Path
) -> None:
    lines = list(client.classify_many([scan_folder / "2 text.png"]))
    assert [line["status"] for line in lines] == ["error"]
    assert grpc_peer.model.requests == []


def test_no_paths_give_no_lines(client: ScanClient) -> None:
    assert list(client.classify_many([])) == []


def test_look_ahead_is_bounded(client: ScanClient, scan_folder: Path) -> None:
    drawn = 0

    def endless() -> Iterator[Path]:
        nonlocal drawn
        while True:
            drawn += 1
            yield scan_folder / "0 (1).png"

    lines = client.classify_many(endless(), batch_size=4)
    for _ in range(6):
        next(lines)
    lines.close()
    assert drawn <= 4 * (4 + (os.cpu_count() or 1)) + 4 * 4 * 4 + 4


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_requests_are_under_way_at_once(
    make_peer: Callable[..., Any], scan_folder: Path, protocol: str
) -> None:
    peer = make_peer(protocol)
    together = threading.Barrier(2, timeout=30)  # breaks where requests come one by one

    def wait(name: str, array: np.ndarray) -> np.ndarray:
        if name == "probabilities":
            together.wait()
        return array

    peer.model.bend_output = wait
    with ScanClient(peer.url, unavailable_timeout_s=0) as client:
        paths = [scan_folder / "0 (1).png", scan_folder / "1 (1).png"] * 4
        lines = list(client.classify_many(paths, batch_size=2))
    assert [line["path"] for line in lines] == [str(path) for path in paths]
    assert {line["status"] for line in lines} == {"ok"}


def test_each_processor_decodes_a_file(
    client: ScanClient, scan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3, timeout=30)  # breaks where fewer are decoded at once

    def inspect_together(source: Source, window: Window, **options: Any) -> Iterator[Slice]:
        together.wait()
        return inspect_scans(source, window, **options)

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr("chestct.batch.decode_worker.inspect_scans", inspect_together)
    lines = list(client.classify_many([scan_folder / "0 (1).png"] * 6, batch_size=3))
    assert [line["status"] for line in lines] == ["ok"] * 6


def test_dicom_is_shown_in_the_window_of_the_model(
    grpc_peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Window] = []

    def spy(source: Source, window: Window, **options: Any) -> Iterator[Slice]:
        seen.append(window)
        return inspect_scans(source, window, **options)

    monkeypatch.setattr("chestct.batch.decode_worker.inspect_scans", spy)
    grpc_peer.model.parameters["window_center_hu"] = "40.0"
    grpc_peer.model.parameters["window_width_hu"] = "400.0"
    with ScanClient(grpc_peer.url) as client:
        list(client.classify_many([tmp_path / "missing.dcm"]))
    assert seen == [Window(40.0, 400.0)]


def assert_only_first_batch_and_errors(lines: list[dict[str, Any]]) -> None:
    names = [(Path(line["path"]).name, line["status"]) for line in lines]
    assert names == [
        ("0 (1).png", "ok"),
        ("1 (1).png", "ok"),
        ("2 (1).png", "ok"),
        ("2 text.png", "error"),  # of the second batch, which was lost but for these
        ("2 torn.png", "error"),
    ]


def test_server_death_comes_after_what_is_finished(
    make_peer: Callable[..., Any], scan_folder: Path
) -> None:
    peer = make_peer("http")
    peer.model.dies_at_request = 2
    lines: list[dict[str, Any]] = []
    with (
        ScanClient(peer.url, unavailable_timeout_s=0) as client,
        pytest.raises(ServerUnavailableError),
    ):
        lines.extend(client.classify_many(list_scans(scan_folder), batch_size=3))
    # The first request may have been under way too.
    assert [line["status"] for line in lines if line["status"] != "error"] in ([], ["ok"] * 3)


def test_failed_batch_comes_after_what_is_finished(
    client: ScanClient, grpc_peer: Any, scan_folder: Path
) -> None:
    grpc_peer.model.bend_output = lambda _, array: array if len(array) == 3 else array * np.nan
    lines: list[dict[str, Any]] = []
    with pytest.raises(InferenceError, match="not finite"):
        lines.extend(client.classify_many(list_scans(scan_folder), batch_size=3))
    assert_only_first_batch_and_errors(lines)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": 0}])
def test_sizes_below_one(client: ScanClient, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        list(client.classify_many([], **wrong))


def test_many_scans_stay_with_their_files(
    client: ScanClient, tmp_path: Path, grey_slice: Callable[..., np.ndarray]
) -> None:
    means = np.random.default_rng(3).choice([40, 100, 160, 220], 60)
    for index, mean in enumerate(means):
        Image.fromarray(grey_slice(int(mean), seed=index)).save(tmp_path / f"{index:03}.png")
    lines = client.classify_many(list_scans(tmp_path), batch_size=7, workers=4)
    labels = client.metadata.class_names
    assert [labels.index(line["label"]) for line in lines] == [int(mean) // 64 for mean in means]


@pytest.mark.parametrize(
    ("read", "said"),
    [("os.abort()", "ended by SIGABRT"), ("time.sleep(600)", "was not done within 2 s")],
)
def test_file_that_crashes_or_hangs_its_decoder_costs_one_record(
    client: ScanClient,
    scan_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: str,
    said: str,
) -> None:
    install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    bad = faulty(tmp_path / "bad.dcm", read)
    good = [Source(path) for path in list_scans(scan_folder)]
    sources = [*good[:3], bad, *good[3:], *good]
    with (
        DecodePool(2, limit_s=2.0, num_in_threads=0) as workers,
    ):
        records = [record for record, _ in classify_sources(client, sources, workers, 3)]
    assert [record["path"] for record in records] == [source.name for source in sources]
    error = records[3]["error"]
    assert error["type"] == "DecoderCrashedError"
    assert said in error["message"]
    assert [record["status"] for record in records].count("ok") == 10


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_file_that_swells_in_memory_costs_one_record(
    client: ScanClient, scan_folder: Path, tmp_path: Path
) -> None:
    swelling = tmp_path / "swelling.dcm"
    swelling.write_bytes(dicom_that_swells(400_000))
    good = list(list_scans(scan_folder))
    paths = [*good[:2], swelling, *good[2:], *good]
    limit = 256 * 2**20
    with (  # it is too large for a thread, though the first files go to threads
        DecodePool(1, memory_bytes=limit) as workers,
    ):
        records = [record for record, _ in classify_sources(client, map(Source, paths), workers, 3)]
    assert [record["path"] for record in records] == list(map(str, paths))
    error = records[2]["error"]
    assert error["type"] == "DecoderCrashedError"
    assert error["message"].endswith(
        "decoding needs more memory than it may take. Export the slice again, or allow it more."
    )
    assert [record["status"] for record in records].count("ok") == 10
    # The same file is no riddle where there is room for it.
    with DecodePool(1, num_in_threads=0) as workers:
        source = Source(swelling)
        [file] = decoded_files(source, workers.submit(source, LUNG_WINDOW))
    assert "DICOM without a picture" in str(file.slice.scan)


def test_flush_sends_what_there_is(client: ScanClient, scan_folder: Path) -> None:
    drawn: list[int] = []

    def coming() -> Iterator[Source | Flush]:
        for index in range(3):
            drawn.append(index)
            yield Source(scan_folder / f"{index} (1).png")
            yield FLUSH

    with DecodePool(1) as workers:
        classified = classify_sources(client, coming(), workers, 4)
        for index in range(3):
            assert next(classified)[0]["status"] == "ok"
            assert drawn == list(range(index + 1))
