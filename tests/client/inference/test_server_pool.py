"""Several servers: balance, illness, recovery, and models that must not be mixed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import grpc
import numpy as np
import pytest

from chestct.errors import (
    ContractError,
    InferenceTimeoutError,
    ModelExchangedError,
    ServerUnavailableError,
)
from chestct.inference.limiter import ConcurrencyLimiter
from chestct.inference.server_pool import ServerPool
from tests.support.ports import free_port
from tests.support.waiting import until


def rate_of(
    limiter: ConcurrencyLimiter, num_slots: int, num_requests: int, start_s: float = 0.0
) -> float:
    """Feeds a limiter the answers of a server that works on `num_slots` requests at once.

    Each takes a second; what is sent beyond waits in a queue. Returns the time at the end.
    """
    now_s = start_s
    for _ in range(num_requests):
        now_s += 1 / min(limiter.limit, num_slots)
        limiter.succeeded(now_s, is_full=True)
    return now_s


@pytest.mark.parametrize("num_slots", [1, 3, 8, 20])
def test_limit_grows_to_what_the_server_works_on_at_once(num_slots: int) -> None:
    limiter = ConcurrencyLimiter()
    rate_of(limiter, num_slots, 3000)
    assert num_slots <= limiter.limit <= num_slots + 2


def test_limit_is_bounded() -> None:
    limiter = ConcurrencyLimiter()
    rate_of(limiter, 10_000, 20_000)
    assert limiter.limit == ConcurrencyLimiter.MOST


def test_limit_follows_a_server_that_others_leave() -> None:
    limiter = ConcurrencyLimiter()
    now_s = rate_of(limiter, 3, 2000)
    assert limiter.limit <= 5
    rate_of(limiter, 12, 20_000, now_s)
    assert limiter.limit >= 12


def test_limit_stays_while_decoding_is_slower() -> None:
    limiter = ConcurrencyLimiter()
    for index in range(500):
        limiter.succeeded(index, is_full=False)
    assert limiter.limit == ConcurrencyLimiter.FIRST


def test_failures_halve_the_limit() -> None:
    limiter = ConcurrencyLimiter()
    rate_of(limiter, 16, 5000)
    before = limiter.limit
    limiter.failed()
    assert limiter.limit == before // 2
    for _ in range(10):
        limiter.failed()
    assert limiter.limit == 1
    rate_of(limiter, 8, 2000)
    assert limiter.limit >= 8


def test_requests_are_balanced(make_peer: Callable[..., Any], scans: np.ndarray) -> None:
    peers = [make_peer("grpc"), make_peer("grpc"), make_peer("http")]
    for peer in peers:
        peer.model.delay_s = 0.02
    with ServerPool([peer.url for peer in peers]) as pool:
        assert pool.max_batch_size == 4
        answers = [pool.submit(scans[:1]) for _ in range(60)]
        assert {answer.result()[0].predicted_labels[0] for answer in answers} == {"adenocarcinoma"}
    numbers = [len(peer.model.requests) for peer in peers]
    assert sum(numbers) == 60
    assert min(numbers) >= 10


def test_slow_server_gets_less(make_peer: Callable[..., Any], scans: np.ndarray) -> None:
    quick, slow = make_peer("grpc"), make_peer("grpc")
    slow.model.delay_s = 0.3
    with ServerPool([quick.url, slow.url]) as pool:
        for answer in [pool.submit(scans[:1]) for _ in range(60)]:
            answer.result()
    assert len(slow.model.requests) < len(quick.model.requests) / 2


def test_dead_server_is_left_out_and_comes_back(
    make_peer: Callable[..., Any], scans: np.ndarray
) -> None:
    port = free_port()
    peers = [make_peer("grpc"), make_peer("grpc", None, port)]
    with ServerPool([peer.url for peer in peers]) as pool:
        assert len(pool.healthy_urls) == 2
        peers[1].die()
        for answer in [pool.submit(scans) for _ in range(20)]:
            assert len(answer.result()[0].predicted_labels) == 6
        assert pool.healthy_urls == [peers[0].url]
        reborn = make_peer("grpc", None, port)
        until(lambda: len(pool.healthy_urls) == 2)
        assert reborn.model.requests  # it came back by a real answer
        for answer in [pool.submit(scans) for _ in range(40)]:
            answer.result()
        assert len(reborn.model.requests) > 5


def test_server_that_is_not_there_at_first_joins(
    make_peer: Callable[..., Any], closed_port_url: str, scans: np.ndarray
) -> None:
    first = make_peer("grpc")
    port = int(closed_port_url.rpartition(":")[2])
    with ServerPool([closed_port_url, first.url]) as pool:
        assert pool.healthy_urls == [first.url]
        make_peer("grpc", None, port)
        until(lambda: len(pool.healthy_urls) == 2)


def test_queueing_server_is_asked_less_but_not_given_up(
    make_peer: Callable[..., Any], scans: np.ndarray
) -> None:
    peer = make_peer("grpc")
    peer.model.failures = [grpc.StatusCode.UNAVAILABLE] * 2
    with ServerPool([peer.url], unavailable_timeout_s=30) as pool:
        answers = [pool.submit(scans[:1]) for _ in range(10)]
        assert [len(answer.result()[0].predicted_labels) for answer in answers] == [1] * 10
        assert pool.num_requests <= 2


def test_short_limit_of_a_call_does_not_make_a_server_unhealthy(
    grpc_peer: Any, scans: np.ndarray
) -> None:
    grpc_peer.model.delay_s = 0.5
    with ServerPool(grpc_peer.url) as pool:
        for _ in range(4):
            with pytest.raises(InferenceTimeoutError, match="no answer within"):
                pool.infer(scans[:1], timeout_s=0.05)
        assert pool.healthy_urls == [grpc_peer.url]


def test_request_that_every_server_fails_at_ends(
    make_peer: Callable[..., Any], scans: np.ndarray
) -> None:
    """The servers are well again each time they are asked for something else."""
    peer = make_peer("grpc")

    def fail_at_batches(name: str, array: np.ndarray) -> np.ndarray:
        if len(array) == 2:
            raise TimeoutError
        return array

    peer.model.bend_output = fail_at_batches
    unavailable = {"StatusCode.UNKNOWN": ServerUnavailableError}
    with (
        ServerPool([peer.url], unavailable_timeout_s=60) as pool,
        patch.dict("chestct.inference.connection.ERROR_BY_STATUS", unavailable),
        pytest.raises(ServerUnavailableError),
    ):
        pool.submit(scans[:2]).result(timeout=60)
    assert 3 < len(peer.model.requests) <= 20


def test_all_servers_dead_fail_after_patience(
    make_peer: Callable[..., Any], scans: np.ndarray
) -> None:
    peers = [make_peer("grpc"), make_peer("grpc")]
    with ServerPool([peer.url for peer in peers], unavailable_timeout_s=0.3) as pool:
        for peer in peers:
            peer.die()
        answers = [pool.submit(scans[:1]) for _ in range(5)]
        for answer in answers:
            with pytest.raises(ServerUnavailableError):
                answer.result()


def test_many_dead_servers_are_waited_for_as_long_as_few(
    make_peer: Callable[..., Any], scans: np.ndarray
) -> None:
    peers = [make_peer("grpc") for _ in range(5)]
    with ServerPool([peer.url for peer in peers], unavailable_timeout_s=1.0) as pool:
        for peer in peers:
            peer.die()
        started_s = time.monotonic()
        with pytest.raises(ServerUnavailableError):
            pool.infer(scans[:1])
        assert time.monotonic() - started_s >= 1.0


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_request_that_a_server_does_not_answer_goes_to_another_one(
    make_peer: Callable[..., Any], scans: np.ndarray, protocol: str
) -> None:
    peers = [make_peer(protocol) for _ in range(3)]
    with ServerPool([peer.url for peer in peers], timeout_s=1.0) as pool:
        before = [len(peer.model.requests) for peer in peers]
        peers[0].model.delay_s = 5.0
        assert pool.infer(scans[:1]).run == "run-7"
        asked = [len(peer.model.requests) - n for peer, n in zip(peers, before, strict=True)]
        assert asked[0] <= 1
        assert sum(asked[1:]) == 1


def test_http_connection_that_was_closed_while_idle_is_opened_anew(
    make_peer: Callable[..., Any], scans: np.ndarray
) -> None:
    peer = make_peer("http")
    with ServerPool(peer.url, unavailable_timeout_s=0) as pool:
        for _ in range(3):
            assert pool.infer(scans[:1]).run == "run-7"
            peer.http.close_idle()


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("training_run", "run-8", {"run is run-8, expected run-7", "run is run-7, expected run-8"}),
        ("labels", '["a", "b", "c", "d"]', {"class_names is"}),
        ("window_center_hu", "40.0", {"window is"}),
    ],
)
def test_models_that_differ_are_not_mixed(
    make_peer: Callable[..., Any], key: str, text: str, said: set[str]
) -> None:
    """The first that answers is what the others are held to."""
    peers = [make_peer("grpc"), make_peer("grpc")]
    peers[1].model.parameters[key] = text
    with pytest.raises(ContractError, match=r"not that of the other servers: ") as raised:
        ServerPool([peer.url for peer in peers]).__enter__()
    assert any(words in str(raised.value) for words in said)


def test_server_that_comes_back_with_another_model_stays_out(
    make_peer: Callable[..., Any], scans: np.ndarray
) -> None:
    port = free_port()
    peers = [make_peer("grpc"), make_peer("grpc", None, port)]
    with ServerPool([peer.url for peer in peers]) as pool:
        peers[1].die()
        for answer in [pool.submit(scans[:1]) for _ in range(20)]:
            answer.result()
        other = make_peer("grpc", None, port, {"training_run": "run-8"})
        until(lambda: other.model.requests)
        time.sleep(0.2)
        assert pool.healthy_urls == [peers[0].url]


def test_exchange_for_other_labels_is_an_error(grpc_peer: Any, scans: np.ndarray) -> None:
    with ServerPool([grpc_peer.url]) as pool:
        grpc_peer.model.versions = ["2"]
        grpc_peer.model.parameters["labels"] = '["a", "b", "c", "d"]'
        with pytest.raises(ModelExchangedError, match="exchanged for one with labels a, b, c, d"):
            pool.submit(scans[:1]).result()


def test_same_address_twice_and_none() -> None:
    for urls in ([], ["grpc://127.0.0.1:1", "grpc://127.0.0.1:1"]):
        with pytest.raises(ValueError, match="expected different ones"):
            ServerPool(urls)


def test_nobody_there(closed_port_url: str) -> None:
    with pytest.raises(ServerUnavailableError):
        ServerPool([closed_port_url], connect_timeout_s=0.3).__enter__()


def test_closing_does_not_wait_for_a_lock_that_an_interrupt_left_taken(
    grpc_peer: Any, scans: np.ndarray
) -> None:
    """SIGINT between taking a lock and noting that it has to be released: its owner keeps it."""
    with ServerPool([grpc_peer.url]) as pool:
        before = set(threading.enumerate())
        future = pool.submit(scans[:2])
        (thread,) = set(threading.enumerate()) - before
        with future._condition:
            time.sleep(0.2)
            assert not future.done()
            started = time.monotonic()
            pool.close()
            assert time.monotonic() - started < 30
            assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()
