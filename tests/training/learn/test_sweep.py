from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pytest
import yaml

import training.learn.fit
import training.learn.sweep
from training.common.config import config_from_mapping, load_config
from training.learn.fit import FitConfig
from training.learn.sweep import Point, SweepConfig, main, points_of
from training.network.vgg16 import build_classifier

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture
def base(phantoms, tmp_path) -> Path:
    """A training of seconds: the head alone, on random convolutions."""
    file = tmp_path / "train.yaml"
    settings = {
        "scans": str(phantoms.scans), "split": str(phantoms.split),
        "cache": str(tmp_path / "cache"), "weights": "random", "epochs": 0, "augmented_copies": 0,
        "augmentation": {"shift": 0.05, "contrast": 0.1},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(settings))
    return file


def config_of(base: Path, **settings) -> SweepConfig:
    return SweepConfig(base=base, output=base.parent / "sweep", **settings)


def test_every_combination_is_a_point_and_the_rest_is_that_of_the_base(base):
    grid = {"dropout": [0.1, 0.2], "augmentation.contrast": [0.3, 0.4], "epochs": [2]}
    points = points_of(config_of(base, grid=grid))
    found = [(p.fit.dropout, p.fit.augmentation.contrast, p.fit.epochs) for p in points]
    assert found == [(0.1, 0.3, 2), (0.1, 0.4, 2), (0.2, 0.3, 2), (0.2, 0.4, 2)]
    assert {p.fit.augmentation.shift for p in points} == {0.05}
    assert {p.fit.weights for p in points} == {"random"}
    assert str(points[0]) == "dropout 0.1, augmentation.contrast 0.3, epochs 2"
    assert len({p.fit.output for p in points}) == 4
    assert points[0].fit.output.name.startswith("dropout-0.1_augmentation.contrast-0.3_epochs-2-")


def test_the_committed_grid_fits_the_committed_training(phantoms, tmp_path):
    config = load_config(SweepConfig, CHECKOUT / "configs" / "sweep.yaml")
    base = yaml.safe_load((CHECKOUT / config.base).read_text())
    here = {"scans": str(phantoms.scans), "split": str(phantoms.split)}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(base | here))
    points = points_of(dataclasses.replace(config, base=tmp_path / "train.yaml"))
    assert len({point.fit.output for point in points}) == 8


def test_the_folder_of_a_point_changes_with_all_that_decides_and_nothing_else(
    base, phantoms, tmp_path
):
    def folder() -> str:
        return points_of(config_of(base, grid={"dropout": [0.1]}))[0].fit.output.name

    before, settings = folder(), yaml.safe_load(base.read_text())
    base.write_text(yaml.safe_dump(settings | {"cache": str(tmp_path / "elsewhere")}))
    assert folder() == before
    base.write_text(yaml.safe_dump(settings | {"seed": 8}))
    assert folder() != before
    split = tmp_path / "split.csv"
    split.write_text(phantoms.split.read_text())
    base.write_text(yaml.safe_dump(settings | {"split": str(split)}))
    assert folder() == before
    split.write_text("\n".join(phantoms.split.read_text().splitlines()[:-1]))
    assert folder() != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "grid is missing"),
        ({"grid": {}}, "grid is {}: expected at least 1 item"),
        ({"grid": {"dropout": 0.3}}, "grid.dropout is 0.3: expected a list"),
        ({"grid": {"dropout": []}}, r"grid.dropout is \[\]: expected at least 1 item"),
        ({"grid": {"output": ["a"]}}, "grid: output says where files are kept"),
        ({"grid": {"dropout": [0.1]}, "name": "a b"}, "name is 'a b': expected pattern"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_from_mapping(SweepConfig, settings, Path("sweep.yaml"))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"dropout": [0.1, 2.0]}, "dropout is 2.0: expected less than or equal to 0.95"),
        ({"dropout": ["high"]}, "dropout is 'high': expected a valid number"),
        ({"drop": [0.1]}, r"unknown keys \['drop'\]"),
        ({"augmentation.zoom": [0.1]}, r"augmentation: unknown keys \['zoom'\]; allowed are"),
        ({"epochs.first": [1]}, "grid: epochs.first: epochs is 0; expected a mapping"),
        ({"split": ["none.csv"]}, "none.csv: no such file; run python -m training split"),
    ],
)
def test_all_points_are_checked_before_the_first_is_trained(base, grid, message):
    with pytest.raises(ValueError, match=message):
        points_of(config_of(base, grid=grid))


def train_narrow(config: FitConfig, tags: Mapping[str, str]) -> None:
    """What a point's process does, with the narrow network, which that process does not know."""
    training.learn.fit.build_classifier = functools.partial(build_classifier, widths=(8,) * 13)
    training.learn.sweep._train(config, tags)


def train_here(point: Point, tags: Mapping[str, str]) -> str | None:
    """A point in this process, which spares the start of TensorFlow in another."""
    with pytest.raises(SystemExit) as ended:
        training.learn.sweep._train(point.fit, tags)
    return "failed; its message stands above" if ended.value.code else None


@pytest.mark.parametrize("where", ["here", pytest.param("apart", marks=pytest.mark.slow)])
def test_a_failing_point_costs_itself_and_finished_ones_are_skipped(
    base, where, tmp_path, monkeypatch, capfd, caplog
):
    """The file of the second point's kernels is missing; before the next call it is put there."""
    caplog.set_level("INFO")
    if where == "apart":
        monkeypatch.setattr(training.learn.sweep, "_train", train_narrow)
    else:
        monkeypatch.setattr(training.learn.sweep, "_trained_apart", train_here)
    kernels = tmp_path / "kernels.keras"
    settings = {
        "name": f"kernels-{where}", "base": str(base), "output": str(tmp_path / "sweep"),
        "grid": {"weights": ["random", str(kernels)]},
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    assert main(["--config", str(tmp_path / "sweep.yaml")]) == 1
    said = capfd.readouterr()
    assert f"error: point 2 of 2 (weights {kernels}) failed; its message stands above" in said.err
    assert f"error: weights {kernels}: no such file" in said.err
    progress = [line for line in caplog.messages if line.startswith("point ")]
    assert progress[0] == "point 1 of 2 (0 s so far): weights random"
    assert progress[1].startswith("point 2 of 2 (")
    assert " so far, about " in progress[1]
    assert caplog.messages.index(progress[0]) < caplog.messages.index(progress[1])
    [record] = (tmp_path / "sweep").glob("*/point.json")
    run = json.loads(record.read_text())["run"]
    assert said.out.splitlines()[1].split()[:2] == ["1", run[:8]]

    stored = mlflow.get_run(run).data
    assert stored.tags["sweep"] == f"kernels-{where}"
    assert stored.metrics["valid.n"] == 12
    low, value, high = (
        stored.metrics[f"valid.balanced_accuracy{end}"] for end in (".low", "", ".high")
    )
    assert low <= value <= high
    assert not [key for key in stored.metrics if key.startswith(("official", "test"))]
    assert {"compare.csv", "compare.html"} <= {path.name for path in record.parents[1].iterdir()}

    shutil.copy(next((tmp_path / "sweep").glob("*/model.keras")), kernels)
    before = record.stat().st_mtime_ns
    caplog.clear()
    assert main(["--config", str(tmp_path / "sweep.yaml")]) == 0
    assert "point 1 of 2: finished before: weights random" in caplog.messages
    assert record.stat().st_mtime_ns == before
    assert len(list((tmp_path / "sweep").glob("*/point.json"))) == 2
    assert len(capfd.readouterr().out.splitlines()) == 3
