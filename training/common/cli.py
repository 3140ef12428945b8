"""Entry point of every command: arguments, log, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chestct.errors import ChestCTError
from training.common.config import in_one_line, read_overrides, use_overrides


def run_room(room: str, modules: Mapping[str, str], argv: list[str] | None = None) -> int:
    """`python -m ROOM COMMAND ...`: run a command of a room, or list them all.

    Args:
        room: Name of the package.
        modules: Module of each command by the command's name. Its `main(argv)` is called; the first
            line of its docstring is its line in the list.
        argv: The arguments, without the program's name.

    Returns:
        The exit code of the process.
    """
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in modules:
        main: Callable[[list[str]], int] = importlib.import_module(modules[given[0]]).main
        return main(given[1:])
    width = max(map(len, modules))
    lines = [f"  {name:{width}}  {_first_line(module)}" for name, module in modules.items()]
    usage = "\n".join([f"usage: python -m {room} COMMAND [-h] ...", "", "commands:", *lines])
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(f"{usage}\n")
        return 0
    sys.stderr.write(f"{usage}\nerror: {given[0]} is no command of {room}\n")
    return 2


def _first_line(module: str) -> str:
    """First line of a module's docstring, read without importing what the module imports."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    tree = ast.parse(source)
    return (ast.get_docstring(tree) or "").split("\n")[0].rstrip(".")


def command_parser(module: str, description: str | None, config: str) -> argparse.ArgumentParser:
    """A parser for `python -m MODULE` with --config, whose default is `config`, and --overrides."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path(config), help="YAML file")
    parser.add_argument(
        "--overrides",
        type=Path,
        action=_UseOverrides,
        help="YAML file of keys that replace those of config files, by the files' names",
    )
    return parser


class _UseOverrides(argparse.Action):
    """Apply the file to all configs that are loaded from here on."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            use_overrides(read_overrides(values))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        setattr(namespace, self.dest, values)


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
        said = in_one_line(error) if isinstance(error, ValidationError) else error
        sys.stderr.write(f"error: {said}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return 130
    finally:
        use_overrides({})
