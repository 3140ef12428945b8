"""`chestct web`: the options of the page, and how it is run."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from chestct.contract import NOT_A_MEDICAL_DEVICE
from chestct.inference.wires import TLSOptions
from chestct.web.settings import WebSettings

__all__ = ["add_options", "run"]

MAX_CONNECTIONS = 1000
EVERYWHERE = ("0.0.0.0", "::", "")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `chestct web`, beside those that say where the model is."""
    default = WebSettings()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=8080, help="port to listen at, 0 for a free one (%(default)s)"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which browsers reach the page; may be repeated",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with a token that the API asks for (the variable CHESTCT_WEB_TOKEN)",
    )
    parser.add_argument(
        "--user-header",
        default="",
        metavar="NAME",
        help="header by which a reverse proxy names the user; requests without it are refused",
    )
    parser.add_argument(
        "--proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="address of that proxy (127.0.0.1 and ::1)",
    )
    parser.add_argument(
        "--max-upload-mb",
        type=int,
        default=default.max_upload_bytes // 2**20,
        metavar="MB",
        help="largest upload (%(default)s)",
    )
    parser.add_argument(
        "--requests-a-minute",
        type=int,
        default=default.requests_a_minute,
        metavar="N",
        help="uploads of one address in the long run (%(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default.workers,
        metavar="N",
        help="decoding processes (%(default)s)",
    )


def run(arguments: argparse.Namespace, tls: TLSOptions | None) -> int:
    """Serves until it is interrupted.

    Args:
        arguments: As parsed with `add_options`, with `url`, `model` and `timeout_s`.
        tls: Certificates for Triton.

    Raises:
        ValueError: A setting out of range, or a token file that cannot be used.
        ModuleNotFoundError: The extra `web` is not installed; the message says how to.
        OSError: The address is taken or is none of this machine.
    """
    try:
        import uvicorn

        from chestct.web.app import create_app
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'chestct web needs {error.name}: pip install "chestct[web]"', name=error.name
        ) from error
    settings = WebSettings(
        url=arguments.url,
        model=arguments.model,
        timeout_s=arguments.timeout_s,
        tls=tls,
        hosts=_hosts(arguments.host, arguments.allow_host),
        token=_token(arguments.token_file),
        user_header=arguments.user_header,
        proxies=tuple(arguments.proxy) or WebSettings().proxies,
        max_upload_bytes=arguments.max_upload_mb * 2**20,
        requests_a_minute=arguments.requests_a_minute,
        workers=arguments.workers,
    )
    app = create_app(settings)
    is_v6 = ":" in arguments.host
    listening = socket.create_server(
        (arguments.host, arguments.port),
        family=socket.AF_INET6 if is_v6 else socket.AF_INET,
        backlog=512,
    )
    with listening:
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if is_v6 else host
        sys.stderr.write(f"chestct web: http://{shown}:{port} ({NOT_A_MEDICAL_DEVICE})\n")
        if not (settings.token or settings.user_header or _is_local(host)):
            sys.stderr.write(
                "chestct web: anyone who reaches this address may use it, and scans travel "
                "unencrypted. Set --token-file or --user-header, behind a proxy with TLS.\n"
            )
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _hosts(host: str, allowed: list[str]) -> tuple[str, ...]:
    names = list(WebSettings().hosts)
    if host not in EVERYWHERE:
        names.append(f"[{host}]" if ":" in host else host)
    return tuple(dict.fromkeys(name.lower() for name in [*names, *allowed]))


def _is_local(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


def _token(file: Path | None) -> str:
    if file is None:
        return os.environ.get("CHESTCT_WEB_TOKEN", "")
    try:
        token = file.read_text().strip()
    except OSError as error:
        raise ValueError(f"--token-file {file}: {error.strerror}") from error
    if not token.isascii() or len(token) < 16:
        raise ValueError(f"--token-file {file}: expected at least 16 ASCII characters")
    return token
