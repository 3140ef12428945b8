"""MLflow's server and the proxies of the environment."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import mlflow
import pytest

from training.track.mlflow_run import connected


class Tracking(http.server.BaseHTTPRequestHandler):
    """Knows no experiment; notes what it is asked."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        body = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}'
        self.send_response(404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("http_proxy", f"http://someone:s3cret@{address}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    yield address
    mlflow.set_tracking_uri(before)


def test_server_on_this_machine_is_reached_directly(dead_proxy, monkeypatch):
    handler = type("Handler", (Tracking,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setenv("no_proxy", "example.org")
        with connected() as store:
            assert store.get_experiment_by_name("chestct") is None
        server.shutdown()
        thread.join(10)
    assert len(handler.seen) == 1


def test_error_of_another_server_names_the_variable_and_not_the_password(dead_proxy, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.test:5000")
    refused = pytest.raises(ValueError, match=r"MLflow at http://mlflow\.test:5000")
    with refused as raised, connected() as store:
        store.get_experiment_by_name("chestct")
    assert f"(http_proxy=http://{dead_proxy} sends this connection to a proxy" in str(raised.value)
    assert "s3cret" not in str(raised.value)
