"""`chestct health`: one inference with a synthetic slice."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from chestct.cli.console import DONE, print_json
from chestct.cli.options import add_server_options, client_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `chestct health`."""
    add_server_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Asks the server and prints its answer.

    Raises:
        UsageError: An option is wrong.
        ServerError: No usable server.
    """
    with client_of(arguments) as client:
        health = client.health()
    if arguments.json:
        print_json(asdict(health))
    else:
        sys.stdout.write(
            f"{health.model} version {health.version}, run {health.run}: "
            f"answered in {health.latency_ms:.1f} ms\n{health.notice}\n"
        )
    return DONE
