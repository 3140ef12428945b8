"""One or several servers that keep the same contract, asked side by side.

The sessions live in the event loop of a thread of their own, so that requests are on their way
while the caller decodes and writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from chestct.contract import MODEL_NAME, ModelFacts
from chestct.errors import (
    ContractError,
    InferenceTimeoutError,
    ServerError,
    ServerUnavailableError,
)
from chestct.inference.client import AsyncScanClient, Predictions, ScanArray, ScanClient, TLSOptions

__all__ = ["Fleet", "Throttle"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

ILL_AFTER = 3  # failures in a row
MOST_ATTEMPTS = 10  # of one request: whatever it does to servers, it does not go on for ever
FIRST_PROBE_S, LONGEST_PROBE_S = 0.2, 10.0
STRAGGLER_S = 2.0  # how long the first server that answers waits for the others
CLOSE_LIMIT_S = 10.0


class Throttle:
    """How many requests a server is sent at once: more as long as more come back a second.

    Requests are counted in windows in which the limit was reached all the time. A window whose
    rate is the best so far by `GAIN` raises the limit by one; any other one lowers it to what the
    best rate was measured with, and after `REST` such windows one more request is tried again. A
    failure halves the limit.
    """

    FIRST, MOST = 2, 32
    GAIN = 1.05
    WINDOW = 4  # times the limit: requests in a window
    LEAST_REQUESTS = 12
    REST = 10

    def __init__(self) -> None:
        """Starts with a limit of `FIRST`."""
        self.limit = self.FIRST
        self._best_rate = 0.0
        self._best_limit = self.FIRST
        self._num_rests = 0
        self._since_s, self._count = 0.0, -1  # the first answer opens a window

    def succeeded(self, now_s: float, *, is_full: bool) -> None:
        """Counts one answer.

        Args:
            now_s: Seconds of any clock that goes on evenly.
            is_full: Whether as many requests as the limit allows are under way.
        """
        if not is_full or self._count < 0:
            self._start_window(now_s)
            return
        self._count += 1
        if self._count < max(self.WINDOW * self.limit, self.LEAST_REQUESTS):
            return
        rate = self._count / max(now_s - self._since_s, 1e-9)
        if rate > self.GAIN * self._best_rate:
            self._best_rate, self._best_limit, self._num_rests = rate, self.limit, 0
            self.limit = min(self.limit + 1, self.MOST)
        else:
            self.limit = self._best_limit
            self._num_rests += 1
            if self._num_rests == self.REST:
                # The load of others may have changed since: measure both anew.
                self._best_rate, self._num_rests = rate / self.GAIN, 0
                self.limit = min(self.limit + 1, self.MOST)
        self._start_window(now_s)

    def failed(self) -> None:
        """Takes in that the server was unavailable or late."""
        self.limit = max(self.limit // 2, 1)
        self._best_rate, self._best_limit, self._num_rests = 0.0, self.limit, 0
        self._count = -1

    def _start_window(self, now_s: float) -> None:
        self._since_s, self._count = now_s, 0


class _Server:
    """One address: its session, and whether it is well."""

    def __init__(self, client: AsyncScanClient) -> None:
        self.client = client
        self.throttle = Throttle()
        self.is_well = False
        self.num_sent = 0
        self.num_failures = 0  # in a row

    @property
    def room(self) -> float:
        """Part of its requests that are free; 0 for an ill one."""
        return (1 - self.num_sent / self.throttle.limit) if self.is_well else 0.0


class Fleet:
    """A blocking face for servers that are asked asynchronously.

    A request goes to the server that has the most room. One that is unavailable or late
    `ILL_AFTER` times in a row is left out, and its requests go to the others; it is asked again
    after a growing pause, and comes back when it keeps the contract and answers a real request.

    Example:
        >>> with Fleet(["grpc://127.0.0.1:8001", "grpc://127.0.0.1:8011"]) as fleet:
        ...     predictions, infer_ms = fleet.submit(scans).result()
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str = MODEL_NAME,
        version: str = "",
        *,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 30.0,
        tls: TLSOptions | None = None,
        patience_s: float = 3.0,
    ) -> None:
        """Checks the arguments; nothing is sent before `connect`.

        Args:
            urls: One or more addresses, each as `ScanClient` takes it.
            model: Name of the model, the same everywhere.
            version: Its version; empty for the one that each server chooses.
            timeout_s: Deadline of one request.
            connect_timeout_s: Deadline of `connect`.
            tls: Certificates, for grpcs:// and https:// only.
            patience_s: How long all servers may be ill before a request fails.

        Raises:
            ValueError: No address, one twice, or an argument that `ScanClient` refuses.
        """
        if not urls or len(set(urls)) != len(urls):
            raise ValueError(f"addresses {', '.join(urls) or '(none)'}: expected different ones")
        if patience_s < 0:
            raise ValueError(f"patience_s is {patience_s}: expected 0 or more seconds")
        self.urls = tuple(urls)
        self.model = model
        self.timeout_s = timeout_s
        self.connect_timeout_s = connect_timeout_s
        self.tls = tls
        self.patience_s = patience_s
        self._servers = [
            _Server(
                AsyncScanClient(
                    url,
                    model,
                    version,
                    timeout_s=timeout_s,
                    connect_timeout_s=connect_timeout_s,
                    tls=tls,
                    retries=0,
                )
            )
            for url in urls
        ]
        self._facts: ModelFacts | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_error: ServerError | None = None

    @classmethod
    def like(cls, client: ScanClient) -> Fleet:
        """One server, asked as `client` asks it."""
        return cls(
            [client.url],
            client.model,
            client.version,
            timeout_s=client.timeout_s,
            connect_timeout_s=client.connect_timeout_s,
            tls=client.tls,
            patience_s=2.0 if client.retries else 0.0,
        )

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
    def facts(self) -> ModelFacts:
        """What the model told of itself, the same on every server."""
        if self._facts is None:
            raise ServerUnavailableError("not connected. Call connect() first.")
        return self._facts

    @property
    def model_version(self) -> str:
        """Version of the model on the first server that is well."""
        return next((s.client.model_version for s in self._servers if s.is_well), "")

    @property
    def max_batch_size(self) -> int:
        """How many scans every server that is well takes in one request."""
        return min((s.client.max_batch_size for s in self._servers if s.is_well), default=1)

    @property
    def num_requests(self) -> int:
        """How many requests are worth having under way; it changes with what the servers take."""
        return max(sum(s.throttle.limit for s in self._servers if s.is_well), 1)

    @property
    def well_urls(self) -> list[str]:
        """Addresses of the servers that are not left out."""
        return [server.client.url for server in self._servers if server.is_well]

    def connect(self) -> None:
        """Waits for the first server, and shortly for the others, and compares their models.

        Servers that are not there yet are asked again until they are.

        Raises:
            ServerUnavailableError: None is ready within the deadline.
            ContractError: A model differs from the contract, or from that of another server.
            InferenceError: A server refuses to tell about its model.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._run(self._connect())

    def submit(self, scans: ScanArray, with_map: bool = False) -> Future[tuple[Predictions, float]]:
        """Asks for some scans; gives the answer and its wall time in ms.

        Args:
            scans: uint8 (N, 224, 224, 1), at most `max_batch_size`.
            with_map: Whether to ask for the activation map.

        Returns:
            A future that raises what `ScanClient.classify` raises, after the request failed on
            every server for `patience_s`.
        """
        if self._loop is None:
            raise ServerUnavailableError("not connected. Call connect() first.")
        return asyncio.run_coroutine_threadsafe(self._answer(scans, with_map), self._loop)

    def close(self) -> None:
        """Closes all sessions; requests under way are given up."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._close(), loop).result(CLOSE_LIMIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_LIMIT_S)
        if not thread.is_alive():  # else it waits for a lock that Ctrl-C left taken
            loop.close()
        self._loop = self._thread = None

    def _run(self, steps: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            raise RuntimeError("unreachable: the loop runs")
        future = asyncio.run_coroutine_threadsafe(steps, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C among them
            future.cancel()
            raise

    async def _connect(self) -> None:
        self._change = asyncio.Condition()
        joining = {asyncio.create_task(self._join(server)): server for server in self._servers}
        waiting, limit_s = set(joining), self.connect_timeout_s + 1
        refused: ServerError | None = None
        while waiting:
            done, waiting = await asyncio.wait(
                waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            for task in done:
                error = task.exception()
                if isinstance(error, ServerError):
                    refused = error
                if error is not None and not isinstance(error, ServerUnavailableError):
                    for other in waiting:
                        other.cancel()
                    raise error
            if self._facts is not None:
                limit_s = STRAGGLER_S
        for task in waiting:
            task.cancel()
        if self._facts is None:
            raise refused or ServerUnavailableError("no server is ready")
        for server in self._servers:
            if not server.is_well:
                logger.warning("%s: not ready, left out until it is", server.client.url)
                self._start_probing(server)

    async def _join(self, server: _Server) -> None:
        """Connects to a server and compares its model with that of the others."""
        await server.client.connect()
        self._compare(server.client.url, server.client.facts)
        server.is_well, server.num_failures = True, 0

    def _compare(self, url: str, facts: ModelFacts) -> None:
        facts = dataclasses.replace(facts, card="")
        if self._facts is None:
            self._facts = facts
        wrong = [
            f"{field.name} is {getattr(facts, field.name)}, expected "
            f"{getattr(self._facts, field.name)}"
            for field in dataclasses.fields(facts)
            if getattr(facts, field.name) != getattr(self._facts, field.name)
        ]
        if wrong:
            raise ContractError(
                f"{url}: model {self.model!r} is not that of the other servers: {'; '.join(wrong)}."
                " Serve one version everywhere, or leave this address out."
            )

    async def _answer(self, scans: ScanArray, with_map: bool) -> tuple[Predictions, float]:
        for _ in range(MOST_ATTEMPTS):
            server = await self._free_server()
            server.num_sent += 1
            start_s = time.perf_counter()
            try:
                predictions = await server.client.classify(scans, with_map)
            except (ServerUnavailableError, InferenceTimeoutError) as error:
                self._last_error = error
                server.throttle.failed()
                server.num_failures += 1
                if server.is_well and server.num_failures >= ILL_AFTER:
                    server.is_well = False
                    logger.warning("%s: left out until it is well: %s", server.client.url, error)
                    self._start_probing(server)
                continue
            finally:
                is_full = server.num_sent >= server.throttle.limit
                server.num_sent -= 1
                async with self._change:
                    self._change.notify_all()
            ended_s = time.perf_counter()
            server.num_failures = 0
            server.throttle.succeeded(ended_s, is_full=is_full)
            self._require_labels(server.client.url, predictions.facts)
            return predictions, 1000 * (ended_s - start_s)
        raise self._last_error or ServerUnavailableError("no server answers")

    def _require_labels(self, url: str, facts: ModelFacts) -> None:
        """A model may be exchanged on the way, but not for one that needs other scans."""
        known = self.facts
        if (facts.labels, facts.window) != (known.labels, known.window):
            raise ContractError(
                f"{url}: the model was exchanged for one with labels {', '.join(facts.labels)} and "
                f"window {facts.window}, expected {', '.join(known.labels)} and {known.window}"
            )

    async def _free_server(self) -> _Server:
        ill_since_s: float | None = None
        while True:
            server = max(self._servers, key=lambda server: server.room)
            if server.room > 0:
                return server
            limit_s = None
            if not self.well_urls:
                now_s = time.monotonic()
                ill_since_s = ill_since_s or now_s
                limit_s = self.patience_s - (now_s - ill_since_s)
                if limit_s <= 0:
                    raise self._last_error or ServerUnavailableError("no server is well")
            else:
                ill_since_s = None
            with contextlib.suppress(TimeoutError):
                async with self._change, asyncio.timeout(limit_s):
                    await self._change.wait()

    def _start_probing(self, server: _Server) -> None:
        task = asyncio.create_task(self._probe(server))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _probe(self, server: _Server) -> None:
        pause_s = FIRST_PROBE_S
        while not server.is_well:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PROBE_S)
            try:
                async with asyncio.timeout(LONGEST_PROBE_S):
                    await server.client.connect()
                    await server.client.health()
                self._compare(server.client.url, server.client.facts)
            except ContractError as error:
                self._last_error = error
                logger.warning("%s", error)
            except (ServerError, TimeoutError):
                continue
            else:
                server.throttle = Throttle()
                server.throttle.failed()  # one at a time first
                server.is_well, server.num_failures = True, 0
                logger.warning("%s: well again", server.client.url)
            async with self._change:
                self._change.notify_all()

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(
            *(server.client.close() for server in self._servers), return_exceptions=True
        )
