from __future__ import annotations

import json

import pytest

from tests.support.slices import annotation
from training.data.phantom import LABELS, dicom_from_phantom, make_phantom
from training.score.shortcuts.report import check_shortcuts, report_lines

pytestmark = pytest.mark.xdist_group("shortcuts")  # its fixtures are made once


@pytest.fixture(scope="module")
def checked(trained, tmp_path_factory) -> dict:
    from training.data.dataset import read_split
    from training.network.vgg16 import load_trained

    folder = tmp_path_factory.mktemp("boxes")
    (folder / "annotations").mkdir()
    for seed in range(2):
        phantom = make_phantom(LABELS[0], seed)
        dataset = dicom_from_phantom(phantom)
        dataset.save_as(folder / f"{seed}.dcm", enforce_file_format=True)
        text = annotation((LABELS[0], phantom.lesion_box))
        (folder / "annotations" / f"{dataset.SOPInstanceUID}.xml").write_text(text)
    model, facts = load_trained(trained.model)
    test = read_split(trained.scans, trained.split, facts.window)["test"]
    alone = check_shortcuts(model, facts, test)
    return {"alone": alone, "pointed": check_shortcuts(model, facts, test, folder)}


def test_all_checks_of_a_model_are_plain_values(checked):
    found = json.loads(json.dumps(checked["pointed"], allow_nan=False))
    assert found == checked["pointed"]
    assert found["scores"]["n"] == 12
    assert set(found["scores"]["perturbed"]) == {
        "brightness_equalized", "outside_blanked", "lungs_blanked", "jpeg"
    }  # fmt: skip
    for perturbed in found["scores"]["perturbed"].values():
        # A scan may have the wanted brightness, or no outside, already.
        assert 0 < perturbed["changed"] <= 12
        assert perturbed["mean_change"] > 0
    assert found["map"]["n"] + found["map"]["no_evidence"] == 12
    assert found["pointing"]["n"] == found["pointing"]["patients"] == 2
    assert checked["alone"] == found | {"pointing": None}


@pytest.mark.parametrize("which", ["alone", "pointed"])
def test_report_tables_are_whole(checked, which):
    lines = report_lines(checked[which])
    assert not any("nan" in line or "None" in line for line in lines)
    tables = "\n".join(lines).split("\n\n")
    tables = [table.splitlines() for table in tables if table.startswith("|")]
    assert len(tables) == {"alone": 2, "pointed": 3}[which]
    for table in tables:
        assert len({row.count("|") for row in table}) == 1
        assert set(table[1]) == set("| -")
    assert len(tables[0]) == 2 + 5


def test_report_says_what_was_not_measured_and_what_was_skipped(checked):
    assert report_lines(checked["alone"])[-1].endswith("not measured (no annotated slices given).")
    pointed = report_lines(checked["pointed"])
    assert pointed[-1] == "Skipped: 0 no slice, 0 no box, 0 other class, 0 outside frame."
    assert any("2 annotated slices of 2 patients" in line for line in pointed)


def test_report_says_whether_blanked_lungs_lower_the_accuracy(checked):
    found = json.loads(json.dumps(checked["alone"]))
    difference = found["scores"]["perturbed"]["lungs_blanked"]["difference"]["accuracy"]
    difference.update(value=-0.3, low=-0.4, high=-0.2)
    assert any("Accuracy drops, as it must." in line for line in report_lines(found))
    difference.update(high=0.1)
    assert any("do not come from the lungs" in line for line in report_lines(found))
