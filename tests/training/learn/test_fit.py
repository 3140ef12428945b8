from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import keras
import mlflow
import numpy as np
import pytest

import training.learn.fit
from chestct.contract import ModelMetadata
from training.common.config import config_from_mapping
from training.learn.fit import FitConfig, fit, main
from training.network.vgg16 import build_classifier, load_trained


def small(phantoms, output, **changes) -> FitConfig:
    return FitConfig(
        scans=phantoms.scans,
        split=phantoms.split,
        output=output,
        cache=output.with_name("cache"),
        weights="random",
        augmented_copies=1,
        **changes,
    )


def test_training_writes_model_facts_history_and_run(trained):
    model, facts = load_trained(trained.model)
    assert sorted(path.name for path in trained.model.iterdir()) == [
        "facts.json",
        "history.csv",
        "model.keras",
        "run.json",
    ]
    assert facts.class_names == (
        "adenocarcinoma",
        "large.cell.carcinoma",
        "normal",
        "squamous.cell.carcinoma",
    )
    assert model.output["probabilities"].shape == (None, 4)
    with (trained.model / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]


def test_run_is_finished_and_holds_the_model(trained):
    facts = ModelMetadata.from_parameters(json.loads((trained.model / "facts.json").read_text()))
    run = mlflow.get_run(facts.run)
    assert run.info.status == "FINISHED"
    assert run.data.params["weights.source"] == "random"
    assert run.data.params["data.sha256"] == facts.data_hash
    names = [
        item.path
        for item in mlflow.artifacts.list_artifacts(run_id=facts.run, artifact_path="model")
    ]
    assert "model/model.keras" in names
    assert len(mlflow.MlflowClient().get_metric_history(facts.run, "valid_loss")) == 2


def test_temperature_is_inside_the_saved_graph(trained):
    model, facts = load_trained(trained.model)
    assert model.get_layer("temperature").scale == pytest.approx(1 / facts.temperature)


def test_domain_threshold_accepts_the_validation_scans(trained):
    from training.data.dataset import read_split

    model, facts = load_trained(trained.model)
    valid = read_split(trained.scans, trained.split)["valid"]
    distances = model.predict_on_batch(valid.pixels)["domain_distance"]
    assert (distances <= facts.domain_threshold).mean() >= 11 / 12 - 1e-6


def test_interrupted_training_ends_as_an_uninterrupted_one(
    phantoms, narrow_widths, tmp_path, monkeypatch
):
    config = small(phantoms, tmp_path / "whole", epochs=3, seed=11)
    fit(config)
    interrupted = dataclasses.replace(config, output=tmp_path / "resumed")
    score, calls = training.learn.fit._scores, []

    def stop_in_epoch_two(*arguments):
        calls.append(1)
        if len(calls) == 3:  # after phase one, after epoch 1, in epoch 2
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(training.learn.fit, "_scores", stop_in_epoch_two)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted)
    assert not interrupted.output.exists()
    killed = mlflow.search_runs(search_all_experiments=True, filter_string="status = 'KILLED'")
    monkeypatch.setattr(training.learn.fit, "_scores", score)
    interrupted = dataclasses.replace(interrupted, output=tmp_path / "elsewhere")
    fit(interrupted)
    whole, resumed = (
        load_trained(folder)[0].get_layer("block5_conv2").get_weights()[0]
        for folder in (config.output, interrupted.output)
    )
    keras.utils.set_random_seed(config.seed)
    start = build_classifier(4, widths=narrow_widths).get_layer("block5_conv2").get_weights()[0]
    # Equal but for sums in another order; other dropout masks alone would make this 0.16.
    assert np.abs(whole - resumed).mean() < 0.02 * np.abs(whole - start).mean()
    run = load_trained(interrupted.output)[1].run
    assert run in set(killed.run_id)
    assert mlflow.get_run(run).info.status == "FINISHED"
    assert not list((config.cache / "fit").iterdir())


def test_failed_write_keeps_the_model_of_before(trained, monkeypatch, tmp_path):
    config = small(trained, tmp_path / "train", epochs=0)
    fit(config)
    before = (config.output / "facts.json").read_text()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.learn.fit, "write_history", disk_full)
    with pytest.raises(OSError, match="No space left"):
        fit(dataclasses.replace(config, seed=12))
    assert (config.output / "facts.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "train"]


def test_direct_training_runs(phantoms, tmp_path):
    config = small(phantoms, tmp_path / "train", epochs=1, frozen_layers="direct", batch_size=10)
    fit(config)
    assert load_trained(config.output)[1].class_names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_trained_block": 7}, "first_trained_block is 7: expected less than or equal to 6"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"frozen_layers": "disk"}, "expected 'auto', 'cached' or 'direct'"),
        ({"augmentation": {"flip": 1.0}}, r"augmentation: unknown keys \['flip'\]; allowed are"),
        ({"window_width_hu": 0.0}, "window_width_hu is 0.0: expected"),
    ],
)
def test_config_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_mapping(FitConfig, changes, Path("train.yaml"))


def test_missing_class_in_training_is_named(phantoms, tmp_path):
    rows = phantoms.split.read_text().splitlines()
    kept = [row for row in rows if not ("/normal/" in row and row.startswith("train"))]
    (tmp_path / "split.csv").write_text("\n".join(kept))
    config = dataclasses.replace(small(phantoms, tmp_path / "train"), split=tmp_path / "split.csv")
    with pytest.raises(ValueError, match="no training scan of normal"):
        fit(config)


def test_command_says_what_is_missing_in_one_line(tmp_path, capsys):
    (tmp_path / "train.yaml").write_text("epochs: 1\n")
    code = main(["--config", str(tmp_path / "train.yaml"), "--split", str(tmp_path / "none.csv")])
    assert code == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error == [f"error: {tmp_path / 'none.csv'}: no such file; run python -m training split"]
