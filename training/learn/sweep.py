"""Grid search over training settings, ranked by scores on the validation scans.

Each point is one `training fit` in a process of its own, so that one that runs out of memory
or fails does not take the others with it. The test scans are never scored. `dvc exp run` would run
whole stages of the pipeline for each point and keep every model a second time in its cache.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from training.common.atomic_io import write_json
from training.common.cli import command_parser, run_command
from training.common.config import (
    Name,
    config_class,
    config_from_mapping,
    load_config,
    plain_settings,
    read_mapping,
)
from training.learn.fit import FitConfig, fit
from training.track.compare import print_comparison
from training.track.mlflow_run import tagged_runs
from training.track.ranking import CompareConfig

logger = logging.getLogger(__name__)

GRACE_S = 10
Values = Annotated[list[Any], Field(min_length=1)]


@config_class
class SweepConfig:
    """Settings of `training sweep`.

    Attributes:
        name: The tag `sweep` of its runs, for `python -m training compare --sweep NAME`.
        base: Config of `training fit` for everything that the grid leaves alone.
        grid: For each key of that config the values to try; `augmentation.contrast` is a key of a
            mapping in it. Every combination is a point.
        metric: Score on the validation scans by which the points are listed at the end.
        output: Folder for one folder a point, and for the comparison.
    """

    name: Name = "sweep"
    base: Path = Path("configs/train.yaml")
    grid: Annotated[dict[str, Values], Field(min_length=1)] = field(kw_only=True)
    metric: Name = "balanced_accuracy"
    output: Path = Path("results/sweep")

    def __post_init__(self) -> None:
        """Refuse to try folders.

        Raises:
            ValueError: The grid names a folder.
        """
        for key in ("output", "cache"):
            if key in self.grid:
                raise ValueError(f"grid: {key} says where files are kept; expected what decides")


@dataclass(frozen=True)
class Point:
    """One training of a sweep.

    Attributes:
        settings: The values of the grid's keys.
        fit: The whole config of the training; its output is the folder of the point.
    """

    settings: Mapping[str, Any]
    fit: FitConfig

    @property
    def record(self) -> Path:
        """The file that says that the point is finished."""
        return self.fit.output / "point.json"

    def __str__(self) -> str:
        """The settings on one line."""
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())


def points_of(config: SweepConfig) -> list[Point]:
    """All points of the grid, the last key varying fastest.

    The folder of a point ends in a hash of its whole config, of the split file and of the scans, so
    that a finished point is known again, and another one is never taken for it.

    Raises:
        ValueError: The base config or a value of the grid cannot be used.
        OSError: The split file or a scan cannot be read.
    """
    base = read_mapping(config.base)
    data: dict[tuple[Path, Path], str] = {}
    points = []
    for values in itertools.product(*config.grid.values()):
        settings = dict(zip(config.grid, values, strict=True))
        raw = copy.deepcopy(base)
        for key, value in settings.items():
            outer, dot, inner = key.partition(".")
            if not dot:
                raw[key] = value
            elif isinstance(raw.setdefault(outer, {}), dict):
                raw[outer][inner] = value
            else:
                raise ValueError(f"grid: {key}: {outer} is {raw[outer]!r}; expected a mapping")
        whole = config_from_mapping(FitConfig, raw, config.base)
        place = (whole.scans, whole.split)
        if place not in data:
            data[place] = _data_sha256(*place)
        decides = plain_settings(whole, without=("output", "cache", "scans", "split"))
        key = json.dumps([decides, data[place]], sort_keys=True)
        words = "_".join(f"{key}-{value}" for key, value in settings.items())
        words = re.sub(r"[^\w.-]+", "-", words)[:80]
        folder = config.output / f"{words}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        points.append(Point(settings, dataclasses.replace(whole, output=folder)))
    return points


def _data_sha256(scans: Path, split: Path) -> str:
    """Hash over the split file and the files that it names."""
    try:
        text = split.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{split}: no such file; run python -m training split") from error
    digest = hashlib.sha256(text)
    for row in csv.DictReader(text.decode("utf-8").splitlines()):
        if not row.get("path"):
            raise ValueError(f"{split}: expected rows with the columns path,label,split,group")
        digest.update(hashlib.sha256((scans / row["path"]).read_bytes()).digest())
    return digest.hexdigest()


def sweep(config: SweepConfig) -> list[str]:
    """Train every point that is not finished; what failed, one sentence each.

    Raises:
        ValueError: The config cannot be used; nothing was trained.
        OSError: The split, a scan or the output cannot be used.
    """
    points = points_of(config)
    started, failures = time.monotonic(), []
    trained = 0
    for index, point in enumerate(points, start=1):
        where = f"point {index} of {len(points)}"
        if point.record.is_file():
            logger.info("%s: finished before: %s", where, point)
            continue
        elapsed_s = time.monotonic() - started
        waiting = sum(not later.record.is_file() for later in points[index - 1 :])
        rest = f", about {_minutes(elapsed_s / trained * waiting)} left" if trained else ""
        logger.info("%s (%s so far%s): %s", where, _minutes(elapsed_s), rest, point)
        failure = _trained_apart(point, {"sweep": config.name})
        trained += 1
        if failure:
            failures.append(f"{where} ({point}) {failure}")
            logger.info("%s", failures[-1])
            continue
        run = json.loads((point.fit.output / "run.json").read_text())["run"]
        write_json(point.record, {"run": run, "settings": dict(point.settings)})
    logger.info(
        "%d points in %s, %d of them failed",
        len(points), _minutes(time.monotonic() - started), len(failures),
    )  # fmt: skip
    return failures


def _trained_apart(point: Point, tags: Mapping[str, str]) -> str | None:
    """Train in a process of its own; returns the reason of a failure."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_train, args=(point.fit, tags))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        # A terminal interrupts the child as well, which then ends its run in MLflow.
        process.join(GRACE_S)
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGINT)
            process.join(3 * GRACE_S)
            process.kill()
        raise
    code = process.exitcode or 0
    if code == 130:
        raise KeyboardInterrupt
    if code < 0:
        return f"was ended by signal {-code}; 9 mostly means that memory ran out"
    return "failed; its message stands above" if code else None


def _train(config: FitConfig, tags: Mapping[str, str]) -> None:
    def work() -> None:
        with tagged_runs(tags):
            fit(config)

    sys.exit(run_command(work, interrupted="the training of this point stops here"))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def main(argv: list[str] | None = None) -> int:
    """Train every point of a grid and list the points by their validation score."""
    parser = command_parser("training sweep", main.__doc__, "configs/sweep.yaml")
    arguments = parser.parse_args(argv)

    def work() -> int:
        config = load_config(SweepConfig, arguments.config)
        failures = sweep(config)
        for failure in failures:
            sys.stderr.write(f"error: {failure}\n")
        print_comparison(
            CompareConfig(metric=config.metric, sweep=config.name, output=config.output)
        )
        return 1 if failures else 0

    again = "interrupted: run the same command again to go on from the last epoch"
    return run_command(work, interrupted=again)
