"""The command `chestct`: results on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chestct import __version__
from chestct.cli import classify, health, listen, schema, web
from chestct.cli.console import (
    INTERRUPTED,
    NO_SERVER,
    SOME_FAILED,
    STDOUT_CLOSED,
    WRONG_USAGE,
    UsageError,
    abandon_stdout,
    say,
)
from chestct.contract import NOT_A_MEDICAL_DEVICE
from chestct.errors import ServerError

__all__ = ["entry_point", "main"]

COMMANDS = (
    (classify, "classify scan files and folders of them"),
    (listen, "take CT series by DICOM, send reports back"),
    (health, "send one synthetic slice and tell how the model answers"),
    (web, "serve a page where scans can be dropped and looked at"),
    (schema, "print the JSON Schema of the records"),
)
SHELLS = ("bash", "zsh", "tcsh")


def entry_point() -> None:
    """The console script."""
    # gRPC's own log would stand between our lines; its reasons are in our errors already.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    code = main()
    if code == INTERRUPTED:
        # Ctrl-C can leave a lock taken (python/cpython issue 74174); a thread that waits for it
        # would keep the interpreter from ending.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives back its exit code.

    Returns:
        0 all done, 1 some scans failed or the results could not be written, 2 wrong usage,
        3 no usable server, 130 interrupted, 141 the reader of stdout went away.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except UsageError as error:
        return _fail(error, WRONG_USAGE)
    except ServerError as error:
        return _fail(error, NO_SERVER)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept", INTERRUPTED)
    except BrokenPipeError:
        abandon_stdout()
        return STDOUT_CLOSED
    except OSError as error:
        abandon_stdout()
        return _fail(f"cannot write the results: {error.strerror or error}", SOME_FAILED)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chestct",
        description=f"Classify chest-CT slices with a Triton server. {NOT_A_MEDICAL_DEVICE}",
    )
    version = f"chestct {__version__} ({NOT_A_MEDICAL_DEVICE})"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print a script that completes the options in a shell",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module, text in COMMANDS:
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {NOT_A_MEDICAL_DEVICE}",
        )
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser


class _PrintCompletion(argparse.Action):
    """Prints the completion script of a shell, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error('completion needs shtab: pip install "chestct[completion]"')
        for action in _actions(parser):
            if action.type is Path or action.dest == "paths":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        sys.stdout.write(shtab.complete(parser, shell) + "\n")
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    actions = []
    for action in parser._actions:
        actions.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                actions += _actions(command)
    return actions


def _fail(reason: object, code: int) -> int:
    say(f"chestct: {reason}")
    return code


if __name__ == "__main__":
    entry_point()
