"""`chestct schema`: the JSON Schema of the records."""

from __future__ import annotations

import argparse
import json
import sys

from chestct.cli.console import DONE
from chestct.results.records import record_schema


def add_options(_: argparse.ArgumentParser) -> None:
    """It has none."""


def run(_: argparse.Namespace) -> int:
    """Prints the schema of the lines of `chestct classify --json`."""
    sys.stdout.write(json.dumps(record_schema(), indent=2) + "\n")
    return DONE
