"""The calls of the KServe V2 protocol that this client makes, over gRPC and over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from chestct.contract import INPUT_NAME, input_spec
from chestct.inference.proxies import is_loopback

__all__ = ["Answer", "GrpcWire", "HttpWire", "Request", "StatusError", "TLSOptions"]

Headers = Mapping[str, str]
ScanArray = npt.NDArray[np.uint8]

MAX_MESSAGE_BYTES = 2**31 - 1  # gRPC's own default of 4 MiB is too small for a batch of maps
READ_BYTES = 2**16
# Of a connection that the peer, or a proxy, closed while nobody used it.
CLOSED_WHILE_IDLE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)
DTYPES = {"FP32": np.float32, "FP64": np.float64, "FP16": np.float16}  # others are not looked into


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
            ValueError: A file is missing, or only one of `cert` and `key` is given.
        """
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS: a client certificate needs its key and the key its certificate")
        for path in (self.ca, self.cert, self.key):
            if path is not None and not path.is_file():
                raise ValueError(f"TLS: {path} is not a file, expected PEM")


class Request(NamedTuple):
    """A request for `outputs` of some scans, uint8 (N, 224, 224, 1)."""

    scans: ScanArray
    outputs: Sequence[str]
    headers: Headers | None = None
    request_id: str = ""


class Answer(NamedTuple):
    """Output tensors by name, as the server sent them, and the version of the model."""

    version: str
    tensors: Mapping[str, npt.NDArray[Any]]


class GrpcWire:
    """tritonclient's gRPC client."""

    def __init__(self, address: str, tls: TLSOptions | None, headers: Headers) -> None:
        """Opens a channel.

        `channel_args` replaces all of tritonclient's own, so message sizes and keepalive (a ping
        a minute, during calls only) are given too; the reconnect times make `wait_for_model` see
        a server soon after it starts. A server on loopback is never reached through a proxy.
        """
        from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

        self._input, self._output = InferInput, InferRequestedOutput
        self._headers = _grpc_metadata(headers)
        files = tls or TLSOptions()
        self._client = InferenceServerClient(
            address,
            ssl=tls is not None,
            root_certificates=_text(files.ca),
            private_key=_text(files.key),
            certificate_chain=_text(files.cert),
            channel_args=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 0),
                ("grpc.http2.max_pings_without_data", 2),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                (
                    "grpc.enable_http_proxy",
                    int(not is_loopback(urlsplit(f"//{address}").hostname or "")),
                ),
            ],
        )

    def is_live(self, timeout_s: float) -> bool:
        """Whether the server is live."""
        return bool(self._client.is_server_live(self._headers, timeout_s))

    def is_ready(self, model: str, version: str, timeout_s: float) -> bool:
        """Whether the model is ready for requests."""
        return bool(self._client.is_model_ready(model, version, self._headers, timeout_s))

    def describe(self, model: str, version: str, timeout_s: float) -> tuple[Any, Any]:
        """The model's metadata and its config, as JSON."""
        options = {"headers": self._headers, "as_json": True, "client_timeout": timeout_s}
        metadata = self._client.get_model_metadata(model, version, **options)
        config = self._client.get_model_config(model, version, **options)
        return metadata, config.get("config", config)

    def infer(self, model: str, version: str, request: Request, timeout_s: float) -> Answer:
        """The answer to one request."""
        tensor = self._input(INPUT_NAME, list(request.scans.shape), input_spec().dtype)
        tensor.set_data_from_numpy(request.scans)
        result = self._client.infer(
            model,
            [tensor],
            version,
            [self._output(name) for name in request.outputs],
            request.request_id,
            headers={**self._headers, **_grpc_metadata(request.headers or {})},
            client_timeout=timeout_s,
        )
        response = result.get_response()
        outputs = zip(response.outputs, response.raw_output_contents, strict=True)
        return Answer(
            response.model_version,
            {each.name: _tensor(each.datatype, each.shape, data) for each, data in outputs},
        )

    def close(self) -> None:
        """Close the connections; calls under way fail."""
        self._client.close()


class HttpWire:
    """The KServe V2 protocol with Triton's binary tensors, over connections that are kept open."""

    def __init__(self, address: str, tls: TLSOptions | None, headers: Headers) -> None:
        self._host, _, path = address.partition("/")
        self._path = f"/{path}" if path else ""
        self._headers = headers
        self._context: ssl.SSLContext | None = None
        if tls is not None:
            self._context = ssl.create_default_context(cafile=tls.ca)
            if tls.cert is not None:
                self._context.load_cert_chain(tls.cert, tls.key)
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._num_closings = 0

    def is_live(self, timeout_s: float) -> bool:
        """Whether the server is live."""
        return self._send("GET", "/v2/health/live", timeout_s)[0] == 200

    def is_ready(self, model: str, version: str, timeout_s: float) -> bool:
        """Whether the model is ready for requests."""
        path = f"{_model_path(model, version)}/ready"
        return self._send("GET", path, timeout_s)[0] == 200

    def describe(self, model: str, version: str, timeout_s: float) -> tuple[Any, Any]:
        """The model's metadata and its config, as JSON."""
        path = _model_path(model, version)
        metadata = self._ask("GET", path, timeout_s)[1]
        return json.loads(metadata), json.loads(self._ask("GET", f"{path}/config", timeout_s)[1])

    def infer(self, model: str, version: str, request: Request, timeout_s: float) -> Answer:
        """The answer to one request."""
        pixels = request.scans.tobytes()
        tensor = {
            "name": INPUT_NAME,
            "shape": request.scans.shape,
            "datatype": input_spec().dtype,
            "parameters": {"binary_data_size": len(pixels)},
        }
        outputs = [{"name": name, "parameters": {"binary_data": True}} for name in request.outputs]
        content: dict[str, Any] = {"inputs": [tensor], "outputs": outputs}
        if request.request_id:
            content["id"] = request.request_id
        head = json.dumps(content).encode()
        length, body = self._ask(
            "POST",
            f"{_model_path(model, version)}/infer",
            timeout_s,
            head + pixels,
            {
                **(request.headers or {}),
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(head)),
            },
        )
        answer = json.loads(body[:length])
        tensors, start = {}, length
        for output in answer["outputs"]:
            end = start + int(output["parameters"]["binary_data_size"])
            tensors[output["name"]] = _tensor(output["datatype"], output["shape"], body[start:end])
            start = end
        return Answer(str(answer.get("model_version", "")), tensors)

    def close(self) -> None:
        """Close the connections; calls under way fail."""
        with self._lock:
            self._num_closings += 1
            for connection in self._busy:  # wakes whoever waits for an answer on it
                with contextlib.suppress(OSError):
                    if connection.sock is not None:
                        connection.sock.shutdown(socket.SHUT_RDWR)
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _ask(self, *arguments: Any) -> tuple[int, bytes]:
        """Length of the JSON part, and the body, of an answer without an error."""
        status, head, body = self._send(*arguments)
        if status == 200:
            return int(head.get("Inference-Header-Content-Length", len(body))), body
        try:
            text = str(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            text = body[:200].decode(errors="replace").strip() or "no reason given"
        raise StatusError(str(status), text)

    def _send(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: bytes = b"",
        headers: Headers | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            is_reused, num_closings = bool(self._idle), self._num_closings
            connection = self._idle.pop() if is_reused else self._new_connection()
            self._busy.add(connection)
        try:
            connection.timeout = timeout_s
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(remaining(deadline))
            all_headers = {**self._headers, **(headers or {})}
            connection.request(method, self._path + path, body, all_headers)
            response = connection.getresponse()
            content = bytearray()
            while piece := response.read1(READ_BYTES):
                content += piece
                if connection.sock is not None:  # closed after the last answer on it
                    connection.sock.settimeout(remaining(deadline))
            response.close()
        except BaseException as error:
            with self._lock:
                self._busy.discard(connection)
                stale, self._idle = self._idle, []
                is_open = num_closings == self._num_closings
            for each in (connection, *stale):  # the server closes them all when it ends
                each.close()
            if is_reused and is_open and isinstance(error, CLOSED_WHILE_IDLE):
                return self._send(method, path, remaining(deadline), body, headers)
            raise
        with self._lock:
            self._busy.discard(connection)
            self._idle.append(connection)
        return response.status, response.headers, bytes(content)

    def _new_connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host)
        return http.client.HTTPSConnection(self._host, context=self._context)


class StatusError(Exception):
    """An HTTP answer that tells of an error."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def _tensor(datatype: str, shape: Sequence[int], data: bytes) -> npt.NDArray[Any]:
    """A tensor in the shape that the server tells, or flat where its data do not fill it."""
    array: npt.NDArray[Any] = np.frombuffer(data, DTYPES.get(datatype, np.uint8))
    return array.reshape(shape) if array.size == math.prod(shape) else array


def _model_path(model: str, version: str) -> str:
    return f"/v2/models/{model}/versions/{version}" if version else f"/v2/models/{model}"


def _grpc_metadata(headers: Headers) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}  # gRPC takes no capitals


def remaining(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
