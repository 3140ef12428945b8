"""Programs that the tests need, by .ci/programs.toml; standard library only.

`python3 programs.py install` installs what is missing, group by group; `python3 programs.py table
SKIPS` prints what is there and how many tests were skipped for what is not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
FILE = CHECKOUT / ".ci" / "programs.toml"
UPDATE_LIMIT_S, GROUP_LIMIT_S = 180, 300
APT = ("-qq", "-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=120")
NOWHERE = "not in .ci/programs.toml"  # the entry of a skip that has none


@dataclass(frozen=True)
class Entry:
    """A group of programs, or without programs a reason to skip."""

    name: str
    reason: re.Pattern[str]
    may_be_missing: frozenset[str]
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def may_be_missing_here(self) -> bool:
        return bool(self.may_be_missing & places())

    def missing_programs(self) -> list[str]:
        """The environment's own programs do not count: pynetdicom has some by dcmtk's names."""
        folders = [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin"]
        path = ":".join(folder for folder in folders if not folder.startswith(str(CHECKOUT)))
        return [name for name in self.programs if shutil.which(name, path=path) is None]


def distribution(file: Path = Path("/etc/os-release")) -> str:
    try:
        found = re.search(r'^ID="?([\w.-]+)', file.read_text(), re.MULTILINE)
    except OSError:
        return "other"
    return found[1] if found else "other"


def places(environment: Mapping[str, str] = os.environ) -> set[str]:
    """The places of `may_be_missing` that apply to this machine."""
    return {
        "anywhere",
        "github" if environment.get("GITHUB_ACTIONS") == "true" else distribution(),
        "root" if os.geteuid() == 0 else "user",
        "gpu" if os.path.exists("/dev/nvidia0") else "no-gpu",
        "gpu-lock" if environment.get("DEVICE") == "gpu" else "cpu-lock",
    }


def read(file: Path = FILE) -> list[Entry]:
    """The groups, then the other reasons to skip."""
    table = tomllib.loads(file.read_text())
    entries = []
    for name, group in table["groups"].items():
        packages = group["packages"]
        if isinstance(packages, dict):
            packages = packages.get(distribution(), ())
        words = [rf"^no ({'|'.join(map(re.escape, group['programs']))})\b"]
        if "reason" in group:
            words.append(group["reason"])
        entries.append(
            Entry(
                name,
                re.compile("|".join(words), re.IGNORECASE),
                frozenset(group.get("may_be_missing", ())),
                tuple(group["programs"]),
                tuple(packages),
            )
        )
    for name, skip in table["skips"].items():
        places_of_skip = frozenset(skip["may_be_missing"])
        entries.append(Entry(name, re.compile(skip["reason"]), places_of_skip))
    return entries


def entry_of(reason: str, entries: Sequence[Entry]) -> Entry | None:
    """The entry that fits the reason; of two groups the one that is missing."""
    found = [entry for entry in entries if entry.reason.search(reason)]
    missing = [entry for entry in found if entry.missing_programs()]
    return next(iter([*missing, *found]), None)


def apt(limit_s: float, *words: str) -> str:
    """Run apt-get; gives the last line of its complaint, empty if there was none."""
    done = subprocess.run(
        ["timeout", "--kill-after=10", str(limit_s), "apt-get", *APT, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode == 124:
        return f"not done within {limit_s:g} s"
    lines = done.stderr.strip().splitlines()
    return (lines or [f"ended with {done.returncode}"])[-1] if done.returncode else ""


def install(entries: Sequence[Entry]) -> None:
    """Install each group of which a program is missing; a failure does not stop the others."""
    missing = [entry for entry in entries if entry.packages and entry.missing_programs()]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print("not installed, as only root can by apt-get:", *[entry.name for entry in missing])
        return
    complaint = apt(UPDATE_LIMIT_S, "update")
    if complaint:
        print(f"apt-get update: {complaint}")
    for entry in missing:
        complaint = apt(
            GROUP_LIMIT_S, "install", "--yes", "--no-install-recommends", *entry.packages
        )
        print(f"{entry.name}: {complaint or 'installed'}", flush=True)


def table(entries: Sequence[Entry], skipped: Mapping[str, int]) -> str:
    """A line for each group, and for each other entry for which a test was skipped."""
    lines = [f"{'group':16}{'here':10}tests skipped for it"]
    for entry in entries:
        count = skipped.get(entry.name, 0)
        if entry.programs or count:
            lacking = entry.missing_programs()
            here = ("missing" if lacking else "yes") if entry.programs else ""
            note = f" (no {', '.join(lacking)})" if lacking else ""
            if (count or lacking) and not entry.may_be_missing_here():
                note += " MUST NOT BE MISSING HERE"
            lines.append(f"{entry.name:16}{here:10}{count}{note}")
    if skipped.get(NOWHERE):
        lines.append(f"{NOWHERE}: {skipped[NOWHERE]}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "install":
        install(read())
    else:
        # One name of an entry a line, written by tests/support/skips.py.
        log = Path(arguments[1])
        print(table(read(), Counter(log.read_text().splitlines() if log.exists() else ())))


if __name__ == "__main__":
    main(sys.argv[1:])
