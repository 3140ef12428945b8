"""A copy of this checkout, as a fresh clone with the changes of today would be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def copy_checkout(folder: Path) -> Path:
    """Copy the files that git knows or would add to `folder`, a git repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True, timeout=60)
    return folder
