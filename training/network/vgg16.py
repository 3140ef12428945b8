"""VGG-16 for one grey chest-CT slice: everything after the resize is inside the graph."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chestct.contract import INPUT_NAME, SCAN_SHAPE, ModelMetadata

if TYPE_CHECKING:
    import keras

# Output channels of the 13 convolutions (Simonyan and Zisserman 2015, table 1, column D).
VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
CONVOLUTIONS_OF_BLOCK = (2, 2, 3, 3, 3)
# Mean of ImageNet in BGR, subtracted from 0..255: keras.applications.imagenet_utils, mode "caffe".
VGG_MEAN_BGR = (103.939, 116.779, 123.68)
# Keeps the slope of the square root finite for an inactive channel; a hundredth of a mean share.
SHARE_FLOOR = 0.01
GREY_CENTER = 128.0  # what a compressed network subtracts: then a scan is exactly a signed byte

Features = npt.NDArray[np.float32]


def set_up_tensorflow() -> None:
    """Set TensorFlow's devices; call it before TensorFlow computes, as often as you like.

    The CPU is the default; the environment variable DEVICE=gpu asks for the GPU. There TensorFlow
    takes memory as it needs it, and TF32 is off: it keeps ten bits of the mantissa, with which a
    reference is no reference (parity allows 1e-5).
    """
    if os.environ.get("DEVICE", "cpu") != "gpu":
        # CUDA reads it when the first device is asked for.
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)
    for gpu in tf.config.list_physical_devices("GPU"):
        if not tf.config.experimental.get_memory_growth(gpu):
            tf.config.experimental.set_memory_growth(gpu, True)


@dataclass(frozen=True)
class DomainFit:
    """Where the training scans lie in the space of channel profiles.

    The profile of a scan are the square roots of the shares of its pooled features (`profiles` in
    `training.network.calibrate`).

    Attributes:
        mean: float32 (F,), mean profile, F = 512 in the full network.
        whitening: float32 (F, F); `(profile - mean) @ whitening` has unit covariance, so its
            Euclidean norm is the Mahalanobis distance.
    """

    mean: Features
    whitening: Features


def build_classifier(
    num_classes: int, temperature: float = 1.0, widths: tuple[int, ...] = VGG16_WIDTHS
) -> keras.Model:
    """A Keras model with the contract's names: a scan in, three outputs as a dict.

    Input `scan`: uint8 (N, 224, 224, 1), 0 = window floor, 255 = its ceiling. Outputs:
    `probabilities` float32 (N, C); `activation_map` float32 (N, 14, 14, C), class evidence;
    `domain_distance` float32 (N, 1).

    Note: VGG-16 (Simonyan and Zisserman 2015) expects BGR minus the ImageNet mean. The graph
    casts, tiles the grey channel to three and subtracts that mean itself: feed raw pixels. A
    network with other `widths` is a compressed one: its first convolution reads the one grey
    channel, minus 128, and the tiling is folded into its kernel.
    The head is one 1x1 convolution on `block5_conv3` followed by global average pooling, so the
    mean of the map over its places is the logit, exactly (Zhou et al. 2016, CAM, equation 2,
    with the linear layer moved in front of the mean).

    Args:
        num_classes: Columns of `probabilities`, at least 2.
        temperature: Divisor of the logits before the softmax (Guo et al. 2017).
        widths: Output channels of the 13 convolutions.
    """
    set_up_tensorflow()
    import keras
    from keras import layers

    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; expected at least 2")
    if len(widths) != len(VGG16_WIDTHS) or min(widths) < 1:
        raise ValueError(f"widths are {widths}; expected 13 positive numbers")
    scan = keras.Input(SCAN_SHAPE, dtype="uint8", name=INPUT_NAME)
    if widths == VGG16_WIDTHS:
        bgr = layers.Concatenate(name="grey_to_bgr")([scan, scan, scan])
        means = [-mean for mean in VGG_MEAN_BGR]
        features = layers.Rescaling(1.0, means, name="vgg_preprocessing")(bgr)
    else:
        features = layers.Rescaling(1.0, -GREY_CENTER, name="grey_preprocessing")(scan)
    for name, width in zip(convolution_names(), widths, strict=True):
        if name.endswith("conv1") and name != "block1_conv1":
            features = layers.MaxPooling2D(2, name=f"block{int(name[5]) - 1}_pool")(features)
        features = layers.Conv2D(width, 3, padding="same", activation="relu", name=name)(features)
    activation_map = layers.Conv2D(
        num_classes, 1, kernel_initializer="zeros", dtype="float32", name="activation_map"
    )(features)
    logits = layers.GlobalAveragePooling2D(dtype="float32", name="logits")(activation_map)
    scaled = layers.Rescaling(1.0 / temperature, dtype="float32", name="temperature")(logits)
    probabilities = layers.Softmax(dtype="float32", name="probabilities")(scaled)
    pooled = layers.GlobalAveragePooling2D(dtype="float32", name="pooled_features")(features)
    share = pooled / (keras.ops.sum(pooled, axis=-1, keepdims=True) + 1e-6)
    profile = keras.ops.sqrt(share + SHARE_FLOOR / widths[-1])
    whitened = layers.Dense(
        widths[-1],
        kernel_initializer="identity",
        trainable=False,
        dtype="float32",
        name="domain_whitening",
    )(profile)
    distance = keras.ops.norm(whitened, axis=-1, keepdims=True)
    return keras.Model(
        scan,
        {
            "probabilities": probabilities,
            "activation_map": activation_map,
            "domain_distance": distance,
        },
        name="chestct",
    )


def convolution_names() -> list[str]:
    """The 13 convolution layers of VGG-16 in order, as Keras names them."""
    return [
        f"block{block}_conv{number}"
        for block, count in enumerate(CONVOLUTIONS_OF_BLOCK, start=1)
        for number in range(1, count + 1)
    ]


def widths_of(model: keras.Model) -> tuple[int, ...]:
    """Output channels of the 13 convolutions of a classifier."""
    return tuple(int(model.get_layer(name).filters) for name in convolution_names())


def frozen_prefix(model: keras.Model, first_trained_block: int) -> keras.Model:
    """The part of a classifier in front of `first_trained_block` (2 to 6), sharing its layers.

    Input: uint8 scans; output: the activations that enter that block, for 5 float32
    (N, 14, 14, 512). Block 6 stands for the head alone: the output is `block5_conv3`.
    """
    import keras

    return keras.Model(model.input, _entrance(model, first_trained_block))


def logits_from(model: keras.Model, first_block: int, dropout: float = 0.0) -> keras.Model:
    """The part from `first_block` on, to logits float32 (N, C), sharing the layers of `model`.

    With `first_block` 1 its input are uint8 scans, otherwise what `frozen_prefix` gives. While
    training, whole channels of the features are dropped, as dropout of pooled features would do.
    """
    import keras

    features = model.get_layer("block5_conv3").output
    if dropout:
        features = keras.layers.SpatialDropout2D(dropout, name="feature_dropout")(features)
    evidence = model.get_layer("activation_map")(features)
    logits = keras.layers.GlobalAveragePooling2D(dtype="float32")(evidence)
    return keras.Model(_entrance(model, first_block), logits)


def map_from(model: keras.Model, first_block: int) -> keras.Model:
    """The part from `first_block` on, to the activation map float32 (N, 14, 14, C)."""
    import keras

    return keras.Model(_entrance(model, first_block), model.get_layer("activation_map").output)


def pooled_features(model: keras.Model, first_block: int = 1) -> keras.Model:
    """The part from `first_block` on, to the pooled features float32 (N, F)."""
    import keras

    return keras.Model(_entrance(model, first_block), model.get_layer("pooled_features").output)


def _entrance(model: keras.Model, block: int) -> Any:
    if block not in range(1, 7):
        raise ValueError(f"block is {block}; expected 1 to 6")
    if block == 1:
        return model.input
    return model.get_layer("block5_conv3" if block == 6 else f"block{block - 1}_pool").output


def set_domain(model: keras.Model, domain: DomainFit) -> None:
    """Write a fitted domain into the graph: `domain_distance` = |(profile - mean) @ whitening|."""
    model.get_layer("domain_whitening").set_weights(
        [domain.whitening, -domain.mean @ domain.whitening]
    )


def with_temperature(model: keras.Model, temperature: float) -> keras.Model:
    """A copy of a classifier with a temperature-scaled softmax."""
    num_classes = model.output["probabilities"].shape[-1]
    copy = build_classifier(num_classes, temperature, widths_of(model))
    copy.set_weights(model.get_weights())
    return copy


def load_trained(folder: Path) -> tuple[keras.Model, ModelMetadata]:
    """The Keras model and the facts that `training fit` wrote into `folder`.

    Raises:
        ValueError: The folder holds no trained model.
    """
    missing = [name for name in ("model.keras", "facts.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: no {' and no '.join(missing)} in it; run python -m training fit"
        )
    set_up_tensorflow()
    import keras

    facts = ModelMetadata.from_parameters(json.loads((folder / "facts.json").read_text()))
    return keras.models.load_model(folder / "model.keras", compile=False), facts
