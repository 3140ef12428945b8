"""Versions of a published model: complete folders, one of which `config.pbtxt` names."""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from export.publish.config_pbtxt import parsed_config
from training.common.atomic_io import replaced

logger = logging.getLogger(__name__)

Texts = dict[str, str]  # name of a file to its content


def publish_version(
    folder: Path, files: Mapping[str, Path], texts: Callable[[int], Texts], keep_versions: int
) -> int:
    """Publish a new version of a model, serve it, and remove old versions; returns its number.

    The version folder is complete before it appears (temporary folder, then a rename). Publishing
    the served version again changes nothing.

    Args:
        folder: Folder of the model in the repository.
        files: Files to copy, by their names in the version folder.
        texts: The files to write, for a version number; `config.pbtxt` is one of them.
        keep_versions: Versions that stay, the served one included.

    Raises:
        OSError: The repository cannot be written; the version served before is served.
    """
    served = served_version(folder)
    if served is not None and _is_same(folder / str(served), files, texts(served)):
        logger.info("%s version %d is already this model", folder, served)
        return served
    version = max(versions_of(folder), default=0) + 1
    with replaced(folder / str(version)) as temporary:
        temporary.mkdir()
        for name, source in files.items():
            shutil.copyfile(source, temporary / name)
        for name, text in texts(version).items():
            (temporary / name).write_text(text, encoding="utf-8")
    set_served_version(folder, version)
    for old in sorted(versions_of(folder))[:-keep_versions]:
        shutil.rmtree(folder / str(old))
    logger.info("wrote %s version %d", folder, version)
    return version


def _is_same(version_folder: Path, files: Mapping[str, Path], texts: Texts) -> bool:
    models = [name for name in files if name.startswith("model.")]
    wanted = {name: text.encode() for name, text in texts.items()}
    if any(not (version_folder / name).is_file() for name in (*models, *wanted)):
        return False
    return all((version_folder / name).read_bytes() == wanted[name] for name in wanted) and all(
        filecmp.cmp(version_folder / name, files[name], shallow=False) for name in models
    )


def served_version(folder: Path) -> int | None:
    """The version that the model folder's `config.pbtxt` names; None where there is no model."""
    if not (folder / "config.pbtxt").is_file():
        return None
    return int(served_config(folder).version_policy.specific.versions[0])


def set_served_version(folder: Path, version: int) -> None:
    """Serve `version`: its `config.pbtxt` becomes that of the model folder.

    Raises:
        OSError: The repository cannot be written.
    """
    # config.pbtxt last: until then publishing again starts from the beginning.
    on_cpu = folder / str(version) / "cpu.pbtxt"
    if on_cpu.is_file():
        with replaced(folder / "configs" / "cpu.pbtxt") as temporary:
            shutil.copyfile(on_cpu, temporary)
    else:
        (folder / "configs" / "cpu.pbtxt").unlink(missing_ok=True)
    with replaced(folder / "config.pbtxt") as temporary:
        shutil.copyfile(folder / str(version) / "config.pbtxt", temporary)


def versions_of(folder: Path) -> list[int]:
    """The version numbers in a model folder."""
    if not folder.is_dir():
        return []
    return [int(entry.name) for entry in os.scandir(folder) if entry.name.isdigit()]


def served_config(folder: Path) -> Any:
    """The `ModelConfig` of a model of the repository.

    Raises:
        ValueError: There is no such model.
    """
    if not (folder / "config.pbtxt").is_file():
        raise ValueError(f"{folder}: no such model; run python -m export repository")
    return parsed_config((folder / "config.pbtxt").read_text(encoding="utf-8"))
