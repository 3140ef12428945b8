"""`python -m serving COMMAND`; it imports nothing but serving, which is all that an image holds."""

from __future__ import annotations

import importlib
import sys

MODULES = {"local": "serving.local.__main__"}


def run(given: list[str]) -> int:
    """Run the command that `given` names, or list them; the exit code."""
    modules = {name: importlib.import_module(path) for name, path in MODULES.items()}
    if given and given[0] in modules:
        exit_code: int = modules[given[0]].main(given[1:])
        return exit_code
    lines = [
        f"  {name}  {(module.__doc__ or '').splitlines()[0].rstrip('.')}"
        for name, module in modules.items()
    ]
    usage = "\n".join(["usage: python -m serving COMMAND [-h] ...", "", "commands:", *lines])
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(f"{usage}\n")
        return 0
    sys.stderr.write(f"{usage}\nerror: {given[0]} is no command of serving\n")
    return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
