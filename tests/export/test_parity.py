from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from export.parity import Tolerance, compare, keras_runner, main, onnx_runner, spread_scans
from training.model import load_trained

SCANS = np.random.default_rng(1).integers(0, 255, (20, 224, 224, 1), dtype=np.uint8)


def fake_outputs(scans: np.ndarray) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(scans[:, 0, 0, 0].astype(int)).random((len(scans), 4))
    return {
        "probabilities": (rows / rows.sum(1, keepdims=True)).astype(np.float32),
        "activation_map": np.ones((len(scans), 14, 14, 4), np.float32) * 50,
        "domain_distance": np.full((len(scans), 1), 30, np.float32),
    }


def changed(name, change):
    def infer(scans):
        outputs = fake_outputs(scans)
        outputs[name] = change(outputs[name])
        return outputs

    return infer


def judge(runner):
    return compare(SCANS, ("one", fake_outputs), ("other", runner), Tolerance())


def test_keras_and_onnx_runtime_agree_at_two_batch_sizes(trained, exported, scan_batch):
    report = compare(
        scan_batch,
        ("keras", keras_runner(load_trained(trained.model)[0])),
        ("onnxruntime", onnx_runner(exported)),
        Tolerance(),
    )
    assert report, report.in_words()
    assert report.num_scans == 12
    assert report.batch_sizes == (1, 8)
    worst = {error.output: error.max for error in report.errors}
    assert worst["probabilities"] <= 1e-5


def test_equal_answers_hold_and_every_scan_is_compared():
    report = judge(fake_outputs)
    assert report
    assert report.num_scans == 20
    assert report.label_agreement == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("probabilities", lambda p: p + 2e-5),
        ("probabilities", lambda p: p * np.nan),
        ("probabilities", lambda p: p[:, ::-1]),
        ("activation_map", lambda m: m + 0.01),
        ("domain_distance", lambda d: d * 1.001),
    ],
)
def test_an_error_above_its_limit_fails(name, change):
    report = judge(changed(name, change))
    assert not report
    assert "FAILS" in report.in_words()


def test_an_error_below_its_limit_holds_and_is_reported():
    report = judge(changed("probabilities", lambda p: p + np.float32(5e-6)))
    assert report
    found = next(error for error in report.errors if error.output == "probabilities")
    assert found.max == pytest.approx(5e-6, rel=0.1)
    assert found.mean == pytest.approx(5e-6, rel=0.1)


def test_another_shape_fails_in_words():
    report = judge(changed("activation_map", lambda m: m[:, :7]))
    assert not report
    assert "activation_map has shape (1, 7, 14, 4), expected (1, 14, 14, 4)" in report.in_words()


def test_a_missing_output_fails_in_words():
    def infer(scans):
        outputs = fake_outputs(scans)
        del outputs["domain_distance"]
        return outputs

    assert "output domain_distance is missing" in judge(infer).in_words()


def test_comparing_nothing_fails():
    report = compare(SCANS[:0], ("one", fake_outputs), ("same", fake_outputs), Tolerance())
    assert not report
    assert report.in_words() == "parity fails: no scan was compared"


def test_one_other_label_fails():
    report = judge(fake_outputs)
    assert not dataclasses.replace(report, label_agreement=0.95)


def test_spread_scans_takes_first_and_last(phantoms, scan_batch):
    got = spread_scans(phantoms.scans / "test", 5)
    assert got.shape == (5, 224, 224, 1)
    np.testing.assert_array_equal(got[[0, -1]], scan_batch[[0, -1]])


def test_command_writes_its_report_and_verdict(trained, exported, tmp_path):
    output = tmp_path / "parity.json"
    (tmp_path / "parity.yaml").write_text(
        f"model: {trained.model}\nonnx: {exported}\nscans: {trained.scans}\n"
        f"num_scans: 9\noutput: {output}\n"
    )
    assert main(["--config", str(tmp_path / "parity.yaml")]) == 0
    report = json.loads(output.read_text())
    assert report["holds"] is True
    assert report["num_scans"] == 9


def test_folder_without_scans_is_one_line(tmp_path, capsys):
    (tmp_path / "parity.yaml").write_text(f"scans: {tmp_path / 'none'}\n")
    assert main(["--config", str(tmp_path / "parity.yaml")]) == 1
    assert "no scan found; parity needs at least one" in capsys.readouterr().err
