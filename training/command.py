"""What every command does around its work: arguments, log, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from chestct.errors import ChestCTError


def command_parser(module: str, description: str | None, config: str) -> argparse.ArgumentParser:
    """A parser for `python -m MODULE` with the option --config, whose default is `config`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path(config), help="YAML file")
    return parser


def run_command(
    work: Callable[[], int | None],
    *,
    errors: tuple[type[Exception], ...] = (),
    interrupted: str = "interrupted: nothing was written",
) -> int:
    """Do `work` and give the exit code of the process.

    0 or what `work` returns; 1 after a user's mistake, which is one line on stderr; 130 after
    Ctrl-C, with the line `interrupted`. Any other error is a bug and keeps its traceback. Log
    messages go to stderr as they are.

    Args:
        work: The command itself.
        errors: What counts as a user's mistake besides ValueError, OSError and ChestCTError.
        interrupted: What is left after Ctrl-C and what to do.
    """
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError, ChestCTError, *errors)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or TensorFlow's log buries the command's
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return work() or 0
    except mistakes as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return 130
