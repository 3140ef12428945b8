from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import keras
import mlflow
import numpy as np
import pytest

import training.learn.fit
from chestct.contract import ModelMetadata
from training.learn.fit import (
    FitConfig,
    ResumableState,
    class_weights,
    compile_trainer,
    cosine_decay,
    epoch_batches,
    fit,
    fit_head,
    gather_augmented,
    gather_copies,
    head_logits,
    main,
    smoothed_targets,
    trainable_twin,
)
from training.network.vgg16 import build_classifier, load_trained, logits_from

CHECKOUT = Path(__file__).resolve().parents[3]


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


def test_frozen_blocks_stay_and_the_last_block_moves(scan_batch):
    model = build_classifier(4)
    fit_head(model, np.random.default_rng(1).random((8, 512)), np.arange(8) % 4, 1.0)
    twin = trainable_twin(model, 5, "float32")
    trainer = logits_from(twin, 1)
    compile_trainer(trainer, 1e-3)
    trainer.train_on_batch(scan_batch[:4], np.eye(4, dtype=np.float32))
    for name, moves in (("block1_conv1", False), ("block4_conv3", False), ("block5_conv1", True)):
        before, after = (m.get_layer(name).get_weights()[0] for m in (model, twin))
        assert (before != after).any() == moves, name


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


def test_head_is_the_logistic_regression_of_the_features():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 30)
    features = rng.normal(0, 3, (90, 512)).astype(np.float32) + 5
    features[np.arange(90), labels] += 12
    model = build_classifier(3)
    fit_head(model, features, labels, 0.1)
    assert (head_logits(model, features).argmax(axis=1) == labels).mean() > 0.95
    shuffled = rng.permutation(labels)
    fit_head(model, features, shuffled, 0.1)
    assert (head_logits(model, features).argmax(axis=1) == labels).mean() < 0.6


def test_head_of_two_classes():
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 30)
    features = rng.normal(size=(60, 512)).astype(np.float32) + labels[:, np.newaxis]
    model = build_classifier(2)
    fit_head(model, features, labels, 0.1)
    assert (head_logits(model, features).argmax(axis=1) == labels).all()


def test_weights_of_the_last_epochs_are_averaged(tmp_path):
    scan = keras.Input((2,))
    trainer = keras.Model(scan, keras.layers.Dense(1, use_bias=False)(scan))
    compile_trainer(trainer, 0.1)
    state = ResumableState(tmp_path / "fit", averaged_epochs=2)
    state.begin("run")
    for epoch, value in enumerate([100.0, 50.0, 2.0, 4.0]):
        trainer.set_weights([np.full((2, 1), value, np.float32)])
        state.record(trainer, {"epoch": epoch, "valid_loss": 1.0})
    state.restore(trainer)
    assert trainer.get_weights()[0][0, 0] == 4
    state.restore_average(trainer)
    assert trainer.get_weights()[0][0, 0] == 3
    assert state.epochs_without_gain() == 3


def test_the_head_alone_is_kept_without_an_epoch(tmp_path):
    scan = keras.Input((2,))
    trainer = keras.Model(scan, keras.layers.Dense(1, use_bias=False)(scan))
    compile_trainer(trainer, 0.1)
    state = ResumableState(tmp_path / "fit", averaged_epochs=8)
    state.begin("run")
    trainer.set_weights([np.full((2, 1), 7, np.float32)])
    state.record(trainer, {"epoch": 0, "valid_loss": 1.0})
    trainer.set_weights([np.full((2, 1), 9, np.float32)])
    state.restore_average(trainer)
    assert trainer.get_weights()[0][0, 0] == 7


def test_learning_rate_falls_along_half_a_cosine():
    assert cosine_decay(1, 10) == 1
    assert cosine_decay(6, 10) == pytest.approx(0.5)
    assert 0 < cosine_decay(10, 10) < 0.05


def test_class_weights_by_hand():
    labels = np.array([0, 0, 0, 1])
    np.testing.assert_allclose(class_weights(labels, 2, 0), [1, 1])
    np.testing.assert_allclose(class_weights(labels, 2, 1), [2 / 3, 2])  # 4 / (2 * count)
    weights = class_weights(labels, 2, 0.5)
    assert weights[1] / weights[0] == pytest.approx(3**0.5)
    assert weights[labels].mean() == pytest.approx(1)


def test_smoothed_targets_by_hand():
    got = smoothed_targets(np.array([1]), 4, 0.1)
    np.testing.assert_allclose(got, [[0.025, 0.925, 0.025, 0.025]])


def test_an_epoch_shows_every_scan_once_with_its_own_target():
    copies = [np.arange(10, dtype=np.float16)[:, np.newaxis] + 100 * copy for copy in range(2)]
    targets, weight = np.eye(10, dtype=np.float32), np.arange(10, dtype=np.float32)
    batches = epoch_batches(gather_copies(copies), targets, weight, 3, batch_size=4, seed=1)
    assert len(batches) == 3
    seen = []
    for index in range(len(batches)):
        inputs, wanted, weights = batches[index]
        assert (inputs[:, 0] - 100 == wanted.argmax(axis=1)).all()  # epoch 3 takes copy 1
        np.testing.assert_array_equal(weights, wanted.argmax(axis=1))
        seen += weights.tolist()
    assert sorted(seen) == list(range(10))
    again = epoch_batches(gather_copies(copies), targets, weight, 3, batch_size=4, seed=1)
    other = epoch_batches(gather_copies(copies), targets, weight, 4, batch_size=4, seed=1)
    assert (again[0][2] == batches[0][2]).all()
    assert (other[0][2] != batches[0][2]).any()


def test_direct_input_is_augmented_anew_in_each_epoch(scan_batch):
    gather = gather_augmented(scan_batch, FitConfig().limits(), 7)
    first = gather(np.array([0, 3]), 1)
    np.testing.assert_array_equal(first[1], gather(np.array([3]), 1)[0])
    assert (first != gather(np.array([0, 3]), 2)).any()


def test_direct_training_runs(phantoms, tmp_path):
    config = small(phantoms, tmp_path / "train", epochs=1, frozen_layers="direct", batch_size=10)
    fit(config)
    assert load_trained(config.output)[1].class_names


def test_mixed_precision_twin_computes_in_float16_and_keeps_float32_outputs():
    model = build_classifier(3)
    twin = trainable_twin(model, 4, "mixed_float16")
    assert twin.get_layer("block3_conv1").compute_dtype == "float16"
    assert twin.get_layer("activation_map").compute_dtype == "float32"
    assert twin.get_layer("block3_conv1").kernel.dtype == "float32"
    assert not twin.get_layer("block3_conv3").trainable
    assert twin.get_layer("block4_conv1").trainable
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.slow
def test_training_is_spread_over_the_devices_of_a_strategy():
    """Two logical CPUs stand for two GPUs; the strategy is the real one."""
    code = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from training.learn.fit import *
model, config = build_classifier(3, widths=(8,) * 13), FitConfig()
scans = np.random.default_rng(0).integers(0, 255, (8, 224, 224, 1), dtype=np.uint8)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    twin = trainable_twin(model, config.first_trained_block, "float32")
    trainer = logits_from(twin, 1, config.dropout)
    compile_trainer(trainer, 1e-3)
targets = np.eye(3, dtype=np.float32)[np.arange(8) % 3]
gather = gather_augmented(scans, config.limits(), 1)
batches = epoch_batches(gather, targets, np.ones(8, np.float32), 1, batch_size=4, seed=1)
loss = trainer.fit(batches, shuffle=False, verbose=0).history["loss"][0]
model.set_weights(twin.get_weights())
print(strategy.num_replicas_in_sync, np.isfinite(loss), int(trainer.optimizer.iterations.numpy()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["2", "True", "2"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_trained_block": 7}, "first_trained_block is 7; expected 2 to 6"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"frozen_layers": "disk"}, "expected auto, cached or direct"),
        ({"augmentation": {"flip": 1.0}}, "allowed keys are"),
        ({"window_width_hu": 0.0}, "window width 0.0 HU"),
    ],
)
def test_config_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**changes)


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
