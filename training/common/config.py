"""Read one command's YAML file into its frozen pydantic dataclass, strictly.

A config class is declared with `@config_class`, the ranges of its fields with pydantic's types.

The pipeline passes `--overrides data/overrides.yaml`: keys that replace those of a file under
configs/, by the file's name without suffix. `training ingest` writes it; it is empty unless
the demo asked for its small settings.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic_core
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from training.common.atomic_io import write_yaml

logger = logging.getLogger(__name__)

CONFIGS = Path("configs")
# Patterns in pydantic's messages, and their replacements in terms of YAML.
PLAIN_WORDS = {
    r"^\w+ should (be |have |match )?": "",
    r" after validation, not \d+$": "",
    r"^an object$": "a mapping",
    r"^a valid array$": "a list",
}
Config = TypeVar("Config")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
Share = Annotated[float, Field(ge=0, le=1)]

_overrides: dict[str, Mapping[str, Any]] = {}


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def config_class(cls: type[Config]) -> type[Config]:
    """A frozen dataclass that checks types and ranges, whoever makes an instance, and how."""
    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return dataclass(cls, frozen=True, config=strict)  # type: ignore[return-value]


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
    """An instance of the config class `cls` from the YAML file at `path`, with overrides applied.

    Raises:
        ValueError: The file is missing, is no mapping, holds an unknown key or a wrong value; the
            message names the file and the key.
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
    """An instance of the config class `cls` from keys and values that were read from `path`.

    Keys that are left out keep the defaults. Values are converted as from JSON: lists become
    tuples, whole numbers floats, text paths, mappings nested config classes, and nothing else.

    Raises:
        ValueError: An unknown key or a wrong value; the message lists the allowed keys.
    """
    try:
        return TypeAdapter(cls).validate_json(pydantic_core.to_json(raw))
    except ValidationError as error:
        raise ValueError(f"{path}: {in_one_line(error, cls)}") from error


def in_one_line(error: ValidationError, cls: Any = None) -> str:
    """Format a validation error as "KEY is VALUE: expected ...", once for each key of the file.

    Args:
        error: From a config class.
        cls: That class; with it the allowed keys are listed for an unknown one.
    """
    unknown: dict[tuple[int | str, ...], list[int | str]] = {}
    wrong: dict[int | str, str] = {}
    for item in error.errors(include_url=False):
        place, text = item["loc"], item["msg"]
        key = ".".join(str(part) for part in place)
        if item["type"] == "unexpected_keyword_argument":
            unknown.setdefault(place[:-1], []).append(place[-1])
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
            wrong.setdefault(key, f"{key} is {item['input']!r}: {text}" if key else text)
        elif item["type"] == "missing":
            wrong.setdefault(place[0], f"{key} is missing")
        else:
            for pattern, plain in PLAIN_WORDS.items():
                text = re.sub(pattern, plain, text)
            wrong.setdefault(place[0], f"{key} is {item['input']!r}: expected {text}")
    for place, keys in unknown.items():
        inside = f"{'.'.join(map(str, place))}: " if place else ""
        allowed = f"; allowed are {_allowed(cls, place)}" if cls else ""
        wrong[inside] = f"{inside}unknown keys {keys}{allowed}"
    return "; ".join(wrong.values())


def _allowed(cls: Any, place: Sequence[int | str]) -> list[str]:
    """Keys of the config class at `place` in `cls`: a field of it, or a value of its mapping."""
    for key in place:
        arguments = typing.get_args(cls)
        cls = arguments[-1] if arguments else cls.__pydantic_fields__[key].annotation
    return [field.name for field in dataclasses.fields(cls)]


def plain_settings(config: Any, without: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a config dataclass as plain values, but for those in `without`."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(config).items()
        if key not in without
    }
