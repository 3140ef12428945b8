"""Model variants to measure: which are there, how each is served, and its scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt
from tqdm import tqdm

from benchmarks.engines import Infer
from chestct.contract import Window
from export.publish.config_pbtxt import engine_of, parsed_config
from serving.local import uses_gpu
from training.common.atomic_io import sha256_of
from training.common.config import config_class
from training.common.metrics import score
from training.data.dataset import ScanSet, evenly_spread, read_split

SCORING_BATCH = 8
SCORES = ("accuracy", "macro_auroc")  # keys of `scores_of`
THREADS = "intra_op_thread_count"  # the parameter of config.pbtxt


@config_class
class MeasuredConfig:
    """Settings shared by the benchmarks of the variants.

    Attributes:
        model: Folder that `training fit` wrote.
        variants: Folder of each variant, as {name: folder}; those that are not there are named in
            the result.
        repository: Triton's model repository; `chestct_NAME` serves the variant NAME.
        scans: Folder of scans to send.
        split: Labelled scans, CSV of `training split`; its test rows give each row
            its accuracy.
        most_scored: At most so many of them, evenly spread.
        seed: Of the random order in which things are measured.
    """

    model: Path = Path("results/train")
    variants: dict[str, Path] = field(
        default_factory=lambda: {
            "fp32": Path("results/export"),
            "int8": Path("results/int8"),
            "compressed": Path("results/compressed"),
        }
    )
    repository: Path = Path("model_repository")
    scans: Path = Path("data/scans")
    split: Path = Path("results/split/split.csv")
    most_scored: PositiveInt = 400
    seed: int = 7

    def labelled(self, window: Window) -> ScanSet:
        """The test scans that each row is scored on, in the window of the model.

        Raises:
            ValueError: There is no split file, or it names no test scan.
            chestct.errors.ScanDecodeError: A scan cannot be read.
        """
        return spread(read_split(self.scans, self.split, window)["test"], self.most_scored)


@dataclass(frozen=True)
class Variant:
    """One model file, and the model of Triton's repository that serves it.

    Attributes:
        name: `fp32`, `int8`, `compressed`, ...
        folder: Holds `model.onnx`.
        repository: Triton's model repository.
        config: What Triton reads of its model there, a `ModelConfig`; None if it is not served.
    """

    name: str
    folder: Path
    repository: Path
    config: Any

    @property
    def served_as(self) -> str:
        """Name of the model in the repository."""
        return f"chestct_{self.name}"

    @property
    def size_mb(self) -> float:
        """Megabytes of the model file."""
        return (self.folder / "model.onnx").stat().st_size / 1e6

    def settings(self) -> dict[str, Any]:
        """How Triton runs it: engine, threads (0 = one a core), instances, batching."""
        batching = self.config.HasField("dynamic_batching")
        parameters = self.config.parameters
        # Looking a key up in a protobuf map adds it.
        threads = parameters[THREADS].string_value if THREADS in parameters else "0"
        return {
            "engine": engine_of(self.config),
            "threads": int(threads),
            "instances": sum(group.count for group in self.config.instance_group),
            "max_batch_size": self.config.max_batch_size,
            "dynamic_batching": batching,
            "max_queue_delay_us": (
                self.config.dynamic_batching.max_queue_delay_microseconds if batching else 0
            ),
        }


def find_variants(
    folders: Mapping[str, Path], repository: Path
) -> tuple[list[Variant], dict[str, str]]:
    """The variants that are there, and the reason for each that is missing.

    Raises:
        ValueError: There is none, or the repository serves another file than a variant's folder
            holds.
    """
    variants, missing = [], {}
    for name, folder in folders.items():
        variant = Variant(name, folder, repository, None)
        if not (variant.folder / "model.onnx").is_file():
            missing[name] = f"{variant.folder} holds no model.onnx"
            continue
        config = _served_config(repository / variant.served_as)
        if config is None:
            missing[variant.served_as] = f"{repository} holds no such model"
        else:
            version = config.version_policy.specific.versions[0]
            served = repository / variant.served_as / str(version) / "model.onnx"
            ours = variant.folder / "model.onnx"
            if served.is_file() and sha256_of(served) != sha256_of(ours):
                raise ValueError(
                    f"{served} is another file than {ours}; publish again: python -m "
                    "export repository"
                )
        variants.append(Variant(name, variant.folder, repository, config))
    if not variants:
        raise ValueError(
            f"no variant of the model is there ({'; '.join(missing.values())}); run python -m "
            "export onnx"
        )
    return variants, missing


def _served_config(folder: Path) -> Any:
    """The config that Triton reads of a model, None where there is none."""
    names = ["config.pbtxt"] if uses_gpu() else ["configs/cpu.pbtxt", "config.pbtxt"]
    for name in names:
        if (folder / name).is_file():
            return parsed_config((folder / name).read_text(encoding="utf-8"))
    return None


def scores_of(infer: Infer, scans: ScanSet, title: str) -> dict[str, Any]:
    """`accuracy` and `macro_auroc` of labelled scans, each with its 95 % interval.

    Wilson for the accuracy, bootstrap over groups for the AUROC: see
    `training.common.metrics.score`.
    """
    starts = tqdm(range(0, len(scans), SCORING_BATCH), title, unit="batch", disable=None)
    answers = (infer(scans.pixels[start : start + SCORING_BATCH]) for start in starts)
    probabilities = np.concatenate([answer["probabilities"] for answer in answers])
    found = score(probabilities, scans.labels, scans.groups, scans.names)
    return {key: _rounded(found[key]) for key in SCORES}


def _rounded(interval: Mapping[str, float]) -> dict[str, float | None]:
    """Value, low and high; None where undefined, because JSON has no NaN."""
    return {
        key: None if math.isnan(interval[key]) else round(interval[key], 4)
        for key in ("value", "low", "high")
    }


def spread(scans: ScanSet, count: int) -> ScanSet:
    """At most `count` of some scans, evenly spread."""
    keep = np.zeros(len(scans), bool)
    keep[evenly_spread(len(scans), count)] = True
    return scans.where(keep)


def describe_interval(interval: dict[str, float | None]) -> str:
    """A value with its interval, `0.990 (0.981 to 0.998)`."""
    if interval["value"] is None or interval["low"] is None:
        return "undefined"
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def median_interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """The median and its 95 % percentile bootstrap interval over 1000 resamples."""
    array = np.asarray(values)
    drawn = np.random.default_rng(seed).choice(array, (1000, len(array)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {
        "value": round(float(np.median(array)), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
    }


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The points of `export compress` with their test AUROC; an empty list where there are none.

    Each has `name`, `latency_ms` (in-process, OpenVINO, batch 1), `macro_auroc` and `chosen`.
    """
    if not path.is_file():
        return []
    return [
        {key: point[key] for key in ("name", "latency_ms", "chosen")}
        | {"macro_auroc": _rounded(point["test"]["macro_auroc"])}
        for point in json.loads(path.read_text(encoding="utf-8"))["points"]
    ]
