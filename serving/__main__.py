"""`python -m serving COMMAND`."""

from __future__ import annotations

import sys

from serving.local import main

MODULES = {"local": "serving.local"}
USAGE = """usage: python -m serving COMMAND [-h] ...

commands:
  local  Start the real Triton on this machine, without Docker
"""


def run(given: list[str]) -> int:
    """Run the command that `given` names, or list them; the exit code."""
    if given[:1] == ["local"]:
        return main(given[1:])
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    sys.stderr.write(f"{USAGE}error: {given[0]} is no command of serving\n")
    return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
