from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections import Counter

import mlflow
import pytest

from training.data.split import SplitConfig
from training.learn.crossvalidate import CrossValidateConfig, cross_validate
from training.learn.fit import FitConfig
from training.network.vgg16 import load_trained
from training.score.evaluate import EvaluateConfig, Sources, crossvalidated, evaluate
from training.score.protocols import grouped_protocols

pytestmark = pytest.mark.xdist_group("crossvalidate")  # its fixtures are made once


@pytest.fixture(scope="module")
def settings(trained, tmp_path_factory) -> tuple[CrossValidateConfig, FitConfig, SplitConfig]:
    """Three folds of the phantoms, the head alone, with the settings of `trained` otherwise."""
    folder = tmp_path_factory.mktemp("crossvalidate")
    groups = folder / "groups.csv"
    rows = [line.split(",") for line in trained.split.read_text().splitlines()[1:]]
    groups.write_text("path,near_dup_group\n" + "".join(f"{row[0]},{row[3]}\n" for row in rows))
    fit = FitConfig(
        scans=trained.scans, cache=folder / "cache", weights="random", epochs=0, augmented_copies=0
    )
    split = SplitConfig(table=folder / "none.json", groups=groups, folds=3)
    return CrossValidateConfig(output=folder / "grouped"), fit, split


@pytest.fixture(scope="module")
def answers(settings) -> list[dict[str, str]]:
    with cross_validate(*settings).open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_scan_is_answered_once_by_a_fold_that_has_not_seen_it(settings, answers):
    paths = Counter(row["path"] for row in answers)
    assert len(paths) == 44
    assert set(paths.values()) == {1}
    for fold in range(3):
        with (settings[0].output / f"fold-{fold}/split/split.csv").open(newline="") as file:
            of_fold = {row["path"]: row["split"] for row in csv.DictReader(file)}
        mine = [row["path"] for row in answers if row["fold"] == str(fold)]
        assert mine
        assert {of_fold[path] for path in mine} == {"test"}
    classes = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")
    for row in answers:
        assert sum(float(row[name]) for name in classes) == pytest.approx(1, abs=1e-5)


def test_second_call_trains_nothing_and_other_settings_train_anew(settings, answers, tmp_path):
    config, fit, split = settings
    config = dataclasses.replace(
        config, output=shutil.copytree(config.output, tmp_path / "grouped")
    )

    def runs() -> list[str]:
        files = [config.output / f"fold-{fold}/train/run.json" for fold in range(3)]
        return [json.loads(file.read_text())["run"] for file in files]

    before = runs()
    cross_validate(config, fit, split)
    assert runs() == before
    cross_validate(config, dataclasses.replace(fit, head_regularisation=0.2), split)
    assert not set(runs()) & set(before)


def test_runs_of_the_folds_are_marked(settings, answers):
    record = json.loads((settings[0].output / "crossvalidate.json").read_text())
    tags = [mlflow.get_run(fold["run"]).data.tags["fold"] for fold in record["folds"]]
    assert tags == ["1 of 3", "2 of 3", "3 of 3"]


def test_grouped_protocol_scores_the_answers_of_all_folds(settings, answers, trained, tmp_path):
    facts = load_trained(trained.model)[1]
    whole, distinct = grouped_protocols(settings[0].output, trained.scans, facts)
    assert (whole.name, distinct.name) == ("grouped", "grouped_distinct")
    assert len(whole.scans) == len(distinct.scans) == 44  # phantoms are all different
    by_path = {row["path"]: float(row["normal"]) for row in answers}
    normal = whole.scans.names.index("normal")
    for path, row in zip(whole.scans.paths, whole.answers["model"], strict=True):
        assert row[normal] == pytest.approx(by_path[path], abs=1e-6)
    config = EvaluateConfig(
        scans=trained.scans, split=trained.split, model=trained.model,
        protocol=trained.split.with_name("split.json"), output=tmp_path / "evaluate",
    )  # fmt: skip
    metrics = evaluate(config, Sources(grouped=settings[0].output))
    assert list(metrics["protocols"]) == ["official", "grouped", "grouped_distinct"]
    assert metrics["protocols"]["grouped"]["model"]["n"] == 44
    assert mlflow.get_run(facts.run).data.metrics["grouped.n"] == 44


def test_model_of_other_settings_is_refused(settings, trained, tmp_path):
    (tmp_path / "train.yaml").write_text("weights: random\nepochs: 3\n")
    (tmp_path / "crossvalidate.yaml").write_text(f"fit: {tmp_path / 'train.yaml'}\n")
    config = EvaluateConfig(model=trained.model, crossvalidate=tmp_path / "crossvalidate.yaml")
    with pytest.raises(ValueError, match="trained with other settings"):
        crossvalidated(config, {})


def test_folder_without_answers_names_the_command(trained, tmp_path):
    facts = load_trained(trained.model)[1]
    with pytest.raises(ValueError, match=r"run python -m training crossvalidate"):
        grouped_protocols(tmp_path, trained.scans, facts)
