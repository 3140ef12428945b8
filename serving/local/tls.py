"""TLS for Triton: certificates, options for gRPC, and an nginx in front of HTTP."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import string
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from serving.local.installation import LocalTritonError
from serving.local.process import HOST, KILL_MARGIN_S, explain

NGINX_CONFIG = Path(__file__).parents[1] / "nginx.conf.template"
START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Certificates:
    """PEM files for TLS.

    Attributes:
        cert: The server's certificate chain.
        key: Its private key.
        client_ca: Authorities whose certificates clients must show (mutual TLS); None asks for no
            certificate.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        """Refuse missing files.

        Raises:
            LocalTritonError: A file is missing.
        """
        for path in (self.cert, self.key, self.client_ca):
            if path is not None and not path.is_file():
                raise LocalTritonError(f"TLS: {path} is not a file, expected PEM")

    def grpc_options(self) -> list[str]:
        """Options of `tritonserver` for gRPC."""
        options = [
            f"--grpc-server-cert={self.cert.absolute()}",
            f"--grpc-server-key={self.key.absolute()}",
        ]
        if self.client_ca is None:
            return ["--grpc-use-ssl=true", *options]
        root = f"--grpc-root-cert={self.client_ca.absolute()}"
        return ["--grpc-use-ssl-mutual=true", *options, root]

    def nginx_config(self, listen: str, upstream: str, folder: Path) -> str:
        """The configuration of an nginx that ends TLS in front of Triton's HTTP."""
        return string.Template(NGINX_CONFIG.read_text(encoding="utf-8")).substitute(
            TLS_LISTEN=listen,
            TLS_UPSTREAM=upstream,
            TLS_CERT=self.cert.absolute(),
            TLS_KEY=self.key.absolute(),
            TLS_VERIFY_CLIENT="off" if self.client_ca is None else "on",
            TLS_CLIENT_CA=(self.client_ca or self.cert).absolute(),
            TLS_RUN=folder.absolute(),
        )


def start_nginx(
    certificates: Certificates, *, port: int, upstream_port: int, folder: Path, log_path: Path
) -> subprocess.Popen[bytes]:
    """Start an nginx that ends TLS on `port` for Triton's HTTP, and wait until it listens.

    Raises:
        LocalTritonError: There is no nginx, or it does not start.
    """
    # Debian keeps it where only root's PATH leads.
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        raise LocalTritonError(
            "TLS over HTTP needs nginx, which is not on this machine (on Debian and Ubuntu: "
            "apt install nginx)"
        )
    config = folder / "nginx.conf"
    config.write_text(
        certificates.nginx_config(f"{HOST}:{port}", f"{HOST}:{upstream_port}", folder)
    )
    libc = ctypes.CDLL(None)
    with log_path.open("ab") as log:
        log_start = log.tell()
        nginx = subprocess.Popen(
            [program, "-p", folder, "-c", config, "-e", "stderr", "-g", "daemon off;"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # PR_SET_PDEATHSIG (prctl(2)): it does not outlive this process.
            preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while nginx.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1.0):
            return nginx
        time.sleep(0.05)
    nginx.kill()
    nginx.wait()
    log_text = log_path.read_bytes()[log_start:].decode(errors="replace")
    raise LocalTritonError(f"nginx does not start: {explain(log_text)}")


def stop_nginx(nginx: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Let requests in flight finish, at most `timeout_s` long, and end the nginx."""
    if nginx.poll() is not None:
        return
    nginx.send_signal(signal.SIGQUIT)  # nginx(8): graceful shutdown
    try:
        nginx.wait(timeout_s)
    except subprocess.TimeoutExpired:
        nginx.terminate()
        nginx.wait(KILL_MARGIN_S)
