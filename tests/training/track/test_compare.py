from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from training.track.compare import main
from training.track.compare_plots import axis_of, parallel_coordinates, scatter_plots, write_page
from training.track.mlflow_run import EXPERIMENT, FOLD_TAG, tagged_runs, tracked_run
from training.track.ranking import (
    CompareConfig,
    Comparison,
    Row,
    flattened,
    rank_runs,
    shortened,
)

pytestmark = pytest.mark.xdist_group("compare")  # its fixtures are made once

# Of the four comparable runs: name, balanced accuracy, Brier, learning rate, contrast, weights.
RUNS = [
    ("one", 0.70, 0.40, 1e-5, 0.2, "imagenet"),
    ("two", 0.80, 0.30, 1e-4, 0.4, "brain-mri"),
    ("three", 0.60, 0.20, 1e-3, 0.2, "brain-mri"),
    ("<b>four</b>", 0.75, 0.35, 1e-4, 0.2, "imagenet"),
]


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.06, "high": value + 0.1}


def store_model(folder: Path, run) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("model.keras", "facts.json"):
        (folder / name).write_text(run.run_id)
    run.log_file(folder, "model")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A store of its own with runs of all sorts; gives their identifiers by name."""
    folder = tmp_path_factory.mktemp("compare")
    before = os.environ["MLFLOW_TRACKING_URI"]
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    mlflow.create_experiment(EXPERIMENT, artifact_location=(folder / "artifacts").as_uri())
    found = {}
    with tracked_run("demo $x^") as run:
        run.log_scores("valid", {"n": 12, "balanced_accuracy": interval(0.99)})
        found["demo"] = run.run_id
    for name, accuracy, brier, rate, contrast, weights in RUNS:
        with tagged_runs({"sweep": "rates"}), tracked_run(name) as run:
            augmentation = {"contrast": contrast, "shift": 0.06}
            run.log_params({"fit.learning_rate": rate, "fit.augmentation": augmentation})
            run.log_params({"fit.epochs": 24, "weights.source": weights, "temperature": rate * 3})
            run.log_params({"data.sha256": "ab" * 32})
            scores = {"balanced_accuracy": interval(accuracy), "brier": interval(brier)}
            run.log_scores("valid", {"n": 72, "groups": 70, **scores, "confusion": [[1]]})
            run.log_metrics({"valid_loss": 1 - accuracy}, step=4)
            store_model(folder / "model", run)
            found[name] = run.run_id
    with tracked_run("<script>alert(1)</script>") as run:
        run.log_scores("official", {"n": 272, "macro_auroc": interval(0.9)})
        found["official"] = run.run_id
    with tracked_run("failed") as run:
        run.log_scores("valid", {"n": 72, "balanced_accuracy": interval(1.0)})
        found["failed"] = run.run_id
    mlflow.MlflowClient().set_terminated(run.run_id, "FAILED")
    with tagged_runs({FOLD_TAG: "1"}), tracked_run("fold") as run:
        run.log_scores("valid", {"n": 72, "balanced_accuracy": interval(1.0)})
    with tracked_run("files alone") as run:
        run.log_scores("valid", {"n": 72, "balanced_accuracy": interval(0.5)})
        found["files"] = run.run_id
    yield found
    os.environ["MLFLOW_TRACKING_URI"] = before
    mlflow.set_tracking_uri(before)


def names(**config) -> list[str]:
    return [row.name for row in rank_runs(CompareConfig(**config)).ranked]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["two", "<b>four</b>", "one", "three", "files alone"]),
        ({"best": "lowest"}, ["files alone", "three", "one", "<b>four</b>", "two"]),
        ({"metric": "brier"}, ["three", "two", "<b>four</b>", "one"]),
        ({"metric": "brier", "best": "highest"}, ["one", "<b>four</b>", "two", "three"]),
        ({"protocol": "last_epoch", "metric": "loss"}, ["two", "<b>four</b>", "one", "three"]),
        ({"n": 12}, ["demo $x^"]),
        ({"protocol": "official", "metric": "macro_auroc"}, ["<script>alert(1)</script>"]),
        ({"sweep": "rates"}, ["two", "<b>four</b>", "one", "three"]),
    ],
)
def test_the_best_run_is_first(store, config, expected):
    assert names(**config) == expected


def test_every_run_left_out_has_its_reason(store):
    found = rank_runs(CompareConfig())
    assert {row.name: reason for row, reason in found.left_out} == {
        "demo $x^": "scored on 12 scans, not on 72: --n 12 takes those",
        "<script>alert(1)</script>": "no valid.balanced_accuracy",
        "failed": "FAILED",
    }


def test_table_shows_interval_n_and_the_parameters_that_differ(store, capsys, caplog):
    caplog.set_level("INFO")
    assert main(["--sweep", "rates"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == [
        "run", "name", "valid", "balanced_accuracy", "n", "model", "augmentation.contrast",
        "learning_rate", "weights.source",
    ]  # fmt: skip
    assert lines[1].split() == [
        "1", store["two"][:8], "two", "0.8000", "(0.7400", "to", "0.9000)", "72", "0.4", "0.0001",
        "brain-mri",
    ]  # fmt: skip
    assert len(lines) == 5
    # 0.75 lies within 0.74 to 0.90, 0.70 and 0.60 do not.
    assert [line.split(":")[0] for line in caplog.messages] == [
        "4 runs by valid.balanced_accuracy, the highest first",
        "1 of the others lies within the interval of the best",
    ]


def test_notes_name_the_runs_that_lack_the_metric(store, caplog):
    caplog.set_level("INFO")
    assert main(["--metric", "brier"]) == 0
    missing = f"left out, no valid.brier: {store['files'][:8]} (files alone), "
    assert any(line.startswith(missing) for line in caplog.messages)


def test_choosing_by_test_scans_is_said(store, caplog):
    caplog.set_level("INFO")
    assert main([]) == 0
    assert main(["--protocol", "last_epoch", "--metric", "loss"]) == 0
    assert "is scored on test scans" not in caplog.text
    assert main(["--protocol", "official", "--metric", "macro_auroc"]) == 0
    assert "official is scored on test scans: whoever chooses by it" in caplog.text


def test_json_holds_every_run(store, capsys):
    assert main(["--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, None, None, None]
    assert rows[0]["run"] == store["two"]
    assert (rows[0]["value"], rows[0]["n"]) == (0.8, 72)
    assert rows[0]["parameters"]["fit.augmentation.contrast"] == "0.4"
    assert rows[-1]["left_out"].startswith("scored on 12")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--protocol", "grouped", "--metric", "valid.brier"],
            "metric valid.brier is of the protocol valid, not of grouped, and protocols are not "
            "mixed; expected --protocol valid --metric brier",
        ),
        (
            ["--protocol", "grouped"],
            "no finished run of 8 has grouped.balanced_accuracy; there are last_epoch: loss; "
            "official: macro_auroc; valid: balanced_accuracy, brier",
        ),
        (["--sweep", "none"], "no run of the sweep 'none' in the experiment chestct"),
        (["--sweep", "a' or tags.x = 'b"], "sweep is \"a' or tags.x = 'b\": expected pattern"),
        (["--n", "5"], "no run was scored on 5 scans; expected one of 12, 72"),
    ],
)
def test_what_cannot_be_compared_is_one_line(store, capsys, arguments, message):
    assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_no_store_is_said_without_making_one(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main([]) == 1
    assert "no mlflow.db in this folder: train first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Page(HTMLParser):
    """A page's addresses that a browser would load, its tags, and its text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.policy = ""
        self.text = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.loaded.append(value)
            if (name, value) == ("http-equiv", "Content-Security-Policy"):
                self.policy = dict(attrs)["content"]

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"]:
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


@pytest.fixture
def written(store, tmp_path, capsys) -> Path:
    assert main(["--output", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_output_is_one_csv_and_one_page(written):
    assert sorted(path.name for path in written.iterdir()) == ["compare.csv", "compare.html"]
    with (written / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5", "", "", ""]
    assert rows[0]["fit.learning_rate"] == "0.0001"
    assert rows[0]["value"] == "0.8"
    assert rows[-1]["left_out"].startswith("scored on 12")


def test_page_loads_nothing_and_lists_every_run(written, store):
    text = (written / "compare.html").read_text()
    page = Page(text)
    assert page.loaded == []
    assert page.policy.startswith("default-src 'none'; ")
    assert "http" not in page.policy
    assert not re.search("https?:", page.text)
    assert len(text) < 6_000_000
    header, *rows = page.rows
    assert header[:6] == ["", "run", "name", "valid balanced_accuracy", "n", "model"]
    runs = ["two", "<b>four</b>", "one", "three"]
    assert [row[1:3] for row in rows[:4]] == [[store[run], run] for run in runs]
    assert rows[0][3:5] == ["0.8000 (0.7400 to 0.9000)", "72"]
    assert len(rows) == 5
    assert dict(zip(header, rows[1], strict=True))["augmentation.contrast"] == "0.2"
    assert "b" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "Not a medical device" in page.text


def test_hostile_values_end_no_script_of_the_page(tmp_path):
    runs = [
        Row("a", "one", "FINISHED", "", 0.5, parameters={"x": "</script><img src=y>"}),
        Row("b", "<img src=z>", "FINISHED", "", 0.4, parameters={"x": "1"}),
    ]
    found = Comparison(CompareConfig(), tuple(runs), ())
    write_page(found, ["<i>"], [["<u>"], *([run.name] for run in runs)], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert not {"img", "i", "u"} & set(page.tags)
    assert page.rows == [["<u>"], ["one"], ["<img src=z>"]]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium: install Debian's chromium, or name one with CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_page_draws_runs_without_a_network_filters_by_a_drag_and_saves_pictures(written, browser):
    address = (written / "compare.html").as_uri()
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    asked, complaints = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    tab.goto(address)
    tab.wait_for_selector("#parallel .axis-brush")
    # Rank, the metric, and the parameters that differ: a point a run for each of these.
    axes = tab.locator("#parallel .axis-title").all_text_contents()
    assert [axes[0], axes[-1]] == ["rank", "valid balanced_accuracy"]
    assert {"learning_rate", "augmentation.contrast", "weights.source"} < set(axes)
    assert tab.locator("#scatter .scatterlayer .point").count() == 5 * (len(axes) - 2)
    brush = tab.locator("#parallel .axis-brush").first.bounding_box()
    middle = brush["x"] + brush["width"] / 2
    tab.mouse.move(middle, brush["y"] + 0.02 * brush["height"])
    tab.mouse.down()
    tab.mouse.move(middle, brush["y"] + 0.5 * brush["height"], steps=5)
    tab.mouse.up()
    kept = "document.getElementById('parallel').data[0].dimensions[0].constraintrange"
    tab.wait_for_function(f"{kept} !== undefined")
    low, high = sorted(tab.evaluate(kept))
    assert low < 1.5
    assert 2 < high < 4.5
    assert asked == [address]
    for name in ("parallel", "scatter"):
        tab.hover(f"#{name}")
        with tab.expect_download() as download:
            tab.click(f'#{name} [data-title^="Download plot"]')
        assert np.asarray(Image.open(download.value.path()).convert("L")).std() > 5
    tab.close()
    assert complaints == []


def test_plots_hold_every_run_and_its_interval(store):
    found = rank_runs(CompareConfig(sweep="rates"))
    rank, *axes, metric = parallel_coordinates(found).data[0].dimensions
    assert rank["values"] == (1, 2, 3, 4)
    assert metric["values"] == (0.8, 0.75, 0.7, 0.6)
    assert {axis["label"]: axis["values"] for axis in axes} == {
        "augmentation.contrast": (0.4, 0.2, 0.2, 0.2),
        "learning_rate": pytest.approx((-4, -4, -5, -3)),
        "weights.source": (0, 1, 1, 0),
    }
    plots = scatter_plots(found).data
    assert [plot.x for plot in plots] == [axis["values"] for axis in axes]
    for plot in plots:
        assert plot.y == metric["values"]
        assert plot.error_y.array == pytest.approx([0.1] * 4)
        assert plot.error_y.arrayminus == pytest.approx([0.06] * 4)
    assert plots[0].text[1] == "2 &lt;b&gt;four&lt;/b&gt;"


def test_dark_lines_are_the_best_runs(store):
    for metric, dark_is_high in (("balanced_accuracy", True), ("brier", False)):
        found = rank_runs(CompareConfig(metric=metric))
        line = parallel_coordinates(found).data[0].line
        assert line.reversescale is dark_is_high


def test_output_beside_other_files_leaves_them(store, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    for _ in range(2):
        assert main(["--output", str(tmp_path), "--n", "12"]) == 0
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_numbers_lie_by_size_and_wide_ones_by_their_logarithm():
    assert axis_of(["1", "3", "2.0"]) == {"values": [1, 3, 2]}
    assert axis_of(["-1", "0", "100"]) == {"values": [-1, 0, 100]}
    rates = axis_of(["1e-5", "2e-3", "1e-4"])
    assert rates["values"] == pytest.approx([-5, -2.699, -4], abs=1e-3)
    assert rates["range"] == (-5, -2)
    assert rates["tickvals"] == [-5, -4, -3, -2]
    assert rates["ticktext"] == ["1e-05", "0.0001", "0.001", "0.01"]


def test_many_runs_get_few_ticks():
    runs = tuple(Row(f"{number:032x}", "", "FINISHED", "", 0.5) for number in range(60))
    found = Comparison(CompareConfig(), runs, ())
    rank, _ = parallel_coordinates(found).data[0].dimensions
    assert rank["values"] == tuple(range(1, 61))
    assert rank["tickvals"] == tuple(range(1, 61, 3))


def test_words_and_missing_values_lie_in_alphabetical_order():
    axis = axis_of(["imagenet", "-", "auto"])
    assert axis["values"] == [2, 0, 1]
    assert axis["ticktext"] == ["-", "auto", "imagenet"]
    assert axis_of(["0.5", "nan"])["ticktext"] == ["0.5", "nan"]
    assert axis_of(["results/grouped/split/split.csv"])["ticktext"] == ["…split/split.csv"]


def test_mappings_become_one_parameter_a_key():
    given = {"a": "{'x': 1, 'y': {'z': 'w'}}", "b": "{not python", "c": "[1, 2]"}
    assert flattened(given) == {"a.x": "1", "a.y.z": "w", "b": "{not python", "c": "[1, 2]"}


def test_long_values_keep_their_end():
    assert shortened("results/grouped/split/split.csv") == "…split/split.csv"


def champion() -> dict[str, int]:
    return {
        alias: int(version)
        for model in mlflow.MlflowClient().search_registered_models("name='chestct'")
        for alias, version in model.aliases.items()
    }


def test_promotion_moves_the_champion_and_roll_back_undoes_it(store, capsys):
    assert main(["--promote"]) == 0
    assert capsys.readouterr().out.endswith("chestct@champion: none -> version 1\n")
    version = mlflow.MlflowClient().get_model_version_by_alias("chestct", "champion")
    assert version.run_id == store["two"]
    commit = version.tags.pop("git_commit")
    assert commit == mlflow.get_run(store["two"]).data.tags["git_commit"]
    assert version.tags == {
        "protocol": "valid", "metric": "balanced_accuracy", "value": "0.8000",
        "interval": "0.7400 to 0.9000", "n": "72", "data_sha256": "ab" * 32,
    }  # fmt: skip

    assert main(["--promote"]) == 0
    assert capsys.readouterr().out.endswith("chestct@champion: version 1 already\n")
    assert champion() == {"champion": 1}
    assert main(["--roll-back"]) == 1
    assert "no version with the alias previous: nothing to roll" in capsys.readouterr().err

    assert main(["--promote", store["three"][:8], "--metric", "brier", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[-1] == {"alias": "champion", "run": store["three"], "before": 1, "after": 2}
    assert champion() == {"champion": 2, "previous": 1}
    assert main([]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "  previous  " in table[1]
    assert "  champion  " in table[4]

    assert main(["--roll-back"]) == 0
    assert capsys.readouterr().out == "chestct@champion: version 2 -> version 1\n"
    assert champion() == {"champion": 1, "previous": 2}
    assert main(["--roll-back"]) == 0
    assert champion() == {"champion": 2, "previous": 1}

    # The run of version 1 again: no third version.
    assert main(["--promote", store["two"]]) == 0
    assert champion() == {"champion": 1, "previous": 2}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("files", "holds no model/model.keras and no model/facts.json; expected a run of python"),
        ("failed", "is FAILED; expected FINISHED"),
        ("official", "lacks valid.balanced_accuracy; evaluate it first"),
    ],
)
def test_what_cannot_be_champion_is_refused(store, capsys, run, message):
    before = champion()
    assert main(["--promote", store[run]]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert champion() == before


def test_run_is_named_by_its_beginning_or_not_at_all(store, capsys):
    assert main(["--promote", "zzz"]) == 1
    assert "'zzz' is the beginning of 0 runs; expected one of" in capsys.readouterr().err


def test_nothing_to_roll_back_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'empty.db'}")
    assert main(["--roll-back"]) == 1
    assert "no version with the alias previous: nothing to roll" in capsys.readouterr().err
