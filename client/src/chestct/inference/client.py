"""Sessions with a server that keeps the contract, over gRPC or HTTP, blocking or asyncio.

What a session does is written once, as generators that yield a `_Call` or a `_Pause` and are
sent the outcome; `ScanClient` and `AsyncScanClient` only carry these steps out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from chestct.contract import (
    INPUT_NAME,
    MODEL_NAME,
    NOT_A_MEDICAL_DEVICE,
    OUTPUT_NAMES,
    SCAN_SHAPE,
    SCAN_SIZE,
    ModelFacts,
    TensorSpec,
    input_spec,
    output_specs,
    tensor_differences,
)
from chestct.errors import (
    ContractError,
    InferenceError,
    InferenceTimeoutError,
    ServerError,
    ServerUnavailableError,
)
from chestct.inference.proxies import Proxy, grpc_proxy, is_loopback
from chestct.region import Region, SharedAnswer

__all__ = ["AsyncScanClient", "Health", "Predictions", "ScanClient", "TLSOptions"]

logger = logging.getLogger(__name__)

Float32Array = npt.NDArray[np.float32]
ScanArray = npt.NDArray[np.uint8]
T = TypeVar("T")

FIRST_POLL_S, LONGEST_POLL_S = 0.05, 1.0
FIRST_RETRY_S, LONGEST_RETRY_S = 0.2, 2.0
RELEASE_TIMEOUT_S = 2.0  # closing does not wait for a server that has gone
MAX_MESSAGE_BYTES = 2**31 - 1  # gRPC's own default of 4 MiB is too small for a batch of maps
# How tritonclient spells what gRPC and HTTP say; every other status is an InferenceError.
ERROR_BY_STATUS: Mapping[str, type[ServerError]] = {
    "StatusCode.DEADLINE_EXCEEDED": InferenceTimeoutError,
    "StatusCode.UNAVAILABLE": ServerUnavailableError,
    "502": ServerUnavailableError,
    "503": ServerUnavailableError,
    "504": InferenceTimeoutError,
}
# Lost connections that are no OSError: of geventhttpclient and of aiohttp, by name, because
# both come with tritonclient and are not for this package to import.
LOST_CONNECTIONS = frozenset({"HTTPConnectionClosed", "ClientConnectionError"})


@dataclass(frozen=True)
class TLSOptions:
    """Certificates for grpcs:// and https://, as PEM files.

    Attributes:
        ca: Authorities to trust; None for those of the system.
        cert: The client's own certificate chain, where the server asks for one.
        key: Private key of `cert`.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        """Refuse files that cannot be used.

        Raises:
            ValueError: A file that is not there, or only one of `cert` and `key`.
        """
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS: a client certificate needs its key and the key its certificate")
        for path in (self.ca, self.cert, self.key):
            if path is not None and not path.is_file():
                raise ValueError(f"TLS: {path} is not a file, expected PEM")


@dataclass(frozen=True)
class Predictions:
    """What the model says of N scans.

    Attributes:
        probabilities: float32 (N, C), rows sum to 1, columns in the order of `facts.labels`.
        activation_map: float32 (N, 14, 14, C), class evidence at each place; None if not asked for.
        domain_distance: float32 (N,), how far from the training scans.
        facts: What the model told of itself.
        model_name: Name of the model that answered.
        model_version: Its version.
    """

    probabilities: Float32Array
    activation_map: Float32Array | None
    domain_distance: Float32Array
    facts: ModelFacts
    model_name: str
    model_version: str

    @property
    def labels(self) -> list[str]:
        """The most probable label of each scan."""
        return [self.facts.labels[index] for index in self.probabilities.argmax(axis=1)]

    @property
    def in_domain(self) -> npt.NDArray[np.bool_]:
        """Bool (N,): whether each scan resembles the training scans to the network.

        What a file itself tells against a scan stands in `Scan.reasons`.
        """
        inside: npt.NDArray[np.bool_] = self.domain_distance <= self.facts.domain_threshold
        return inside

    @property
    def reasons(self) -> list[list[str]]:
        """Why each scan is not in domain, in words; empty for one that is."""
        return [
            []
            if is_inside
            else [
                f"unlike the training scans: distance {distance:.1f}, "
                f"limit {self.facts.domain_threshold:.1f}"
            ]
            for is_inside, distance in zip(self.in_domain, self.domain_distance, strict=True)
        ]

    @property
    def run(self) -> str:
        """The training run of the model that answered."""
        return self.facts.run

    @property
    def notice(self) -> str:
        """What has to be said with every answer: not a medical device."""
        return NOT_A_MEDICAL_DEVICE


@dataclass(frozen=True)
class Health:
    """A model that has just answered a real request.

    Attributes:
        model: Its name.
        version: Its version.
        run: Its training run.
        latency_ms: Wall time of the request, wire included.
        notice: What has to be said with every answer: not a medical device.
    """

    model: str
    version: str
    run: str
    latency_ms: float
    notice: str = NOT_A_MEDICAL_DEVICE


@dataclass(frozen=True)
class _Served:
    facts: ModelFacts
    version: str
    max_batch_size: int


@dataclass(frozen=True)
class _Call:
    method: str
    arguments: Mapping[str, Any]
    timeout_s: float


@dataclass(frozen=True)
class _Pause:
    seconds: float


@dataclass(frozen=True)
class _Done(Generic[T]):
    value: T


_Steps = Generator[_Call | _Pause, Any, T]


def _advance(steps: _Steps[T], outcome: Any) -> _Call | _Pause | _Done[T]:
    try:
        if isinstance(outcome, ServerError):
            return steps.throw(outcome)
        return steps.send(outcome)
    except StopIteration as stop:
        return _Done(stop.value)


class _Session:
    """Everything that the blocking and the asyncio client have in common."""

    def __init__(
        self,
        url: str = "grpc://127.0.0.1:8001",
        model: str = MODEL_NAME,
        version: str = "",
        *,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 30.0,
        tls: TLSOptions | None = None,
        retries: int = 3,
        shared_memory: Literal["auto", "on", "off"] = "off",
    ) -> None:
        """Checks the arguments; nothing is sent before `connect`.

        Args:
            url: grpc://HOST:PORT, grpcs://, http:// or https://. gRPC takes the proxies of the
                environment, except to loopback (`chestct.inference.proxies`); HTTP connects
                directly.
            model: Name of the model.
            version: Version of the model; empty for the one that the server chooses.
            timeout_s: Deadline of one request of at most `max_batch_size` scans, retries included.
            connect_timeout_s: Deadline of `connect`.
            tls: Certificates, for grpcs:// and https:// only.
            retries: How often a request is sent again when the server is unavailable.
            shared_memory: `on` passes scans and answers through memory shared with a server on this
                host, and fails where that cannot be; `auto` then goes back to the wire and logs
                why. `off` by default, because it gains little: on 2 cores, over gRPC, nothing that
                can be told from noise for one scan (50 KB), and 0.2 ms of 1.0 ms of the client's
                own time for 8 scans.

        Raises:
            ValueError: An argument out of range, or an address of another form.
        """
        self._is_grpc, self._is_secure, self._address = _parse_url(url)
        self._host = urlsplit(url).hostname or ""
        if tls is not None and not self._is_secure:
            raise ValueError(f"{url}: certificates need grpcs:// or https://")
        for name, value in (("timeout_s", timeout_s), ("connect_timeout_s", connect_timeout_s)):
            if not value > 0:
                raise ValueError(f"{name} is {value}: expected a positive number of seconds")
        if retries < 0:
            raise ValueError(f"retries is {retries}: expected 0 or more")
        if shared_memory not in ("auto", "on", "off"):
            raise ValueError(f"shared_memory is {shared_memory!r}: expected auto, on or off")
        self.url = url
        self.model = model
        self.version = version
        self.timeout_s = timeout_s
        self.connect_timeout_s = connect_timeout_s
        self.retries = retries
        self.tls = tls
        self._tls = tls or TLSOptions()
        self._known: _Served | None = None
        self._wire: Any = None
        self._wire_timeout_s = timeout_s
        self._proxy: Proxy | None = None
        self._shares_memory = shared_memory != "off"
        self._needs_memory = shared_memory == "on"
        # One for each request that was ever under way at once.
        self._idle_regions: list[Region] = []

    @property
    def facts(self) -> ModelFacts:
        """What the model told of itself: labels, window, domain threshold, training run."""
        return self._served.facts

    @property
    def model_version(self) -> str:
        """Version of the model that `facts` belong to."""
        return self._served.version

    @property
    def max_batch_size(self) -> int:
        """How many scans the model takes in one request."""
        return self._served.max_batch_size

    @property
    def _served(self) -> _Served:
        if self._known is None:
            raise ServerUnavailableError(f"{self.url}: not connected. Call connect() first.")
        return self._known

    def _connect_steps(self) -> _Steps[None]:
        deadline = time.monotonic() + self.connect_timeout_s
        longest_s, reason = FIRST_POLL_S, ""
        while True:
            try:
                if not (yield self._call_until(deadline, "is_server_live", {})):
                    reason = f"{self.url}: the server is not live"
                elif not (
                    yield self._call_until(deadline, "is_model_ready", self._named(self.version))
                ):
                    reason = f"{self.url}: model {self.model!r} is not ready"
                else:
                    self._known = yield from self._read_model_steps(self.version, deadline)
                    return
            except ServerUnavailableError as error:
                reason = str(error)
            except InferenceTimeoutError as error:  # the last attempts have little time
                reason = reason or str(error)
            pause_s = min(longest_s, (deadline - time.monotonic()) / 2)
            if pause_s < FIRST_POLL_S:
                raise ServerUnavailableError(
                    f"{reason} (waited {self.connect_timeout_s:g} s). "
                    "Start the server, or correct the address or the name of the model."
                )
            yield _Pause(pause_s)
            longest_s = min(2 * longest_s, LONGEST_POLL_S)

    def _read_model_steps(self, version: str, deadline: float) -> _Steps[_Served]:
        arguments = {**self._named(version), **({"as_json": True} if self._is_grpc else {})}
        metadata = yield self._call_until(deadline, "get_model_metadata", arguments)
        config = yield self._call_until(deadline, "get_model_config", arguments)
        try:
            return _served_model(metadata, config.get("config", config), version)
        except ContractError as error:
            raise ContractError(
                f"{self.url}: model {self.model!r} is not what this client was made for: {error}"
            ) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InferenceError(
                f"{self.url}: unreadable description of model {self.model!r} ({error!r}). "
                "Is this the address of a Triton server?"
            ) from error

    def _classify_steps(self, scans: ScanArray, with_map: bool) -> _Steps[Predictions]:
        _require_scans(scans)
        size = self.max_batch_size
        pieces = []
        for start in range(0, len(scans), size):
            pieces.append((yield from self._infer_steps(scans[start : start + size], with_map)))
        if len(pieces) == 1:
            return pieces[0]
        versions = {piece.model_version for piece in pieces}
        if len(versions) > 1:
            raise InferenceError(
                f"{self.url}: versions {sorted(versions)} of {self.model!r} answered parts of one "
                "batch: the model was exchanged meanwhile. Send the batch again."
            )
        maps = [piece.activation_map for piece in pieces if piece.activation_map is not None]
        return Predictions(
            np.concatenate([piece.probabilities for piece in pieces]),
            np.concatenate(maps) if maps else None,
            np.concatenate([piece.domain_distance for piece in pieces]),
            pieces[0].facts,
            pieces[0].model_name,
            pieces[0].model_version,
        )

    def _infer_steps(self, scans: ScanArray, with_map: bool) -> _Steps[Predictions]:
        names = [name for name in OUTPUT_NAMES if with_map or name != "activation_map"]
        deadline = time.monotonic() + self.timeout_s
        result = None
        if self._shares_memory:
            result = yield from self._shared_steps(scans, names, deadline)
        if result is None:
            arguments = self._infer_arguments(scans, names)
            call = _Call("infer", arguments, self.timeout_s)
            result = yield from self._retried_steps(call, deadline)
        version = _version_of(result) or self.model_version
        if version != self.model_version:  # rolled out meanwhile: its labels may be others
            self._known = yield from self._read_model_steps(version, deadline)
        served = self._served
        try:
            arrays = _output_arrays(result, names, len(scans), len(served.facts.labels))
        except InferenceError as error:
            raise InferenceError(f"{self.url}: {error}") from error
        return Predictions(
            arrays["probabilities"],
            arrays.get("activation_map"),
            arrays["domain_distance"][:, 0],
            served.facts,
            self.model,
            version,
        )

    def _shared_steps(
        self, scans: ScanArray, names: Sequence[str], deadline: float
    ) -> _Steps[SharedAnswer | None]:
        """The answer by way of shared memory; None when the scans have to go over the wire."""
        refusal: ServerError | None = None
        for _ in range(2):  # a server that was started anew does not know the regions of before
            try:
                region = self._idle_regions.pop()
            except IndexError:
                new = yield from self._new_region_steps(deadline)
                if new is None:
                    return None
                region = new
            region.write(scans)
            arguments = self._infer_arguments(scans, names, region)
            try:
                result = yield from self._retried_steps(
                    self._call_until(deadline, "infer", arguments), deadline
                )
            except BaseException as error:
                # It stays registered: the server might still be using its own view.
                region.close()
                if not isinstance(error, InferenceError) or region.name not in str(error):
                    raise
                refusal = error
                while self._idle_regions:
                    self._idle_regions.pop().close()
            else:
                outputs = {name: region.read(name, len(scans)) for name in names}
                self._idle_regions.append(region)
                return SharedAnswer(result, outputs)
        self._go_without_memory(refusal)
        return None

    def _new_region_steps(self, deadline: float) -> _Steps[Region | None]:
        served = self._served
        try:
            region = Region(served.max_batch_size, len(served.facts.labels))
        except OSError as error:
            self._go_without_memory(error)
            return None
        arguments = {"name": region.name, "key": f"/{region.name}", "byte_size": region.num_bytes}
        try:
            yield self._call_until(deadline, "register_system_shared_memory", arguments)
        except ServerError as error:
            region.close()
            self._go_without_memory(error)
            return None
        return region

    def _go_without_memory(self, reason: Exception | None) -> None:
        if self._needs_memory:
            raise InferenceError(
                f"{self.url}: no memory is shared with this server ({reason}). It must run on this "
                "host under this user and permit it; or choose shared_memory='auto'."
            ) from reason
        self._shares_memory = False
        logger.info("%s: scans go over the wire, not through shared memory: %s", self.url, reason)

    def _release_steps(self) -> _Steps[None]:
        while self._idle_regions:
            region = self._idle_regions.pop()
            region.close()
            with contextlib.suppress(ServerError):
                name = {"name": region.name}
                yield _Call("unregister_system_shared_memory", name, RELEASE_TIMEOUT_S)

    def _retried_steps(self, call: _Call, deadline: float) -> _Steps[Any]:
        for attempt in range(self.retries + 1):
            try:
                return (yield call)
            except ServerUnavailableError:
                longest_s = min(FIRST_RETRY_S * 2**attempt, LONGEST_RETRY_S)
                pause_s = random.uniform(longest_s / 2, longest_s)
                remaining_s = deadline - time.monotonic() - pause_s
                if attempt == self.retries or remaining_s <= 0:
                    raise
            yield _Pause(pause_s)
            call = _Call(call.method, call.arguments, remaining_s)
        raise RuntimeError("unreachable: the last attempt returns or raises")

    def _health_steps(self) -> _Steps[Health]:
        start = time.perf_counter()
        predictions = yield from self._classify_steps(_synthetic_scan(), with_map=False)
        return Health(
            predictions.model_name,
            predictions.model_version,
            predictions.facts.run,
            1000 * (time.perf_counter() - start),
        )

    def _call_until(self, deadline: float, method: str, arguments: Mapping[str, Any]) -> _Call:
        remaining_s = max(deadline - time.monotonic(), 0.001)
        return _Call(method, arguments, min(self.timeout_s, remaining_s))

    def _named(self, version: str) -> dict[str, str]:
        return {"model_name": self.model, "model_version": version}

    def _infer_arguments(
        self, scans: ScanArray, names: Sequence[str], region: Region | None = None
    ) -> dict[str, Any]:
        if self._is_grpc:
            from tritonclient.grpc import InferInput, InferRequestedOutput
        else:  # its inputs and outputs are binary by default
            from tritonclient.http import InferInput, InferRequestedOutput
        tensor = InferInput(INPUT_NAME, list(scans.shape), input_spec().dtype)
        outputs = [InferRequestedOutput(name) for name in names]
        if region is None:
            tensor.set_data_from_numpy(scans)
        else:
            tensor.set_shared_memory(**region.place(INPUT_NAME, len(scans)))
            for output in outputs:
                output.set_shared_memory(**region.place(output.name(), len(scans)))
        return {**self._named(self.version), "inputs": [tensor], "outputs": outputs}

    def _grpc_options(self) -> dict[str, Any]:
        """Arguments of tritonclient's gRPC clients.

        `channel_args` replaces all of tritonclient's own, so message sizes and keepalive (a ping
        a minute, during calls only) are given too; the reconnect times make `connect` see a
        server soon after it starts. A server on loopback is never reached through a proxy.
        """
        self._proxy = grpc_proxy(self._host)
        return {
            "ssl": self._is_secure,
            "root_certificates": _text(self._tls.ca),
            "private_key": _text(self._tls.key),
            "certificate_chain": _text(self._tls.cert),
            "channel_args": [
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 0),
                ("grpc.http2.max_pings_without_data", 2),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.enable_http_proxy", int(not is_loopback(self._host))),
            ],
        }


class ScanClient(_Session):
    """A blocking session with a server: connect, classify, close.

    Over gRPC one client may be shared by threads; over HTTP each thread needs its own, because
    tritonclient's HTTP connections belong to the thread that uses them.

    Example:
        >>> with ScanClient("grpc://127.0.0.1:8001") as client:
        ...     predictions = client.classify(scans)
    """

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Waits for server and model, then compares the model with the contract.

        Connection errors, time-outs and a model that is not ready mean "not yet" until
        `connect_timeout_s` is over; anything else fails at once.

        Raises:
            ServerUnavailableError: Nothing ready at the address within the deadline.
            ContractError: The model differs from the contract; all differences are listed.
            InferenceError: The server refuses to tell about the model.
        """
        self._run(self._connect_steps())

    def classify(self, scans: ScanArray, with_map: bool = True) -> Predictions:
        """What the model says of some scans.

        Args:
            scans: uint8 (N, 224, 224, 1), 0 = floor of the window, 255 = its ceiling; sent in
                pieces of at most `max_batch_size`.
            with_map: Whether to ask for the activation map, 3 KB a scan and class.

        Raises:
            ValueError: Scans of another dtype or shape.
            ServerUnavailableError: The server was unavailable at each of the attempts.
            InferenceTimeoutError: No answer to a piece within `timeout_s`.
            InferenceError: The server refused a piece or gave an unusable answer.
        """
        return self._run(self._classify_steps(scans, with_map))

    def health(self) -> Health:
        """The outcome of a real request with a synthetic slice: readiness alone proves little.

        Raises:
            ServerError: The model does not answer as it should.
        """
        return self._run(self._health_steps())

    def close(self) -> None:
        """Closes the connection; over HTTP an open one would keep the server from stopping."""
        self._run(self._release_steps())
        self._known = None
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def _run(self, steps: _Steps[T]) -> T:
        step = _advance(steps, None)
        while not isinstance(step, _Done):
            step = _advance(steps, self._perform(step))
        return step.value

    def _perform(self, step: _Call | _Pause) -> Any:
        if isinstance(step, _Pause):
            return time.sleep(step.seconds)
        try:
            if self._is_grpc:
                wire = self._grpc_wire()
                return getattr(wire, step.method)(**step.arguments, client_timeout=step.timeout_s)
            return getattr(self._http_wire(step.timeout_s), step.method)(**step.arguments)
        except Exception as error:  # of four libraries below tritonclient
            return _server_error(error, self.url, step.timeout_s, self._proxy)

    def _grpc_wire(self) -> Any:
        if self._wire is None:
            from tritonclient.grpc import InferenceServerClient

            self._wire = InferenceServerClient(self._address, **self._grpc_options())
        return self._wire

    def _http_wire(self, timeout_s: float) -> Any:
        """A connection for this deadline: tritonclient fixes it on opening, so others reopen."""
        if self._wire is not None and self._wire_timeout_s != timeout_s:
            self._wire.close()
            self._wire = None
        if self._wire is None:
            from tritonclient.http import InferenceServerClient

            files = {"ca_certs": self._tls.ca, "certfile": self._tls.cert, "keyfile": self._tls.key}
            self._wire = InferenceServerClient(
                self._address,
                connection_timeout=timeout_s,
                network_timeout=timeout_s,
                ssl=self._is_secure,
                ssl_options={name: _text(path) for name, path in files.items() if path is not None},
            )
            self._wire_timeout_s = timeout_s
        return self._wire


class AsyncScanClient(_Session):
    """`ScanClient` for asyncio: the same arguments, answers and errors.

    Example:
        >>> async with AsyncScanClient("grpc://127.0.0.1:8001") as client:
        ...     predictions = await client.classify(scans)
    """

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Waits for server and model and checks the contract: see `ScanClient.connect`."""
        await self._run(self._connect_steps())

    async def classify(self, scans: ScanArray, with_map: bool = True) -> Predictions:
        """What the model says of uint8 (N, 224, 224, 1): see `ScanClient.classify`."""
        return await self._run(self._classify_steps(scans, with_map))

    async def health(self) -> Health:
        """The outcome of a real request with a synthetic slice: see `ScanClient.health`."""
        return await self._run(self._health_steps())

    async def close(self) -> None:
        """Closes the connection."""
        await self._run(self._release_steps())
        self._known = None
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()

    async def _run(self, steps: _Steps[T]) -> T:
        step = _advance(steps, None)
        while not isinstance(step, _Done):
            step = _advance(steps, await self._perform(step))
        return step.value

    async def _perform(self, step: _Call | _Pause) -> Any:
        if isinstance(step, _Pause):
            return await asyncio.sleep(step.seconds)
        try:
            if self._is_grpc:
                wire = self._grpc_wire()
                call = getattr(wire, step.method)
                return await call(**step.arguments, client_timeout=step.timeout_s)
            async with asyncio.timeout(step.timeout_s):
                return await getattr(self._http_wire(), step.method)(**step.arguments)
        except Exception as error:  # of four libraries below tritonclient
            return _server_error(error, self.url, step.timeout_s, self._proxy)

    def _grpc_wire(self) -> Any:
        if self._wire is None:
            from tritonclient.grpc.aio import InferenceServerClient

            self._wire = InferenceServerClient(self._address, **self._grpc_options())
        return self._wire

    def _http_wire(self) -> Any:
        if self._wire is None:
            from tritonclient.http.aio import InferenceServerClient

            context = ssl.create_default_context(cafile=self._tls.ca) if self._is_secure else None
            if context is not None and self._tls.cert is not None:
                context.load_cert_chain(self._tls.cert, self._tls.key)
            self._wire = InferenceServerClient(
                self._address, conn_timeout=None, ssl=self._is_secure, ssl_context=context
            )
        return self._wire


def _parse_url(url: str) -> tuple[bool, bool, str]:
    """Whether it is gRPC, whether it is TLS, and the address as tritonclient wants it.

    A missing port is 8001 for gRPC and 8000 for HTTP.
    """
    parts = urlsplit(url)
    wanted = "expected grpc://HOST:8001, grpcs://, http://HOST:8000 or https://"
    is_grpc = parts.scheme.startswith("grpc")
    try:
        has_port = parts.port is not None
        is_complete = bool(parts.hostname) and parts.username is None
    except ValueError:
        is_complete = False
    if parts.scheme not in ("grpc", "grpcs", "http", "https") or not is_complete:
        raise ValueError(f"address {url!r}: {wanted}")
    path = parts.path.rstrip("/")
    if parts.query or parts.fragment or (is_grpc and path):
        raise ValueError(f"address {url!r}: {wanted}, with nothing after the port")
    port = "" if has_port else ":8001" if is_grpc else ":8000"
    return is_grpc, parts.scheme.endswith("s"), parts.netloc.rstrip(":") + port + path


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _server_error(
    error: Exception, url: str, timeout_s: float, proxy: Proxy | None = None
) -> ServerError:
    """The error of our own tree that tells what went wrong below, with its cause."""
    from tritonclient.utils import InferenceServerException

    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    kind: type[ServerError] = InferenceError
    if isinstance(error, InferenceServerException):
        text = " ".join(str(error.message()).split())
        kind = ERROR_BY_STATUS.get(str(error.status()), InferenceError)
    elif isinstance(error, ssl.SSLError):
        kind, text = ServerError, f"no TLS connection: {text}. Check the certificates."
    elif isinstance(error, TimeoutError):
        kind = InferenceTimeoutError
    elif isinstance(error, OSError) or LOST_CONNECTIONS & {
        base.__name__ for base in type(error).__mro__
    }:
        kind = ServerUnavailableError
    if kind is InferenceTimeoutError:
        text = f"no answer within {timeout_s:.3g} s"
    if proxy is not None and kind in (ServerUnavailableError, InferenceTimeoutError):
        text = f"{text} ({proxy})"
    translated = kind(f"{url}: {text}")
    translated.__cause__ = error
    return translated


def _served_model(metadata: Mapping[str, Any], config: Mapping[str, Any], version: str) -> _Served:
    """What the server tells of a model, if that is what the contract says.

    Raises:
        ContractError: Every difference, in one message.
    """
    differences: list[str] = []
    inputs, outputs = (_tensor_specs(metadata.get(kind, ())) for kind in ("inputs", "outputs"))
    facts = None
    try:
        parameters = config.get("parameters", {})
        facts = ModelFacts.from_parameters(
            {name: value.get("string_value", "") for name, value in parameters.items()}
        )
    except ValueError as error:
        differences.append(str(error))
    # Without labels the server's own number of classes lets the rest be compared all the same.
    shapes = {spec.name: spec.shape for spec in outputs}
    num_classes = len(facts.labels) if facts else (shapes.get("probabilities") or (-1,))[-1]
    differences += tensor_differences("input", [input_spec()], inputs)
    differences += tensor_differences("output", output_specs(num_classes), outputs)
    max_batch_size = int(config.get("max_batch_size", 0))
    if max_batch_size < 1:
        differences.append(f"max_batch_size is {max_batch_size}, expected at least 1")
    if differences or facts is None:
        raise ContractError("; ".join(differences))
    newest = max(metadata.get("versions") or [""], key=lambda text: (len(text), text))
    return _Served(facts, version or newest, max_batch_size)


def _tensor_specs(tensors: Sequence[Mapping[str, Any]]) -> list[TensorSpec]:
    # JSON made from protobuf spells whole numbers of 64 bits as strings.
    return [
        TensorSpec(tensor["name"], tensor["datatype"], tuple(int(n) for n in tensor["shape"]))
        for tensor in tensors
    ]


def _require_scans(scans: ScanArray) -> None:
    expected = ("N", *SCAN_SHAPE)
    if scans.dtype != np.uint8 or scans.ndim != 4 or scans.shape[1:] != SCAN_SHAPE:
        raise ValueError(f"scans are {scans.dtype} {scans.shape}: expected uint8 {expected}")
    if len(scans) == 0:
        raise ValueError("no scans: expected at least one")


def _version_of(result: Any) -> str:
    response = result.get_response()
    if isinstance(response, dict):
        return str(response.get("model_version", ""))
    return str(response.model_version)


def _output_arrays(
    result: Any, names: Sequence[str], num_scans: int, num_classes: int
) -> dict[str, Float32Array]:
    """The outputs by name, each of the shape and dtype of the contract and finite.

    Raises:
        InferenceError: An output is missing, empty, of another shape or dtype, or not finite.
    """
    arrays = {}
    for spec in output_specs(num_classes):
        if spec.name not in names:
            continue
        expected = (num_scans, *spec.shape[1:])
        try:
            array = result.as_numpy(spec.name)
        except (ValueError, KeyError, TypeError) as error:
            raise InferenceError(
                f"output {spec.name!r} cannot be read ({error}), expected float32 {expected}. "
                "A Python backend under numpy 2 answers with empty tensors: it needs numpy < 2."
            ) from error
        if array is None or array.shape != expected or array.dtype != np.float32:
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise InferenceError(f"output {spec.name!r} is {found}, expected float32 {expected}")
        if not np.isfinite(array).all():
            raise InferenceError(f"output {spec.name!r} holds values that are not finite")
        arrays[spec.name] = array
    return arrays


def _synthetic_scan() -> ScanArray:
    """One slice with texture, uint8 (1, 224, 224, 1): two dark fields in a grey body, and noise."""
    rows, columns = np.mgrid[-1 : 1 : SCAN_SIZE * 1j, -1 : 1 : SCAN_SIZE * 1j]
    body = 150.0 * (rows**2 / 0.6 + columns**2 / 0.9 < 1)
    lungs = rows**2 / 0.3 + (np.abs(columns) - 0.42) ** 2 / 0.1 < 1
    noise = np.random.default_rng(0).normal(0, 6, rows.shape)
    grey = np.where(lungs, 40 + 20 * rows, body) + noise
    scan: ScanArray = np.clip(grey, 0, 255).astype(np.uint8)[np.newaxis, :, :, np.newaxis]
    return scan
