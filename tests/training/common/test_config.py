from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from training.common.config import load_config


@dataclass(frozen=True)
class Example:
    name: str = "a"
    share: float = 0.5
    sizes: tuple[int, ...] = (1,)
    folder: Path = Path()
    limit: int | None = None
    exact: bool = False


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text(text)
    return path


def test_values_take_the_types_of_the_fields(tmp_path):
    text = "share: 1\nsizes: [2, 3]\nfolder: a/b\nlimit: 4\n"
    got = load_config(Example, write(tmp_path, text))
    assert got == Example(share=1.0, sizes=(2, 3), folder=Path("a/b"), limit=4)
    assert isinstance(got.share, float)


def test_empty_file_gives_the_defaults(tmp_path):
    assert load_config(Example, write(tmp_path, "# nothing\n")) == Example()


def test_unknown_key_lists_the_allowed_ones(tmp_path):
    with pytest.raises(ValueError, match=r"unknown keys \['shape'\]; allowed are \['name', 'sha"):
        load_config(Example, write(tmp_path, "shape: 1\n"))


@pytest.mark.parametrize("text", ["share: x", "sizes: 3", "sizes: [a]", "limit: true", "exact: 1"])
def test_wrong_type_names_key_and_value(tmp_path, text):
    with pytest.raises(ValueError, match=f"{text.split(':')[0]} is .*; expected"):
        load_config(Example, write(tmp_path, text))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text"])
def test_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"expected a mapping|not YAML"):
        load_config(Example, write(tmp_path, text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such config file"):
        load_config(Example, tmp_path / "none.yaml")
