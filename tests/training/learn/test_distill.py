from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from training.common.config import config_from_mapping
from training.data.dataset import read_split
from training.learn.distill import DistillConfig, distill, distillation_loss, lessons_of
from training.learn.fit import FitConfig
from training.network.calibrate import softmax
from training.network.vgg16 import load_trained, map_from, widths_of

pytestmark = pytest.mark.xdist_group("distill")  # its fixtures are made once

TINY = (8, 8, 8, 8, 12, 12, 12, 16, 16, 16, 16, 16, 16)


@pytest.fixture(scope="module")
def config(trained, tmp_path_factory) -> DistillConfig:
    folder = tmp_path_factory.mktemp("distill")
    fit = folder / "train.yaml"
    fit.write_text("weights: random\nepochs: 1\naugmented_copies: 1\n")
    return DistillConfig(
        scans=trained.scans,
        split=trained.split,
        teacher=trained.model,
        fit=fit,
        output=folder / "students",
        cache=folder / "cache",
        students={"tiny": TINY},
        pruning_scans=6,
        epochs=6,
        batch_size=4,
        learning_rate=1e-3,
    )


@pytest.fixture(scope="module")
def student(config):
    [folder] = distill(config)
    return folder


def test_student_is_a_model_of_its_own(config, student):
    model, facts = load_trained(student)
    _, teacher = load_trained(config.teacher)
    assert widths_of(model) == TINY
    assert facts.class_names == teacher.class_names
    assert facts.run != teacher.run
    assert facts.domain_threshold != teacher.domain_threshold
    record = json.loads((student / "student.json").read_text())
    assert record["teacher"] == teacher.run
    assert record["run"] == facts.run


def test_student_comes_nearer_to_the_teacher(student):
    rows = (student / "history.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss")
    losses = [float(row.split(",")[column]) for row in rows[2:]]  # the first is before training
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_domain_threshold_accepts_most_validation_scans(config, student):
    model, facts = load_trained(student)
    valid = read_split(config.scans, config.split)["valid"]
    distances = model.predict_on_batch(valid.pixels)["domain_distance"]
    assert 0.8 <= float((distances <= facts.domain_threshold).mean()) < 1


def test_lessons_hold_the_teachers_maps_of_every_copy(config):
    teacher, facts = load_trained(config.teacher)
    train = read_split(config.scans, config.split, facts.window)["train"]
    fit = FitConfig(augmented_copies=1)
    lessons = lessons_of(teacher, train, fit, config.cache, "float32")
    assert len(lessons) == 2
    assert (lessons[0].scans == train.pixels).all()
    assert not (lessons[1].scans == train.pixels).all()
    wanted = map_from(teacher, 1).predict_on_batch(lessons[1].scans)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(lessons[1].maps, wanted, atol=0.01 * scale)  # cached as float16


def test_loss_is_zero_for_the_teachers_own_answer():
    maps = np.random.default_rng(0).normal(size=(2, 14, 14, 3)).astype(np.float32)
    np.testing.assert_allclose(distillation_loss(2.0, 1.0, 1.0)(maps, maps), 0, atol=1e-6)


def test_loss_is_the_formula():
    rng = np.random.default_rng(0)
    wanted, given = rng.normal((0, 1, 3), size=(2, 2, 14, 14, 3)).astype(np.float32)
    p, q = (softmax(maps.mean(axis=(1, 2)), 2.0) for maps in (wanted, given))
    answer = 4 * (p * np.log(p / q)).sum(axis=1)
    place = 0.5 * np.square(wanted - given).mean(axis=(1, 2, 3)) / 3
    loss = distillation_loss(2.0, map_weight=0.5, map_scale=3.0)
    np.testing.assert_allclose(loss(wanted, given), answer + place, rtol=1e-4)


@pytest.mark.parametrize(
    ("students", "said"),
    [
        ({}, "at least 1 item"),
        ({"a": [1, 2]}, "students.a is .*: expected 13 whole numbers"),
        ({"a": [65, *TINY[1:]]}, "at most"),
        ({"a": 3}, "students.a is 3: expected a list"),
    ],
)
def test_students_that_cannot_be_made_are_refused(students, said):
    with pytest.raises(ValueError, match=said):
        config_from_mapping(DistillConfig, {"students": students}, Path("distill.yaml"))
