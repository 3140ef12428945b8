"""Evaluate a trained model under each protocol, beside baselines that need no network."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.common.atomic_io import replaced, without_nan, write_json
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.data.dataset import predict_outputs, read_split
from training.network.vgg16 import load_trained
from training.score.ood import check_domain
from training.score.protocols import (
    CROSS_VALIDATE,
    Protocol,
    external_protocols,
    grouped_protocols,
    official_protocols,
    read_cross_validation,
)
from training.score.report import HEADLINE, draw_plots, report
from training.score.shortcuts.report import check_shortcuts
from training.track.mlflow_run import tracked_run

logger = logging.getLogger(__name__)

PROTOCOLS = ("official", "grouped", "external", "all")


@config_class
class EvaluateConfig:
    """Settings of `training evaluate`.

    Attributes:
        scans: Folder that the split file's paths are relative to.
        split: CSV with path, label, split, group.
        protocol: How the split was made, the record that `training split` writes beside it.
        model: Folder that `training fit` wrote.
        grouped: Folder that `training crossvalidate` wrote, for the grouped protocol.
        output: Folder for scores and plots.
    """

    scans: Path = Path("data/scans")
    split: Path = Path("results/split/split.csv")
    protocol: Path = Path("results/split/split.json")
    model: Path = Path("results/train")
    grouped: Path = Path("results/grouped")
    output: Path = Path("results/evaluate")


@dataclass(frozen=True)
class Sources:
    """Data scored beside the model's own test split; None leaves it out.

    Attributes:
        grouped: Folder that `training crossvalidate` wrote.
        external: Folder `CLASS/*` of another source; scored as normal against all else.
        foreign: Folder `KIND/*` of what is no axial chest-CT slice and should be rejected.
        chest: Folders of axial chest-CT slices from elsewhere, which should not.
        boxes: Folder of DICOM slices with boxed tumours, for the pointing game.
    """

    grouped: Path | None = None
    external: Path | None = None
    foreign: Path | None = None
    chest: tuple[Path, ...] = ()
    boxes: Path | None = None


def evaluate(config: EvaluateConfig, sources: Sources = Sources()) -> dict[str, Any]:
    """Score the model on its test split and on the other sources, each under its protocol.

    With an official split the first protocols are `official` and `official_without_duplicates`
    (test scans with a near-duplicate in train or valid left out); with a grouped split,
    `grouped_fold`. On the test scans the shortcuts are checked too. Writes `metrics.json`,
    `scores.json` (the headline numbers), `report.md`, `predictions.csv` and plots into
    `config.output`, replaced in one step, and logs them to the training's MLflow run.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: Model, split or a source cannot be used.
        chestct.errors.ScanDecodeError: A scan cannot be read.
        OSError: The output cannot be written.
    """
    model, facts = load_trained(config.model)
    sets = read_split(config.scans, config.split, facts.window)
    test = sets["test"]
    if test.names != facts.class_names:
        raise ValueError(
            f"{config.split} has the classes {test.names}, the model {facts.class_names}; "
            "train again"
        )
    split = json.loads(config.protocol.read_text())
    if sources.grouped is not None:
        require_same_training(sources.grouped, config.model, split.get("data_hash"))
    # `grouped` is the cross-validation, in which every scan is a test scan once.
    name = "grouped_fold" if split["protocol"] == "grouped" else split["protocol"]
    outputs = predict_outputs(model, test.pixels, "test scans")
    protocols = official_protocols(name, facts, sets, outputs["probabilities"])
    if sources.grouped is not None:
        protocols += grouped_protocols(sources.grouped, config.scans, facts)
    if sources.external is not None:
        protocols += external_protocols(model, facts, sets["train"], sources.external)
    metrics: dict[str, Any] = {
        "run": facts.run,
        "data_hash": facts.data_hash,
        "labels": list(facts.class_names),
        "temperature": facts.temperature,
        "intervals": "95 %, bootstrap over groups; of a proportion that is 0 or 1 Wilson over "
        "groups",
        "protocols": {protocol.name: protocol.scores() for protocol in protocols},
        "shortcuts": check_shortcuts(model, facts, test, sources.boxes),
    }
    if sources.foreign is not None:
        paths = [config.scans / path for path in test.paths]
        metrics["domain"] = check_domain(model, facts, paths, sources.foreign, list(sources.chest))
    with replaced(config.output) as folder:
        folder.mkdir()
        write_json(folder / "metrics.json", without_nan(metrics))
        write_json(folder / "scores.json", headline(metrics["protocols"]))
        (folder / "report.md").write_text(report(metrics), encoding="utf-8")
        write_predictions(folder / "predictions.csv", protocols)
        draw_plots(folder, protocols, metrics)
    with tracked_run("evaluate", facts.run) as run:
        for protocol, answers in metrics["protocols"].items():
            run.log_scores(protocol, answers["model"])
        if domain := metrics.get("domain"):
            run.log_metrics({"domain.auroc": domain["auroc"]} | {
                f"domain.{name}.rejected": found["share"]["value"]
                for name, found in (domain["accept"] | domain["reject"]).items()
            })  # fmt: skip
        run.log_file(config.output, "evaluate")
    return metrics


def headline(protocols: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The few numbers of each protocol that DVC compares between commits."""
    found: dict[str, dict[str, float]] = {}
    for protocol, answers in protocols.items():
        numbers = {"n": answers["model"]["n"], "groups": answers["model"]["groups"]}
        for key in HEADLINE:
            interval = answers["model"].get(key)
            if interval is None or math.isnan(interval["value"]):
                continue
            numbers[key] = round(interval["value"], 4)
        numbers["majority_accuracy"] = round(answers["majority"]["accuracy"]["value"], 4)
        found[protocol] = numbers
    return found


def write_predictions(path: Path, protocols: list[Protocol]) -> None:
    """The model's answer to each scan of each protocol with the labels of the first one, as CSV."""
    names = protocols[0].scans.names
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["protocol", "path", "group", "actual", "predicted", *names])
        for protocol in protocols:
            scans = protocol.scans
            if scans.names != names:
                continue
            for index, row in enumerate(protocol.answers["model"]):
                actual, predicted = names[scans.labels[index]], names[int(row.argmax())]
                writer.writerow([
                    protocol.name, scans.paths[index], scans.groups[index], actual, predicted,
                    *(f"{p:.6f}" for p in row),
                ])  # fmt: skip


def require_same_training(folder: Path, model: Path, data_hash: str | None) -> None:
    """Refuse a cross-validation that is missing, or of another training than the model's.

    Args:
        folder: Output of `training crossvalidate`.
        model: Output of `training fit`.
        data_hash: Of the scans that the model was trained on; None where no table tells.

    Raises:
        ValueError: The message says which command to run.
    """
    found = read_cross_validation(folder)
    if found["settings"] != json.loads((model / "run.json").read_text()).get("settings"):
        raise ValueError(f"{folder} was trained with other settings than {model}; {CROSS_VALIDATE}")
    if any(fold["key"]["data"] != data_hash for fold in found["folds"]):
        raise ValueError(f"{folder} was trained on other scans than {model}; {CROSS_VALIDATE}")


def main(argv: list[str] | None = None) -> int:
    """Score the trained model under one protocol or all of them."""
    parser = command_parser("training evaluate", main.__doc__, "configs/evaluate.yaml")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="official",
        help="official: the model's own test split; grouped: also the folds of `training "
        "crossvalidate`; external: also another source; all: whatever is given",
    )
    parser.add_argument("--external", type=Path, help="folder CLASS/* of another source")
    parser.add_argument("--foreign", type=Path, help="folder KIND/* of what is no chest CT")
    parser.add_argument(
        "--chest", type=Path, nargs="+", default=[], help="more axial chest slices, with --foreign"
    )
    parser.add_argument("--boxes", type=Path, help="folder of DICOM slices with boxed tumours")
    parser.add_argument("--output", type=Path, help="instead of the config's")
    arguments = parser.parse_args(argv)
    if arguments.protocol == "external" and arguments.external is None:
        parser.error("--protocol external needs --external FOLDER")
    if arguments.chest and arguments.foreign is None:
        parser.error("--chest needs --foreign FOLDER")

    def work() -> None:
        config = load_config(EvaluateConfig, arguments.config)
        if arguments.output:
            config = dataclasses.replace(config, output=arguments.output)
        sources = Sources(
            grouped=config.grouped if arguments.protocol in ("grouped", "all") else None,
            external=arguments.external,
            foreign=arguments.foreign,
            chest=tuple(arguments.chest),
            boxes=arguments.boxes,
        )
        sys.stdout.write(report(evaluate(config, sources)))

    return run_command(work)
