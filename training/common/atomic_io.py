"""Write a file or a folder whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    The block may create a file or a folder there. On an error, Ctrl-C included, what was written
    is removed and an older `path` stays as it was.

    Raises:
        OSError: The folder cannot be written or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = holder / path.name
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.rename(holder / "before")
        os.replace(temporary, path)
    except BaseException:
        if (holder / "before").exists() and not path.exists():
            (holder / "before").rename(path)
        raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def without_nan(value: Any) -> Any:
    """The same structure of dicts and lists with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_yaml(path: Path, content: Any) -> None:
    """`content` as YAML in `path`, replaced in one step."""
    with replaced(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON in `path`, replaced in one step."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
