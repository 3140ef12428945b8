from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import mlflow
import numpy as np
import pytest

from training.data.dataset import read_split
from training.score.baselines import BASELINES
from training.score.evaluate import EvaluateConfig, Sources, evaluate, main
from training.score.report import report

pytestmark = pytest.mark.xdist_group("evaluate")  # its fixtures are made once


def config_of(trained, output) -> EvaluateConfig:
    return EvaluateConfig(
        scans=trained.scans,
        split=trained.split,
        protocol=trained.split.with_name("split.json"),
        model=trained.model,
        output=output,
    )


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluate") / "evaluate"
    external = tmp_path_factory.mktemp("external")
    for name, label in (("normal", "normal"), ("malignant", "adenocarcinoma")):
        shutil.copytree(trained.scans / "test" / label, external / name)
    return output, evaluate(config_of(trained, output), Sources(external=external))


def test_files_and_protocols(evaluated):
    output, metrics = evaluated
    assert {path.name for path in output.iterdir()} == {
        "metrics.json", "scores.json", "report.md", "predictions.csv",
        "confusion.png", "roc.png", "reliability.png", "external_malignant-confusion.png",
        "external_malignant-roc.png", "external_malignant-reliability.png",
    }  # fmt: skip
    assert list(metrics["protocols"]) == ["official", "external_malignant"]
    assert metrics["protocols"]["official"]["model"]["n"] == 12


def test_baselines_stand_beside_the_model(evaluated, trained):
    answers = evaluated[1]["protocols"]["official"]
    assert answers["majority"]["accuracy"]["value"] == 0.25
    assert answers["majority"]["macro_auroc"]["value"] == 0.5
    sets = read_split(trained.scans, trained.split)
    for name, baseline in BASELINES.items():
        called = baseline(sets["train"], sets["test"].pixels).argmax(axis=1)
        right = np.mean(called == sets["test"].labels)
        assert answers[name]["accuracy"]["value"] == pytest.approx(right), name


def test_predictions_agree_with_the_scores(evaluated):
    output, metrics = evaluated
    with (output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    right = np.mean([row["actual"] == row["predicted"] for row in rows])
    assert right == pytest.approx(metrics["protocols"]["official"]["model"]["accuracy"]["value"])
    assert sum(float(rows[0][name]) for name in metrics["labels"]) == pytest.approx(1, abs=1e-5)


def test_scores_are_in_the_run_of_the_training(evaluated):
    _, metrics = evaluated
    logged = mlflow.get_run(metrics["run"]).data.metrics
    expected = metrics["protocols"]["official"]["model"]["accuracy"]["value"]
    assert logged["official.accuracy"] == pytest.approx(expected, abs=1e-4)
    run = mlflow.get_run(metrics["run"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "vgg16-block5")


def test_external_source_is_scored_as_normal_against_the_rest(evaluated):
    found = evaluated[1]["protocols"]["external_malignant"]
    assert found["model"]["n"] == 6
    assert list(found["model"]["classes"]) == ["normal", "malignant"]
    area = found["model"]["normal_against_rest_auroc"]
    assert area["low"] <= area["value"] <= area["high"]
    assert found["majority"]["macro_auroc"]["value"] == 0.5


def test_report_names_n_and_intervals(evaluated):
    text = report(evaluated[1])
    assert "| official | 12 | 12 | model |" in text
    assert "| majority | 0.250 (" in text
    assert "sensitivity at 95 % specificity" in text
    assert "before temperature" in text
    assert "## Shortcuts\n\n12 scans in 12 groups" in text
    assert "## Out of domain" not in text  # nothing foreign was given


def test_duplicates_of_training_scans_are_scored_apart(trained, tmp_path):
    rows = [line.split(",") for line in trained.split.read_text().splitlines()]
    train_group = next(row[3] for row in rows if row[2] == "train")
    duplicate = next(row for row in rows if row[2] == "test")
    duplicate[3] = train_group
    (tmp_path / "split.csv").write_text("\n".join(",".join(row) for row in rows))
    (tmp_path / "split.json").write_text(json.dumps({"protocol": "official"}))
    config = dataclasses.replace(
        config_of(trained, tmp_path / "evaluate"),
        split=tmp_path / "split.csv",
        protocol=tmp_path / "split.json",
    )
    metrics = evaluate(config)
    sizes = {name: answers["model"]["n"] for name, answers in metrics["protocols"].items()}
    assert sizes == {"official": 12, "official_without_duplicates": 11}


def test_one_fold_of_a_grouped_split_is_not_called_its_cross_validation(trained, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"protocol": "grouped"}))
    config = dataclasses.replace(
        config_of(trained, tmp_path / "evaluate"), protocol=tmp_path / "split.json"
    )
    assert list(evaluate(config)["protocols"]) == ["grouped_fold"]


def test_external_folder_without_normal_is_refused(trained, tmp_path):
    shutil.copytree(trained.scans / "test" / "normal", tmp_path / "external" / "benign")
    with pytest.raises(ValueError, match="expected 'normal' in both"):
        evaluate(config_of(trained, tmp_path / "out"), Sources(external=tmp_path / "external"))
    assert not (tmp_path / "out").exists()


def test_external_protocol_needs_its_folder(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--protocol", "external"])
    assert left.value.code == 2
    assert "needs --external FOLDER" in capsys.readouterr().err
