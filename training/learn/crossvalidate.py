"""Grouped cross-validation: out-of-fold predictions of the training's settings.

No near duplicate, series or group of a group file lies in two folds: each scan is predicted by a
network that has seen no known relative of it. `training evaluate --protocol grouped` scores the
predictions, which are kept in one table.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import time
from pathlib import Path

from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.data.dataset import predict_outputs, read_split
from training.data.split import SplitConfig, write_split
from training.learn.fit import FitConfig, fit, settings_hash
from training.network.vgg16 import load_trained
from training.track.mlflow_run import FOLD_TAG, tagged_runs

logger = logging.getLogger(__name__)

COLUMNS = ("path", "label", "group", "fold", "domain_distance", "in_domain")


@config_class
class CrossValidateConfig:
    """Settings of `training crossvalidate`.

    Attributes:
        fit: Config of the training that is repeated; its scans are used.
        split: Config of the grouped split; its number of folds and its seed are used.
        output: Folder for one folder a fold, answers.csv and crossvalidate.json.
    """

    fit: Path = Path("configs/train.yaml")
    split: Path = Path("configs/split-grouped.yaml")
    output: Path = Path("results/grouped")


def cross_validate(config: CrossValidateConfig, fit_config: FitConfig, split: SplitConfig) -> Path:
    """Train on all folds but one and predict that one, for each fold.

    A fold that is done is not done again, and an interrupted one goes on from its last epoch.

    Args:
        config: Output folder.
        fit_config: The training; its split and output are replaced.
        split: The split; protocol and fold are replaced.

    Returns:
        Path of answers.csv: path, label, group, fold, domain_distance, in_domain, and one column
        of probability for each class.

    Raises:
        ValueError: The split or the training cannot be made.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The output cannot be written.
    """
    record_file = config.output / "crossvalidate.json"
    record_file.unlink(missing_ok=True)  # what is not complete must not be evaluated
    rows: list[list[str]] = []
    records = []
    names: list[str] = []
    for fold in range(split.folds):
        folder = config.output / f"fold-{fold}"
        of_split = dataclasses.replace(
            split, protocol="grouped", fold=fold, scans=fit_config.scans, output=folder / "split"
        )
        facts = write_split(of_split)
        key = {
            "settings": settings_hash(fit_config),
            "split": hashlib.sha256((folder / "split/split.csv").read_bytes()).hexdigest(),
            "data": facts["data_hash"],
        }
        done = folder / "fold.json"
        if not done.is_file() or json.loads(done.read_text())["key"] != key:
            logger.info("fold %d of %d", fold + 1, split.folds)
            started = time.monotonic()
            of_fold = dataclasses.replace(
                fit_config, split=folder / "split/split.csv", output=folder / "train"
            )
            # By this tag `training compare` leaves the folds out: no one of them is a
            # candidate.
            with tagged_runs({FOLD_TAG: f"{fold + 1} of {split.folds}"}):
                _predict_fold(of_fold, folder, fold)
            write_json(done, {"key": key, "seconds": time.monotonic() - started})
        record = json.loads(done.read_text())
        records.append(record | {"run": json.loads((folder / "train/run.json").read_text())["run"]})
        with (folder / "answers.csv").open(newline="", encoding="utf-8") as file:
            header, *answers = csv.reader(file)
        names = header[len(COLUMNS) :]
        rows += answers
    with (
        replaced(config.output / "answers.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([[*COLUMNS, *names], *rows])
    write_json(
        record_file,
        {"settings": settings_hash(fit_config), "folds": records, "seed": split.seed},
    )
    return config.output / "answers.csv"


def _predict_fold(config: FitConfig, folder: Path, fold: int) -> None:
    fit(config)
    model, facts = load_trained(config.output)
    test = read_split(config.scans, config.split, facts.window)["test"]
    outputs = predict_outputs(model, test.pixels, f"test scans of fold {fold}")
    distances = outputs["domain_distance"][:, 0]
    with (
        replaced(folder / "answers.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *test.names])
        for index, path in enumerate(test.paths):
            writer.writerow([
                path, test.names[test.labels[index]], test.groups[index], fold,
                f"{distances[index]:.6g}", int(distances[index] <= facts.domain_threshold),
                *(f"{value:.8g}" for value in outputs["probabilities"][index]),
            ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train on all folds but one and predict that one, for each fold."""
    parser = command_parser("training crossvalidate", main.__doc__, "configs/crossvalidate.yaml")
    parser.add_argument("--fit", type=Path, help="instead of the config's")
    parser.add_argument("--output", type=Path, help="instead of the config's")
    parser.add_argument("--group-file", type=Path, help="instead of the split config's")
    parser.add_argument("--group-columns", nargs="+", help="instead of the split config's")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(CrossValidateConfig, arguments.config)
        given = {key: getattr(arguments, key) for key in ("fit", "output")}
        config = dataclasses.replace(config, **{key: path for key, path in given.items() if path})
        split = load_config(SplitConfig, config.split)
        if arguments.group_file:
            split = dataclasses.replace(split, group_file=arguments.group_file)
        if arguments.group_columns:
            split = dataclasses.replace(split, group_columns=tuple(arguments.group_columns))
        path = cross_validate(config, load_config(FitConfig, config.fit), split)
        logger.info("answers of all folds: %s", path)

    return run_command(work, interrupted="interrupted: run the same command again to go on")
