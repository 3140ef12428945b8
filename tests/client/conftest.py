"""Two real servers that speak the V2 protocol, gRPC and HTTP, around one model made of rules."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from chestct.contract import ModelMetadata, Window, input_spec, output_specs
from tests.support.ports import free_port

LABELS = ("adenocarcinoma", "large_cell", "normal", "squamous_cell")
FACTS = ModelMetadata(LABELS, Window(-600.0, 1500.0), 1.5, 10.0, "run-7", "ab" * 32)


def _unchanged(_: str, value: Any) -> Any:
    return value


@dataclass
class FakeModel:
    """What a server serves. Tests bend the fields; `requests` tells what arrived."""

    name: str = "chestct"
    versions: list[str] = field(default_factory=lambda: ["1"])
    parameters: dict[str, str] = field(default_factory=FACTS.to_parameters)
    num_classes: int = 4
    max_batch_size: int = 4
    live: bool = True
    ready: bool = True
    delay_s: float = 0.0
    failures: list[grpc.StatusCode] = field(default_factory=list)  # one is used up by each request
    dies_at_request: int | None = None
    bend_output: Callable[[str, np.ndarray], np.ndarray] = _unchanged
    bend_tensors: Callable[[str, list[dict]], list[dict]] = _unchanged
    requests: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    heads: list[tuple[str, str, str]] = field(default_factory=list)  # two headers, request ID

    def tensors(self, kind: str) -> list[dict[str, Any]]:
        specs = [input_spec()] if kind == "inputs" else output_specs(self.num_classes)
        found = [{"name": s.name, "datatype": s.dtype, "shape": list(s.shape)} for s in specs]
        return self.bend_tensors(kind, found)

    def outputs(self, scans: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Class = upper quartile of the grey by quarters; distance = 40 without texture, else 2."""
        self.requests.append((len(scans), names))
        bright = np.percentile(scans.reshape(len(scans), -1), 75, axis=1)
        chosen = np.minimum(bright // 64, self.num_classes - 1).astype(int)
        probabilities = np.full((len(scans), self.num_classes), 0.1, np.float32)
        probabilities[np.arange(len(scans)), chosen] = 1 - 0.1 * (self.num_classes - 1)
        spread = scans.reshape(len(scans), -1).std(axis=1)
        maps = np.broadcast_to(
            probabilities[:, None, None, :], (len(scans), 14, 14, self.num_classes)
        )
        arrays = {
            "probabilities": probabilities,
            "activation_map": np.ascontiguousarray(maps),
            "domain_distance": np.where(spread < 1, 40, 2).astype(np.float32)[:, None],
        }
        return {name: self.bend_output(name, arrays[name]) for name in names}


HTTP_STATUS = {
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.INTERNAL: 500,
}


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, model: FakeModel, die: Callable[[], None]) -> None:
        self.model = model
        self.die = die

    def ServerLive(self, request, context):  # noqa: N802
        return service_pb2.ServerLiveResponse(live=self.model.live)

    def ModelReady(self, request, context):  # noqa: N802
        ready = self.model.ready and request.name == self.model.name
        return service_pb2.ModelReadyResponse(ready=ready)

    def ModelMetadata(self, request, context):  # noqa: N802
        kinds = {
            kind: [service_pb2.ModelMetadataResponse.TensorMetadata(**t) for t in tensors]
            for kind in ("inputs", "outputs")
            for tensors in [self.model.tensors(kind)]
        }
        return service_pb2.ModelMetadataResponse(
            name=request.name, versions=self.model.versions, **kinds
        )

    def ModelConfig(self, request, context):  # noqa: N802
        parameters = {
            key: model_config_pb2.ModelParameter(string_value=value)
            for key, value in self.model.parameters.items()
        }
        config = model_config_pb2.ModelConfig(
            name=request.name, max_batch_size=self.model.max_batch_size, parameters=parameters
        )
        return service_pb2.ModelConfigResponse(config=config)

    def ModelInfer(self, request, context):  # noqa: N802
        model = self.model
        if model.delay_s:
            time.sleep(model.delay_s)
        shape = tuple(request.inputs[0].shape)
        names = tuple(output.name for output in request.outputs)
        if model.failures:
            model.requests.append((shape[0], names))
            context.abort(model.failures.pop(0), "made to fail")
        if model.dies_at_request == len(model.requests) + 1:
            self.die()
            time.sleep(1)
        given = dict(context.invocation_metadata())
        model.heads.append((given.get("x-site", ""), given.get("x-trace", ""), request.id))
        scans = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape)
        outputs = model.outputs(scans, names)
        answer = service_pb2.ModelInferResponse(
            model_name=request.model_name,
            model_version=request.model_version or model.versions[-1],
        )
        for name, array in outputs.items():
            declared = (shape[0], *output_shape(name, model.num_classes))
            answer.outputs.add(
                name=name,
                datatype="FP32" if array.dtype == np.float32 else "FP64",
                shape=declared if array.size == 0 else array.shape,
            )
            answer.raw_output_contents.append(array.tobytes())
        return answer


def output_shape(name: str, num_classes: int) -> tuple[int, ...]:
    return next(spec.shape[1:] for spec in output_specs(num_classes) if spec.name == name)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpServer

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        super().finish()
        self.server.connections.discard(self.connection)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", header_length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if header_length is not None:
            self.send_header("Inference-Header-Content-Length", str(header_length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        model = self.server.model
        if self.path == "/v2/health/live":
            return self.answer(200 if model.live else 400)
        is_known = self.path.startswith(f"/v2/models/{model.name}/")
        if self.path.endswith("/ready"):
            return self.answer(200 if model.ready and is_known else 400)
        if self.path.endswith("/config"):
            parameters = {key: {"string_value": text} for key, text in model.parameters.items()}
            content = {"max_batch_size": model.max_batch_size, "parameters": parameters}
        else:
            content = {
                "name": model.name,
                "versions": model.versions,
                "inputs": model.tensors("inputs"),
                "outputs": model.tensors("outputs"),
            }
        return self.answer(200, json.dumps(content).encode())

    def do_POST(self) -> None:
        model = self.server.model
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.endswith("/infer"):
            return self.answer(404, b'{"error": "no such service"}')
        split = int(self.headers["Inference-Header-Content-Length"])
        request = json.loads(body[:split])
        shape = tuple(request["inputs"][0]["shape"])
        names = tuple(output["name"] for output in request["outputs"])
        if model.delay_s:
            time.sleep(model.delay_s)
        if model.failures:
            model.requests.append((shape[0], names))
            status = HTTP_STATUS[model.failures.pop(0)]
            return self.answer(status, b'{"error": "made to fail"}')
        if model.dies_at_request == len(model.requests) + 1:
            self.close_connection = True
            return self.server.die()
        given = (self.headers.get("X-Site", ""), self.headers.get("X-Trace", ""))
        model.heads.append((*given, request.get("id", "")))
        scans = np.frombuffer(body[split:], np.uint8).reshape(shape)
        outputs, blobs = [], []
        for name, array in model.outputs(scans, names).items():
            declared = [shape[0], *output_shape(name, model.num_classes)]
            outputs.append(
                {
                    "name": name,
                    "datatype": "FP32" if array.dtype == np.float32 else "FP64",
                    "shape": declared if array.size == 0 else list(array.shape),
                    "parameters": {"binary_data_size": array.nbytes},
                }
            )
            blobs.append(array.tobytes())
        version = (
            self.path.split("/versions/")[1].split("/")[0] if "/versions/" in self.path else ""
        )
        header = json.dumps(
            {
                "model_name": model.name,
                "model_version": version or model.versions[-1],
                "outputs": outputs,
            }
        ).encode()
        return self.answer(200, header + b"".join(blobs), len(header))


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model: FakeModel, context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if context is not None:
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self.model = model
        self.connections: set[Any] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is part of the tests."""

    def close_idle(self) -> None:
        """Close the connections, as a proxy closes those that are not used for a while."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def die(self) -> None:
        self.shutdown()
        self.server_close()


class Peer:
    """A running server, its model and its address."""

    def __init__(
        self, protocol: str, tls: Any = None, port: int = 0, parameters: Any = None
    ) -> None:
        self.model = FakeModel()
        self.model.parameters |= parameters or {}
        scheme = protocol if tls is None else f"{protocol}s"
        if protocol == "http":
            self.http = HttpServer(self.model, tls)
            self.die = self.http.die
            self.url = f"{scheme}://127.0.0.1:{self.http.server_port}"
            return
        server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        self.die = lambda: server.stop(grace=None)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            _Servicer(self.model, self.die), server
        )
        address = f"127.0.0.1:{port}"
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, tls)
        self.url = f"{scheme}://127.0.0.1:{bound}"
        server.start()


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def make(*arguments: Any) -> Peer:
        peers.append(Peer(*arguments))
        return peers[-1]

    yield make
    for peer in peers:
        peer.die()


@pytest.fixture(params=["grpc", "http"])
def peer(request: pytest.FixtureRequest, make_peer: Callable[..., Peer]) -> Peer:
    return make_peer(request.param)


@pytest.fixture
def grpc_peer(make_peer: Callable[..., Peer]) -> Peer:
    return make_peer("grpc")


@pytest.fixture
def closed_port_url() -> str:
    return f"grpc://127.0.0.1:{free_port()}"


@pytest.fixture
def grey_slice() -> Callable[..., np.ndarray]:
    """uint8 (H, W): a gradient with noise about a mean, never one colour."""

    def make(mean: int, height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
        rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        noise = np.random.default_rng(seed).normal(0, 4, (height, width))
        return np.clip(mean + 12 * rows - 8 * columns + noise, 0, 255).astype(np.uint8)

    return make


@pytest.fixture
def chest_slice() -> Callable[..., np.ndarray]:
    """uint8 (120, 160): a body as bright as asked for with two lungs in it, and noise."""

    def make(level: int, seed: int = 0) -> np.ndarray:
        rows, columns = np.mgrid[-1:1:120j, -1:1:160j]
        lungs = rows**2 / 0.4 + (np.abs(columns) - 0.4) ** 2 / 0.06 < 1
        grey = np.where(lungs, 0.1, 1.0) * level * (rows**2 + columns**2 < 0.95)
        noise = np.random.default_rng(seed).normal(0, 3, grey.shape)
        return np.clip(grey + noise, 0, 255).astype(np.uint8)

    return make


@pytest.fixture
def scans(grey_slice: Callable[..., np.ndarray]) -> np.ndarray:
    """uint8 (6, 224, 224, 1) whose classes are 0, 1, 2, 3, 0, 1."""
    means = (40, 100, 160, 220, 40, 100)
    slices = [grey_slice(mean, 224, 224, seed) for seed, mean in enumerate(means)]
    return np.stack(slices)[..., None]


@pytest.fixture
def scan_folder(tmp_path: Path, chest_slice: Callable[..., np.ndarray]) -> Path:
    """Five good PNG files, two broken ones among them, and one file of another kind."""
    folder = tmp_path / "scans"
    (folder / "inner").mkdir(parents=True)
    for index, level in enumerate((40, 100, 160, 220)):
        Image.fromarray(chest_slice(level, seed=index)).save(folder / f"{index} (1).png")
    Image.fromarray(chest_slice(40, seed=9)).save(folder / "inner" / "a.PNG")
    (folder / "2 text.png").write_text("this is no picture\n")
    whole = (folder / "3 (1).png").read_bytes()
    (folder / "2 torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not a scan")
    return folder
