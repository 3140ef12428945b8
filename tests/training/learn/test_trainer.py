from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from training.learn.trainer import (
    AugmentedScans,
    compile_trainer,
    cosine_decay,
    epoch_batches,
    fit_head,
    head_logits,
    in_turn,
    scan_weights,
    trainable_twin,
)
from training.network.augment import Augmentation
from training.network.vgg16 import build_classifier, logits_from

CHECKOUT = Path(__file__).resolve().parents[3]


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


def test_learning_rate_falls_along_half_a_cosine():
    assert cosine_decay(1, 10) == 1
    assert cosine_decay(6, 10) == pytest.approx(0.5)
    assert 0 < cosine_decay(10, 10) < 0.05


def test_scan_weights_by_hand():
    labels = np.array([0, 0, 0, 1])
    np.testing.assert_allclose(scan_weights(labels, 0), [1, 1, 1, 1])
    np.testing.assert_allclose(scan_weights(labels, 1)[2:], [2 / 3, 2])  # 4 / (2 * count)
    weights = scan_weights(labels, 0.5)
    assert weights.dtype == np.float32
    assert weights[3] / weights[0] == pytest.approx(3**0.5)
    assert weights.mean() == pytest.approx(1)


def test_loss_smooths_the_labels_by_hand():
    trainer = keras.Sequential([keras.Input((4,)), keras.layers.Activation("linear")])
    compile_trainer(trainer, 0.1, label_smoothing=0.1)
    logits = np.array([[0.0, 1.0, 2.0, 4.0]], np.float32)
    smoothed = np.array([0.025, 0.925, 0.025, 0.025])
    expected = -(smoothed * (logits[0] - np.log(np.exp(logits[0]).sum()))).sum()
    loss = trainer.evaluate(logits, np.eye(4, dtype=np.float32)[[1]], verbose=0)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_an_epoch_shows_every_scan_once_with_its_own_target():
    copies = [np.arange(10, dtype=np.float16)[:, np.newaxis] + 100 * copy for copy in range(2)]
    targets, weight = np.eye(10, dtype=np.float32), np.arange(10, dtype=np.float32)

    def epoch_of(number):
        return epoch_batches(
            in_turn(copies, number), targets, weight, epoch=number, batch_size=4, seed=1
        )

    batches = epoch_of(3)
    assert len(batches) == 3
    seen = []
    for index in range(len(batches)):
        inputs, wanted, weights = batches[index]
        assert (inputs[:, 0] - 100 == wanted.argmax(axis=1)).all()  # epoch 3 takes copy 1
        np.testing.assert_array_equal(weights, wanted.argmax(axis=1))
        seen += weights.tolist()
    assert sorted(seen) == list(range(10))
    assert (epoch_of(3)[0][2] == batches[0][2]).all()
    assert (epoch_of(4)[0][2] != batches[0][2]).any()


def test_direct_input_is_augmented_anew_in_each_epoch(scan_batch):
    first = AugmentedScans(scan_batch, Augmentation(), 7, 1)
    shown = first[np.array([0, 3])]
    np.testing.assert_array_equal(shown[1], first[np.array([3])][0])
    assert (shown != AugmentedScans(scan_batch, Augmentation(), 7, 2)[np.array([0, 3])]).any()


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
from training.learn.trainer import *
from training.network.vgg16 import logits_from
model = build_classifier(3, widths=(8,) * 13)
scans = np.random.default_rng(0).integers(0, 255, (8, 224, 224, 1), dtype=np.uint8)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    twin = trainable_twin(model, 5, "float32")
    trainer = logits_from(twin, 1, 0.3)
    compile_trainer(trainer, 1e-3)
targets = np.eye(3, dtype=np.float32)[np.arange(8) % 3]
inputs = AugmentedScans(scans, Augmentation(), 1, 1)
weights = np.ones(8, np.float32)
batches = epoch_batches(inputs, targets, weights, epoch=1, batch_size=4, seed=1)
loss = trainer.fit(batches, shuffle=False, verbose=0).history["loss"][0]
model.set_weights(twin.get_weights())
print(strategy.num_replicas_in_sync, np.isfinite(loss), int(trainer.optimizer.iterations.numpy()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["2", "True", "2"], done.stderr[-2000:]
