"""Proxies of the environment: none to loopback, the documented ones to other hosts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from chestct.cli import __main__ as cli
from chestct.client import AsyncScanClient, ScanClient
from chestct.contract import SCAN_SHAPE
from chestct.errors import ServerUnavailableError
from chestct.inference.proxies import (
    GRPC_EXCEPTIONS,
    GRPC_VARIABLES,
    grpc_proxy,
    is_loopback,
    url_proxy,
    without_credentials,
)
from chestct.inference.server_pool import ServerPool

VARIABLES = (*GRPC_VARIABLES, *GRPC_EXCEPTIONS, "all_proxy")
SCANS = np.zeros((2, *SCAN_SHAPE), np.uint8)


class ConnectProxy:
    """An HTTP proxy: opens tunnels by CONNECT to the servers it has names for, refuses others."""

    def __init__(self, servers: dict[str, str]) -> None:
        self.servers = servers
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(4096)
                if not piece:
                    return
                head += piece
            line = head.decode("latin-1").split("\r\n", 1)[0]
            self.asked.append(line)
            method, target, _ = line.split(" ")
            if method != "CONNECT" or target not in self.servers:
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                return
            host, port = self.servers[target].split(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                back.start()
                _copy(client, server)
                back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def make_proxy() -> Iterator[Callable[[dict[str, str]], ConnectProxy]]:
    with contextlib.ExitStack() as stack:

        def make(servers: dict[str, str]) -> ConnectProxy:
            proxy = ConnectProxy(servers)
            stack.callback(proxy.close)
            return proxy

        yield make


@pytest.fixture
def company(make_proxy, monkeypatch: pytest.MonkeyPatch) -> ConnectProxy:
    """A proxy that every variable names, in both cases, and that refuses everything."""
    proxy = make_proxy({})
    for name in (*GRPC_VARIABLES, "all_proxy"):
        monkeypatch.setenv(name, f"http://{proxy.address}")
        monkeypatch.setenv(name.upper(), f"http://{proxy.address}")
    return proxy


def _ask_asynchronously(url: str) -> str:
    async def ask() -> str:
        async with AsyncScanClient(url, connect_timeout_s=5) as client:
            return (await client.infer(SCANS)).run

    return asyncio.run(ask())


def _ask_a_fleet(url: str) -> str:
    with ServerPool([url], connect_timeout_s=5) as fleet:
        return fleet.submit(SCANS).result()[0].run


def _ask(url: str) -> str:
    with ScanClient(url, connect_timeout_s=5) as client:
        return client.infer(SCANS).run


@pytest.mark.parametrize("ask", [_ask, _ask_asynchronously, _ask_a_fleet])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_never_goes_by_a_proxy(ask, host, peer, company):
    url = peer.url.replace("127.0.0.1", host)
    assert ask(url) == "run-7"
    assert company.asked == []


def test_the_command_reaches_loopback_too(grpc_peer, company, tmp_path, capsys):
    Image.fromarray(np.arange(80 * 80, dtype=np.uint8).reshape(80, 80)).save(tmp_path / "a.png")
    code = cli.main(["classify", str(tmp_path / "a.png"), "--json", "--url", grpc_peer.url])
    assert (code, company.asked) == (0, []), capsys.readouterr().err


@pytest.mark.parametrize("variable", GRPC_VARIABLES)
@pytest.mark.parametrize("ask", [_ask, _ask_asynchronously])
def test_grpc_to_another_host_goes_by_the_proxy_of_the_variable(
    ask, variable, grpc_peer, make_proxy, monkeypatch
):
    # Nothing but the proxy knows the name.
    proxy = make_proxy({"triton.test:8001": urlsplit(grpc_peer.url).netloc})
    monkeypatch.setenv(variable, f"http://{proxy.address}")
    assert ask("grpc://triton.test:8001") == "run-7"
    assert set(proxy.asked) == {"CONNECT triton.test:8001 HTTP/1.1"}
    assert len(grpc_peer.model.requests) == 1


def test_no_proxy_names_the_hosts_to_reach_directly(company, monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org,.test")
    with pytest.raises(ServerUnavailableError) as raised:
        ScanClient("grpc://triton.test:8001", connect_timeout_s=0.3).connect()
    assert company.asked == []
    assert "_proxy" not in str(raised.value)


@pytest.mark.parametrize("variable", GRPC_VARIABLES)
@pytest.mark.parametrize("is_dead", [True, False], ids=["dead", "refusing"])
def test_error_names_the_variable_and_not_the_password(variable, is_dead, make_proxy, monkeypatch):
    proxy = make_proxy({})
    if is_dead:
        proxy.close()
    monkeypatch.setenv(variable, f"http://someone:s3cret@{proxy.address}")
    client = ScanClient("grpc://triton.test:8001", connect_timeout_s=0.5)
    with contextlib.closing(client), pytest.raises(ServerUnavailableError) as raised:
        client.connect()
    text = str(raised.value)
    assert f"{variable}=http://{proxy.address}" in text
    assert "add triton.test to no_proxy" in text
    assert "s3cret" not in text
    assert "someone" not in text


def test_error_of_a_dead_server_on_loopback_names_no_proxy(closed_port_url, company):
    with pytest.raises(ServerUnavailableError) as raised:
        ScanClient(closed_port_url, connect_timeout_s=0.3).connect()
    assert "_proxy" not in str(raised.value)
    assert company.asked == []


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("LOCALHOST", True), ("127.0.0.1", True), ("127.8.9.10", True),
        ("::1", True), ("[::1]", True), ("128.0.0.1", False), ("10.0.0.1", False),
        ("localhost.example.org", False), ("127.0.0.1.example.org", False), ("::2", False),
        ("", False),
    ],
)  # fmt: skip
def test_loopback_is_told_from_other_hosts(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("exceptions", "host", "is_direct"),
    [
        ("", "triton.test", False),
        ("triton.test", "triton.test", True),
        ("other.test, .TEST", "triton.test", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/80", "10.1.2.3", False),
        ("triton.test", "other.test", False),
    ],
)
def test_exceptions_are_read_as_grpc_reads_them(exceptions, host, is_direct, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_proxy", exceptions)
    assert (grpc_proxy(host) is None) == is_direct
    monkeypatch.setenv("no_grpc_proxy", "nothing.test")  # it goes before no_proxy
    assert grpc_proxy(host) is not None


def test_grpc_takes_the_first_variable_and_http_proxies_only(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://one.test:1")
    monkeypatch.setenv("https_proxy", "http://two.test:2")
    assert grpc_proxy("triton.test")[:2] == ("https_proxy", "http://two.test:2")
    monkeypatch.setenv("grpc_proxy", "socks5://three.test:3")
    assert grpc_proxy("triton.test") is None


def test_proxy_of_an_address_for_urllib_names_the_variable_that_is_set(monkeypatch):
    assert url_proxy("https://mlflow.test/api") is None
    monkeypatch.setenv("HTTPS_PROXY", "http://a:b@proxy.test:3128/")
    assert url_proxy("https://mlflow.test/api")[:2] == ("HTTPS_PROXY", "http://proxy.test:3128/")
    assert url_proxy("http://mlflow.test/api") is None
    assert url_proxy("https://127.0.0.1:5000") is None
    monkeypatch.setenv("NO_PROXY", "mlflow.test")
    assert url_proxy("https://mlflow.test/api") is None


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://user:pass@proxy.test:3128", "http://proxy.test:3128"),
        ("http://us@er:pa@ss@proxy.test:3128/x", "http://proxy.test:3128/x"),
        ("proxy.test:3128", "proxy.test:3128"),
        ("user:pass@proxy.test:3128", "proxy.test:3128"),
    ],
)
def test_credentials_are_never_shown(address, shown):
    assert without_credentials(address) == shown


def test_every_channel_of_the_project_says_whether_a_proxy_is_taken():
    """A gRPC client elsewhere that leaves the option out goes to loopback by way of a proxy."""
    checkout = Path(__file__).parents[3]
    files = [
        path
        for room in ("client/src", "training", "export", "benchmarks", "serving", "deploy")
        for path in (checkout / room).rglob("*.py")
        if "tritonclient.grpc" in (text := path.read_text(encoding="utf-8"))
        and "InferenceServerClient(" in text
    ]
    assert len(files) >= 2
    assert [p.name for p in files if "grpc.enable_http_proxy" not in p.read_text()] == []
