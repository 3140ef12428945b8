from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from chestct.imaging.sources import list_scans
from training.network.vgg16 import load_trained
from training.score.ood import check_domain, report_lines

pytestmark = pytest.mark.xdist_group("domain")  # its fixtures are made once


@pytest.fixture(scope="module")
def checked(trained, tmp_path_factory):
    """Phantoms are to be accepted; a colour picture, noise and a text file are not."""
    foreign = tmp_path_factory.mktemp("foreign")
    rng = np.random.default_rng(5)
    for name in ("photo", "broken"):
        (foreign / name).mkdir()
    colour = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(colour).resize((256, 256)).save(foreign / "photo" / "colour.png")
    noise = rng.integers(0, 255, (300, 300), dtype=np.uint8)
    Image.fromarray(noise).save(foreign / "photo" / "noise.png")
    (foreign / "broken" / "text.png").write_text("no picture")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "hospital"
    shutil.copytree(trained.scans / "valid" / "normal", elsewhere)
    model, facts = load_trained(trained.model)
    test = list(list_scans(trained.scans / "test"))
    return check_domain(model, facts, test, foreign, [elsewhere])


def test_every_source_is_counted(checked):
    assert {name: found["n"] for name, found in checked["accept"].items()} == {
        "test": 12,
        "hospital": 3,
    }
    counts = {name: found["n"] for name, found in checked["reject"].items()}
    assert counts == {"broken": 1, "photo": 2, "all": 3}


def test_what_cannot_be_read_is_refused_and_colour_is_flagged_by_a_rule(checked):
    broken, photo = checked["reject"]["broken"], checked["reject"]["photo"]
    assert (broken["refused"], broken["rejected"]) == (1, 1)
    assert photo["refused"] == 0
    assert photo["flagged_by_rules"] >= 1
    # A scan that two things speak against is rejected once.
    assert photo["rejected"] <= photo["n"]
    assert checked["reject"]["all"]["rejected"] == broken["rejected"] + photo["rejected"]


def test_rules_accept_phantoms(checked):
    assert checked["accept"]["test"]["flagged_by_rules"] == 0
    assert checked["accept"]["test"]["refused"] == 0


def test_distance_tells_foreign_pictures_apart(checked):
    assert checked["auroc_n"] == [12, 2]
    # A random network sees both pictures of noise farther out than any phantom.
    assert checked["auroc"] == 1


def test_report_holds_every_row(checked):
    text = "\n".join(report_lines(checked))
    assert "| accepted | test | 12 | 0 | 0 |" in text
    assert "| rejected | broken | 1 | 1 | 0 | 0 | 1: 1.000 (" in text


def test_name_of_a_folder_formats_nothing(checked):
    kinds = {"*<b>*": checked["reject"]["broken"]}
    text = "\n".join(report_lines({**checked, "reject": kinds}))
    assert r"| rejected | \*\<b\>\* | 1 |" in text


def test_folder_without_kinds_is_refused(trained, tmp_path):
    model, facts = load_trained(trained.model)
    scans = list(list_scans(trained.scans / "test" / "normal"))
    with pytest.raises(ValueError, match="no folders in it"):
        check_domain(model, facts, scans, tmp_path, [])
