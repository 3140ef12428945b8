from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.engines import open_engine
from benchmarks.variants import find_variants, median_interval, read_curve, scores_of, spread
from training.common.metrics import macro_auroc
from training.data.dataset import read_split

FOLDERS = {
    "fp32": Path("results/export"),
    "int8": Path("results/int8"),
    "compressed": Path("results/compressed"),
}


@pytest.fixture
def _here(published, monkeypatch):
    monkeypatch.chdir(published.folder)


@pytest.mark.usefixtures("_here")
def test_variants_say_how_they_are_served_and_the_missing_one_why(published):
    variants, missing = find_variants(FOLDERS, published.folder / "model_repository")
    assert [variant.name for variant in variants] == ["fp32", "int8"]
    assert missing == {"compressed": "results/compressed holds no model.onnx"}
    settings = [variant.settings() for variant in variants]
    assert [item["engine"] for item in settings] == ["onnxruntime", "openvino"]
    assert settings[0] == {
        "engine": "onnxruntime",
        "threads": 0,
        "instances": 1,
        "max_batch_size": 32,
        "dynamic_batching": True,
        "max_queue_delay_us": 0,
    }


@pytest.mark.usefixtures("_here")
def test_variant_that_is_not_published_is_kept_and_named(tmp_path):
    variants, missing = find_variants({"fp32": Path("results/export")}, tmp_path)
    assert [variant.config for variant in variants] == [None]
    assert "chestct_fp32" in missing


def test_no_variant_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no variant .* python -m export onnx"):
        find_variants({"fp32": tmp_path}, tmp_path)


@pytest.mark.usefixtures("_here")
def test_accuracy_of_one_file_never_stands_beside_the_speed_of_another(published, tmp_path):
    """A folder that was exported again and not published again."""
    folder = tmp_path / "int8"
    shutil.copytree(published.folder / "results" / "int8", folder)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"another file than .* publish again"):
        find_variants({"int8": folder}, published.folder / "model_repository")


def test_scores_are_those_of_the_labels(published):
    scans = read_split(published.scans, published.split)["test"]
    infer = open_engine("onnxruntime", published.folder / "results" / "export")
    found = scores_of(infer, scans, "score")
    probabilities = infer(scans.pixels)["probabilities"]
    right = (probabilities.argmax(axis=1) == scans.labels).mean()
    assert found["accuracy"]["value"] == pytest.approx(right, abs=1e-4)
    area = macro_auroc(probabilities, scans.labels)
    assert found["macro_auroc"]["value"] == pytest.approx(area, abs=1e-4)
    for interval in found.values():
        assert interval["low"] <= interval["value"] <= interval["high"]


def test_scans_are_spread_over_the_whole_set(published):
    scans = read_split(published.scans, published.split)["test"]
    chosen = spread(scans, 4)
    assert chosen.paths == tuple(scans.paths[index] for index in (0, 4, 7, 11))
    assert len(spread(scans, 100)) == len(scans) == 12


def test_median_and_its_interval():
    found = median_interval([1.0, 2.0, 100.0])
    assert (found["value"], found["low"], found["high"]) == (2.0, 1.0, 100.0)
    many = median_interval(list(np.arange(1001.0)))
    assert many["value"] == 500
    # Order statistics: 501 -+ 1.96 * sqrt(1001) / 2, give or take the resampling
    assert 455 < many["low"] < 485
    assert 515 < many["high"] < 545


def test_curve_holds_the_scores_of_the_test_scans(tmp_path):
    """Those of the validation scans chose the point; the plot shows what it is worth."""
    worth = {"n": 9, "accuracy": {}, "refused_for": []}
    point = {
        "name": "x 0.5",
        "widths": [32],
        "latency_ms": 4.7,
        "chosen": True,
        "valid": worth | {"macro_auroc": {"value": 0.9, "low": 0.8, "high": 1.0}},
        "test": worth | {"macro_auroc": {"value": 0.98, "low": float("nan"), "high": 0.99}},
    }
    (tmp_path / "curve.json").write_text(json.dumps({"reference": {}, "points": [point]}))
    assert read_curve(tmp_path / "curve.json") == [
        {
            "name": "x 0.5",
            "latency_ms": 4.7,
            "chosen": True,
            "macro_auroc": {"value": 0.98, "low": None, "high": 0.99},
        }
    ]
    assert read_curve(tmp_path / "absent.json") == []
