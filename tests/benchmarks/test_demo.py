from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from benchmarks.demo import (
    COMPARED,
    EXACT,
    describe_pipeline,
    describe_served,
    largest_difference,
    serve_and_classify,
)


@pytest.fixture(scope="module")
def served(published, triton_environment):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(published.folder)
        yield serve_and_classify(published.scans / "test")


@pytest.mark.server
def test_exact_model_is_held_to_keras_and_the_promoted_one_is_told_of(served, published):
    assert served.exact, served.exact.describe()
    assert EXACT in served.exact.candidate
    assert served.precision == "int8"
    assert served.promoted.num_scans == served.exact.num_scans == COMPARED
    assert served.promoted.label_agreement == 1.0  # the same file under another name
    said = "\n".join(describe_served(served, published.scans / "test"))
    assert "parity holds" in said
    assert f"chestct is int8; it gives Keras' label to 100.0% of {COMPARED} scans" in said
    assert "12 scans of" in said
    assert largest_difference(served.over_grpc, served.over_http) < 1e-6
    json.dumps(served.promoted.to_json(), allow_nan=False)


@pytest.mark.server
def test_promoted_model_that_differs_is_not_called_equal(served, published):
    """Words follow the figures; the limits of a variant are those of its own gate."""
    report = dataclasses.replace(served.promoted, label_agreement=0.75)
    said = "\n".join(
        describe_served(dataclasses.replace(served, promoted=report), published.scans / "test")
    )
    assert f"Keras' label to 75.0% of {COMPARED} scans" in said


@pytest.mark.server
@pytest.mark.usefixtures("triton_environment")
def test_repository_without_the_exact_model_says_so(published, tmp_path, monkeypatch):
    for name in ("results", ".venv-triton"):
        (tmp_path / name).symlink_to(published.folder / name)
    shutil.copytree(
        published.folder / "model_repository" / "chestct", tmp_path / "model_repository" / "chestct"
    )
    monkeypatch.chdir(tmp_path)
    served = serve_and_classify(published.scans / "test")
    assert served.exact is None
    assert "no FP32 model is served" in describe_served(served, published.scans / "test")[0]


def test_pipeline_is_told_with_the_speed_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interval = {"value": 0.9, "low": 0.8, "high": 0.95}
    row = {
        "engine": "triton_grpc", "runs_on": "openvino", "variant": "int8", "n": 9,
        "p50_ms": 20.0, "p99_ms": 30.0, "scans_per_s": 50.0,
        "times_faster_than_keras_predict": 6.0, "times_faster_than_keras_compiled": 3.5,
        "accuracy": interval, "macro_auroc": interval,
    }  # fmt: skip
    place = {
        "cpu": "A CPU", "cpu_flags": ["avx512_vnni"], "cores": 2, "gpu": None,
        "commit": "0" * 40, "date": "2026-01-01",
    }  # fmt: skip
    latency = {
        "environment": place,
        "scored_on": "24 test scans",
        "rows": [row | {"batch": 1}, row | {"batch": 8, "p50_ms": 99.0}],
    }
    points = [
        {"name": "third", "valid": {"refused_for": []}},
        {"name": "quarter", "valid": {"refused_for": ["accuracy_drop 0.1 (limit 0.01)"]}},
        {"name": "full", "valid": {"refused_for": []}},
    ]
    scores = {"official": {"n": 24, "accuracy": 0.9, "majority_accuracy": 0.25}}
    for name, content in (
        ("data/ingest.json", {"source": "phantom"}),
        ("results/benchmark/latency.json", latency),
        ("results/evaluate/scores.json", scores),
        ("results/compressed/curve.json", {"points": points}),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    said = "\n".join(describe_pipeline())
    assert "A CPU (avx512_vnni), 2 cores, GPU: none" in said
    header, row = (line.split("  ") for line in said.splitlines()[2:4])
    assert [text.strip() for text in header if text][:3] == ["engine", "variant", "p50 ms"]
    assert [text.strip() for text in row if text] == [
        "triton_grpc", "int8", "20.0", "6.00 x", "3.50 x", "0.900 (0.800 to 0.950)",
    ]  # fmt: skip
    assert "99.0" not in said
    assert "student third is within its gate." in said
    assert "student quarter is refused by its gate and not published: accuracy_drop 0.1" in said
    assert "student full" not in said
    assert "VGG-16 on phantom; official test split, n = 24: accuracy 0.9" in said
