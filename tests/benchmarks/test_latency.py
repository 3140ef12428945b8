from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.latency import LatencyConfig, _add_footprints, _rows, main
from benchmarks.reports import latency_report
from benchmarks.rounds import Subject, Timing, run_rounds, share_of_server
from benchmarks.variants import find_variants
from training.common.config import config_from_mapping

IN_PROCESS = {
    ("keras_predict", "fp32"), ("keras_compiled", "fp32"),
    ("onnxruntime", "fp32"), ("onnxruntime", "int8"),
    ("openvino", "fp32"), ("openvino", "int8"),
}  # fmt: skip
SERVED = {(f"triton_{way}", variant) for way in ("grpc", "http") for variant in ("fp32", "int8")}


def test_row_by_hand():
    parts = {"queue": 1.0, "compute": 15.0, "wire": 4.0}
    row = Timing([[10.0], [30.0, 20.0]], [parts] * 2).row(2, decode_ms=4.0)
    assert (row["n"], row["p50_ms"], row["min_ms"]) == (3, 20.0, 10.0)
    assert row["scans_per_s"] == 100.0  # 2 scans in 20 ms
    assert row["parts_ms"] == {"decode": 8.0, "wire": 4.0, "queue": 1.0, "compute": 15.0}


def test_engine_without_a_server_has_no_server_parts():
    assert Timing([[5.0]]).row(1, 1.0)["parts_ms"] == {"decode": 1.0}


def test_share_of_the_server_is_paired_by_round():
    """The machine slows down threefold; the server adds 2 ms, 2 ms and 4 ms of 10, 20 and 40."""
    in_process = Timing([[10.0], [19.0, 20.0, 90.0], [40.0]])
    served = Timing([[12.0], [22.0], [44.0]])
    share = share_of_server(served, in_process)
    assert share["ms"]["value"] == 2.0
    assert share["percent"]["value"] == 10.0  # of 20 %, 10 % and 10 %
    # With the rounds of one side in another order the medians are the same, and the pairs are not.
    turned = Timing([served.rounds[2], served.rounds[0], served.rounds[1]])
    assert share_of_server(turned, in_process)["ms"]["value"] == -8.0


def test_ratios_and_shares_are_against_the_right_row():
    def nothing(scans):
        raise AssertionError

    def subject(engine, variant, runs_on=None):
        model = f"chestct_{variant}" if runs_on else None
        return Subject(engine, variant, nothing, runs_on or engine, model)

    milliseconds = {
        subject("keras_predict", "fp32"): 120.0,
        subject("keras_compiled", "fp32"): 60.0,
        subject("onnxruntime", "int8"): 30.0,
        subject("openvino", "int8"): 20.0,
        subject("openvino", "fp32"): 50.0,
        subject("triton_grpc", "int8", "openvino"): 24.0,
    }
    timings = [Timing([[value]] * 3, []) for value in milliseconds.values()]
    rows = {
        (row["engine"], row["variant"]): row
        for row in _rows(list(milliseconds), timings, batch=1, decode_ms=1.0)
    }
    served = rows["triton_grpc", "int8"]
    assert served["times_faster_than_keras_predict"] == 5.0
    assert served["times_faster_than_keras_compiled"] == 2.5
    assert served["share_of_triton"]["ms"]["value"] == 4.0  # over OpenVINO on the same variant
    assert served["share_of_triton"]["percent"]["value"] == 20.0
    assert rows["keras_predict", "fp32"]["times_faster_than_keras_compiled"] == 0.5
    assert "share_of_triton" not in rows["openvino", "int8"]


def test_time_is_bounded_and_every_subject_has_the_same_rounds():
    calls: list[str] = []
    subjects = [
        Subject(name, "fp32", lambda scans, name=name: calls.append(name), name)
        for name in ("a", "b")
    ]
    scans = np.zeros((4, 224, 224, 1), np.uint8)
    timings = run_rounds(subjects, scans, 1, rounds=1000, limit_s=0.2, seed=7)
    assert 2 <= len(timings[0].rounds) == len(timings[1].rounds) < 1000
    assert {len(turn) for turn in timings[0].rounds} == {12}
    # Two to find the repeats, then in each turn twelve untimed and twelve timed ones.
    assert calls.count("a") == 2 + 24 * len(timings[0].rounds)


@pytest.mark.parametrize("rounds", [{0: 3}, {1: 0}, {"a": 1}])
def test_rounds_that_measure_nothing_are_refused(rounds):
    with pytest.raises(ValueError, match=r"rounds\..* is .*: expected"):
        config_from_mapping(LatencyConfig, {"rounds": rounds}, Path("latency.yaml"))


@pytest.mark.parametrize(
    "settings", [{"rounds": {}}, {"limit_s": 0.0}, {"cold_starts": -1}, {"most_scored": 0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"expected (at least 1 item|greater than)"):
        config_from_mapping(LatencyConfig, settings, Path("latency.yaml"))


@pytest.mark.server
@pytest.mark.usefixtures("triton_environment")
def test_all_engines_and_variants_are_measured_in_one_run(published, monkeypatch, tmp_path, capsys):
    (tmp_path / "latency.yaml").write_text(
        f"scans: {published.scans}\nsplit: {published.split}\n"
        "rounds: {1: 2, 2: 1}\ncold_starts: 0\nmost_scored: 8\n"
    )
    monkeypatch.chdir(published.folder)
    output = tmp_path / "results" / "latency.json"
    command = ["--config", str(tmp_path / "latency.yaml"), "--output", str(output)]
    assert main(command) == 0
    text = output.read_text()
    result = json.loads(text)
    assert "NaN" not in text
    rows = {(row["engine"], row["variant"], row["batch"]): row for row in result["rows"]}
    bfloat16 = {("openvino_bf16", "fp32")} - {(name, "fp32") for name in result["not_measured"]}
    assert set(rows) == {
        (*key, batch) for key in IN_PROCESS | SERVED | bfloat16 for batch in (1, 2)
    }
    assert "compressed" in result["not_measured"]
    assert result["num_scored"] == 8
    assert {kind: item["n"] for kind, item in result["decode"].items()} == {"DICOM": 4, "PNG": 40}
    exact = rows["keras_compiled", "fp32", 1]["macro_auroc"]
    for (engine, variant, batch), row in rows.items():
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert np.isclose(row["scans_per_s"], 1000 * batch / row["p50_ms"], rtol=0.01)
        if engine != "openvino_bf16":
            assert row["macro_auroc"] == exact  # `int8` is the same file here
        served = engine.startswith("triton")
        assert ({"queue", "compute", "wire"} <= set(row["parts_ms"])) == served
        assert ("share_of_triton" in row) == served
        if served:
            assert row["runs_on"] == {"fp32": "onnxruntime", "int8": "openvino"}[variant]
            assert row["parts_ms"]["compute"] > 0
            assert row["parts_ms"]["queue"] >= 0
        assert "cold_start_s" not in row
        baseline = rows["keras_compiled", "fp32", batch]["p50_ms"]
        ratio = row["times_faster_than_keras_compiled"]
        assert ratio == pytest.approx(baseline / row["p50_ms"], abs=0.006)
    encoded = result["encoded"]
    assert encoded["n"] == 22
    assert min(encoded["client_p50_ms"], encoded["server_p50_ms"]) > 0
    assert "as a whole file to `chestct_encoded`" in latency_report(result)
    assert (
        output.with_suffix(".md").read_text() == latency_report(result) == capsys.readouterr().out
    )
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.server
@pytest.mark.usefixtures("triton_environment")
def test_footprint_is_that_of_the_engine_and_of_the_server_of_each_row(published, monkeypatch):
    monkeypatch.chdir(published.folder)
    config = LatencyConfig(cold_starts=1)
    variants, _ = find_variants(config.variants, config.repository)
    rows = [
        {"engine": engine, "variant": "int8", "batch": 8}
        for engine in ("onnxruntime", "triton_grpc", "triton_http")
    ]
    _add_footprints(config, rows, variants)
    in_process, grpc, http = rows
    size_mb = (published.folder / "results/int8/model.onnx").stat().st_size / 1e6
    assert {row["model_mb"] for row in rows} == {round(size_mb, 2)}
    assert in_process["cold_start_s"] > 0.05
    assert grpc["peak_memory_mb"] > in_process["peak_memory_mb"] > 20
    assert (grpc["cold_start_s"], grpc["peak_memory_mb"]) == (
        http["cold_start_s"],
        http["peak_memory_mb"],
    )


def test_nothing_trained_is_one_line(tmp_path, capsys):
    (tmp_path / "latency.yaml").write_text(f"model: {tmp_path}\n")
    output = tmp_path / "latency.json"
    assert main(["--config", str(tmp_path / "latency.yaml"), "--output", str(output)]) == 1
    assert "run python -m training fit" in capsys.readouterr().err
    assert not output.exists()
