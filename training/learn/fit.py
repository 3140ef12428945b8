"""Fine-tune VGG-16 in two phases: the head on fixed features, then the last blocks."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from chestct.contract import LUNG_WINDOW, ModelMetadata, Window
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config, plain_settings
from training.common.metrics import score
from training.data.dataset import ScanSet, read_split
from training.network.activation_cache import Activations, augmented_copy, cached_activations
from training.network.augment import Augmentation, Scan, augment
from training.network.calibrate import (
    domain_distances,
    domain_threshold,
    fit_domain,
    fit_temperature,
    softmax,
)
from training.network.vgg16 import (
    build_classifier,
    frozen_prefix,
    logits_from,
    pooled_features,
    set_domain,
    set_up_tensorflow,
    widths_of,
    with_temperature,
)
from training.network.weights import load_backbone_weights
from training.track.mlflow_run import Run, tracked_run

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Gather = Callable[[Indices, int], npt.NDArray[Any]]  # (scan indices, epoch) to training input


@dataclass(frozen=True)
class FitConfig:
    """What `training fit` is told.

    Attributes:
        scans: Folder that the split file's paths are relative to.
        split: CSV with path, label, split, group.
        output: Folder for the model and its records.
        cache: Folder for activations and the state of an interrupted run.
        weights: `auto`, `imagenet`, `brain-mri`, `random` or a path.
        first_trained_block: Block of VGG-16 from which phase two trains; 6 trains the head alone.
        epochs: At most so many epochs in phase two.
        patience: Phase two stops after so many epochs without a lower validation loss.
        averaged_epochs: The weights of so many last epochs are averaged (Izmailov et al. 2018). A
            few dozen validation scans cannot tell the best of them, and the mean is steadier.
        batch_size: Scans a step.
        learning_rate: Adam's in the first epoch, then along half a cosine; small, because the
            kernels are nearly right already.
        head_regularisation: Inverse strength C of the logistic regression of phase one.
        dropout: Fraction of feature channels dropped in phase two.
        class_weighting: 0 counts every scan alike, 1 gives every class the same total weight, and
            values between take that power of the inverse frequency.
        label_smoothing: Share of the target spread over all classes.
        augmented_copies: Copies of the training set beside the original; each epoch takes the
            next. On the CPU they pass the frozen layers once, before phase two.
        augmentation: Limits of the random changes, the fields of `Augmentation`.
        frozen_layers: `cached` (activations on disk), `direct` (every epoch anew, every scan
            augmented anew), `auto` = cached on a CPU, direct on a GPU.
        mixed_precision: Compute frozen layers and phase two in half precision where that is
            faster: float16 on a GPU, bfloat16 on a CPU with instructions for it. Weights, head,
            softmax, validation of the final model and all that is exported stay in float32.
        accepted: Fraction of validation scans that the domain threshold accepts.
        window_center_hu: Window for slices in Hounsfield units.
        window_width_hu: Its width.
        seed: Of everything random.
    """

    scans: Path = Path("data/scans")
    split: Path = Path("results/split/split.csv")
    output: Path = Path("results/train")
    cache: Path = Path(".cache")
    weights: str = "auto"
    first_trained_block: int = 5
    epochs: int = 12
    patience: int = 12
    averaged_epochs: int = 6
    batch_size: int = 8
    learning_rate: float = 5e-5
    head_regularisation: float = 0.1
    dropout: float = 0.3
    class_weighting: float = 0.5
    label_smoothing: float = 0.05
    augmented_copies: int = 5
    augmentation: dict[str, float] = field(default_factory=dict)
    frozen_layers: str = "auto"
    mixed_precision: bool = True
    accepted: float = 0.95
    window_center_hu: float = LUNG_WINDOW.center_hu
    window_width_hu: float = LUNG_WINDOW.width_hu
    seed: int = 7

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant.

        Raises:
            ValueError: A value outside its range; the message names it.
        """
        ranges: list[tuple[str, float, float]] = [
            ("first_trained_block", 2, 6),
            ("epochs", 0, 10_000),
            ("patience", 1, 10_000),
            ("averaged_epochs", 1, 100),
            ("batch_size", 1, 4096),
            ("learning_rate", 1e-9, 1),
            ("head_regularisation", 1e-9, 1e9),
            ("dropout", 0, 0.95),
            ("class_weighting", 0, 1),
            ("label_smoothing", 0, 0.5),
            ("augmented_copies", 0, 100),
            ("accepted", 0.5, 1),
        ]
        for name, low, high in ranges:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; expected {low} to {high}")
        if self.frozen_layers not in ("auto", "cached", "direct"):
            raise ValueError(
                f"frozen_layers is {self.frozen_layers!r}; expected auto, cached or direct"
            )
        self.limits()
        self.window()

    def limits(self) -> Augmentation:
        """The augmentation as its own type."""
        try:
            return Augmentation(**self.augmentation)
        except TypeError as error:
            allowed = [item.name for item in dataclasses.fields(Augmentation)]
            raise ValueError(
                f"augmentation {self.augmentation}: allowed keys are {allowed}"
            ) from error

    def window(self) -> Window:
        """The window as its own type."""
        return Window(self.window_center_hu, self.window_width_hu)


def fit(config: FitConfig) -> Path:
    """Train a classifier and write it with its records into `config.output`.

    Writes `model.keras` (contract names, temperature and domain inside), `facts.json` (the
    parameters that travel with it), `history.csv` (one row an epoch) and `run.json`. The folder
    is replaced in one step. An interrupted run goes on from its last epoch when it is called
    again with the same config, data and weights.

    Returns:
        The path of `model.keras`.

    Raises:
        ValueError: The config, the split or the weights cannot be used.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The output cannot be written.
    """
    set_up_tensorflow()
    import keras
    import tensorflow as tf

    started = time.monotonic()
    sets = read_split(config.scans, config.split, config.window())
    train, valid = sets["train"], sets["valid"]
    missing = [name for index, name in enumerate(train.names) if index not in train.labels]
    if missing:
        raise ValueError(f"{config.split}: no training scan of {', '.join(missing)}")
    gpus = tf.config.list_physical_devices("GPU")
    keras.utils.set_random_seed(config.seed)
    model = build_classifier(len(train.names))
    weights = load_backbone_weights(model, config.weights)
    logger.info("starting weights: %s", weights.source)
    state = ResumableState.find(config, train, valid, weights.sha256)
    with tracked_run(f"vgg16-block{config.first_trained_block}", state.run_id) as run:
        state.begin(run.run_id)
        run.log_params({f"fit.{key}": value for key, value in _settings(config).items()})
        run.log_params({"weights.source": weights.source, "weights.sha256": weights.sha256})
        run.log_params({"data.sha256": train.sha256, "data.train": len(train)})
        run.set_tags({"devices": f"{len(gpus)} GPU" if gpus else f"{os.cpu_count()} CPU"})
        _train(config, model, train, valid, state, run, bool(gpus))
        features = predict(pooled_features(model), train.pixels, "features of train")
        valid_features = predict(pooled_features(model), valid.pixels, "features of valid")
        logits = head_logits(model, valid_features)
        temperature = fit_temperature(logits, valid.labels)
        answers = softmax(logits, temperature)
        run.log_scores("valid", score(answers, valid.labels, valid.groups, valid.names))
        domain = fit_domain(features)
        threshold = domain_threshold(domain_distances(valid_features, domain), config.accepted)
        set_domain(model, domain)
        final = with_temperature(model, temperature)
        facts = ModelMetadata(
            train.names,
            config.window(),
            temperature,
            threshold,
            run.run_id,
            train.sha256,
            git_commit=run.git_commit,
        )
        run.log_params({"temperature": temperature, "domain_threshold": threshold})
        with replaced(config.output) as folder:
            folder.mkdir()
            final.save(folder / "model.keras")
            write_json(folder / "facts.json", facts.to_parameters())
            write_json(
                folder / "run.json",
                {
                    "run": run.run_id,
                    "weights": weights.source,
                    "settings": settings_hash(config),
                    "seconds": round(time.monotonic() - started, 1),
                },
            )
            write_history(folder / "history.csv", state.history)
        for name in ("model.keras", "facts.json", "history.csv"):
            run.log_file(config.output / name, "model")
    state.remove()
    logger.info("trained in %.0f s: %s", time.monotonic() - started, config.output)
    return config.output / "model.keras"


def _train(
    config: FitConfig,
    model: keras.Model,
    train: ScanSet,
    valid: ScanSet,
    state: ResumableState,
    run: Run,
    on_gpu: bool,
) -> None:
    """Both phases, on all GPUs where there are any; leaves the averaged weights in `model`."""
    import tensorflow as tf

    cached = config.frozen_layers == "cached" or (config.frozen_layers == "auto" and not on_gpu)
    policy = dtype_policy(on_gpu) if config.mixed_precision else "float32"
    gather: Gather
    train_input: Activations | Scan
    valid_input: Activations | Scan
    if cached:
        entrance = config.first_trained_block
        copies, valid_input = _cached_inputs(config, model, train, valid, policy)
        train_input = copies[0]
        gather = gather_copies(copies)
    else:
        entrance = 1
        train_input, valid_input = train.pixels, valid.pixels
        gather = gather_augmented(train.pixels, config.limits(), config.seed)
    num_classes = len(train.names)
    if not state.history:
        features = predict(pooled_features(model, entrance), train_input, "phase one: features")
        fit_head(model, features, train.labels, config.head_regularisation)
        logger.info("phase one: head fitted on %d scans", len(train))
    # Everything that holds variables must come to be within the strategy's scope.
    strategy = tf.distribute.MirroredStrategy() if on_gpu else tf.distribute.get_strategy()
    with strategy.scope():
        twin = trainable_twin(model, config.first_trained_block, policy)
        trainer = logits_from(twin, entrance, config.dropout)
        compile_trainer(trainer, config.learning_rate)
    weight = class_weights(train.labels, num_classes, config.class_weighting)[train.labels]
    targets = smoothed_targets(train.labels, num_classes, config.label_smoothing)
    state.restore(trainer)
    if not state.history:
        state.record(trainer, {"epoch": 0} | _scores(trainer, valid_input, valid.labels))
        run.log_metrics(state.history[-1], step=0)
    epochs = config.epochs if config.first_trained_block < 6 else 0
    while state.epoch < epochs and state.epochs_without_gain() < config.patience:
        epoch = state.epoch + 1
        batches = epoch_batches(
            gather, targets, weight, epoch, batch_size=config.batch_size, seed=config.seed
        )
        logger.info("phase two: epoch %d of at most %d", epoch, epochs)
        trainer.optimizer.learning_rate = config.learning_rate * cosine_decay(epoch, epochs)
        seed_dropout(trainer, config.seed, epoch)
        loss = trainer.fit(batches, shuffle=False, verbose="auto" if sys.stderr.isatty() else 0)
        row = {"epoch": epoch, "loss": float(loss.history["loss"][0])}
        row |= _scores(trainer, valid_input, valid.labels)
        state.record(trainer, row)
        run.log_metrics(row, step=epoch)
        logger.info(
            "loss %.3f, validation loss %.3f, validation accuracy %.3f",
            row["loss"], row["valid_loss"], row["valid_accuracy"],
        )  # fmt: skip
    state.restore_average(trainer)
    model.set_weights(twin.get_weights())


def _cached_inputs(
    config: FitConfig, model: keras.Model, train: ScanSet, valid: ScanSet, policy: str
) -> tuple[list[Activations], Activations]:
    block = config.first_trained_block
    prefix = frozen_prefix(trainable_twin(model, block, policy), block)
    folder = config.cache / "activations"
    copies = [
        cached_activations(
            prefix,
            augmented_copy(train.pixels, copy, config.limits(), config.seed),
            folder,
            f"frozen layers, copy {copy} of {config.augmented_copies}",
        )
        for copy in range(config.augmented_copies + 1)
    ]
    return copies, cached_activations(prefix, valid.pixels, folder, "frozen layers, validation")


def gather_copies(copies: Sequence[Activations | npt.NDArray[Any]]) -> Gather:
    """Reads training input from cached copies; epoch n takes copy n modulo their number."""

    def gather(indices: Indices, epoch: int) -> npt.NDArray[Any]:
        return copies[epoch % len(copies)][indices]

    return gather


def gather_augmented(scans: Scan, limits: Augmentation, seed: int) -> Gather:
    """Augments scans, uint8 (N, 224, 224, 1), anew in each epoch."""

    def gather(indices: Indices, epoch: int) -> npt.NDArray[Any]:
        return np.stack(
            [
                augment(scans[index], limits, np.random.default_rng((seed, epoch, index)))
                for index in indices.tolist()
            ]
        )

    return gather


def epoch_batches(
    gather: Gather,
    targets: Floats,
    weight: Floats,
    epoch: int,
    *,
    batch_size: int,
    seed: int,
) -> Any:
    """One epoch for `keras.Model.fit`: (input, targets (B, C), sample weights (B,)) a batch.

    The order depends on seed and epoch alone, so that a resumed run sees what an uninterrupted
    one would have seen.
    """
    import keras

    order = np.random.default_rng((seed, epoch)).permutation(len(targets))

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return math.ceil(len(order) / batch_size)

        def __getitem__(self, index: int) -> tuple[Any, Any, Any]:
            chosen = order[index * batch_size : (index + 1) * batch_size]
            return gather(chosen, epoch), targets[chosen], weight[chosen]

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


def compile_trainer(trainer: keras.Model, learning_rate: float) -> None:
    """Make `trainer`, which gives logits, ready for `fit`."""
    import keras

    trainer.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
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


def class_weights(labels: npt.NDArray[np.int64], num_classes: int, power: float) -> Floats:
    """float32 (C,), inverse class frequencies to `power`, with mean 1 over the scans."""
    frequencies = np.bincount(labels, minlength=num_classes) / len(labels)
    weights = frequencies**-power
    return (weights / (weights @ frequencies)).astype(np.float32)  # type: ignore[no-any-return]


def smoothed_targets(labels: npt.NDArray[np.int64], num_classes: int, smoothing: float) -> Floats:
    """float32 (N, C), 1 - smoothing for the label and the rest spread (Szegedy et al. 2016)."""
    hard = np.eye(num_classes, dtype=np.float32)[labels]
    return hard * np.float32(1 - smoothing) + np.float32(smoothing / num_classes)


def predict(model: keras.Model, inputs: Activations | npt.NDArray[Any], title: str) -> Floats:
    """Output float32 of `model` for all `inputs`, with a progress bar."""
    outputs = []
    for start in tqdm(range(0, len(inputs), 16), title, unit="batch", disable=None):
        outputs.append(np.asarray(model.predict_on_batch(inputs[start : start + 16])))
    return np.concatenate(outputs).astype(np.float32)


def _scores(
    trainer: keras.Model, inputs: Activations | Scan, labels: npt.NDArray[np.int64]
) -> dict[str, float]:
    logits = predict(trainer, inputs, "validation")
    probabilities = softmax(logits)
    right = probabilities.argmax(axis=1) == labels
    chosen = probabilities[np.arange(len(labels)), labels]
    return {
        "valid_loss": float(-np.log(np.maximum(chosen, 1e-12)).mean()),
        "valid_accuracy": float(right.mean()),
        "valid_balanced_accuracy": float(
            np.mean([right[labels == label].mean() for label in np.unique(labels)])
        ),
    }


class ResumableState:
    """Where a training stands: its epochs and the weights of the last ones, on disk.

    The folder is named by a hash of everything that decides the result, so another config, other
    data or other weights never go on from here.
    """

    def __init__(self, folder: Path, averaged_epochs: int) -> None:
        self._folder = folder
        self._averaged_epochs = averaged_epochs
        self.run_id: str | None = None
        self.history: list[dict[str, float]] = []

    @classmethod
    def find(
        cls, config: FitConfig, train: ScanSet, valid: ScanSet, weights_sha256: str
    ) -> ResumableState:
        """The state that belongs to these inputs, empty where no training was interrupted."""
        key = json.dumps(
            [_settings(config), train.sha256, valid.sha256, weights_sha256], sort_keys=True
        )
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        state = cls(config.cache / "fit" / name, config.averaged_epochs)
        file = state._folder / "state.json"
        if file.is_file():
            stored = json.loads(file.read_text())
            state.run_id, state.history = stored["run"], stored["history"]
            logger.info("an interrupted training is resumed after epoch %d", state.epoch)
        return state

    @property
    def epoch(self) -> int:
        """Epochs of phase two that are done."""
        return len(self.history) - 1 if self.history else 0

    def epochs_without_gain(self) -> int:
        """Epochs since the one with the lowest validation loss."""
        losses = [row["valid_loss"] for row in self.history]
        return len(losses) - 1 - int(np.argmin(losses))

    def begin(self, run_id: str) -> None:
        """Remember which run this training belongs to."""
        self.run_id = run_id
        self._write()

    def record(self, trainer: keras.Model, row: dict[str, float]) -> None:
        """Store the weights and the scores of the epoch that has ended."""
        self.history.append(row)
        trainer.save_weights(self._weights(len(self.history) - 1))
        self._write()
        keep = {self._weights(epoch) for epoch in self._averaged()}
        for file in self._folder.glob("*.weights.h5"):
            if file not in keep:
                file.unlink()

    def restore(self, trainer: keras.Model) -> None:
        """Load the weights of the last epoch, optimizer state included."""
        if self.history:
            trainer.load_weights(self._weights(self.epoch))

    def restore_average(self, trainer: keras.Model) -> None:
        """Load the mean of the weights of the last epochs."""
        epochs = self._averaged()
        total: list[Any] = []
        for epoch in epochs:
            trainer.load_weights(self._weights(epoch))
            weights = trainer.get_weights()
            total = [a + b for a, b in zip(total, weights, strict=True)] if total else weights
        trainer.set_weights(
            [
                (weight / len(epochs)).astype(weight.dtype)
                if np.issubdtype(weight.dtype, np.floating)
                else weight
                for weight in total
            ]
        )

    def remove(self) -> None:
        """Forget this training: it is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _averaged(self) -> range:
        """The last epochs of phase two; the head of phase one alone where there is none."""
        first = max(min(1, self.epoch), self.epoch - self._averaged_epochs + 1)
        return range(first, self.epoch + 1)

    def _weights(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch:04d}.weights.h5"

    def _write(self) -> None:
        write_json(self._folder / "state.json", {"run": self.run_id, "history": self.history})


def settings_hash(config: FitConfig) -> str:
    """Hash of everything in a config but where files lie: equal for equal trainings."""
    settings = plain_settings(config, without=("scans", "split", "output", "cache"))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _settings(config: FitConfig) -> dict[str, Any]:
    """What decides the result: all of the config but where files are kept."""
    return plain_settings(config, without=("output", "cache"))


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """The rows of a training as CSV; what the first row, before training, lacks stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[-1]))
        writer.writeheader()
        writer.writerows(history)


def main(argv: list[str] | None = None) -> int:
    """Fine-tune VGG-16 on the scans of a split file."""
    parser = command_parser("training fit", main.__doc__, "configs/train.yaml")
    parser.add_argument("--scans", type=Path, help="instead of the config's")
    parser.add_argument("--split", type=Path, help="instead of the config's")
    parser.add_argument("--output", type=Path, help="instead of the config's")
    arguments = parser.parse_args(argv)

    def work() -> None:
        given = {key: getattr(arguments, key) for key in ("scans", "split", "output")}
        config = load_config(FitConfig, arguments.config)
        fit(dataclasses.replace(config, **{key: path for key, path in given.items() if path}))

    again = "interrupted: run the same command again to go on from the last epoch"
    return run_command(work, interrupted=again)
