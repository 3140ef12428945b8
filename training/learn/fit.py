"""Fine-tune VGG-16 in two phases: the head on fixed features, then the last blocks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveFloat

from chestct.contract import LUNG_WINDOW, ModelMetadata, Window
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import Share, config_class, load_config, plain_settings
from training.common.metrics import score
from training.data.dataset import ScanSet, read_split
from training.learn.resumable import ResumableState, write_history
from training.learn.trainer import (
    AugmentedScans,
    compile_trainer,
    cosine_decay,
    dtype_policy,
    epoch_batches,
    fit_head,
    head_logits,
    in_turn,
    predict,
    scan_weights,
    seed_dropout,
    trainable_twin,
)
from training.network.activation_cache import Activations, augmented_copy, cached_activations
from training.network.augment import Augmentation, Scan
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
    with_temperature,
)
from training.network.weights import load_backbone_weights
from training.track.mlflow_run import Run, tracked_run

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)


@config_class
class FitConfig:
    """Settings of `training fit`.

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
        augmentation: Limits of the random changes.
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
    first_trained_block: Annotated[int, Field(ge=2, le=6)] = 5
    epochs: Annotated[int, Field(ge=0, le=10_000)] = 12
    patience: Annotated[int, Field(ge=1, le=10_000)] = 12
    averaged_epochs: Annotated[int, Field(ge=1, le=100)] = 6
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-5
    head_regularisation: PositiveFloat = 0.1
    dropout: Annotated[float, Field(ge=0, le=0.95)] = 0.3
    class_weighting: Share = 0.5
    label_smoothing: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    augmented_copies: Annotated[int, Field(ge=0, le=100)] = 5
    augmentation: Augmentation = Augmentation()
    frozen_layers: Literal["auto", "cached", "direct"] = "auto"
    mixed_precision: bool = True
    accepted: Annotated[float, Field(ge=0.5, le=1)] = 0.95
    window_center_hu: float = LUNG_WINDOW.center_hu
    window_width_hu: Annotated[float, Field(ge=1)] = LUNG_WINDOW.width_hu
    seed: int = 7

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
    decides = [_settings(config), train.sha256, valid.sha256, weights.sha256]
    state = ResumableState.find(config.cache / "fit", decides, config.averaged_epochs)
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
    copies: Sequence[Activations | Scan]
    valid_input: Activations | Scan
    if cached:
        entrance = config.first_trained_block
        copies, valid_input = _cached_inputs(config, model, train, valid, policy)
    else:
        entrance = 1
        copies, valid_input = [train.pixels], valid.pixels
    if not state.history:
        features = predict(pooled_features(model, entrance), copies[0], "phase one: features")
        fit_head(model, features, train.labels, config.head_regularisation)
        logger.info("phase one: head fitted on %d scans", len(train))
    # Everything that holds variables must come to be within the strategy's scope.
    strategy = tf.distribute.MirroredStrategy() if on_gpu else tf.distribute.get_strategy()
    with strategy.scope():
        twin = trainable_twin(model, config.first_trained_block, policy)
        trainer = logits_from(twin, entrance, config.dropout)
        compile_trainer(trainer, config.learning_rate, config.label_smoothing)
    weights = scan_weights(train.labels, config.class_weighting)
    targets = np.eye(len(train.names), dtype=np.float32)[train.labels]
    state.restore(trainer)
    if not state.history:
        state.record(trainer, {"epoch": 0} | _scores(trainer, valid_input, valid.labels))
        run.log_metrics(state.history[-1], step=0)
    epochs = config.epochs if config.first_trained_block < 6 else 0
    while state.epoch < epochs and state.epochs_without_gain() < config.patience:
        epoch = state.epoch + 1
        shown: Activations | Scan | AugmentedScans = in_turn(copies, epoch)
        if not cached:
            shown = AugmentedScans(train.pixels, config.augmentation, config.seed, epoch)
        batches = epoch_batches(
            shown, targets, weights,
            epoch=epoch, batch_size=config.batch_size, seed=config.seed,
        )  # fmt: skip
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
            augmented_copy(train.pixels, copy, config.augmentation, config.seed),
            folder,
            f"frozen layers, copy {copy} of {config.augmented_copies}",
        )
        for copy in range(config.augmented_copies + 1)
    ]
    return copies, cached_activations(prefix, valid.pixels, folder, "frozen layers, validation")


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


def settings_hash(config: FitConfig) -> str:
    """Hash of everything in a config but where files lie: equal for equal trainings."""
    settings = plain_settings(config, without=("scans", "split", "output", "cache"))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _settings(config: FitConfig) -> dict[str, Any]:
    """The settings that decide the result: all but where files are kept."""
    return plain_settings(config, without=("output", "cache"))


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
