from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import mlflow
import pytest
import yaml

import training.cards.card
from chestct.contract import NOT_A_MEDICAL_DEVICE, ModelMetadata
from export.publish.config_pbtxt import parsed_config
from export.publish.repository import write_repository
from export.publish.settings import RepositoryConfig
from training.cards.card import main, write_cards
from training.cards.model_card import (
    CHECKS,
    model_card,
    summary,
    summary_protocol,
    worst_scans,
)
from training.cards.run_records import CardConfig, read_artefacts
from training.common.atomic_io import sha256_of
from training.common.config import config_from_mapping
from training.data.audit import AuditConfig, write_audit
from training.data.ingest import ingest
from training.data.settings import IngestConfig
from training.data.split import SplitConfig, write_split
from training.score.evaluate import EvaluateConfig, Sources, evaluate
from training.score.report import HEADLINE, OPERATING_POINTS

pytestmark = pytest.mark.xdist_group("card")  # its fixtures are made once

FILES = {"model_card.md", "model_card.html", "data_card.md", "data_card.html", "summary.json"}
HOSTILE = 'test/normal/"><script>alert(1)</script>|`x`\n.png'


@pytest.fixture(scope="module")
def records(trained, tmp_path_factory) -> CardConfig:
    """All that the stages before leave, for the phantoms and a source beside them."""
    folder = tmp_path_factory.mktemp("records")
    scans, table = folder / "data" / "scans", folder / "data" / "ingest.json"
    ingest(str(trained.scans), IngestConfig(scans=scans, table=table))
    write_audit(AuditConfig(scans=scans, table=table, output=folder / "audit"))
    write_split(
        SplitConfig(
            scans=scans, table=table, groups=folder / "audit" / "groups.csv",
            output=folder / "split", protocol="official",
        )
    )  # fmt: skip
    for name, label in (("normal", "normal"), ("malignant", "adenocarcinoma")):
        shutil.copytree(trained.scans / "test" / label, folder / "external" / name)
    evaluate(
        EvaluateConfig(
            scans=trained.scans, split=trained.split,
            protocol=trained.split.with_name("split.json"), model=trained.model,
            output=folder / "evaluate",
        ),
        Sources(external=folder / "external"),
    )  # fmt: skip
    return CardConfig(
        train=trained.model,
        evaluate=folder / "evaluate",
        audit=folder / "audit" / "audit.json",
        split=folder / "split" / "split.json",
        ingest=table,
        variants={"fp32": str(folder / "none")},
        latency=folder / "latency.json",
        output=folder / "card",
    )


@pytest.fixture(scope="module")
def written(records) -> Path:
    write_cards(records)
    return records.output


@pytest.fixture
def copied(records, tmp_path) -> CardConfig:
    """The same records where a test may change them."""
    places = {}
    for name in ("train", "evaluate"):
        places[name] = Path(shutil.copytree(getattr(records, name), tmp_path / name))
    for name in ("audit", "split", "ingest"):
        places[name] = Path(shutil.copy(getattr(records, name), tmp_path / f"{name}.json"))
    return dataclasses.replace(records, **places, output=tmp_path / "card")


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Page(HTMLParser):
    """A page taken apart; refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.title = ""
        self._open: list[str] = []
        self._heading = ""
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "hr", "img", "link"):
            self._open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self._heading = dict(attrs)["id"]
        elif tag == "table":
            self.tables.setdefault(self._heading, []).append([])
        elif tag == "tr":
            self.tables[self._heading][-1].append([])
        elif tag in ("th", "td"):
            self.tables[self._heading][-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "title":
            self.title += data
        elif {"td", "th"} & set(self._open):
            self.tables[self._heading][-1][-1][-1] += data

    def rows(self, anchor: str, number: int = 0) -> list[list[str]]:
        """The rows of a table below a heading, without the first."""
        return self.tables[anchor][number][1:]


def page(folder: Path, name: str = "model_card") -> Page:
    return Page((folder / f"{name}.html").read_text(encoding="utf-8"))


def same(cell: str, score: dict[str, float | None] | None) -> bool:
    """Whether a cell shows a score of metrics.json, to three digits."""
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
    if score is None or score["value"] is None:
        return numbers == []
    wanted = [score[end] for end in ("value", "low", "high")]
    return len(numbers) == 3 and all(
        abs(number - want) <= 5.001e-4 for number, want in zip(numbers, wanted, strict=True)
    )


def test_both_cards_and_the_summary_are_written(written):
    assert {path.name for path in written.iterdir()} == FILES
    for name in ("model_card.md", "data_card.md"):
        assert NOT_A_MEDICAL_DEVICE in (written / name).read_text()


def test_the_same_records_give_the_same_files(written, records):
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    write_cards(records)
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before


def test_cards_are_stored_with_the_run_of_the_training(written, records):
    run = json.loads((records.train / "facts.json").read_text())["training_run"]
    stored = mlflow.artifacts.list_artifacts(run_id=run, artifact_path="card")
    assert {Path(item.path).name for item in stored} == FILES
    assert mlflow.get_run(run).info.status == "FINISHED"


def test_every_score_is_that_of_the_metrics(written, records):
    protocols = json.loads((records.evaluate / "metrics.json").read_text())["protocols"]
    found = page(written)
    assert list(protocols) == ["official", "external_malignant"]
    rows = {(row[0], row[3]): row for row in found.rows("protocols")}
    counted = 0
    for name, answers in protocols.items():
        for who in ("model", "majority", "mean grey"):
            row = rows[name, who]
            assert [row[1], row[2]] == [str(answers[who]["n"]), str(answers[who]["groups"])]
            for cell, key in zip(row[4:], HEADLINE, strict=True):
                assert same(cell, answers[who].get(key)), (name, who, key, cell)
                counted += 1
        assert [row[0] for row in found.rows(name)] == list(answers["model"]["classes"])
        for row in found.rows(name):
            scores = answers["model"]["classes"][row[0]]
            assert [row[1], row[2]] == [str(scores["n"]), str(scores["groups"])]
            assert same(row[3], scores["sensitivity"])
            assert same(row[4], scores["specificity"])
            assert same(row[5], scores["auroc"])
        confusion = [[int(cell) for cell in row[1:]] for row in found.rows(name, 1)]
        assert confusion == answers["model"]["confusion"]
    assert counted == 2 * 3 * len(HEADLINE)
    assert {who for _, who in rows} == {
        who for who, scores in protocols["official"].items() if "macro_auroc" in scores
    }


def test_operating_points_and_calibration_are_those_of_the_metrics(written, records):
    protocols = json.loads((records.evaluate / "metrics.json").read_text())["protocols"]
    found = page(written)
    assert [row[0] for row in found.rows("operating-points")] == list(protocols)
    assert [row[0] for row in found.rows("calibration")] == list(protocols)
    for row in found.rows("operating-points"):
        for cell, key in zip(row[2:], OPERATING_POINTS, strict=True):
            assert same(cell, protocols[row[0]]["model"][key])
    for row in found.rows("calibration"):
        before = protocols[row[0]]["before_temperature"]["calibration_error"]
        assert float(row[2]) == pytest.approx(before, abs=5.001e-4)
        assert same(row[3], protocols[row[0]]["model"]["calibration_error"])
        assert same(row[4], protocols[row[0]]["model"]["brier"])
    bins = [
        (name, state, b)
        for name, answers in protocols.items()
        for state, bins in (
            ("before temperature", answers["before_temperature"]["reliability"]),
            ("as served", answers["reliability"]),
        )
        for b in bins
    ]
    shown = found.rows("calibration", 1)
    assert len(shown) == len(bins) > 0
    for row, (name, state, b) in zip(shown, bins, strict=True):
        assert row[:2] == [name, state]
        assert float(row[2]) == pytest.approx(b["confidence"], abs=5.001e-4)
        assert float(row[3]) == pytest.approx(b["accuracy"], abs=5.001e-4)
        assert int(row[4]) == b["n"]


def test_faults_of_the_data_are_those_of_the_audit(written, records):
    audit = json.loads(records.audit.read_text())
    split = json.loads(records.split.read_text())
    text = (written / "model_card.md").read_text()
    near = audit["duplicates"]["near"]
    assert f"{audit['num_scans']} scans are {near['num_distinct']} distinct pictures" in text
    rows = page(written, "data_card").rows("composition")
    assert {row[0]: int(row[1]) for row in rows} == {
        name: sum(counts.values()) for name, counts in split["counts"].items()
    }
    duplicates = page(written, "data_card").rows("duplicates")
    assert [int(cell) for cell in duplicates[2][1:]] == [
        near[key] for key in (
            "num_distinct", "num_redundant", "num_groups", "num_groups_across_splits",
            "num_label_conflicts",
        )
    ]  # fmt: skip


def test_worst_scans_come_first_by_loss(written, records):
    with (records.evaluate / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["protocol"] == "official"]
    losses = sorted((-math.log(max(float(row[row["actual"]]), 5e-7)) for row in rows), reverse=True)
    shown = page(written).rows("worst-of-official")
    assert [float(row[4].removeprefix("over ")) for row in shown] == pytest.approx(
        losses[:10], abs=5.001e-3
    )
    by_path = {row["path"]: row for row in rows}
    for path, actual, called, probability, _ in shown:
        assert [actual, called] == [by_path[path]["actual"], by_path[path]["predicted"]]
        assert float(probability) == float(by_path[path][actual])
    assert "worst-of-external_malignant" not in page(written).tables


def test_equal_losses_are_listed_by_path():
    rows = [
        {"protocol": "p", "path": path, "actual": "a", "predicted": "b", "a": value, "b": "1"}
        for path, value in (("z", "0.000000"), ("y", "0.5"), ("x", "0.000000"), ("w", "0.25"))
    ]
    assert [failure.path for failure in worst_scans(rows, "p", 3)] == ["x", "z", "w"]
    assert worst_scans(rows, "p", 3)[0].loss == pytest.approx(14.5087, abs=1e-4)
    assert worst_scans(rows, "other", 3) == []


@pytest.mark.parametrize("name", ["model_card", "data_card"])
def test_page_is_whole_and_loads_nothing(written, name):
    found = page(written, name)
    pages = {file: page(written, file) for file in ("model_card", "data_card")}
    anchors = {file: [a["id"] for _, a in one.tags if "id" in a] for file, one in pages.items()}
    assert found.title
    assert ("html", {"lang": "en"}) in found.tags
    assert len(anchors[name]) == len(set(anchors[name]))
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert not [a for _, a in found.tags if "src" in a or any(key.startswith("on") for key in a)]
    links = [a["href"] for tag, a in found.tags if tag == "a"]
    assert len(links) > 8
    for link in links:
        file, _, anchor = link.partition("#")
        target = file.removesuffix(".html") or name
        assert not anchor or anchor in anchors[target], link
    assert "http://" not in (written / f"{name}.html").read_text()
    assert "https://" not in (written / f"{name}.html").read_text()
    assert "&lt;" not in (written / f"{name}.html").read_text()  # HTML within the Markdown
    assert [tag for tag, _ in found.tags].count("h1") == 1
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    headings = [a for tag, a in found.tags if tag == "th"]
    assert headings
    assert all(a.get("scope") in ("col", "row") for a in headings)
    regions = [a["aria-labelledby"] for tag, a in found.tags if a.get("role") == "region"]
    assert set(regions) <= set(anchors[name])
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_anchors_of_the_markdown_exist_too(written):
    from training.common.markdown import slug

    anchors = {
        name: {slug(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
        for name in ("model_card.md", "data_card.md")
        for text in [(written / name).read_text()]
    }
    for name in anchors:
        for file, anchor in re.findall(
            r"\]\(([\w.]*)(?:#([\w-]+))?\)", (written / name).read_text()
        ):
            assert not anchor or anchor in anchors[file or name]


def test_hostile_names_are_shown_and_not_obeyed(copied):
    file = copied.evaluate / "predictions.csv"
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    rows[0] |= {"path": HOSTILE, **{label: "0" for label in rows[0] if "." in label}}
    rows[0][rows[0]["actual"]] = "0.000000"
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    split = json.loads(copied.split.read_text())
    counts = {name: {"<img src=x onerror=y>|_a_": 0, **by} for name, by in split["counts"].items()}
    change(copied.split, counts=counts)
    write_cards(copied)
    shown = page(copied.output).rows("worst-of-official")
    assert HOSTILE.replace("\n", "\\n") in [row[0] for row in shown]
    for name in ("model_card", "data_card"):
        assert not {"script", "img"} & {tag for tag, _ in page(copied.output, name).tags}
    head = page(copied.output, "data_card").tables["composition"][0][0]
    assert "<img src=x onerror=y>|_a_" in head


@pytest.mark.parametrize(
    ("place", "name", "command"),
    [
        ("train", "facts.json", "training fit"),
        ("train", "run.json", "training fit"),
        ("train", "history.csv", "training fit"),
        ("train", "model.keras", "training fit"),
        ("evaluate", "metrics.json", "training evaluate"),
        ("evaluate", "predictions.csv", "training evaluate"),
        ("audit", "", "training audit"),
        ("split", "", "training split"),
        ("ingest", "", "training ingest"),
    ],
)
def test_missing_record_names_the_command_that_makes_it(copied, place, name, command):
    file = getattr(copied, place) / name
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name}: no such file; run python -m {command}"):
        write_cards(copied)
    assert not copied.output.exists()


@pytest.mark.parametrize(
    ("place", "text", "message"),
    [
        ("audit", "{", "not JSON; run python -m training audit again"),
        ("audit", "[]", "no data_hash, duplicates, brightness in it"),
        ("split", "{}", "no data_hash, protocol, counts in it"),
    ],
)
def test_broken_record_names_the_command_that_makes_it(copied, place, text, message):
    getattr(copied, place).write_text(text)
    with pytest.raises(ValueError, match=message):
        write_cards(copied)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("evaluate/metrics.json", {"run": "b"}, r"is about b, .* run python -m training evaluate"),
        ("evaluate/metrics.json", {"data_hash": "b"}, r"is about b, .* training evaluate again"),
        ("audit.json", {"data_hash": "b"}, r"is about b, .* run python -m training audit again"),
        ("split.json", {"data_hash": "b"}, r"is about b, .* run python -m training split again"),
        ("split.json", {"counts": {"train": {"a": 3}, "valid": {}, "test": {}}},
         r"trains on 3 scans, run \w+ was trained on 20; run python -m training fit"),
        ("train/facts.json", {"temperature": "-1"}, r"facts\.json: temperature is -1\.0"),
    ],
)  # fmt: skip
def test_records_of_another_run_or_other_scans_are_refused(copied, file, values, message):
    change(copied.output.parent / file, **values)
    with pytest.raises(ValueError, match=message):
        write_cards(copied)
    assert not copied.output.exists()


def test_metrics_of_an_older_form_are_refused(copied):
    change(copied.evaluate / "metrics.json", protocols={"official": {"model": {}}})
    with pytest.raises(ValueError, match="no before_temperature, reliability under official"):
        write_cards(copied)


def test_split_with_another_number_of_test_scans_is_refused(copied):
    counts = json.loads(copied.split.read_text())["counts"]
    change(copied.split, counts=counts | {"test": {"a": 1}})
    with pytest.raises(ValueError, match="tests 1 scans, 12 were scored"):
        write_cards(copied)


def test_what_was_not_measured_is_said(written):
    text = (written / "model_card.md").read_text()
    assert "Not measured: `metrics.json` holds no `domain`." in text
    assert "Latency: not measured" in text
    [[variant, holds, _]] = page(written).rows("variants-and-speed")
    assert [variant, holds] == ["fp32", "not measured"]


def test_parity_and_latency_of_the_run_are_shown_and_of_another_left_out(copied, trained, tmp_path):
    for name, run in (("same", None), ("other", "b")):
        (tmp_path / name).mkdir()
        shutil.copy(trained.model / "facts.json", tmp_path / name)
        (tmp_path / name / "parity.json").write_text(
            json.dumps({"holds": True, "verdict": f"parity holds: {name}"})
        )
        if run:
            change(tmp_path / name / "facts.json", training_run=run)
    facts = json.loads((trained.model / "facts.json").read_text())
    shutil.copytree(tmp_path / "other", tmp_path / "student")
    (tmp_path / "student" / "student.json").write_text(
        json.dumps({"run": "b", "teacher": facts["training_run"]})
    )
    latency = tmp_path / "latency.json"
    row = {"engine": "e", "variant": "v", "n": 9, "p50_ms": 1.5, "p90_ms": 2.5, "p99_ms": 3.5}
    content = {
        "run": facts["training_run"],
        "environment": {"cpu": "a CPU", "cores": 2},
        "rows": [row | {"batch": 1}, row | {"batch": 8}],
    }
    latency.write_text(json.dumps(content))
    variants = {name: str(tmp_path / name) for name in ("same", "other", "student")}
    config = dataclasses.replace(copied, variants=variants, latency=latency)
    write_cards(config)
    rows = page(config.output).rows("variants-and-speed")
    assert [row[:2] for row in rows] == [
        ["same", "yes"], ["other", "not measured"], ["student", "yes"],
    ]  # fmt: skip
    assert rows[0][2] == "parity holds: same"
    assert rows[1][2].endswith("is of run b")
    assert page(config.output).rows("variants-and-speed", 1) == [
        ["e", "v", "9", "1.5", "2.5", "3.5"]
    ]
    change(latency, run="b")
    write_cards(config)
    assert f"{latency.name} is of run b" in (config.output / "model_card.md").read_text()


def test_checks_are_those_of_the_report(copied, monkeypatch):
    write_cards(copied)
    text = (copied.output / "model_card.md").read_text()
    assert "Lungs were found and blanked in" in text
    monkeypatch.setitem(CHECKS, "shortcuts", lambda found: ["#### Lungs", "", f"n = {len(found)}"])
    write_cards(copied)
    text = (copied.output / "model_card.md").read_text()
    assert "## Shortcut checks\n\n### Lungs\n\nn = 3\n" in text
    claim = {row[0]: row for row in page(copied.output).rows("claim-2024")}
    assert claim["30"][2] == "reported"
    change(copied.evaluate / "metrics.json", shortcuts=None)
    write_cards(copied)
    text = (copied.output / "model_card.md").read_text()
    assert "## Shortcut checks\n\nNot measured: `metrics.json` holds no `shortcuts`.\n" in text


def test_every_item_of_both_checklists_is_answered_once(written):
    claim = page(written).rows("claim-2024")
    assert [row[0] for row in claim] == [str(number) for number in range(1, 45)]
    tripod = page(written).rows("tripodai")
    letters = {3: 3, 5: 2, 6: 3, 8: 3, 9: 3, 12: 7, 18: 6, 20: 3, 23: 2, 27: 3}
    assert [row[0] for row in tripod] == [
        f"{number}{letter}"
        for number in range(1, 28)
        for letter in ("abcdefg"[: letters[number]] if number in letters else [""])
    ]
    states = {"reported", "partly", "not reported", "not applicable"}
    assert {row[2] for row in claim + tripod} == states
    assert all(row[1] and row[3] for row in claim + tripod)


def test_statements_reach_the_cards_and_the_checklists(copied):
    told = {
        "intended_use": "To teach.", "data_source": "One hospital,\n2020 | 2021.",
        "data_licence": "CC BY 4.0.", "population": "Adults.", "reference_standard": "Biopsy.",
        "ethics": "Waived.", "funding": "None.", "contact": "the maintainers",
    }  # fmt: skip
    write_cards(dataclasses.replace(copied, **told))
    model, data = page(copied.output), page(copied.output, "data_card")
    source = dict(row for row in data.rows("source"))
    assert source["collected by"] == "One hospital, 2020 | 2021."
    assert [source["patients"], source["labels decided by"]] == ["Adults.", "Biopsy."]
    text = (copied.output / "model_card.md").read_text()
    assert "## Intended use\n\nTo teach.\n" in text
    assert "- Scans: CC BY 4.0." in text
    assert "## Contact\n\nthe maintainers\n" in text
    claim = {row[0]: row[2:] for row in model.rows("claim-2024")}
    assert claim["44"] == ["reported", "None."]
    assert [claim[item][0] for item in ("7", "11", "14")] == ["reported"] * 3


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/somebody/scans", "scans"),
        ("C:\\data\\chest ct\\", "chest ct"),
        ("https://user:secret@host.example/a.zip?token=1#x", "https://host.example/a.zip"),
    ],
)
def test_source_is_named_without_what_may_be_secret(copied, source, shown):
    change(copied.ingest, source=source)
    write_cards(copied)
    assert f"| source of the scans | `{shown}` |" in (copied.output / "model_card.md").read_text()
    assert f"| source | `{shown}` |" in (copied.output / "data_card.md").read_text()
    for file in copied.output.iterdir():
        assert not re.search("somebody|secret|token", file.read_text())


def test_phantoms_are_called_so(copied):
    change(copied.ingest, source="phantom")
    write_cards(copied)
    assert "synthetic phantoms" in (copied.output / "data_card.md").read_text()
    assert "drawn by this project's code" in (copied.output / "model_card.md").read_text()


def test_run_that_the_store_does_not_know_is_said(records):
    text = model_card(read_artefacts(records), records, None)
    assert "The tracking store holds no settings of this run." in text
    assert "| started | not recorded |" in text


def test_settings_and_commit_come_from_the_store(written, records):
    run = json.loads((records.train / "facts.json").read_text())["training_run"]
    stored = mlflow.get_run(run)
    shown = {row[0]: row[1] for row in page(written).rows("training", 1)}
    wanted = {
        key.removeprefix("fit."): value
        for key, value in stored.data.params.items()
        if key.startswith("fit.") and key not in ("fit.scans", "fit.split")
    }
    assert shown == wanted
    assert len(shown) > 10
    environment = dict(row for row in page(written).rows("environment"))
    assert environment["devices of the training"] == stored.data.tags["devices"]
    assert len(environment["commit of the run"].removesuffix("-dirty")) in (7, 40)
    assert re.match(r"\d+\.\d+", environment["tensorflow"])


def test_summary_is_of_the_strictest_protocol(written, records):
    found = read_artefacts(records)
    content = json.loads((written / "summary.json").read_text())
    scores = found.protocols["official"]["model"]
    assert content == summary(found)
    assert [content["protocol"], content["n"], content["groups"]] == ["official", 12, 12]
    for key in ("balanced_accuracy", "macro_auroc", "calibration_error"):
        wanted = [scores[key][end] for end in ("value", "low", "high")]
        assert content[key] == pytest.approx(wanted, abs=5.1e-5)
    assert content["notice"] == NOT_A_MEDICAL_DEVICE
    assert len(json.dumps(content)) < 700
    flattering = ["official", "official_without_duplicates", "grouped", "grouped_distinct"]
    while flattering:
        metrics = {"protocols": {name: {} for name in flattering}}
        assert summary_protocol(dataclasses.replace(found, metrics=metrics)) == flattering.pop()


@pytest.fixture
def publishable(written, trained, exported, tmp_path) -> RepositoryConfig:
    shutil.copytree(trained.model, tmp_path / "variant")
    parity = tmp_path / "parity.json"
    parity.write_text(json.dumps({"holds": True, "onnx_sha256": sha256_of(exported)}))
    return RepositoryConfig(
        exported, tmp_path / "variant", parity, tmp_path / "repository",
        card=written / "summary.json",
    )  # fmt: skip


def facts_served(config: RepositoryConfig) -> ModelMetadata:
    text = (config.repository / config.name / "config.pbtxt").read_text(encoding="utf-8")
    entries = parsed_config(text).parameters.items()
    return ModelMetadata.from_parameters({key: entry.string_value for key, entry in entries})


def test_summary_reaches_the_served_parameters(publishable, written, trained):
    write_repository(publishable)
    served = facts_served(publishable)
    assert json.loads(served.card) == json.loads((written / "summary.json").read_text())
    stored = json.loads((trained.model / "facts.json").read_text())
    assert dataclasses.replace(served, card="") == ModelMetadata.from_parameters(stored)
    assert write_repository(publishable) == 1


def test_model_without_a_card_is_published_and_logged(publishable, tmp_path, caplog):
    caplog.set_level("INFO")
    write_repository(dataclasses.replace(publishable, card=tmp_path / "none.json"))
    served = facts_served(publishable)
    assert served.card == ""
    assert "card" not in served.to_parameters()
    assert ModelMetadata.from_parameters(served.to_parameters() | {"card": ""}) == served
    assert f"chestct has no model card: {tmp_path / 'none.json'} is not there" in caplog.messages


def test_card_of_another_run_is_refused(publishable, written, tmp_path):
    other = tmp_path / "summary.json"
    other.write_text(json.dumps({"run": "b"}))
    with pytest.raises(ValueError, match=r"card of run b, .* run python -m training card again"):
        write_repository(dataclasses.replace(publishable, card=other))
    other.write_text("[]")
    with pytest.raises(ValueError, match=r"no card; run python -m training card again"):
        write_repository(dataclasses.replace(publishable, card=other))
    assert not publishable.repository.exists()


def test_student_is_published_with_the_card_of_its_teacher(publishable, written):
    run = json.loads((publishable.model / "facts.json").read_text())["training_run"]
    change(publishable.model / "facts.json", training_run="student")
    with pytest.raises(ValueError, match="is of run student"):
        write_repository(publishable)
    (publishable.model / "student.json").write_text(json.dumps({"run": "student", "teacher": run}))
    write_repository(publishable)
    served = facts_served(publishable)
    assert [served.run, json.loads(served.card)["run"]] == ["student", run]


def test_command_prints_the_summary(copied, capsys):
    file = copied.output.parent / "card.yaml"
    plain = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(copied).items()
    }
    file.write_text(yaml.safe_dump(plain))
    assert main(["--config", str(file)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((copied.output / "summary.json").read_text())
    copied.audit.unlink()
    assert main(["--config", str(file)]) == 1
    assert "run python -m training audit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"worst_scans": 0}, "worst_scans is 0: expected greater than 0"),
        ({"contact": "  "}, "contact is '  ': expected at least 1 character"),
        ({"variants": {"int8": 8}}, "variants.int8 is 8: expected a valid string"),
    ],
)
def test_config_that_cannot_be_meant_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config_from_mapping(CardConfig, values, Path("card.yaml"))


def test_an_interrupted_writing_leaves_the_old_cards(copied, monkeypatch):
    write_cards(copied)
    before = {path.name: path.read_bytes() for path in copied.output.iterdir()}

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.cards.card, "page_from_markdown", fail)
    with pytest.raises(KeyboardInterrupt):
        write_cards(dataclasses.replace(copied, intended_use="Another one."))
    assert {path.name: path.read_bytes() for path in copied.output.iterdir()} == before
