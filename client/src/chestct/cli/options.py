"""Options that several commands share, and the connections that they stand for."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from chestct.cli.console import UsageError
from chestct.client import ScanClient
from chestct.contract import MODEL_NAME
from chestct.inference.server_pool import UNAVAILABLE_TIMEOUT_S, ServerPool
from chestct.inference.wires import TLSOptions

Options = argparse.ArgumentParser | argparse._ArgumentGroup


def add_number(parser: Options, name: str, unit: str, default: float, text: str) -> None:
    """Adds an option for a number; its help tells the default."""
    help_ = f"{text} (%(default)g)"
    parser.add_argument(name, type=float, metavar=unit, default=default, help=help_)


def add_list(parser: Options, name: str, metavar: str, text: str) -> None:
    """Adds an option that may be repeated."""
    help_ = f"{text}; may be repeated"
    parser.add_argument(name, action="append", default=[], metavar=metavar, help=help_)


def add_server_options(server: argparse.ArgumentParser) -> None:
    """The options of all commands that ask a server."""
    default = default_urls().replace("%", "%%")
    server.add_argument(
        "--url",
        dest="urls",
        action="append",
        metavar="URL",
        help=f"grpc://HOST:8001, grpcs://, http://HOST:8000 or https:// ({default}; "
        "the variable CHESTCT_URL changes this default)",
    )
    server.add_argument("--model", default=MODEL_NAME, help="name of the model (%(default)s)")
    add_number(server, "--timeout-s", "S", 30.0, "deadline of one request")
    add_number(server, "--connect-timeout-s", "S", 30.0, "how long to wait for the server")
    for name, text in (
        ("ca", "authorities to trust, a PEM file (those of the system)"),
        ("cert", "the client's own certificate, a PEM file (none)"),
        ("key", "key of that certificate, a PEM file (none)"),
    ):
        server.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=text)


def default_urls() -> str:
    """Addresses without `--url`, with commas between them."""
    return os.environ.get("CHESTCT_URL", "grpc://127.0.0.1:8001")


def urls_of(arguments: argparse.Namespace) -> list[str]:
    """The addresses of the servers."""
    return arguments.urls or default_urls().split(",")


def client_of(arguments: argparse.Namespace) -> ScanClient:
    """A client that is not connected yet.

    Raises:
        UsageError: An option is wrong.
    """
    try:
        return ScanClient(
            urls_of(arguments)[-1],
            arguments.model,
            timeout_s=arguments.timeout_s,
            connect_timeout_s=arguments.connect_timeout_s,
            unavailable_timeout_s=0,  # `health` tells it, and the node waits by itself
            tls=tls_of(arguments),
        )
    except ValueError as error:
        raise UsageError(error) from error


def fleet_of(arguments: argparse.Namespace) -> ServerPool:
    """All servers, not connected yet.

    Raises:
        UsageError: An option is wrong.
    """
    unavailable_timeout_s = arguments.unavailable_timeout_s
    if unavailable_timeout_s is None:
        unavailable_timeout_s = math.inf if arguments.watch else UNAVAILABLE_TIMEOUT_S
    try:
        return ServerPool(
            urls_of(arguments),
            arguments.model,
            timeout_s=arguments.timeout_s,
            connect_timeout_s=arguments.connect_timeout_s,
            tls=tls_of(arguments),
            unavailable_timeout_s=unavailable_timeout_s,
        )
    except ValueError as error:
        raise UsageError(error) from error


def tls_of(arguments: argparse.Namespace) -> TLSOptions | None:
    """The certificates, if any are named.

    Raises:
        ValueError: They cannot be used.
    """
    files = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key)
    return TLSOptions(*files) if any(files) else None
