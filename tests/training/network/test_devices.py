"""Which devices TensorFlow gets."""

from __future__ import annotations

import os

import pytest
import tensorflow as tf

from training.network.vgg16 import set_up_tensorflow


@pytest.mark.parametrize(("device", "visible"), [("gpu", "0"), ("cpu", "-1"), (None, "-1")])
def test_gpu_is_seen_only_if_asked_for_and_computes_in_full_precision(device, visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("DEVICE", raising=False)
    if device:
        monkeypatch.setenv("DEVICE", device)
    tf.config.experimental.enable_tensor_float_32_execution(True)
    set_up_tensorflow()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    tf.add(1, 1)
    set_up_tensorflow()  # what is in use is left as it is
