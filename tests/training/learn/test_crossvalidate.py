from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections import Counter

import mlflow
import pytest
import yaml

import training.learn.crossvalidate
from training.data.split import SplitConfig
from training.learn.crossvalidate import CrossValidateConfig, cross_validate
from training.learn.fit import FitConfig, settings_hash
from training.network.vgg16 import load_trained
from training.score.evaluate import EvaluateConfig, Sources, evaluate, main
from training.score.protocols import grouped_protocols, read_cross_validation

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


def test_grouped_protocol_holds_the_answers_of_all_folds(settings, answers, trained):
    facts = load_trained(trained.model)[1]
    whole, distinct = grouped_protocols(settings[0].output, trained.scans, facts)
    assert (whole.name, distinct.name) == ("grouped", "grouped_distinct")
    assert len(whole.scans) == len(distinct.scans) == 44  # phantoms are all different
    by_path = {row["path"]: float(row["normal"]) for row in answers}
    normal = whole.scans.names.index("normal")
    for path, row in zip(whole.scans.paths, whole.answers["model"], strict=True):
        assert row[normal] == pytest.approx(by_path[path], abs=1e-6)


@pytest.fixture
def own(settings, answers, trained, tmp_path) -> EvaluateConfig:
    """A model with the settings of the folds."""
    model = shutil.copytree(trained.model, tmp_path / "train")
    record = json.loads((model / "run.json").read_text())
    (model / "run.json").write_text(json.dumps(record | {"settings": settings_hash(settings[1])}))
    return EvaluateConfig(
        scans=trained.scans, split=trained.split, model=model, grouped=settings[0].output,
        protocol=trained.split.with_name("split.json"), output=tmp_path / "evaluate",
    )  # fmt: skip


def test_evaluation_reads_the_folds_and_trains_nothing(own, tmp_path):
    config = {key: str(path) for key, path in dataclasses.asdict(own).items()}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(config))
    before = {path: path.stat().st_mtime_ns for path in own.grouped.rglob("*")}
    assert main(["--config", str(tmp_path / "evaluate.yaml"), "--protocol", "grouped"]) == 0
    metrics = json.loads((own.output / "metrics.json").read_text())
    assert list(metrics["protocols"]) == ["official", "grouped", "grouped_distinct"]
    assert metrics["protocols"]["grouped"]["model"]["n"] == 44
    assert mlflow.get_run(metrics["run"]).data.metrics["grouped.n"] == 44
    assert {path: path.stat().st_mtime_ns for path in own.grouped.rglob("*")} == before


def test_folds_of_another_training_are_refused_with_the_command(own, trained, tmp_path):
    remedy = "run python -m training crossvalidate with the config"
    sources = Sources(grouped=own.grouped)
    with pytest.raises(ValueError, match=f"was trained with other settings than .*; {remedy}"):
        evaluate(dataclasses.replace(own, model=trained.model), sources)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"protocol": "official", "data_hash": "of other scans"}))
    with pytest.raises(ValueError, match=f"was trained on other scans than .*; {remedy}"):
        evaluate(dataclasses.replace(own, protocol=split), sources)
    with pytest.raises(ValueError, match=rf"crossvalidate\.json: no such file; {remedy}"):
        evaluate(own, Sources(grouped=tmp_path / "nothing"))
    assert not own.output.exists()


def test_an_interrupted_cross_validation_cannot_be_evaluated(
    settings, answers, tmp_path, monkeypatch
):
    config, fit, split = settings
    config = dataclasses.replace(
        config, output=shutil.copytree(config.output, tmp_path / "grouped")
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.learn.crossvalidate, "_predict_fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(config, dataclasses.replace(fit, head_regularisation=0.3), split)
    with pytest.raises(ValueError, match=r"crossvalidate\.json: no such file; run python"):
        read_cross_validation(config.output)


def test_folder_without_answers_names_the_command(trained, tmp_path):
    facts = load_trained(trained.model)[1]
    with pytest.raises(ValueError, match=r"run python -m training crossvalidate"):
        grouped_protocols(tmp_path, trained.scans, facts)
