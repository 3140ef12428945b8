"""Servers that serve the same model, as one: balancing, retries, health, and comparison.

gRPC's own means (`round_robin`, health checking and `retryPolicy` in a service config) balance and
retry too. They cannot refuse a server that serves another model, know nothing of the HTTP
endpoint, and do not tell how many requests a server works on at once.

The file is longer than others: `ServerPool` is one class, all of it under one lock.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

from chestct.contract import (
    MODEL_NAME,
    OUTPUT_NAMES,
    ModelMetadata,
)
from chestct.errors import (
    ContractError,
    InferenceError,
    InferenceTimeoutError,
    ModelExchangedError,
    ServerError,
    ServerUnavailableError,
)
from chestct.inference.connection import Connection, ServedModel
from chestct.inference.limiter import ConcurrencyLimiter
from chestct.inference.predictions import (
    Health,
    Predictions,
    ScanArray,
    output_arrays,
    require_scans,
    synthetic_scan,
)
from chestct.inference.wires import Request, TLSOptions

__all__ = ["ServerPool", "in_thread"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

WITHOUT_MAP = tuple(name for name in OUTPUT_NAMES if name != "activation_map")
UNHEALTHY_THRESHOLD = 3  # failures in a row
MAX_ROUNDS = 10  # of one request over the servers; it may be what they fail at
RETRY_PAUSE_S = 0.1
UNAVAILABLE_TIMEOUT_S = 60.0  # a restart of Triton with a large model
FIRST_PROBE_S, LONGEST_PROBE_S = 0.2, 10.0
STRAGGLER_S = 2.0  # how long the first server that is ready waits for the others
CHECK_AFTER_S = 1.0  # without an answer; no server restarts in less


class _Server:
    """One connection and its state; everything but `connection` is guarded by the pool's lock."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.limiter = ConcurrencyLimiter()
        self.served: ServedModel | None = None
        self.is_healthy = False
        self.is_probed = False
        self.num_sent = 0
        self.num_failures = 0  # in a row
        self.answered_s = 0.0  # the model is compared again after a failure or a while

    @property
    def free_capacity(self) -> float:
        """Part of its limit of concurrent requests that is free; negative beyond the limit."""
        return 1 - self.num_sent / self.limiter.limit


@dataclass(frozen=True)
class _Call:
    """What the requests of a call have in common."""

    expected: ModelMetadata
    with_map: bool = False
    headers: Mapping[str, str] | None = None
    request_id: str = ""
    is_queued: bool = False  # wait until a server has free capacity


class ServerPool:
    """One or several servers of the same model, blocking; threads may share a pool.

    A request goes to the server with the most free capacity. A request that fails because its
    server is unavailable or late is sent again, also to another server. A server that fails
    `UNHEALTHY_THRESHOLD` times in a row is left out. It is probed after a growing pause, and
    comes back when it serves the same model and answers a real request.
    """

    def __init__(
        self,
        urls: str | Sequence[str] = "grpc://127.0.0.1:8001",
        model: str = MODEL_NAME,
        version: str = "",
        *,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 30.0,
        unavailable_timeout_s: float = UNAVAILABLE_TIMEOUT_S,
        tls: TLSOptions | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Checks the arguments; nothing is sent before `connect`.

        Args:
            urls: One or more addresses: grpc://HOST:PORT, grpcs://, http:// or https://. gRPC
                takes the proxies of the environment, except to loopback
                (`chestct.inference.proxies`); HTTP connects directly.
            model: Name of the model, the same everywhere.
            version: Its version; empty for the one that each server chooses.
            timeout_s: Limit of one request to one server.
            connect_timeout_s: Limit of `connect`.
            unavailable_timeout_s: How long a call goes on when no server answers it, from its
                first failure; 0 to fail at once, `math.inf` to go on until a server is back.
            tls: Certificates, for grpcs:// and https:// only.
            headers: HTTP headers or gRPC metadata of every request.

        Raises:
            ValueError: No address, one twice or of another form, or a number out of range.
        """
        self.urls = (urls,) if isinstance(urls, str) else tuple(urls)
        if not self.urls or len(set(self.urls)) != len(self.urls):
            raise ValueError(
                f"addresses {', '.join(self.urls) or '(none)'}: expected different ones"
            )
        for name, value in (("timeout_s", timeout_s), ("connect_timeout_s", connect_timeout_s)):
            if not value > 0:
                raise ValueError(f"{name} is {value}: expected a positive number of seconds")
        if not unavailable_timeout_s >= 0:
            raise ValueError(
                f"unavailable_timeout_s is {unavailable_timeout_s}: expected 0 or more seconds"
            )
        self.model = model
        self.version = version
        self.timeout_s = timeout_s
        self.connect_timeout_s = connect_timeout_s
        self.unavailable_timeout_s = unavailable_timeout_s
        self.tls = tls
        self._servers = [
            _Server(Connection(url, model, version, tls=tls, headers=headers)) for url in self.urls
        ]
        self._metadata: ModelMetadata | None = None
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._last_error: ServerError | None = None

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def metadata(self) -> ModelMetadata:
        """The model's labels, window, training run and so on, as read by `connect`."""
        if self._metadata is None:
            raise ServerUnavailableError(
                f"{', '.join(self.urls)}: not connected. Call connect() first."
            )
        return self._metadata

    @property
    def model_version(self) -> str:
        """Version of the model on the first healthy server."""
        return next((served.version for served in self._served()), "")

    @property
    def max_batch_size(self) -> int:
        """How many scans every healthy server takes in one request."""
        return min((served.max_batch_size for served in self._served()), default=1)

    @property
    def num_requests(self) -> int:
        """How many concurrent requests are worth having; it changes with the servers' load."""
        return max(sum(s.limiter.limit for s in self._servers if s.is_healthy), 1)

    @property
    def healthy_urls(self) -> list[str]:
        """Addresses of the servers that are not left out."""
        return [server.connection.url for server in self._servers if server.is_healthy]

    def connect(self) -> None:
        """Wait for the first server, and shortly for the others, and compare their models.

        Servers that are not ready then are probed until they are. Connecting again reads anew
        which model is served.

        Raises:
            ServerUnavailableError: No server was ready within `connect_timeout_s`.
            ContractError: A model differs from the contract, or from that of another server.
            InferenceError: A server refuses to describe its model.
        """
        self._closed.clear()
        limits_s = (self.connect_timeout_s, self.timeout_s)
        joining = {
            in_thread(server.connection.wait_for_model, *limits_s): server
            for server in self._servers
        }
        first: ModelMetadata | None = None
        refused: ServerError | None = None
        waiting, limit_s = set(joining), self.connect_timeout_s + 1
        while waiting:
            done, waiting = wait(waiting, limit_s, FIRST_COMPLETED)
            if not done:
                break
            for future in done:
                try:
                    served = future.result()
                except ServerUnavailableError as error:
                    refused = error
                    continue
                if first is None:
                    first = self._metadata = served.metadata
                    limit_s = STRAGGLER_S
                self._compare(joining[future].connection.url, served.metadata)
                self._admit(joining[future], served)
        if first is None:
            raise refused or ServerUnavailableError("no server is ready")
        for server in self._servers:
            if not server.is_healthy:
                logger.warning("%s: not ready, left out until it is", server.connection.url)
                in_thread(self._probe, server)

    def infer(
        self,
        scans: ScanArray,
        *,
        with_map: bool = False,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        request_id: str = "",
        prepared_for: ModelMetadata | None = None,
    ) -> Predictions:
        """Classify prepared scans.

        Args:
            scans: uint8 (N, 224, 224, 1), 0 = floor of the window of `metadata`, 255 = its
                ceiling; sent in pieces of at most `max_batch_size`.
            with_map: Whether to ask for the activation map, 3 KB a scan and class.
            timeout_s: Limit of the whole call, all pieces and retries included. Without it each
                request has the limit of the pool, and is retried for `unavailable_timeout_s`.
            headers: HTTP headers or gRPC metadata of this call.
            request_id: Identifier of the call in the server's log and trace.
            prepared_for: Metadata whose window the scans are shown in, where `connect` may have
                read others since.

        Raises:
            ValueError: Scans of another dtype or shape, or a limit that is not positive.
            ServerUnavailableError: No server was available in time.
            InferenceTimeoutError: No answer in time.
            ModelExchangedError: The server has changed to another model meanwhile.
            InferenceError: The server refused a piece or gave an unusable answer.
        """
        return self._infer(
            scans,
            _Call(prepared_for or self.metadata, with_map, headers, request_id),
            timeout_s=timeout_s,
        )

    def _infer(self, scans: ScanArray, call: _Call, timeout_s: float | None = None) -> Predictions:
        require_scans(scans)
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}: expected a positive number of seconds")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        size = self.max_batch_size
        starts = range(0, len(scans), size)
        return self._joined([self._ask(scans[i : i + size], call, deadline) for i in starts])

    def submit(self, scans: ScanArray, with_map: bool = False) -> Future[tuple[Predictions, float]]:
        """Classify prepared scans in the background, as soon as a server has free capacity.

        Args:
            scans: uint8 (N, 224, 224, 1), as `infer` takes it.
            with_map: Whether to ask for the activation map.

        Returns:
            Predictions and wall time in ms, or the error that `infer` raises.
        """
        call = _Call(self.metadata, with_map, is_queued=True)
        return in_thread(self._timed, scans, call)

    def health(self) -> Health:
        """Send a real request with a synthetic slice: readiness alone proves little.

        Raises:
            ServerError: The model does not answer as it should.
        """
        predictions, latency_ms = self._timed(synthetic_scan(), _Call(self.metadata))
        return Health(
            predictions.model_name, predictions.model_version, predictions.run, latency_ms
        )

    def close(self) -> None:
        """Close all connections; requests under way end with an error."""
        self._closed.set()
        self._metadata = None
        for server in self._servers:
            server.is_healthy = False
            server.connection.close()
        if self._changed.acquire(timeout=1):  # an interrupt may have left it taken
            try:
                self._changed.notify_all()
            finally:
                self._changed.release()

    def _served(self) -> list[ServedModel]:
        _ = self.metadata
        return [s.served for s in self._servers if s.is_healthy and s.served is not None]

    def _timed(self, scans: ScanArray, call: _Call) -> tuple[Predictions, float]:
        start_s = time.perf_counter()
        predictions = self._infer(scans, call)
        return predictions, 1000 * (time.perf_counter() - start_s)

    def _joined(self, answers: Sequence[tuple[str, Predictions]]) -> Predictions:
        """The answers of servers, each with its address, as one."""
        pieces = [piece for _, piece in answers]
        if len(pieces) == 1:
            return pieces[0]
        versions = {(url, piece.model_version) for url, piece in answers}
        has_changed = len(versions) > len({url for url, _ in answers})
        if has_changed or any(_differences(p.metadata, pieces[0].metadata) for p in pieces):
            names = sorted({version for _, version in versions})
            raise ModelExchangedError(
                f"{', '.join(self.urls)}: versions {names} of {self.model!r} answered parts of one "
                "call: the model was exchanged meanwhile. Classify again."
            )
        maps = [piece.activation_map for piece in pieces if piece.activation_map is not None]
        return dataclasses.replace(
            pieces[0],
            probabilities=np.concatenate([piece.probabilities for piece in pieces]),
            activation_map=np.concatenate(maps) if maps else None,
            domain_distance=np.concatenate([piece.domain_distance for piece in pieces]),
        )

    def _ask(
        self, scans: ScanArray, call: _Call, deadline: float | None
    ) -> tuple[str, Predictions]:
        """Address and answer of one request, sent again as long as it makes sense."""
        give_up: float | None = None
        tried: set[str] = set()  # in this round
        for _ in range(MAX_ROUNDS * len(self._servers)):
            with self._free_server(call.is_queued, deadline, give_up, tried) as server:
                try:
                    url = server.connection.url
                    return url, self._send(server, scans, call, deadline)
                except (ServerUnavailableError, InferenceTimeoutError) as error:
                    last = error
                    # That the limit of a call is short says nothing of the server.
                    if deadline is None or isinstance(error, ServerUnavailableError):
                        self._failed(server, error)
            if self._closed.is_set() or (deadline is not None and time.monotonic() >= deadline):
                raise last
            tried.add(url)
            if give_up is None:
                give_up = time.monotonic() + self.unavailable_timeout_s
            if tried >= set(self.healthy_urls):
                if time.monotonic() >= give_up:
                    raise last
                self._closed.wait(random.uniform(RETRY_PAUSE_S / 2, RETRY_PAUSE_S))
                tried.clear()
        raise last

    def _send(
        self, server: _Server, scans: ScanArray, call: _Call, deadline: float | None
    ) -> Predictions:
        names = OUTPUT_NAMES if call.with_map else WITHOUT_MAP
        connection, served = server.connection, server.served
        if served is None or time.monotonic() - server.answered_s > CHECK_AFTER_S:
            served = connection.describe(self._limit_s(deadline))
        request = Request(scans, names, call.headers, call.request_id)
        answer = connection.infer(request, self._limit_s(deadline))
        if answer.version and answer.version != served.version:  # rolled out meanwhile
            served = connection.describe(self._limit_s(deadline), answer.version)
        if not _same_task(served.metadata, call.expected):
            raise self._exchanged(connection.url, served.metadata, call.expected)
        try:
            arrays = output_arrays(
                answer.tensors, names, len(scans), len(served.metadata.class_names)
            )
        except InferenceError as error:
            raise InferenceError(f"{connection.url}: {error}", connection.url) from error
        with self._changed:
            server.answered_s, server.num_failures = time.monotonic(), 0
            if served is not server.served and self._metadata is not None:
                server.served, self._metadata = served, served.metadata
            is_full = server.num_sent >= server.limiter.limit
            server.limiter.succeeded(server.answered_s, is_full=is_full)
        return Predictions(
            arrays["probabilities"],
            arrays.get("activation_map"),
            arrays["domain_distance"][:, 0],
            served.metadata,
            self.model,
            served.version,
        )

    def _limit_s(self, deadline: float | None) -> float:
        if deadline is None:
            return self.timeout_s
        return min(self.timeout_s, max(deadline - time.monotonic(), 0.001))

    @contextmanager
    def _free_server(
        self, is_queued: bool, deadline: float | None, give_up: float | None, tried: set[str]
    ) -> Iterator[_Server]:
        """The healthy server with the most free capacity; if queued, as soon as one has any.

        Servers that were not tried in this round go first.
        """

        def rank(server: _Server) -> tuple[bool, bool, bool, float]:
            free, is_new = server.free_capacity, server.connection.url not in tried
            return server.is_healthy, free > 0, is_new, free

        with self._changed:
            while True:
                server = max(self._servers, key=rank)
                if server.is_healthy and (server.free_capacity > 0 or not is_queued):
                    server.num_sent += 1
                    break
                if self.healthy_urls:
                    self._wait_for_change(deadline, None)
                    continue
                if give_up is None:
                    give_up = time.monotonic() + self.unavailable_timeout_s
                self._wait_for_change(deadline, give_up)
        try:
            yield server
        finally:
            with self._changed:
                server.num_sent -= 1
                self._changed.notify_all()

    def _wait_for_change(self, deadline: float | None, give_up: float | None) -> None:
        if self._closed.is_set():
            _ = self.metadata  # raises
        if give_up is not None and isinstance(self._last_error, ModelExchangedError):
            raise self._last_error
        ends = [end for end in (deadline, give_up) if end is not None]
        limit_s = min(ends) - time.monotonic() if ends else threading.TIMEOUT_MAX
        if limit_s <= 0:
            raise self._last_error or ServerUnavailableError("no server is available")
        self._changed.wait(min(limit_s, threading.TIMEOUT_MAX))

    def _failed(self, server: _Server, error: ServerError) -> None:
        with self._changed:
            self._last_error = error
            server.served = None
            server.limiter.failed()
            server.num_failures += 1
            is_newly_unhealthy = server.is_healthy and server.num_failures >= UNHEALTHY_THRESHOLD
            if is_newly_unhealthy:
                server.is_healthy = False
                self._changed.notify_all()
        if is_newly_unhealthy and not self._closed.is_set():
            logger.warning("%s: left out until it is healthy: %s", server.connection.url, error)
            in_thread(self._probe, server)

    def _probe(self, server: _Server) -> None:
        """Ask an unhealthy server again and again, until it is healthy."""
        with self._changed:
            if server.is_probed:
                return
            server.is_probed = True
        pause_s, connection = FIRST_PROBE_S, server.connection
        while not self._closed.wait(pause_s) and not server.is_healthy:
            pause_s = min(2 * pause_s, LONGEST_PROBE_S)
            try:
                limit_s = min(self.timeout_s, LONGEST_PROBE_S)
                served = connection.wait_for_model(limit_s, limit_s)
                answer = connection.infer(Request(synthetic_scan(), WITHOUT_MAP), limit_s)
                output_arrays(answer.tensors, WITHOUT_MAP, 1, len(served.metadata.class_names))
                if self.healthy_urls:
                    self._compare(connection.url, served.metadata)
                elif not _same_task(served.metadata, self.metadata):
                    raise self._exchanged(connection.url, served.metadata, self.metadata)
            except (ContractError, ModelExchangedError) as error:
                logger.warning("%s", error)
                with self._changed:
                    self._last_error = error
                    self._changed.notify_all()
            except ServerError:
                continue
            else:
                self._admit(server, served)
                logger.warning("%s: healthy again", connection.url)
        server.is_probed = False

    def _admit(self, server: _Server, served: ServedModel) -> None:
        with self._changed:
            if self._closed.is_set():
                return
            if not server.is_healthy and server.num_failures:
                server.limiter = ConcurrencyLimiter()
                server.limiter.failed()  # one request at a time first
            server.served, server.answered_s = served, time.monotonic()
            server.is_healthy, server.num_failures, server.is_probed = True, 0, False
            self._changed.notify_all()

    def _compare(self, url: str, metadata: ModelMetadata) -> None:
        differences = _differences(metadata, self.metadata)
        if differences:
            raise ContractError(
                f"{url}: model {self.model!r} is not that of the other servers: {differences}. "
                "Serve one version everywhere, or leave this address out.",
                url,
            )

    def _exchanged(
        self, url: str, found: ModelMetadata, expected: ModelMetadata
    ) -> ModelExchangedError:
        return ModelExchangedError(
            f"{url}: model {self.model!r} was exchanged for one with labels "
            f"{', '.join(found.class_names)} and window {found.window}, expected "
            f"{', '.join(expected.class_names)} and {expected.window}. Connect again.",
            url,
        )


def in_thread(function: Callable[..., T], *arguments: Any, **options: Any) -> Future[T]:
    """Run a function in a daemon thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function(*arguments, **options)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="chestct", daemon=True).start()
    return future


def _same_task(one: ModelMetadata, other: ModelMetadata) -> bool:
    """Whether two models take the same scans and give the same classes."""
    return (one.class_names, one.window) == (other.class_names, other.window)


def _differences(found: ModelMetadata, expected: ModelMetadata) -> str:
    return "; ".join(
        f"{field.name} is {getattr(found, field.name)}, expected {getattr(expected, field.name)}"
        for field in dataclasses.fields(found)
        if field.name != "card" and getattr(found, field.name) != getattr(expected, field.name)
    )
