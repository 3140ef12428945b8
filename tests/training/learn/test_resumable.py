from __future__ import annotations

import keras
import numpy as np

from training.learn.resumable import ResumableState
from training.learn.trainer import compile_trainer


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
