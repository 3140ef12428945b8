"""Read one command's YAML file into its frozen dataclass, strictly.

The pipeline passes `--overrides data/overrides.yaml`: keys that replace those of a file under
configs/, by the file's name without suffix. `training ingest` writes it; it is empty unless
the demo asked for its small settings.
"""

from __future__ import annotations

import dataclasses
import logging
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from training.common.atomic_io import write_yaml

logger = logging.getLogger(__name__)

CONFIGS = Path("configs")
Config = TypeVar("Config")

_overrides: dict[str, Mapping[str, Any]] = {}


def use_overrides(overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Let `load_config` replace keys by these, given by the name of the config file."""
    _overrides.clear()
    _overrides.update(overrides)


def read_overrides(path: Path) -> dict[str, dict[str, Any]]:
    """Keys and values by the name of a file under configs/, from the YAML file at `path`.

    Raises:
        ValueError: The file is missing, has another form, or names a config that is not there.
    """
    raw = read_mapping(path)
    for name, values in raw.items():
        if not (CONFIGS / f"{name}.yaml").is_file():
            raise ValueError(f"{path}: {name} is no config: there is no {CONFIGS}/{name}.yaml")
        if not isinstance(values, dict):
            raise ValueError(
                f"{path}: {name} is {values!r}; expected keys and values of configs/{name}.yaml"
            )
    return {name: values for name, values in raw.items() if values}


def write_overrides(path: Path, overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `overrides` to `path` with a section for each config, empty where nothing is replaced.

    Each stage of dvc.yaml names its sections as parameters, and DVC refuses one that is missing.

    Raises:
        OSError: The file cannot be written.
    """
    sections = {file.stem: dict(overrides.get(file.stem, {})) for file in CONFIGS.glob("*.yaml")}
    write_yaml(path, dict(sorted(sections.items())))


def load_config(cls: type[Config], path: Path) -> Config:
    """An instance of the dataclass `cls` from the YAML file at `path`, with overrides applied.

    Raises:
        ValueError: The file is missing, is no mapping, holds an unknown key or a wrong type; the
            message lists the allowed keys.
    """
    replaced = _overrides.get(path.stem, {})
    if replaced:
        said = ", ".join(f"{key} {value}" for key, value in replaced.items())
        logger.info("%s with overrides: %s", path, said)
    source = Path(f"{path} with overrides of {', '.join(replaced)}") if replaced else path
    return config_from_mapping(cls, {**read_mapping(path), **replaced}, source)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`; empty for an empty file.

    Raises:
        ValueError: The file is missing or is no mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such config file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(raw).__name__}")
    return raw


def config_from_mapping(cls: type[Config], raw: Mapping[str, Any], path: Path) -> Config:
    """An instance of the dataclass `cls` from keys and values that were read from `path`.

    Keys that are left out keep the dataclass's defaults. YAML lists become tuples, whole numbers
    are taken where a float is expected, and nothing else is converted.

    Raises:
        ValueError: An unknown key or a wrong type; the message lists the allowed keys.
    """
    hints = typing.get_type_hints(cls)
    allowed = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [key for key in raw if key not in allowed]
    if unknown:
        raise ValueError(f"{path}: unknown keys {unknown}; allowed are {allowed}")
    values = {key: _checked(path, key, value, hints[key]) for key, value in raw.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def plain_settings(config: Any, without: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a config dataclass as plain values, but for those in `without`."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(config).items()
        if key not in without
    }


def _checked(path: Path, key: str, value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
        if value is None and type(None) in members:
            return None
        rest = [member for member in members if member is not type(None)]
        for member in rest[:-1]:
            try:
                return _checked(path, key, value, member)
            except ValueError:
                continue
        return _checked(path, key, value, rest[-1])
    if origin is tuple and isinstance(value, list):
        member = typing.get_args(hint)[0]
        return tuple(_checked(path, key, item, member) for item in value)
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (not isinstance(value, bool) or hint is bool)
    ):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{path}: {key} is {value!r}; expected {name}")
