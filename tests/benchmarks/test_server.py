from __future__ import annotations

import threading
import time

import pytest

from benchmarks.environment import cores
from benchmarks.load import Cell, load
from benchmarks.server import first_served_answer, statistics_after, statistics_of
from chestct.client import ScanClient
from tests.support.triton import serve

pytestmark = pytest.mark.server


class Counting:
    """A client that counts its requests, and holds the first ones until all are under way."""

    def __init__(self, client: ScanClient, concurrency: int) -> None:
        self.model, self._client = client.model, client
        self._lock, self._all_here = threading.Lock(), threading.Barrier(concurrency, timeout=60)
        self.num_sent = self.in_flight = self.most_in_flight = 0

    def infer(self, scans, with_map=False):
        with self._lock:
            self.num_sent += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            is_first = self.num_sent <= self._all_here.parties
        if is_first:
            self._all_here.wait()
        try:
            return self._client.infer(scans, with_map=with_map)
        finally:
            with self._lock:
                self.in_flight -= 1


@pytest.fixture(scope="module")
def triton(published, triton_environment):
    repository = published.folder / "model_repository"
    with serve(repository, triton_environment) as server:
        yield server


def test_requests_of_another_client_are_noticed(triton, scan_batch, monkeypatch):
    monkeypatch.setattr("benchmarks.server.COUNTED_WITHIN_S", 0.3)
    with ScanClient(triton.grpc_url, "chestct_fp32") as client:
        before = statistics_of(triton.http_url, "chestct_fp32")
        client.infer(scan_batch, with_map=True)
        after = statistics_after(triton.http_url, "chestct_fp32", before, 1)
        assert after["scans"] - before["scans"] == len(scan_batch)
        assert after["executions"] - before["executions"] == 1
        client.infer(scan_batch, with_map=True)
        client.infer(scan_batch, with_map=True)
        with pytest.raises(ValueError, match="2 requests to chestct_fp32 were counted for 1"):
            statistics_after(triton.http_url, "chestct_fp32", after, 1)


def test_load_keeps_so_many_requests_in_flight(triton, scan_batch):
    cell = Cell()
    with ScanClient(triton.grpc_url, "chestct_fp32") as real:
        client = Counting(real, 4)
        load(
            client,
            scan_batch,
            4,
            warm_up_s=0.2,
            window_s=0.5,
            http_url=triton.http_url,
            into=cell,
        )
    assert client.most_in_flight == 4
    assert sum(cell.counts) == len(cell.latency_ms) > 0
    # The server's count begins before the window, ends after it, and lags behind its answers.
    assert sum(cell.counts) - 4 <= cell.scans <= client.num_sent
    assert 1 <= cell.scans / cell.executions <= 4
    assert 0 < cell.client_cpu_s <= 1.2 * cores() * sum(cell.seconds)
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(work)")]


def test_window_lasts_until_there_is_an_answer(triton, scan_batch):
    cell = Cell()
    with ScanClient(triton.grpc_url, "chestct_fp32") as client:
        load(
            client,
            scan_batch,
            1,
            warm_up_s=0,
            window_s=1e-6,
            http_url=triton.http_url,
            into=cell,
        )
    assert len(cell.latency_ms) >= 1
    assert cell.seconds[0] > 1e-4


def test_load_ends_with_the_error_of_a_worker(triton, scan_batch):
    with ScanClient(triton.grpc_url, "chestct_fp32") as client:
        client.model = "nobody"
        started = time.monotonic()
        with pytest.raises(Exception, match="nobody"):
            load(
                client,
                scan_batch,
                2,
                warm_up_s=5,
                window_s=60,
                http_url=triton.http_url,
                into=Cell(),
            )
        assert time.monotonic() - started < 30


def test_statistics_of_an_unknown_model_are_refused_in_words(triton):
    with pytest.raises(ValueError, match="no statistics of nobody"):
        statistics_of(triton.http_url, "nobody")


def test_first_answer_of_a_server_with_one_model(published, triton, monkeypatch):
    """One model takes less than the three that the other server holds."""
    monkeypatch.chdir(published.folder)
    started = time.perf_counter()
    seconds, memory_mb = first_served_answer(
        published.folder / "model_repository", "chestct_fp32", 8
    )
    assert 0 < seconds < time.perf_counter() - started
    assert 0 < memory_mb < triton.peak_memory_mb()
