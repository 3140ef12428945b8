"""Both clients against real servers on both protocols."""

from __future__ import annotations

import asyncio
import datetime
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from chestct import errors
from chestct.client import AsyncScanClient, ScanClient
from chestct.contract import LUNG_WINDOW, ModelMetadata
from chestct.errors import (
    ChestCTError,
    ContractError,
    InferenceError,
    InferenceTimeoutError,
    ModelExchangedError,
    ServerError,
    ServerUnavailableError,
)
from chestct.inference import connection, server_pool
from chestct.inference.predictions import Health, Predictions, synthetic_scan
from chestct.inference.wires import StatusError, TLSOptions
from tests.support.waiting import until

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def classify(
    kind: str, url: str, scans: np.ndarray, with_map: bool = True, **options: Any
) -> Predictions:
    """One session of either client: connect, classify, close."""
    if kind == "blocking":
        with ScanClient(url, **options) as client:
            return client.infer(scans, with_map=with_map)

    async def session() -> Predictions:
        async with AsyncScanClient(url, **options) as client:
            return await client.infer(scans, with_map=with_map)

    return asyncio.run(session())


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "RETRY_PAUSE_S", 0.02)


def test_predictions_of_a_split_batch(kind: str, peer: Any, scans: np.ndarray) -> None:
    predictions = classify(kind, peer.url, scans)
    assert [size for size, _ in peer.model.requests] == [4, 2]
    facts = ModelMetadata.from_parameters(peer.model.parameters)
    assert predictions.metadata == facts
    assert predictions.predicted_labels == [facts.class_names[i] for i in (0, 1, 2, 3, 0, 1)]
    assert predictions.probabilities.shape == (6, 4)
    assert predictions.probabilities.dtype == np.float32
    assert predictions.activation_map is not None
    assert predictions.activation_map.shape == (6, 14, 14, 4)
    assert predictions.domain_distance.shape == (6,)
    np.testing.assert_allclose(predictions.probabilities[2], [0.1, 0.1, 0.7, 0.1], rtol=1e-6)
    np.testing.assert_allclose(
        predictions.activation_map.mean(axis=(1, 2)), predictions.probabilities, rtol=1e-5
    )
    assert (predictions.model_name, predictions.model_version) == ("chestct", "1")


def test_map_is_not_asked_for_without_need(kind: str, peer: Any, scans: np.ndarray) -> None:
    predictions = classify(kind, peer.url, scans[:2], with_map=False)
    assert predictions.activation_map is None
    assert peer.model.requests == [(2, ("probabilities", "domain_distance"))]


def test_scan_beyond_the_threshold_is_out_of_domain(
    kind: str, peer: Any, scans: np.ndarray
) -> None:
    flat = np.full_like(scans[:1], 90)  # the server calls a picture without texture far away
    predictions = classify(kind, peer.url, np.concatenate([scans[:1], flat]))
    assert predictions.in_domain.tolist() == [True, False]


def test_distance_at_the_threshold_is_in_domain() -> None:
    facts = ModelMetadata(("a", "b", "c"), LUNG_WINDOW, 1.0, 2.0, "run", "00")
    distances = np.array([1.9, 2.0, 2.1], np.float32)
    predictions = Predictions(np.eye(3, dtype=np.float32), None, distances, facts, "m", "1")
    assert predictions.in_domain.tolist() == [True, True, False]
    assert predictions.predicted_labels == ["a", "b", "c"]


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 224, 224, 1), np.float32),
        np.zeros((1, 224, 224, 3), np.uint8),
        np.zeros((224, 224, 1), np.uint8),
        np.zeros((1, 128, 128, 1), np.uint8),
        np.zeros((0, 224, 224, 1), np.uint8),
    ],
)
def test_other_arrays_are_refused_before_sending(kind: str, peer: Any, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        classify(kind, peer.url, wrong)
    assert peer.model.requests == []


def test_scans_need_not_be_contiguous(kind: str, peer: Any, scans: np.ndarray) -> None:
    backwards = classify(kind, peer.url, scans[::-1])
    np.testing.assert_array_equal(
        backwards.probabilities[::-1], classify(kind, peer.url, scans).probabilities
    )


def test_health_is_a_real_inference(peer: Any) -> None:
    with ScanClient(peer.url) as client:
        health = client.health()
    assert health == Health("chestct", "1", "run-7", health.latency_ms)
    assert 0 < health.latency_ms < 30_000
    assert peer.model.requests == [(1, ("probabilities", "domain_distance"))]
    assert synthetic_scan().std() > 20


def test_health_asyncio(peer: Any) -> None:
    async def session() -> Health:
        async with AsyncScanClient(peer.url) as client:
            return await client.health()

    assert asyncio.run(session()).run == "run-7"


def test_connect_waits_for_a_model_that_comes_later(kind: str, peer: Any, scans: Any) -> None:
    peer.model.ready = False
    timer = threading.Timer(0.3, setattr, (peer.model, "ready", True))
    timer.start()
    assert classify(kind, peer.url, scans).predicted_labels
    timer.join()


def test_connect_waits_for_a_server_that_comes_later(
    kind: str, make_peer: Callable[..., Any], scans: np.ndarray
) -> None:
    with socket.socket() as held:  # a port that is certainly free: bound, but not listening
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        started = threading.Event()

        def start() -> None:
            held.close()
            make_peer("grpc", None, port)
            started.set()

        timer = threading.Timer(0.4, start)
        timer.start()
        assert classify(kind, f"grpc://127.0.0.1:{port}", scans).predicted_labels
        assert started.wait(5)
        timer.join()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_nobody_there(kind: str, closed_port_url: str, scheme: str, scans: np.ndarray) -> None:
    url = closed_port_url.replace("grpc", scheme)
    with pytest.raises(ServerUnavailableError, match=r"onnect.*waited 0\.3 s.*Start the server"):
        classify(kind, url, scans, connect_timeout_s=0.3)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_somebody_who_never_answers(kind: str, scheme: str, scans: np.ndarray) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ServerUnavailableError, match=r"waited 0\.4 s"):
            classify(kind, url, scans, connect_timeout_s=0.4)
        assert time.monotonic() - start < 15  # and not timeout_s, 30


@pytest.mark.parametrize(
    ("state", "reason"),
    [({"live": False}, "server is not live"), ({"ready": False}, "model 'chestct' is not ready")],
)
def test_not_ready_in_time(
    kind: str, peer: Any, scans: np.ndarray, state: dict[str, bool], reason: str
) -> None:
    for name, value in state.items():
        setattr(peer.model, name, value)
    with pytest.raises(ServerUnavailableError, match=reason):
        classify(kind, peer.url, scans, connect_timeout_s=0.2)


def test_unknown_model(kind: str, peer: Any, scans: np.ndarray) -> None:
    with pytest.raises(ServerUnavailableError, match="model 'other' is not ready"):
        classify(kind, peer.url, scans, model="other", connect_timeout_s=0.2)


def test_another_protocol_on_the_port(kind: str, make_peer: Any, scans: np.ndarray) -> None:
    url = make_peer("grpc").url.replace("grpc", "http")
    with pytest.raises(ServerError, match=url):
        classify(kind, url, scans, connect_timeout_s=0.3)


def test_all_contract_differences_are_told_at_once(kind: str, peer: Any, scans: Any) -> None:
    def bend(tensor_kind: str, tensors: list[dict]) -> list[dict]:
        if tensor_kind == "inputs":
            tensors[0]["datatype"] = "FP32"
            tensors[0]["shape"] = [-1, 3, 224, 224]
            return tensors
        return [*tensors[:2], {"name": "extra", "datatype": "FP32", "shape": [-1, 1]}]

    peer.model.bend_tensors = bend
    peer.model.num_classes = 5
    peer.model.max_batch_size = 0
    with pytest.raises(ContractError) as caught:
        classify(kind, peer.url, scans)
    for part in (
        "input 'scan' has dtype FP32, expected UINT8",
        "input 'scan' has shape (-1, 3, 224, 224), expected (-1, 224, 224, 1)",
        "output 'probabilities' has shape (-1, 5), expected (-1, 4)",
        "output 'activation_map' has shape (-1, 14, 14, 5), expected (-1, 14, 14, 4)",
        "output 'domain_distance' is missing",
        "output 'extra' is not in the contract",
        "max_batch_size is 0, expected at least 1",
    ):
        assert part in str(caught.value)
    assert peer.model.requests == []


def test_parameters_and_tensors_are_told_together(kind: str, peer: Any, scans: Any) -> None:
    del peer.model.parameters["labels"], peer.model.parameters["training_run"]
    peer.model.parameters["temperature"] = "warm"
    peer.model.bend_tensors = lambda _, tensors: tensors[:1]
    with pytest.raises(ContractError) as caught:
        classify(kind, peer.url, scans)
    for part in ("'labels' is missing", "'training_run' is missing", "'warm'", "'activation_map'"):
        assert part in str(caught.value)
    assert "shape" not in str(caught.value)  # the server's own number of classes agrees with itself


def test_model_without_parameters(peer: Any, scans: np.ndarray) -> None:
    peer.model.parameters = {}
    with pytest.raises(ContractError, match="parameter 'labels' is missing"):
        classify("blocking", peer.url, scans)


@pytest.mark.parametrize("num_failures", [1, 2, 6])
def test_unavailable_is_tried_again(
    kind: str, peer: Any, scans: np.ndarray, num_failures: int
) -> None:
    """After three failures in a row the server is left out until a probe finds it healthy."""
    peer.model.failures = [UNAVAILABLE] * num_failures
    assert len(classify(kind, peer.url, scans[:2]).predicted_labels) == 2
    assert not peer.model.failures


def test_unavailable_is_not_tried_forever(kind: str, peer: Any, scans: np.ndarray) -> None:
    peer.model.failures = [UNAVAILABLE] * 99
    with pytest.raises(ServerUnavailableError, match="made to fail") as raised:
        classify(kind, peer.url, scans[:2], unavailable_timeout_s=0.3)
    assert (raised.value.code, raised.value.retryable) == ("unavailable", True)
    assert raised.value.url == peer.url
    assert 1 < len(peer.model.requests) < 20


def test_unavailable_is_not_tried_again_where_nothing_is_waited_for(
    kind: str, peer: Any, scans: np.ndarray
) -> None:
    peer.model.failures = [UNAVAILABLE] * 9
    with pytest.raises(ServerUnavailableError):
        classify(kind, peer.url, scans[:2], unavailable_timeout_s=0)
    assert len(peer.model.requests) == 1


def test_no_retry_beyond_the_limit_of_the_call(kind: str, peer: Any, scans: np.ndarray) -> None:
    peer.model.failures = [UNAVAILABLE] * 99

    def blocking() -> None:
        with ScanClient(peer.url) as client:
            client.infer(scans[:2], timeout_s=0.3)

    async def session() -> None:
        async with AsyncScanClient(peer.url) as client:
            await client.infer(scans[:2], timeout_s=0.3)

    with pytest.raises(ServerUnavailableError):
        blocking() if kind == "blocking" else asyncio.run(session())
    assert len(peer.model.requests) < 20


@pytest.mark.parametrize(
    "status",
    [grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND],
)
def test_other_failures_are_not_tried_again(
    kind: str, peer: Any, scans: np.ndarray, status: grpc.StatusCode
) -> None:
    peer.model.failures = [status]
    with pytest.raises(InferenceError, match="made to fail"):
        classify(kind, peer.url, scans[:2])
    assert len(peer.model.requests) == 1


def test_slow_answer_is_a_timeout(kind: str, peer: Any, scans: np.ndarray) -> None:
    peer.model.delay_s = 1.0
    options = {"timeout_s": 0.2, "connect_timeout_s": 20, "unavailable_timeout_s": 0}
    with pytest.raises(InferenceTimeoutError, match=r"no answer within 0\.2 s"):
        classify(kind, peer.url, scans[:2], **options)


def test_deadline_of_connecting_does_not_bind_requests(
    kind: str, peer: Any, scans: np.ndarray
) -> None:
    peer.model.delay_s = 1.2
    assert len(classify(kind, peer.url, scans[:2], connect_timeout_s=1.0).predicted_labels) == 2


def test_death_in_the_middle(kind: str, peer: Any, scans: np.ndarray) -> None:
    peer.model.dies_at_request = 2
    with pytest.raises(ServerUnavailableError, match=peer.url):
        classify(kind, peer.url, scans, unavailable_timeout_s=0)
    assert len(peer.model.requests) == 1


def test_empty_tensors_name_numpy_2(kind: str, peer: Any, scans: np.ndarray) -> None:
    peer.model.bend_output = lambda _, array: array[:0]
    with pytest.raises(InferenceError, match=r"'probabilities' is float32.*numpy < 2"):
        classify(kind, peer.url, scans[:2])


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (lambda array: array[:1], r"float32 \(1, 4\), expected float32 \(2, 4\)"),
        (lambda array: array.astype(np.float64), r"float64 \(2, 4\), expected float32"),
        (lambda array: array * np.float32(np.nan), "not finite"),
    ],
)
def test_unusable_outputs(
    kind: str, peer: Any, scans: np.ndarray, bend: Callable[..., Any], message: str
) -> None:
    peer.model.bend_output = lambda name, array: bend(array) if name == "probabilities" else array
    with pytest.raises(InferenceError, match=rf"output 'probabilities'.*{message}"):
        classify(kind, peer.url, scans[:2])


def test_new_version_brings_its_own_facts(peer: Any, scans: np.ndarray) -> None:
    with ScanClient(peer.url) as client:
        assert client.infer(scans[:1]).metadata.run == "run-7"
        peer.model.versions = ["1", "2"]
        later = replace(client.metadata, run="run-8", domain_threshold=1.0)
        peer.model.parameters = later.to_parameters()
        predictions = client.infer(scans[:1])
        assert predictions.model_version == client.model_version == "2"
        assert predictions.metadata == client.metadata == later
        assert predictions.in_domain.tolist() == [False]


@pytest.mark.parametrize("has_version", [True, False])
@pytest.mark.parametrize(
    "parameters", [{"labels": '["a", "b", "c", "d"]'}, {"window_center_hu": "40.0"}]
)
def test_model_with_other_labels_or_window_gives_no_answer(
    peer: Any, scans: np.ndarray, parameters: dict[str, str], has_version: bool
) -> None:
    """Also where a server that was started anew serves it under the same version."""
    with ScanClient(peer.url) as client:
        client.infer(scans[:1])
        peer.model.parameters |= parameters
        if has_version:
            peer.model.versions = ["1", "2"]
        else:
            peer.model.failures = [UNAVAILABLE]
        for _ in range(2):
            with pytest.raises(ModelExchangedError, match="Connect again") as raised:
                client.infer(scans[:1])
        assert (raised.value.code, raised.value.url) == ("model_exchanged", peer.url)
        old = client.metadata
        client.connect()
        assert client.infer(scans[:1]).metadata == client.metadata
        with pytest.raises(ModelExchangedError):
            client.infer(scans[:1], prepared_for=old)


def test_model_is_compared_again_after_a_pause(
    grpc_peer: Any, scans: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may restart while nothing is asked, and no request fails by it."""
    monkeypatch.setattr(server_pool, "CHECK_AFTER_S", 0.0)
    with ScanClient(grpc_peer.url) as client:
        grpc_peer.model.parameters["labels"] = '["a", "b", "c", "d"]'
        with pytest.raises(ModelExchangedError):
            client.infer(scans[:1])


def test_headers_and_request_id_reach_the_server(peer: Any, scans: np.ndarray) -> None:
    with ScanClient(peer.url, headers={"X-Site": "here"}) as client:
        client.infer(scans[:1], headers={"X-Trace": "42"}, request_id="scan-7")
    assert peer.model.heads == [("here", "42", "scan-7")]


def test_versions_are_not_mixed_in_one_answer(kind: str, peer: Any, scans: np.ndarray) -> None:
    def roll_out(name: str, array: np.ndarray) -> np.ndarray:
        peer.model.versions = [str(len(peer.model.requests))]
        return array

    peer.model.bend_output = roll_out
    with pytest.raises(ModelExchangedError, match=r"versions \['1', '2'\].*Classify again"):
        classify(kind, peer.url, scans)


def test_unreadable_description(kind: str, peer: Any, scans: np.ndarray) -> None:
    peer.model.bend_tensors = lambda _, tensors: [{"name": "scan"}]
    with pytest.raises(ServerError, match=peer.url):
        classify(kind, peer.url, scans)


def test_newest_version_is_told_on_connecting(peer: Any) -> None:
    peer.model.versions = ["2", "10", "9"]
    with ScanClient(peer.url) as client:
        assert client.model_version == "10"
        assert client.max_batch_size == 4


def test_asked_version_is_sent(kind: str, peer: Any, scans: np.ndarray) -> None:
    peer.model.versions = ["1", "2"]
    assert classify(kind, peer.url, scans[:1], version="1").model_version == "1"


def test_use_before_connecting_and_after_closing(peer: Any, scans: np.ndarray) -> None:
    client = ScanClient(peer.url)
    with pytest.raises(ServerUnavailableError, match="not connected"):
        client.infer(scans)
    client.connect()
    assert client.metadata.run == "run-7"
    client.close()
    client.close()
    with pytest.raises(ServerUnavailableError, match="not connected"):
        _ = client.metadata


def test_close_leaves_no_http_connection(make_peer: Callable[..., Any], scans: np.ndarray) -> None:
    peer = make_peer("http")
    with ScanClient(peer.url) as client:
        client.infer(scans)
        assert len(peer.http.connections) == 1
    until(lambda: not peer.http.connections, "the end of the connection")


def test_threads_share_a_grpc_client(grpc_peer: Any, scans: np.ndarray) -> None:
    answers: list[list[str]] = []
    with ScanClient(grpc_peer.url) as client:
        threads = [
            threading.Thread(target=lambda: answers.append(client.infer(scans).predicted_labels))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert answers == [answers[0]] * 4


def test_large_answers_pass(kind: str, grpc_peer: Any, scans: np.ndarray) -> None:
    # 4 maps of 14 x 14 x 2000 float32 are 6.3 MB, gRPC's own limit is 4 MiB.
    facts = ModelMetadata.from_parameters(grpc_peer.model.parameters)
    many = replace(facts, class_names=tuple(f"class {number}" for number in range(2000)))
    grpc_peer.model.parameters = many.to_parameters()
    grpc_peer.model.num_classes = 2000
    predictions = classify(kind, grpc_peer.url, scans[:4])
    assert predictions.activation_map is not None
    assert predictions.activation_map.nbytes > 4 * 2**20


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8001",
        "localhost:8001",
        "ftp://host:1",
        "grpc://:8001",
        "grpc://host:8001/path",
        "grpc://host:many",
        "http://user:word@host:8000",
        "http://host:8000?query",
        "",
    ],
)
def test_address_of_another_form(url: str) -> None:
    with pytest.raises(ValueError, match="expected grpc://HOST:8001"):
        ScanClient(url)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("grpc://host", "host:8001"),
        ("grpcs://[::1]", "[::1]:8001"),
        ("http://host", "host:8000"),
        ("https://host:443/triton/", "host:443/triton"),
        ("grpc://host:0", "host:0"),
    ],
)
def test_missing_port_is_that_of_triton(url: str, address: str) -> None:
    assert connection._parse_url(url)[2] == address


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"connect_timeout_s": -1}]
)
def test_deadlines_must_be_positive(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a positive number of seconds"):
        ScanClient(**options)


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    pem.touch()
    with pytest.raises(ValueError, match="unavailable_timeout_s is -1"):
        AsyncScanClient(unavailable_timeout_s=-1)
    with pytest.raises(ValueError, match="need grpcs:// or https://"):
        ScanClient("grpc://host:1", tls=TLSOptions(ca=pem))
    with pytest.raises(ValueError, match="is not a file"):
        TLSOptions(ca=tmp_path / "missing.pem")
    with pytest.raises(ValueError, match="needs its key"):
        TLSOptions(cert=pem)


def test_every_status_and_error_has_its_place() -> None:
    def kind_of(error: Exception) -> type:
        translated = connection._server_error(error, "grpc://host:1", 3.0)
        assert translated.url == "grpc://host:1"
        assert str(translated).startswith("grpc://host:1: ")
        return type(translated)

    expected = {
        "StatusCode.CANCELLED": ServerUnavailableError,
        "StatusCode.DEADLINE_EXCEEDED": InferenceTimeoutError,
        "StatusCode.UNAVAILABLE": ServerUnavailableError,
        "502": ServerUnavailableError,
        "503": ServerUnavailableError,
        "504": InferenceTimeoutError,
    }
    statuses = [str(code) for code in grpc.StatusCode]
    for status in (*statuses, "400", "404", "500", "502", "503", "504", None):
        error = InferenceServerException("it went wrong", status)
        assert kind_of(error) is expected.get(str(status), InferenceError)

    for error, kind in (
        (ConnectionRefusedError(111, "refused"), ServerUnavailableError),
        (ConnectionResetError(), ServerUnavailableError),
        (socket.gaierror(-2, "unknown host"), ServerUnavailableError),
        (http.client.RemoteDisconnected("closed"), ServerUnavailableError),
        (http.client.IncompleteRead(b"short"), ServerUnavailableError),
        (StatusError("503", "full"), ServerUnavailableError),
        (StatusError("504", "late"), InferenceTimeoutError),
        (StatusError("500", "wrong"), InferenceError),
        (TimeoutError(), InferenceTimeoutError),
        (ssl.SSLCertVerificationError(1, "self-signed"), ServerError),
        (http.client.BadStatusLine("no HTTP"), InferenceError),
        (ValueError("no JSON"), InferenceError),
        (KeyError("outputs"), InferenceError),
    ):
        assert kind_of(error) is kind, error


def test_every_public_error_is_in_the_tree() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(kind, ChestCTError) for kind in kinds)
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert found == set(errors.__all__)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and a self-signed certificate for localhost, as PEM files."""
    x509 = pytest.importorskip("cryptography.x509", reason="needs the package cryptography")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "key.pem").write_bytes(key_pem)
    (folder / "cert.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    return folder / "key.pem", folder / "cert.pem"


def secure_peer(make_peer: Callable[..., Any], protocol: str, key: Path, cert: Path) -> Any:
    """A server that also asks the client for that certificate."""
    if protocol == "grpc":
        pair = (key.read_bytes(), cert.read_bytes())
        return make_peer(
            "grpc", grpc.ssl_server_credentials([pair], cert.read_bytes(), require_client_auth=True)
        )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cert)
    context.load_cert_chain(cert, key)
    context.verify_mode = ssl.CERT_REQUIRED
    return make_peer("http", context)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_tls_with_client_certificate(
    kind: str,
    protocol: str,
    make_peer: Callable[..., Any],
    certificate: tuple[Path, Path],
    scans: np.ndarray,
) -> None:
    key, cert = certificate
    peer = secure_peer(make_peer, protocol, key, cert)
    assert peer.url.startswith(f"{protocol}s://")
    tls = TLSOptions(ca=cert, cert=cert, key=key)
    assert len(classify(kind, peer.url, scans, tls=tls).predicted_labels) == 6


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_tls_with_an_authority_that_is_not_trusted(
    kind: str,
    protocol: str,
    make_peer: Callable[..., Any],
    certificate: tuple[Path, Path],
    scans: np.ndarray,
) -> None:
    peer = secure_peer(make_peer, protocol, *certificate)
    with pytest.raises(ServerError, match=r"(?i)certificate|handshake"):
        classify(kind, peer.url, scans, connect_timeout_s=0.5)
    assert peer.model.requests == []
