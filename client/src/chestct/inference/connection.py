"""Calls to one Triton server over gRPC or HTTP, each with a deadline and with our own errors."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from chestct.contract import (
    ModelMetadata,
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
from chestct.inference.proxies import Proxy, grpc_proxy
from chestct.inference.wires import (
    Answer,
    GrpcWire,
    Headers,
    HttpWire,
    Request,
    StatusError,
    TLSOptions,
    remaining,
)

__all__ = ["Connection", "ServedModel"]


FIRST_POLL_S, LONGEST_POLL_S = 0.05, 1.0
# gRPC and HTTP statuses; every other one is an InferenceError.
ERROR_BY_STATUS: Mapping[str, type[ServerError]] = {
    "StatusCode.CANCELLED": ServerUnavailableError,  # this client was closed meanwhile
    "StatusCode.DEADLINE_EXCEEDED": InferenceTimeoutError,
    "StatusCode.UNAVAILABLE": ServerUnavailableError,
    "502": ServerUnavailableError,
    "503": ServerUnavailableError,
    "504": InferenceTimeoutError,
}


@dataclass(frozen=True)
class ServedModel:
    """Metadata, version and batch limit of the model that a server serves."""

    metadata: ModelMetadata
    version: str
    max_batch_size: int


class Connection:
    """One server and one model on it. Threads may share a connection.

    Attributes:
        url: The address, for messages.
    """

    def __init__(
        self,
        url: str,
        model: str,
        version: str = "",
        *,
        tls: TLSOptions | None = None,
        headers: Headers | None = None,
    ) -> None:
        """Checks the arguments; nothing is sent yet.

        Args:
            url: grpc://HOST:PORT, grpcs://, http:// or https://.
            model: Name of the model.
            version: Version of the model; empty for the one that the server chooses.
            tls: Certificates, for grpcs:// and https:// only.
            headers: HTTP headers or gRPC metadata of every call.

        Raises:
            ValueError: An address of another form, or certificates without TLS.
        """
        self.url = url
        self._model, self._version = model, version
        is_grpc, is_secure, self._address = _parse_url(url)
        if tls is not None and not is_secure:
            raise ValueError(f"{url}: certificates need grpcs:// or https://")
        self._tls = (tls or TLSOptions()) if is_secure else None
        self._headers = dict(headers or {})
        self._wire_type = GrpcWire if is_grpc else HttpWire
        self._wire: GrpcWire | HttpWire | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._proxy: Proxy | None = None

    def wait_for_model(self, limit_s: float, timeout_s: float) -> ServedModel:
        """Wait until server and model are ready, then compare the model with the contract.

        Connection errors, time-outs and a model that is not ready mean "not yet"; anything else
        fails at once.

        Args:
            limit_s: How long to wait.
            timeout_s: Limit of a single call.

        Raises:
            ServerUnavailableError: Server or model was not ready in time.
            ContractError: The model differs from the contract; all differences are listed.
            InferenceError: The server refuses to describe the model.
        """
        deadline, longest_s, reason = time.monotonic() + limit_s, FIRST_POLL_S, ""
        self._is_closed = False
        while True:
            try:
                with self._calling(min(timeout_s, remaining(deadline))) as (wire, call_s):
                    is_live = wire.is_live(call_s)
                if is_live:
                    return self.describe(min(timeout_s, remaining(deadline)))
                reason = f"{self.url}: the server is not live"
            except ServerUnavailableError as error:
                reason = str(error)
            except InferenceTimeoutError as error:  # the last attempts have little time
                reason = reason or str(error)
            pause_s = min(longest_s, (deadline - time.monotonic()) / 2)
            if pause_s < FIRST_POLL_S or self._is_closed:
                raise ServerUnavailableError(
                    f"{reason} (waited {limit_s:g} s). Start the server, or correct "
                    "the address or the name of the model.",
                    self.url,
                )
            time.sleep(pause_s)
            longest_s = min(2 * longest_s, LONGEST_POLL_S)

    def describe(self, timeout_s: float, version: str = "") -> ServedModel:
        """Read the model's metadata and compare it with the contract.

        Args:
            timeout_s: Limit of each of the calls.
            version: Another version than the one of this connection.

        Raises:
            ServerError: The server is unavailable, or the model is not what was expected.
        """
        version = version or self._version
        with self._calling(timeout_s) as (wire, limit_s):
            is_ready = wire.is_ready(self._model, version, limit_s)
            if is_ready:
                metadata, config = wire.describe(self._model, version, limit_s)
        if not is_ready:
            raise ServerUnavailableError(
                f"{self.url}: model {self._model!r} is not ready", self.url
            )
        try:
            return _served_model(metadata, config, version)
        except ContractError as error:
            raise ContractError(
                f"{self.url}: model {self._model!r} does not fit this client: {error}", self.url
            ) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InferenceError(
                f"{self.url}: unreadable description of model {self._model!r} ({error!r}). "
                "Is this the address of a Triton server?",
                self.url,
            ) from error

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """Send one request and return the outputs, unchecked."""
        with self._calling(timeout_s) as (wire, limit_s):
            return wire.infer(self._model, self._version, request, limit_s)

    def close(self) -> None:
        """Close the connection; calls under way end with an error."""
        with self._lock:
            wire, self._wire, self._is_closed = self._wire, None, True
        if wire is not None:
            wire.close()

    @contextlib.contextmanager
    def _calling(self, timeout_s: float) -> Iterator[tuple[GrpcWire | HttpWire, float]]:
        try:
            with self._lock:
                if self._is_closed:
                    raise ConnectionAbortedError("this client was closed")
                if self._wire is None:
                    if self._wire_type is GrpcWire:
                        self._proxy = grpc_proxy(urlsplit(self.url).hostname or "")
                    self._wire = self._wire_type(self._address, self._tls, self._headers)
                wire = self._wire
            yield wire, timeout_s
        except Exception as error:  # of several libraries
            raise _server_error(error, self.url, timeout_s, self._proxy) from error


def _parse_url(url: str) -> tuple[bool, bool, str]:
    """Whether it is gRPC, whether it is TLS, and host, port and path.

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


def _server_error(
    error: Exception, url: str, timeout_s: float, proxy: Proxy | None = None
) -> ServerError:
    """Translate an error of a library below into one of `chestct.errors`."""
    from tritonclient.utils import InferenceServerException

    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    kind: type[ServerError] = InferenceError
    if isinstance(error, InferenceServerException):
        text = " ".join(str(error.message()).split())
        kind = ERROR_BY_STATUS.get(str(error.status()), InferenceError)
    elif isinstance(error, StatusError):
        text = f"HTTP status {error.status}: {' '.join(str(error).split())}"
        kind = ERROR_BY_STATUS.get(error.status, InferenceError)
    elif isinstance(error, ssl.SSLError):
        kind, text = ServerError, f"no TLS connection: {text}. Check the certificates."
    elif isinstance(error, TimeoutError):
        kind = InferenceTimeoutError
    elif isinstance(error, (OSError, http.client.IncompleteRead, http.client.NotConnected)):
        kind = ServerUnavailableError
    if kind is InferenceTimeoutError:
        text = f"no answer within {timeout_s:.3g} s"
    if proxy is not None and kind in (ServerUnavailableError, InferenceTimeoutError):
        text = f"{text} ({proxy})"
    return kind(f"{url}: {text}", url)


def _served_model(
    metadata: Mapping[str, Any], config: Mapping[str, Any], version: str
) -> ServedModel:
    """The model that the server describes, if it keeps the contract.

    Raises:
        ContractError: Every difference, in one message.
    """
    differences: list[str] = []
    inputs, outputs = (_tensor_specs(metadata.get(kind, ())) for kind in ("inputs", "outputs"))
    facts = None
    try:
        parameters = config.get("parameters", {})
        facts = ModelMetadata.from_parameters(
            {name: value.get("string_value", "") for name, value in parameters.items()}
        )
    except ValueError as error:
        differences.append(str(error))
    # Without labels the server's own number of classes lets the rest be compared all the same.
    shapes = {spec.name: spec.shape for spec in outputs}
    num_classes = len(facts.class_names) if facts else (shapes.get("probabilities") or (-1,))[-1]
    differences += tensor_differences("input", [input_spec()], inputs)
    differences += tensor_differences("output", output_specs(num_classes), outputs)
    max_batch_size = int(config.get("max_batch_size", 0))
    if max_batch_size < 1:
        differences.append(f"max_batch_size is {max_batch_size}, expected at least 1")
    if differences or facts is None:
        raise ContractError("; ".join(differences))
    newest = max(metadata.get("versions") or [""], key=lambda text: (len(text), text))
    return ServedModel(facts, version or newest, max_batch_size)


def _tensor_specs(tensors: Sequence[Mapping[str, Any]]) -> list[TensorSpec]:
    # JSON made from protobuf spells whole numbers of 64 bits as strings.
    return [
        TensorSpec(tensor["name"], tensor["datatype"], tuple(int(n) for n in tensor["shape"]))
        for tensor in tensors
    ]
