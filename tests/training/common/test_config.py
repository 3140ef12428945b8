from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt, ValidationError

from training.common.cli import run_command
from training.common.config import config_class, load_config


@config_class
class Inner:
    part: float = 0.0
    folder: Path | None = None


@config_class
class Example:
    name: str = "a"
    share: float = 0.5
    sizes: tuple[int, ...] = (1,)
    folder: Path = Path()
    limit: int | None = None
    exact: bool = False
    epochs: Annotated[int, Field(ge=0, le=9)] = 1
    mode: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    many: dict[str, Inner] = dataclasses.field(default_factory=dict)
    rounds: dict[PositiveInt, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.exact and self.epochs == 0:
            raise ValueError("exact needs epochs: expected at least 1")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text(text)
    return path


def test_values_take_the_types_of_the_fields(tmp_path):
    text = "share: 1\nsizes: [2, 3]\nfolder: a/b\nlimit: 4\n"
    got = load_config(Example, write(tmp_path, text))
    assert got == Example(share=1.0, sizes=(2, 3), folder=Path("a/b"), limit=4)
    assert isinstance(got.share, float)


def test_mappings_become_config_classes_and_keep_their_defaults(tmp_path):
    text = "inner: {part: 2}\nmany: {x: {folder: a}, y: {}}\nrounds: {1: 60, 8: 6}\n"
    got = load_config(Example, write(tmp_path, text))
    assert got.inner == Inner(part=2.0)
    assert got.many == {"x": Inner(folder=Path("a")), "y": Inner()}
    assert got.rounds == {1: 60, 8: 6}


def test_empty_file_gives_the_defaults(tmp_path):
    assert load_config(Example, write(tmp_path, "# nothing\n")) == Example()


def test_unknown_key_lists_the_allowed_ones(tmp_path):
    with pytest.raises(ValueError, match=r"unknown keys \['shape'\]; allowed are \['name', 'sha"):
        load_config(Example, write(tmp_path, "shape: 1\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("share: x", "share is 'x': expected a valid number"),
        ("share: true", "share is True: expected a valid number"),
        ("share: .nan", "share is nan: expected a finite number"),
        ("sizes: 3", "sizes is 3: expected a list"),
        ("sizes: [a]", "sizes.0 is 'a': expected a valid integer"),
        ("limit: true", "limit is True: expected a valid integer"),
        ("limit: '4'", "limit is '4': expected a valid integer"),
        ("exact: 1", "exact is 1: expected a valid boolean"),
        ("name: 1", "name is 1: expected a valid string"),
        ("folder: 1", "folder is 1: expected a valid string"),
        ("epochs: 1.0", "epochs is 1.0: expected a valid integer"),
        ("epochs: 10", "epochs is 10: expected less than or equal to 9"),
        ("mode: c", "mode is 'c': expected 'a' or 'b'"),
        ("inner: 3", "inner is 3: expected a mapping"),
        ("inner: {part: x}", "inner.part is 'x': expected a valid number"),
        ("inner: {size: 1}", "inner: unknown keys ['size']; allowed are ['part', 'folder']"),
        ("many: {x: {size: 1}}", "many.x: unknown keys ['size']; allowed are ['part', 'folder']"),
        ("rounds: {0: 1}", "rounds.0.[key] is '0': expected greater than 0"),
        ("exact: true\nepochs: 0", "exact needs epochs: expected at least 1"),
        ("epochs: -1\nmode: c", "epochs is -1: expected greater than or equal to 0; mode is 'c': "
         "expected 'a' or 'b'"),
    ],
)  # fmt: skip
def test_wrong_value_names_file_key_and_value_in_one_line(tmp_path, text, said):
    with pytest.raises(ValueError, match=r"expected|allowed") as caught:
        load_config(Example, write(tmp_path, text))
    assert str(caught.value) == f"{tmp_path / 'example.yaml'}: {said}"


def test_an_instance_is_checked_whoever_makes_it_and_cannot_be_changed(capsys):
    with pytest.raises(ValidationError):
        Example(share="1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().share = math.pi

    def work() -> None:
        dataclasses.replace(Example(), epochs=-1)  # as a flag does

    assert run_command(work) == 1
    expected = "error: epochs is -1: expected greater than or equal to 0\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text"])
def test_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"expected a mapping|not YAML"):
        load_config(Example, write(tmp_path, text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such config file"):
        load_config(Example, tmp_path / "none.yaml")
