"""Measure the speed-up of fine-tuning on cached activations."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from training.common.atomic_io import write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config
from training.data.dataset import evenly_spread, read_split
from training.learn.fit import FitConfig
from training.learn.trainer import (
    AugmentedScans,
    compile_trainer,
    epoch_batches,
    trainable_twin,
)
from training.network.activation_cache import cached_activations
from training.network.vgg16 import build_classifier, frozen_prefix, logits_from
from training.network.weights import load_backbone_weights

logger = logging.getLogger(__name__)


def measure(config: FitConfig, num_scans: int, repeats: int) -> dict[str, Any]:
    """Seconds of an epoch: plain `model.fit` on scans against the same on cached activations.

    Both train the same layers of the same network on the same scans, in turns, after an untimed
    epoch each. The one-off cost of filling the cache is measured as well, so that the whole
    training can be compared: `epochs * plain` against `copies * fill + epochs * cached`.

    Args:
        config: Of `training fit`; its split, block, batch size and epochs are used.
        num_scans: At most so many training scans, evenly spread.
        repeats: Timed epochs of each.

    Raises:
        ValueError: The split or the weights cannot be used.
    """
    train = read_split(config.scans, config.split, config.window())["train"]
    chosen = evenly_spread(len(train), num_scans)
    pixels, labels = train.pixels[chosen], train.labels[chosen]
    model = build_classifier(len(train.names))
    load_backbone_weights(model, config.weights)
    twin = trainable_twin(model, config.first_trained_block, "float32")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prefix = frozen_prefix(twin, config.first_trained_block)
        activations = cached_activations(prefix, pixels, Path(folder), "fill the cache")
        fill_s = time.perf_counter() - started
        ways: dict[str, tuple[Any, Callable[[int], Any]]] = {
            "plain": (
                logits_from(twin, 1, config.dropout),
                lambda epoch: AugmentedScans(pixels, config.augmentation, config.seed, epoch),
            ),
            "cached": (
                logits_from(twin, config.first_trained_block, config.dropout),
                lambda epoch: activations,
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for trainer, _ in ways.values():
            compile_trainer(trainer, config.learning_rate, config.label_smoothing)
        targets = np.eye(len(train.names), dtype=np.float32)[labels]
        weight = np.ones(len(labels), np.float32)
        for epoch in range(repeats + 1):
            for name, (trainer, inputs_of) in ways.items():
                batches = epoch_batches(
                    inputs_of(epoch), targets, weight,
                    epoch=epoch, batch_size=config.batch_size, seed=config.seed,
                )  # fmt: skip
                started = time.perf_counter()
                trainer.fit(batches, shuffle=False, verbose=0)
                if epoch:
                    times[name].append(time.perf_counter() - started)
                logger.info("%s, epoch %d: %.1f s", name, epoch, time.perf_counter() - started)
    plain_s, cached_s = (statistics.median(times[name]) for name in ("plain", "cached"))
    copies = config.augmented_copies + 1
    total_plain_s = config.epochs * plain_s
    total_cached_s = copies * fill_s + config.epochs * cached_s
    return {
        "environment": environment(),
        "method": f"{repeats} timed epochs each, in turns, after one untimed; medians",
        "scans": len(labels),
        "first_trained_block": config.first_trained_block,
        "plain_epoch_s": round(plain_s, 2),
        "cached_epoch_s": round(cached_s, 2),
        "fill_one_copy_s": round(fill_s, 2),
        "epoch_speed_up": round(plain_s / cached_s, 2),
        "epochs": config.epochs,
        "copies": copies,
        "training_speed_up": round(total_plain_s / total_cached_s, 2),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure the speed-up of fine-tuning on cached activations."""
    parser = command_parser("benchmarks training", main.__doc__, "configs/train.yaml")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--num-scans", type=int, default=128, help="most training scans")
    parser.add_argument("--repeats", type=int, default=3, help="timed epochs of each")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(FitConfig, arguments.config)
        result = measure(config, arguments.num_scans, arguments.repeats)
        write_json(arguments.output, result)
        sys.stdout.write(
            f"an epoch on {result['scans']} scans: plain {result['plain_epoch_s']} s, cached "
            f"{result['cached_epoch_s']} s, {result['epoch_speed_up']} times faster; "
            f"{result['epochs']} epochs with the cost of the cache: "
            f"{result['training_speed_up']} times\n"
        )

    return run_command(work)
