from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.environment import cores
from benchmarks.layouts import Layout, layouts_of, write_layouts
from benchmarks.load import Cell
from benchmarks.reports import throughput_report
from benchmarks.throughput import ThroughputConfig, file_rows, main
from benchmarks.variants import find_variants
from export.publish.config_pbtxt import parsed_config
from training.common.config import config_from_mapping


def test_row_of_a_cell_by_hand():
    cell = Cell([1.0, 2.0, 9.0], seconds=[1.0, 3.0], counts=[10, 50], scans=60, executions=20)
    cell.client_cpu_s = 2.0
    row = cell.row(Layout("fp32", 1, 2, batching=True), 8)
    assert row["scans_per_s"] == 15.0  # 60 in 4 s, not the mean of 10 and 16.7
    assert row["scans_per_s_by_pass"] == [10.0, 16.67]
    assert (row["p50_ms"], row["mean_batch"], row["client_cores"]) == (2.0, 3.0, 0.5)


def test_ratios_of_files_are_paired_by_pass():
    """The second pass falls on a slow moment, for all ways alike."""
    rows = file_rows(
        {
            "keras_predict": [10.0, 40.0, 10.0],
            "keras_compiled": [5.0, 20.0, 5.0],
            "int8": [1.0, 4.0, 0.5],
        },
        num_files=100,
    )
    by_way = {row["way"]: row for row in rows}
    assert by_way["int8"]["times_faster_than_keras_predict"] == 10.0
    assert by_way["int8"]["times_faster_than_keras_compiled"] == 5.0
    assert by_way["int8"]["scans_per_s"] == 100.0
    assert by_way["keras_predict"]["times_faster_than_keras_compiled"] == 0.5


def test_layouts_share_the_cores():
    class Named:
        name = "fp32"

    layouts = layouts_of([Named()], (1, 2))
    assert [(layout.instances, layout.batching) for layout in layouts] == [
        (1, True), (1, False), (2, True), (2, False),
    ]  # fmt: skip
    assert [layout.threads for layout in layouts[::2]] == [cores(), max(1, cores() // 2)]


def test_layouts_differ_from_the_published_model_in_what_is_measured_alone(published, tmp_path):
    folders = {"int8": published.folder / "results" / "int8"}
    (variant,), _ = find_variants(folders, published.folder / "model_repository")
    layouts = [Layout("int8", 2, 1, batching=False), Layout("int8", 1, 2, batching=True)]
    write_layouts(tmp_path, {"int8": variant}, layouts)
    for layout in layouts:
        config = parsed_config((tmp_path / layout.model / "config.pbtxt").read_text())
        assert config.name == layout.model
        assert config.instance_group[0].count == layout.instances
        threads = config.parameters["intra_op_thread_count"].string_value
        assert threads == str(layout.threads)
        assert config.HasField("dynamic_batching") == layout.batching
        assert config.optimization == variant.config.optimization
        assert config.input == variant.config.input
        assert (tmp_path / layout.model / "1" / "model.onnx").is_file()


@pytest.mark.parametrize(
    "settings",
    [
        {"concurrency": ()},
        {"instances": (0,)},
        {"seconds": 0.0},
        {"file_passes": 0},
        {"batch_passes": 0},
    ],
)
def test_settings_that_measure_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        config_from_mapping(ThroughputConfig, settings, Path("throughput.yaml"))


@pytest.mark.server
@pytest.mark.usefixtures("triton_environment")
def test_load_and_files_are_measured(published, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PERF_ANALYZER", "no-such-command")
    monkeypatch.chdir(published.folder)
    (tmp_path / "throughput.yaml").write_text(
        f"scans: {published.scans}\nsplit: {published.split}\nmost_scored: 8\n"
        "variants: {int8: results/int8, compressed: nowhere}\n"
        "concurrency: [1, 4]\nseconds: 0.2\nwarm_up_s: 0.1\npasses: 1\nnum_files: 6\n"
        "file_passes: 1\nbatch_size: 4\nbatch_seconds: 0.3\nbatch_passes: 1\n"
    )
    output = tmp_path / "throughput.json"
    command = ["--config", str(tmp_path / "throughput.yaml"), "--output", str(output)]
    assert main(command) == 0
    result = json.loads(output.read_text())
    assert {
        (row["instances"], row["dynamic_batching"], row["concurrency"]) for row in result["rows"]
    } == {
        (count, batching, load) for count in (1, 2) for batching in (True, False) for load in (1, 4)
    }
    for row in result["rows"]:
        assert row["n"] > 0
        # Triton counts requests and batches one after the other.
        assert row["mean_batch"] >= 0.9
        if not row["dynamic_batching"] or row["concurrency"] == 1:
            assert row["mean_batch"] == pytest.approx(1, abs=0.1)
    assert [row["way"] for row in result["files"]["rows"]] == [
        "keras_predict", "keras_compiled", "int8",
    ]  # fmt: skip
    assert result["files"]["num_files"] == 6
    assert result["scored_on"].startswith("8 test scans of ")
    scores = [row["macro_auroc"] for row in (*result["files"]["rows"], *result["rows"])]
    assert scores == [scores[0]] * 11  # `int8` is the same network here
    assert scores[0]["low"] <= scores[0]["value"] <= scores[0]["high"]
    for row in result["limits"]:
        assert row["variant"] == "int8"
        each = row["decode"], row["server"]
        allowed = min(each) if row["place"] == "apart" else 1 / (1 / each[0] + 1 / each[1])
        assert row["bound"] == pytest.approx(allowed, abs=0.1)
        assert 0 < row["part"]["value"] == pytest.approx(row["both"] / row["bound"], rel=0.05)
    assert [row["place"] for row in result["limits"]] == ["together", "apart"][: cores()]
    assert result["perf_analyzer"] == []
    assert result["not_measured"].keys() == {"compressed", "perf_analyzer"}
    assert (
        output.with_suffix(".md").read_text()
        == throughput_report(result)
        == capsys.readouterr().out
    )
    about = {"model": "chestct_int8", "concurrency": 4}
    figures = {"stable": True, "scans_per_s": 9.06, "p50_ms": 110.04, "p99_ms": 250.0}
    result["perf_analyzer"] = [about | figures, about | {"concurrency": 16, "stable": False}]
    assert "| chestct_int8 | 4 | 9.1 | 110.0 | 250.0 |" in throughput_report(result)
    assert "| chestct_int8 | 16 | not stable |  |  |" in throughput_report(result)


def test_nothing_served_is_one_line(published, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(published.folder)
    (tmp_path / "throughput.yaml").write_text(f"repository: {tmp_path}\n")
    output = Path("never.json")
    command = ["--config", str(tmp_path / "throughput.yaml"), "--output", str(output)]
    assert main(command) == 1
    assert "run python -m export repository" in capsys.readouterr().err
    assert not output.exists()
