"""Start the real Triton on this machine, without Docker."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from serving.local.installation import ENVIRONMENT, LocalTritonError, models_of
from serving.local.process import HOST
from serving.local.server import LocalTriton
from serving.local.tls import Certificates

logger = logging.getLogger("serving.local")

ADMIN_KEY = "CHESTCT_ADMIN_KEY"
_LISTENERS = ("http", "grpc", "metrics")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving local",
        description="Serve a model repository by a real Triton on 127.0.0.1 until interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--repository", type=Path, default=Path("model_repository"), help="model repository"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="load this model only; may be repeated; without it all are loaded",
    )
    parser.add_argument(
        "--explicit",
        action="store_true",
        help="allow loading and unloading with the admin key, as a rollout needs it; the key is "
        f"taken from the environment variable {ADMIN_KEY}",
    )
    parser.add_argument("--http-port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--grpc-port", type=int, default=8001, help="0 takes a free one")
    parser.add_argument("--metrics-port", type=int, default=8002, help="0 takes a free one")
    for name, text in (
        ("cert", "certificate chain for TLS, PEM"),
        ("key", "its private key"),
        ("client-ca", "authorities whose certificates clients must show: mutual TLS"),
    ):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--environment", type=Path, default=ENVIRONMENT, help="Triton's own environment"
    )
    parser.add_argument(
        "--address",
        default=HOST,
        help="address to listen on; 0.0.0.0 only inside a container, whose network says who may "
        "connect",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve in the foreground; 0 after SIGINT or SIGTERM, 1 when Triton cannot run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.tls_cert is None) != (arguments.tls_key is None) or (
        arguments.tls_client_ca and not arguments.tls_cert
    ):
        parser.error("--tls-cert and --tls-key belong together, and --tls-client-ca needs them")
    if arguments.tls_cert and arguments.address != HOST:
        parser.error(f"--address {arguments.address} would open the plain HTTP port behind the TLS")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    started_s = time.monotonic()
    admin_key, models = os.environ.get(ADMIN_KEY, ""), arguments.model
    if arguments.explicit:
        if not admin_key:
            sys.stderr.write(f"--explicit needs a key in the environment variable {ADMIN_KEY}\n")
            return 2
        models = models or models_of(arguments.repository)
    try:
        certificates = None
        if arguments.tls_cert:
            files = (arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
            certificates = Certificates(*files)
        logger.info("starting Triton on %s", arguments.repository)
        with LocalTriton(
            arguments.repository,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            environment=arguments.environment,
            models=models,
            admin_key=admin_key,
            certificates=certificates,
            extra_args=[f"--{name}-address={arguments.address}" for name in _LISTENERS],
        ) as server:
            logger.info(
                "ready at %s and %s after %.1f s, metrics at %s, log in %s",
                server.grpc_url,
                server.http_url,
                time.monotonic() - started_s,
                server.metrics_url,
                server.log_path,
            )
            for name, version in server.models():
                logger.info("model %s version %s", name, version)
            try:
                server.watch(threading.Event())
            finally:
                logger.info("stopping: requests in flight finish first")
    except KeyboardInterrupt:
        logger.info("stopped")
    except LocalTritonError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
