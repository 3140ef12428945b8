"""Parts of a training that fine-tuning and distillation share: batches, precision, schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from training.network.activation_cache import Activations
from training.network.augment import Augmentation, Scan, augment
from training.network.vgg16 import build_classifier, widths_of

if TYPE_CHECKING:
    import keras

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Item = TypeVar("Item")


@dataclass(frozen=True)
class AugmentedScans:
    """Scans uint8 (N, 224, 224, 1), changed at random when they are read, anew in each epoch."""

    scans: Scan
    limits: Augmentation
    seed: int
    epoch: int

    def __getitem__(self, chosen: Indices) -> Scan:
        """Variants of some of the scans, uint8 (n, 224, 224, 1)."""
        return np.stack([
            augment(self.scans[index], self.limits,
                    np.random.default_rng((self.seed, self.epoch, index)))
            for index in chosen.tolist()
        ])  # fmt: skip


def in_turn(copies: Sequence[Item], epoch: int) -> Item:
    """The copy of the training set for an epoch: n takes copy n modulo their number."""
    return copies[epoch % len(copies)]


def epoch_batches(
    inputs: Activations | AugmentedScans | npt.NDArray[Any],
    *targets: npt.NDArray[Any],
    epoch: int,
    batch_size: int,
    seed: int,
) -> Any:
    """One epoch for `keras.Model.fit`: a tuple (input, *targets) a batch.

    The order depends on seed and epoch alone, so that a resumed run sees the same batches as an
    uninterrupted one.

    Args:
        inputs: N of them.
        targets: Arrays (N, ...): targets, and sample weights where there are any.
        epoch: Number of the epoch.
        batch_size: Scans in a batch; the last one holds the rest.
        seed: Of the order.
    """
    import keras

    order = np.random.default_rng((seed, epoch)).permutation(len(targets[0]))

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return math.ceil(len(order) / batch_size)

        def __getitem__(self, index: int) -> tuple[Any, ...]:
            chosen = order[index * batch_size : (index + 1) * batch_size]
            return inputs[chosen], *(target[chosen] for target in targets)

    return Batches(workers=1)


def fit_head(
    model: keras.Model, features: Floats, labels: npt.NDArray[np.int64], inverse_strength: float
) -> None:
    """Fit the 1x1-convolution head on pooled features, float32 (N, 512), and write it in place.

    The head is linear and averaging commutes with it, so this is a multinomial logistic
    regression: convex, solved to its optimum without a learning rate. Features are standardised
    for the solver and the standardisation is folded into kernel and bias.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-3
    solver = LogisticRegression(C=inverse_strength, class_weight="balanced", max_iter=5000)
    with threadpool_limits(1):  # threads of BLAS that wait for each other take 60 times as long
        solver.fit((features - mean) / scale, labels)
    kernel, bias = solver.coef_.T, solver.intercept_
    if kernel.shape[1] == 1:  # two classes: scikit-learn gives the evidence of the second alone
        kernel, bias = np.hstack([-kernel / 2, kernel / 2]), np.array([-bias[0] / 2, bias[0] / 2])
    kernel = kernel / scale[:, np.newaxis]
    bias = bias - mean @ kernel
    model.get_layer("activation_map").set_weights(
        [kernel[np.newaxis, np.newaxis].astype(np.float32), bias.astype(np.float32)]
    )


def head_logits(model: keras.Model, features: Floats) -> Floats:
    """Logits float32 (N, C) of pooled features (N, 512)."""
    kernel, bias = model.get_layer("activation_map").get_weights()
    return (features @ kernel[0, 0] + bias).astype(np.float32)  # type: ignore[no-any-return]


def dtype_policy(on_gpu: bool) -> str:
    """The Keras policy of half-precision training on this machine; float32 where none is faster."""
    if on_gpu:
        return "mixed_float16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "mixed_bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def trainable_twin(model: keras.Model, first_trained_block: int, policy: str) -> keras.Model:
    """A copy of `model` whose blocks before `first_trained_block` are frozen.

    Its convolutions compute by the Keras dtype `policy` on variables in float32; head, softmax
    and distance stay in float32, and `model` is left as it is.
    """
    import keras

    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        twin = build_classifier(model.output["probabilities"].shape[-1], widths=widths_of(model))
    finally:
        keras.config.set_dtype_policy(before)
    twin.set_weights(model.get_weights())
    for layer in twin.layers:
        if layer.name.startswith("block"):
            layer.trainable = int(layer.name[5]) >= first_trained_block
    return twin


def compile_trainer(
    trainer: keras.Model, learning_rate: float, label_smoothing: float = 0.0
) -> None:
    """Make `trainer`, which gives logits, ready for `fit`.

    Args:
        trainer: The model.
        learning_rate: Adam's.
        label_smoothing: Share of the target spread over all classes (Szegedy et al. 2016).
    """
    import keras

    trainer.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=label_smoothing
        ),
        jit_compile=False,
    )
    # Without its variables the optimizer of an untrained model could not be restored later.
    trainer.optimizer.build(trainer.trainable_variables)


def seed_dropout(trainer: keras.Model, seed: int, epoch: int) -> None:
    """Let the dropout of an epoch depend on seed and epoch alone: weight files do not keep it."""
    for layer in trainer.layers:
        if hasattr(layer, "seed_generator"):
            layer.seed_generator.state.assign([seed, epoch])


def cosine_decay(epoch: int, epochs: int) -> float:
    """Factor of the learning rate in `epoch`, from 1 in the first down to nearly 0 in the last.

    Half a cosine (Loshchilov and Hutter 2017, equation 5), a step an epoch.
    """
    return 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def scan_weights(labels: npt.NDArray[np.int64], power: float) -> Floats:
    """float32 (N,), inverse frequencies of the scans' classes to `power`, with mean 1."""
    from sklearn.utils.class_weight import compute_sample_weight

    weights = compute_sample_weight("balanced", labels) ** power
    return (weights / weights.mean()).astype(np.float32)  # type: ignore[no-any-return]


def predict(model: keras.Model, inputs: Activations | npt.NDArray[Any], title: str) -> Floats:
    """Output float32 of `model` for all `inputs`, with a progress bar."""
    outputs = []
    for start in tqdm(range(0, len(inputs), 16), title, unit="batch", disable=None):
        outputs.append(np.asarray(model.predict_on_batch(inputs[start : start + 16])))
    return np.concatenate(outputs).astype(np.float32)
