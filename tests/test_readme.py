"""The README names every command, and names no command that is not there."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from chestct.contract import LUNG_WINDOW, ModelMetadata
from chestct.inference.predictions import Predictions
from chestct.results.records import json_text, result_line

CHECKOUT = Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text()


def commands() -> set[str]:
    """What can be run with `python -m`: a room and one of its commands."""
    return {
        f"{room} {name}"
        for room in ("training", "export", "serving", "benchmarks")
        for name in importlib.import_module(f"{room}.__main__").MODULES
    }


def test_every_command_of_a_room_stands_in_the_readme():
    shown = set(re.findall(r"python -m (\w+ [a-z][\w-]*)", README))
    by_make = {"benchmarks demo", "benchmarks training", "training pipeline"}
    assert commands() - by_make <= shown
    assert shown <= commands()


def test_every_make_target_in_the_readme_exists():
    targets = set(
        re.findall(r"^([a-z-]+):.*  ##", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    )
    shown = set(re.findall(r"(?:^|`|\$ )make ([a-z-]+)", README, re.MULTILINE))
    assert shown <= targets
    assert {"demo", "test", "pipeline", "serve", "bench", "gpu-check"} <= shown


def test_every_subcommand_of_the_client_is_shown(capsys):
    from chestct.cli.__main__ import main

    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    subcommands = re.findall(r"^    ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE)
    assert {"classify", "health"} <= set(subcommands)
    for name in subcommands:
        assert f"chestct {name}" in README


def test_json_line_is_as_the_client_prints_it():
    """Made again from its own values: fields, their order and the numbers' form."""
    (shown,) = re.findall(r"```json\n(.*\n)```", README)
    line = json.loads(shown)
    facts = ModelMetadata(
        tuple(line["probabilities"]), LUNG_WINDOW, 1.0, 1e9, line["model"]["run"], "00" * 32
    )
    predictions = Predictions(
        np.array([list(line["probabilities"].values())], np.float32),
        None,
        np.array([line["domain_distance"]], np.float32),
        facts,
        line["model"]["name"],
        line["model"]["version"],
    )
    decode_ms, infer_ms = line["ms"].values()
    made = result_line(line["path"], predictions, 0, decode_ms=decode_ms, infer_ms=infer_ms)
    notice = made.pop("notice")
    assert json_text(made | {"series": line["series"], "notice": notice}) == shown


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+?)\)", README):
        assert (CHECKOUT / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
