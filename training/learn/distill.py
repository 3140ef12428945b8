"""Distill narrow students: prune the trained network, then train on its outputs."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from chestct.contract import ModelMetadata
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config, plain_settings
from training.common.metrics import macro_auroc
from training.data.dataset import ScanSet, read_split
from training.learn.fit import FitConfig
from training.learn.resumable import write_history
from training.learn.trainer import (
    cosine_decay,
    dtype_policy,
    epoch_batches,
    head_logits,
    in_turn,
    predict,
    trainable_twin,
)
from training.network.activation_cache import Activations, augmented_copy, cached_activations
from training.network.calibrate import (
    domain_distances,
    domain_threshold,
    fit_domain,
    fit_temperature,
    softmax,
)
from training.network.prune import pruned
from training.network.vgg16 import (
    VGG16_WIDTHS,
    frozen_prefix,
    load_trained,
    map_from,
    pooled_features,
    set_domain,
    with_temperature,
)
from training.track.mlflow_run import Run, tracked_run

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


def _fitting(widths: tuple[int, ...]) -> tuple[int, ...]:
    if len(widths) != len(VGG16_WIDTHS) or any(
        not 1 <= width <= full for width, full in zip(widths, VGG16_WIDTHS, strict=True)
    ):
        raise ValueError(f"expected 13 whole numbers, at most {list(VGG16_WIDTHS)}")
    return widths


Widths = Annotated[tuple[int, ...], AfterValidator(_fitting)]


@config_class
class DistillConfig:
    """Settings of `training distill`.

    Attributes:
        scans: Folder that the split file's paths are relative to.
        split: CSV with path, label, split, group; students are taught on its training scans.
        teacher: Folder that `training fit` wrote.
        fit: The config of that training: its augmented copies are used again, and what it cached
            of them is not computed twice.
        output: Folder for the students, one folder each.
        cache: Folder for activations.
        students: Output channels of the 13 convolutions by the student's name. Multiples of 16:
            INT8 kernels work on so many channels at once.
        pruning_scans: Training scans that kernels are refitted on.
        first_trained_block: Blocks before it stay as pruning left them and pass each scan once,
            which saves most of an epoch: they are wide pictures with few channels.
        epochs: Passes over the training scans.
        batch_size: Scans a step.
        learning_rate: Adam's in the first epoch, then along half a cosine. Three times as much
            undoes what pruning kept.
        temperature: Softens both answers (Hinton et al. 2015, section 2).
        map_weight: Weight of the activation map's error beside that of the answer.
        accepted: Fraction of validation scans that the domain threshold accepts.
        seed: Of everything random.
    """

    scans: Path = Path("data/scans")
    split: Path = Path("results/split/split.csv")
    teacher: Path = Path("results/train")
    fit: Path = Path("configs/train.yaml")
    output: Path = Path("results/students")
    cache: Path = Path(".cache")
    students: Annotated[dict[str, Widths], Field(min_length=1)] = field(kw_only=True)
    pruning_scans: PositiveInt = 128
    first_trained_block: Annotated[int, Field(ge=1, le=5)] = 3
    epochs: PositiveInt = 30
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-4
    temperature: PositiveFloat = 2.0
    map_weight: NonNegativeFloat = 2.0
    accepted: Annotated[float, Field(ge=0.5, le=1)] = 0.95
    seed: int = 7


@dataclass(frozen=True)
class Lesson:
    """Input and target of one epoch.

    Attributes:
        scans: uint8 (N, 224, 224, 1).
        maps: float32 (N, 14, 14, C), the teacher's activation maps of them.
    """

    scans: npt.NDArray[np.uint8]
    maps: Floats


def lessons_of(
    teacher: keras.Model, train: ScanSet, fit: FitConfig, cache: Path, policy: str
) -> list[Lesson]:
    """One lesson for each augmented copy that the teacher was trained on."""
    twin = trainable_twin(teacher, fit.first_trained_block, policy)
    prefix = frozen_prefix(twin, fit.first_trained_block)
    tail = map_from(teacher, fit.first_trained_block)
    lessons = []
    for copy in range(fit.augmented_copies + 1):
        scans = augmented_copy(train.pixels, copy, fit.augmentation, fit.seed)
        title = f"frozen layers, copy {copy} of {fit.augmented_copies}"
        entering = cached_activations(prefix, scans, cache / "activations", title)
        lessons.append(Lesson(scans, predict(tail, entering, f"teacher, copy {copy}")))
    return lessons


def distillation_loss(temperature: float, map_weight: float, map_scale: float) -> Any:
    """A Keras loss of two activation maps, (B, 14, 14, C): the teacher's and the student's.

    T^2 KL(softmax(z / T), softmax(s / T)) of their means, the logits (Hinton et al. 2015, section
    2), and `map_weight` times their mean squared difference over the teacher's variance
    `map_scale`.
    """
    from keras import ops

    def loss(wanted: Any, given: Any) -> Any:
        teacher = ops.log_softmax(ops.mean(wanted, axis=(1, 2)) / temperature)
        student = ops.log_softmax(ops.mean(given, axis=(1, 2)) / temperature)
        answer = ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)
        place = ops.mean(ops.square(wanted - given), axis=(1, 2, 3)) / map_scale
        return temperature**2 * answer + map_weight * place

    return loss


def teach(
    student: keras.Model,
    lessons: list[Lesson],
    valid: tuple[ScanSet, Floats],
    config: DistillConfig,
    run: Run,
    policy: str,
) -> list[dict[str, float]]:
    """Train `student` in place on what the teacher answered; the rows of its history.

    Args:
        student: From `training.network.prune.pruned`.
        lessons: Epochs take them in turn.
        valid: The validation scans and the teacher's maps of them, float32 (N, 14, 14, C).
        config: How it is trained.
        run: Gets the scores of each epoch.
        policy: The Keras dtype policy that it is trained under.
    """
    import keras

    twin = trainable_twin(student, config.first_trained_block, policy)
    prefix = frozen_prefix(twin, config.first_trained_block)
    trainer = map_from(twin, config.first_trained_block)
    scale = float(np.var(lessons[0].maps))
    trainer.compile(
        optimizer=keras.optimizers.Adam(config.learning_rate),
        loss=distillation_loss(config.temperature, config.map_weight, scale),
        jit_compile=False,
    )

    def entering(scans: npt.NDArray[np.uint8], title: str) -> Activations | npt.NDArray[np.uint8]:
        if config.first_trained_block == 1:
            return scans
        return cached_activations(prefix, scans, config.cache / "activations", title)

    shown = [
        entering(lesson.scans, f"student's frozen layers, copy {copy}")
        for copy, lesson in enumerate(lessons)
    ]
    valid_set, valid_maps = valid
    valid_shown = entering(valid_set.pixels, "student's frozen layers, validation")
    history = [{"epoch": 0} | _scores(trainer, valid_shown, valid_set, valid_maps)]
    run.log_metrics(history[0], step=0)
    for epoch in range(1, config.epochs + 1):
        trainer.optimizer.learning_rate = config.learning_rate * cosine_decay(epoch, config.epochs)
        fitted = trainer.fit(
            epoch_batches(
                in_turn(shown, epoch),
                in_turn(lessons, epoch).maps,
                epoch=epoch,
                batch_size=config.batch_size,
                seed=config.seed,
            ),
            shuffle=False,
            verbose="auto" if sys.stderr.isatty() else 0,
        )
        row = {"epoch": epoch, "loss": float(fitted.history["loss"][0])}
        row |= _scores(trainer, valid_shown, valid_set, valid_maps)
        history.append(row)
        run.log_metrics(row, step=epoch)
        logger.info(
            "epoch %d of %d: loss %.3f, agrees with the teacher on %.3f of the validation scans",
            epoch, config.epochs, row["loss"], row["valid_agreement"],
        )  # fmt: skip
    student.set_weights(twin.get_weights())
    return history


def _scores(
    trainer: keras.Model,
    inputs: Activations | npt.NDArray[np.uint8],
    valid: ScanSet,
    teacher_maps: Floats,
) -> dict[str, float]:
    maps = predict(trainer, inputs, "validation")
    logits, wanted = maps.mean(axis=(1, 2)), teacher_maps.mean(axis=(1, 2))
    probabilities = softmax(logits)
    return {
        "valid_agreement": float((logits.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
        "valid_map_correlation": float(np.corrcoef(maps.ravel(), teacher_maps.ravel())[0, 1]),
        "valid_accuracy": float((probabilities.argmax(axis=1) == valid.labels).mean()),
        "valid_macro_auroc": macro_auroc(probabilities, valid.labels),
    }


def distill(config: DistillConfig) -> list[Path]:
    """Make every student and write it as `training fit` writes a model; returns their folders.

    Raises:
        ValueError: The config, the split or the teacher cannot be used.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The output cannot be written.
    """
    import keras

    teacher, facts = load_trained(config.teacher)
    fit = load_config(FitConfig, config.fit)
    sets = read_split(config.scans, config.split, facts.window)
    train, valid = sets["train"], sets["valid"]
    keras.utils.set_random_seed(config.seed)
    policy = dtype_policy(on_gpu=False) if fit.mixed_precision else "float32"
    lessons = lessons_of(teacher, train, fit, config.cache, policy)
    valid_maps = predict(map_from(teacher, 1), valid.pixels, "teacher, validation")
    shuffled = np.random.default_rng(config.seed).permutation(len(train))
    chosen = np.sort(shuffled[: config.pruning_scans])
    folders = []
    for name, widths in config.students.items():
        started = time.monotonic()
        with tracked_run(f"student-{name}") as run:
            run.log_params({"widths": list(widths), "teacher": facts.run})
            run.log_params({f"distill.{key}": value for key, value in _settings(config).items()})
            student = pruned(teacher, widths, train.pixels[chosen], seed=config.seed)
            pruned_s = time.monotonic() - started
            history = teach(student, lessons, (valid, valid_maps), config, run, policy)
            final, student_facts = _calibrated(student, facts, train, valid, config, run)
            seconds = {"pruning_s": pruned_s, "whole_s": time.monotonic() - started}
            run.log_metrics(seconds)
            folder = config.output / name
            with replaced(folder) as temporary:
                temporary.mkdir()
                final.save(temporary / "model.keras")
                write_json(temporary / "facts.json", student_facts.to_parameters())
                write_json(
                    temporary / "student.json",
                    {"run": run.run_id, "teacher": facts.run, "widths": list(widths)} | seconds,
                )
                write_history(temporary / "history.csv", history)
            run.log_file(folder, "student")
        logger.info("student %s in %.0f s: %s", name, seconds["whole_s"], folder)
        folders.append(folder)
    return folders


def _calibrated(
    student: keras.Model,
    facts: ModelMetadata,
    train: ScanSet,
    valid: ScanSet,
    config: DistillConfig,
    run: Run,
) -> tuple[keras.Model, ModelMetadata]:
    """The student with a temperature and a domain of its own, and its facts."""
    features = predict(pooled_features(student), train.pixels, "features of train")
    valid_features = predict(pooled_features(student), valid.pixels, "features of valid")
    temperature = fit_temperature(head_logits(student, valid_features), valid.labels)
    domain = fit_domain(features)
    set_domain(student, domain)
    threshold = domain_threshold(domain_distances(valid_features, domain), config.accepted)
    run.log_params({"temperature": temperature, "domain_threshold": threshold})
    return with_temperature(student, temperature), dataclasses.replace(
        facts, temperature=temperature, domain_threshold=threshold, run=run.run_id
    )


def _settings(config: DistillConfig) -> dict[str, Any]:
    """The settings that decide the result, but for the widths."""
    return plain_settings(config, without=("output", "cache", "students"))


def main(argv: list[str] | None = None) -> int:
    """Prune the trained network to each width and teach what is left."""
    parser = command_parser("training distill", main.__doc__, "configs/distill.yaml")
    arguments = parser.parse_args(argv)

    def work() -> None:
        distill(load_config(DistillConfig, arguments.config))

    return run_command(work)
