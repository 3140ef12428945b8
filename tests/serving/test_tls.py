"""TLS and mutual TLS with certificates made here, between the client and the real Triton."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import shutil
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tritonclient.utils import InferenceServerException

from chestct.client import ScanClient
from chestct.errors import ServerError
from chestct.inference.wires import TLSOptions
from export.publish.admin import TritonAdmin
from serving.local import Certificates, LocalTriton, LocalTritonError
from serving.local.__main__ import main
from tests.support.triton import SMALL_FACTS, config_parameters, serve

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("tls")]


@dataclass(frozen=True)
class Authority:
    """Signs certificates; all files lie in `folder`."""

    folder: Path
    name: x509.Name
    key: ec.EllipticCurvePrivateKey

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def sign(self, name: str) -> tuple[Path, Path]:
        """Certificate and key for `name`, at 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        cert = _builder(subject, self.name, key).add_extension(
            x509.SubjectAlternativeName(addresses), critical=False
        )
        cert_file, key_file = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        cert_file.write_bytes(
            cert.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert_file, key_file


def _builder(subject: x509.Name, issuer: x509.Name, key: Any) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


def authority(folder: Path) -> Authority:
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
    cert = _builder(name, name, key).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    made = Authority(folder, name, key)
    made.ca.write_bytes(cert.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return made


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """The one that server and clients trust, and a stranger."""
    folder = tmp_path_factory.mktemp("authorities")
    return authority(folder / "hospital"), authority(folder / "stranger")


@pytest.fixture(scope="module")
def small_repository(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Path:
    folder = tmp_path_factory.mktemp("tls-repository")
    write_model(folder, "chestct", config_parameters(SMALL_FACTS))
    return folder


def need_nginx() -> None:
    if shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.skip("no nginx: apt install nginx")


@pytest.fixture(scope="module", params=["tls", "mutual"])
def secured(
    request: pytest.FixtureRequest,
    small_repository: Path,
    environment: Path,
    authorities: tuple[Authority, Authority],
) -> Iterator[tuple[str, LocalTriton]]:
    """A server with TLS, or one that also asks for the client's certificate."""
    need_nginx()
    hospital, _ = authorities
    cert, key = hospital.sign("server")
    client_ca = hospital.ca if request.param == "mutual" else None
    certificates = Certificates(cert, key, client_ca)
    with serve(small_repository, environment, certificates=certificates) as running:
        yield request.param, running


def classify(
    url: str, tls: TLSOptions | None, scans: np.ndarray, connect_timeout_s: float = 30
) -> Any:
    with ScanClient(
        url, tls=tls, connect_timeout_s=connect_timeout_s, unavailable_timeout_s=0
    ) as client:
        return client.infer(scans, with_map=True)


def urls(server: LocalTriton) -> list[str]:
    return [server.grpc_url, server.http_url]


def test_the_right_certificates_are_accepted(
    secured: tuple[str, LocalTriton], authorities: tuple[Authority, Authority], scans: np.ndarray
) -> None:
    kind, server = secured
    hospital, _ = authorities
    own = hospital.sign("client") if kind == "mutual" else (None, None)
    answers = [classify(url, TLSOptions(hospital.ca, *own), scans) for url in urls(server)]
    assert [url.split(":")[0] for url in urls(server)] == ["grpcs", "https"]
    np.testing.assert_array_equal(answers[0].probabilities, answers[1].probabilities)
    assert answers[0].probabilities.shape == (8, 3)
    assert server.check() == []


def test_a_server_of_another_authority_is_refused_by_the_client(
    secured: tuple[str, LocalTriton], authorities: tuple[Authority, Authority], scans: np.ndarray
) -> None:
    kind, server = secured
    hospital, stranger = authorities
    own = hospital.sign("client") if kind == "mutual" else (None, None)
    for url in urls(server):
        with pytest.raises(ServerError, match=r"(?i)certificate|handshake"):
            classify(url, TLSOptions(stranger.ca, *own), scans, 2)


def test_a_client_without_the_right_certificate_is_refused_by_the_server(
    secured: tuple[str, LocalTriton], authorities: tuple[Authority, Authority], scans: np.ndarray
) -> None:
    kind, server = secured
    hospital, stranger = authorities
    if kind != "mutual":
        for url in urls(server):  # nobody is asked, so nobody is refused
            assert classify(url, TLSOptions(hospital.ca), scans).predicted_labels
        return
    for url in urls(server):
        for own in ((None, None), stranger.sign("client")):
            with pytest.raises(ServerError):
                classify(url, TLSOptions(hospital.ca, *own), scans, 0.5)


def test_plain_text_is_refused(secured: tuple[str, LocalTriton], scans: np.ndarray) -> None:
    _, server = secured
    grpc_url = server.grpc_url.replace("grpcs://", "grpc://")
    with pytest.raises(ServerError):
        classify(grpc_url, None, scans, 0.5)
    address = server.http_url.removeprefix("https://")
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", "/v2/health/live")
    assert connection.getresponse().status == 400  # nginx: a plain request on an HTTPS port
    connection.close()


def test_admin_apis_need_the_key_also_over_tls(
    secured: tuple[str, LocalTriton], authorities: tuple[Authority, Authority]
) -> None:
    kind, server = secured
    hospital, _ = authorities
    context = ssl.create_default_context(cafile=hospital.ca)
    cert, key = hospital.sign("client")
    if kind == "mutual":
        context.load_cert_chain(cert, key)

    def post(path: str, header: dict[str, str]) -> int:
        request = urllib.request.Request(server.http_url + path, b"{}", header)
        try:
            with urllib.request.urlopen(request, timeout=20, context=context) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    for path in ("/v2/repository/index", "/v2/repository/models/chestct/unload", "/v2/logging"):
        assert post(path, {}) == 403
        assert post(path, {"admin-key": "guessed"}) == 403
    assert post("/v2/repository/index", {"admin-key": server.admin_key}) == 200
    own = {"private_key": str(key), "certificate_chain": str(cert)} if kind == "mutual" else {}
    with tritonclient.grpc.InferenceServerClient(
        server.grpc_url.removeprefix("grpcs://"),
        ssl=True,
        root_certificates=str(hospital.ca),
        **own,
    ) as client:
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_model_repository_index()
        with_key = {"triton-grpc-protocol-admin-key": server.admin_key}
        assert client.get_model_repository_index(headers=with_key).models


def test_the_admin_client_of_a_rollout_speaks_tls(
    secured: tuple[str, LocalTriton], authorities: tuple[Authority, Authority]
) -> None:
    kind, server = secured
    hospital, stranger = authorities
    own = hospital.sign("client") if kind == "mutual" else (None, None)
    tls = TLSOptions(hospital.ca, *own)
    assert TritonAdmin(server.http_url, server.admin_key, tls).ready() == {"chestct"}
    with pytest.raises(ValueError, match=r"HTTP 403: .*is CHESTCT_ADMIN_KEY the key"):
        TritonAdmin(server.http_url, "guessed", tls).ready()
    with pytest.raises(ConnectionError, match=r"(?i)certificate"):
        TritonAdmin(server.http_url, server.admin_key, TLSOptions(stranger.ca, *own)).ready()


def test_files_and_options_that_do_not_fit_are_refused(
    tmp_path: Path, authorities: tuple[Authority, Authority], capsys: pytest.CaptureFixture[str]
) -> None:
    cert, key = authorities[0].sign("server")
    with pytest.raises(LocalTritonError, match=r"missing\.pem is not a file, expected PEM"):
        Certificates(cert, tmp_path / "missing.pem")
    for options in (["--tls-cert", str(cert)], ["--tls-client-ca", str(authorities[0].ca)]):
        with pytest.raises(SystemExit, match="2"):
            main(options)
        assert "belong together" in capsys.readouterr().err
    assert main(["--tls-cert", str(cert), "--tls-key", str(key.with_name("no.pem"))]) == 1


def test_the_metrics_port_is_not_for_the_outside(secured: tuple[str, LocalTriton]) -> None:
    """It has no TLS and no key, so it must stay on loopback."""
    _, server = secured
    with urllib.request.urlopen(server.metrics_url, timeout=5) as reply:
        assert b"nv_inference_count" in reply.read()
    port = urllib.parse.urlsplit(server.metrics_url).port
    with pytest.raises(ConnectionRefusedError):  # a server on 0.0.0.0 would answer here
        socket.create_connection(("127.0.0.2", port), timeout=5)
