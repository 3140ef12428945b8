from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.check.gate import Gate, compare_by_labels, gate_figures
from export.check.parity import ParityConfig, Tolerance, check_served, compare, main, spread_scans
from export.check.runners import keras_runner, onnx_runner, openvino_runner
from export.convert.quantize import QuantizeConfig, write_int8
from training.common.atomic_io import sha256_of
from training.common.config import config_from_mapping
from training.data.dataset import ScanSet
from training.network.vgg16 import load_trained

pytestmark = pytest.mark.xdist_group("parity")  # its fixtures are made once

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


def test_keras_and_onnx_runtime_agree_at_two_batch_sizes_in_full_width(full_width, scan_batch):
    report = compare(
        scan_batch[:9],
        ("keras", keras_runner(load_trained(full_width.model)[0])),
        ("onnxruntime", onnx_runner(full_width.onnx)),
        Tolerance(),
    )
    assert report, report.describe()
    assert report.num_scans == 9
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
    assert "FAILS" in report.describe()


def test_an_error_below_its_limit_holds_and_is_reported():
    report = judge(changed("probabilities", lambda p: p + np.float32(5e-6)))
    assert report
    found = next(error for error in report.errors if error.output == "probabilities")
    assert found.max == pytest.approx(5e-6, rel=0.1)
    assert found.mean == pytest.approx(5e-6, rel=0.1)


def test_another_shape_fails_in_words():
    report = judge(changed("activation_map", lambda m: m[:, :7]))
    assert not report
    assert "activation_map has shape (1, 7, 14, 4), expected (1, 14, 14, 4)" in report.describe()


def test_a_missing_output_fails_in_words():
    def infer(scans):
        outputs = fake_outputs(scans)
        del outputs["domain_distance"]
        return outputs

    assert "output domain_distance is missing" in judge(infer).describe()


def test_comparing_nothing_fails():
    report = compare(SCANS[:0], ("one", fake_outputs), ("same", fake_outputs), Tolerance())
    assert not report
    assert report.describe() == "parity fails: no scan was compared"


def test_one_other_label_fails():
    report = judge(fake_outputs)
    assert not dataclasses.replace(report, label_agreement=0.95)


def test_spread_scans_takes_first_and_last(phantoms, scan_batch):
    got = spread_scans(phantoms.scans / "test", 5)
    assert got.shape == (5, 224, 224, 1)
    np.testing.assert_array_equal(got[[0, -1]], scan_batch[[0, -1]])


@pytest.fixture(scope="module")
def variants(trained, exported, tmp_path_factory) -> Path:
    """A folder with the FP32 variant `export` and the INT8 variant `int8`."""
    folder = tmp_path_factory.mktemp("variants")
    (folder / "export").mkdir()
    shutil.copy(exported, folder / "export" / "model.onnx")
    shutil.copy(trained.model / "facts.json", folder / "export")
    write_int8(QuantizeConfig(folder / "export", trained.scans, trained.split, 8, folder / "int8"))
    return folder


@pytest.fixture
def config(trained, variants, tmp_path) -> Path:
    """A config whose gate passes any accuracy: the network of the tests knows nothing.

    One of its twelve scans lies so near the domain threshold that either side is right.
    """
    file = tmp_path / "parity.yaml"
    file.write_text(
        f"model: {trained.model}\nscans: {trained.scans}\nsplit: {trained.split}\n"
        f"num_scans: 9\nreference: {variants / 'export'}\n"
        "gate: {label_agreement: 0.5, macro_auroc_drop: 1, accuracy_drop: 1, "
        "in_domain_agreement: 0.5}\n"
    )
    return file


def test_fp32_variant_is_compared_with_keras_in_both_engines(variants, config):
    assert main(["--config", str(config), "--variant", str(variants / "export")]) == 0
    report = json.loads((variants / "export" / "parity.json").read_text())
    assert report["holds"] is True
    assert report["onnx_sha256"] == sha256_of(variants / "export" / "model.onnx")
    assert [r["candidate"] for r in report["reports"]] == ["onnxruntime", "openvino"]
    assert {r["reference"] for r in report["reports"]} == {"keras"}
    assert {r["num_scans"] for r in report["reports"]} == {9}


def test_int8_variant_is_gated_on_validation_scans_in_both_engines(variants, config, tmp_path):
    output = tmp_path / "copy.json"
    arguments = ["--config", str(config), "--variant", str(variants / "int8")]
    assert main([*arguments, "--output", str(output)]) == 0
    report = json.loads((variants / "int8" / "parity.json").read_text())
    assert report["holds"] is True
    assert report["onnx_sha256"] == sha256_of(variants / "int8" / "model.onnx")
    assert [r["candidate"] for r in report["reports"]] == ["onnxruntime", "openvino"]
    for part in report["reports"]:
        assert part["reference"] == "FP32"
        assert part["gated"] == "valid"
        assert part["num_scans"] == {"valid": 12, "test": 12}
        assert set(part["figures"]) == {"valid", "test"}
    assert json.loads(output.read_text())["reports"] == report["reports"]


def test_variant_that_fails_says_why_in_its_report(variants, config, narrow_widths, tmp_path):
    """The head's signs turned: each map is the reverse of the true one."""
    broken = tmp_path / "broken"
    shutil.copytree(variants / "int8", broken)
    model = onnx.load(broken / "model.onnx")
    shape = [4, narrow_widths[-1], 1, 1]
    head = next(i for i in model.graph.initializer if list(i.dims) == shape)
    weights = onnx.numpy_helper.to_array(head)
    head.CopyFrom(onnx.numpy_helper.from_array(-weights, head.name))
    onnx.save(model, broken / "model.onnx")
    assert main(["--config", str(config), "--variant", str(broken)]) == 1
    report = json.loads((broken / "parity.json").read_text())
    assert report["holds"] is False
    assert [reason.split(": ")[1] for reason in report["reasons"]] == ["onnxruntime", "openvino"]
    assert all("least_map_correlation" in reason for reason in report["reasons"])
    assert "parity FAILS: openvino: " in report["verdict"]


@pytest.mark.server
def test_served_variant_is_judged_by_the_precision_that_it_tells(
    variants, config, trained, triton_environment, tmp_path
):
    from export.publish.repository import write_repository
    from export.publish.settings import RepositoryConfig
    from serving.local import LocalTriton
    from training.common.config import load_config

    folder = variants / "int8"
    verdict = tmp_path / "parity.json"
    verdict.write_text(json.dumps({"holds": True, "onnx_sha256": sha256_of(folder / "model.onnx")}))
    repository = tmp_path / "repository"
    write_repository(
        RepositoryConfig(
            onnx=folder / "model.onnx", model=folder, parity=verdict, repository=repository,
            name="chestct_int8", engine="openvino",
        )
    )  # fmt: skip
    with LocalTriton(repository, environment=triton_environment) as server:
        judged = check_served(load_config(ParityConfig, config), server.grpc_url, "chestct_int8")
    assert judged, judged.describe()
    [report] = judged.reports
    assert report.candidate == "triton chestct_int8 version 1"
    assert report.reference == "FP32"


def test_folder_without_scans_is_one_line(variants, tmp_path, capsys):
    (tmp_path / "parity.yaml").write_text(
        f"variant: {variants / 'export'}\nscans: {tmp_path / 'none'}\n"
    )
    assert main(["--config", str(tmp_path / "parity.yaml")]) == 1
    assert "no scan found; parity needs at least one" in capsys.readouterr().err


def test_variant_without_facts_is_one_line(variants, config, tmp_path, capsys):
    shutil.copy(variants / "int8" / "model.onnx", tmp_path)
    assert main(["--config", str(config), "--variant", str(tmp_path)]) == 1
    assert "facts.json: no such file; make the variant first" in capsys.readouterr().err


# Ten labelled scans of two classes in five groups. The reference is right on all but the last,
# and its scores of class 0 rank every scan of class 0 above every one of class 1 but that one.
LABELS = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
LABELLED = ScanSet(
    np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1),
    LABELS,
    np.repeat(np.arange(5), 2),
    tuple("abcdefghij"),
    ("ill", "well"),
)
SCORES = np.array([0.9, 0.8, 0.7, 0.9, 0.8, 0.2, 0.3, 0.1, 0.2, 0.75])


def outputs_of(scores: np.ndarray, **changed: np.ndarray) -> dict[str, np.ndarray]:
    maps = np.random.default_rng(2).normal(size=(10, 14, 14, 2))
    return {
        "probabilities": np.stack([scores, 1 - scores], axis=1).astype(np.float32),
        "activation_map": maps.astype(np.float32),
        "domain_distance": np.arange(10, dtype=np.float32)[:, np.newaxis],
    } | changed


def figures_of(candidate, thresholds=(8.5, 8.5), gate=None):
    found = gate_figures(LABELLED, outputs_of(SCORES), candidate, thresholds, gate or Gate())
    return {figure.name: figure for figure in found}


def test_equal_answers_lose_nothing():
    found = figures_of(outputs_of(SCORES))
    assert all(found.values())
    assert found["macro_auroc_drop"].value == 0
    assert (found["accuracy_drop"].low, found["accuracy_drop"].high) == (0, 0)
    assert found["median_map_correlation"].value == pytest.approx(1)


def test_lost_labels_and_ranks_are_counted():
    # Scan 0 falls from 0.9 to 0.15: its label changes from right to wrong (accuracy 0.9 to 0.8).
    # Of the 25 pairs the reference orders 24 rightly (0.7 < 0.75); now scan 0 is also below
    # 0.2, 0.3, 0.2 and 0.75, so 20: the AUROC falls by 4/25, the same for both classes.
    scores = SCORES.copy()
    scores[0] = 0.15
    found = figures_of(outputs_of(scores))
    assert found["label_agreement"].value == pytest.approx(0.9)
    assert found["accuracy_drop"].value == pytest.approx(0.1)
    assert found["macro_auroc_drop"].value == pytest.approx(4 / 25)
    assert found["max_probability_error"].value == pytest.approx(0.75)
    assert found["mean_probability_error"].value == pytest.approx(0.075)
    assert found["accuracy_drop"].low == 0
    assert 0.1 <= found["accuracy_drop"].high <= 0.5
    failed = {name for name, figure in found.items() if not figure}
    assert failed == {
        "label_agreement", "macro_auroc_drop", "accuracy_drop", "mean_probability_error",
        "max_probability_error",
    }  # fmt: skip


def test_a_better_variant_holds():
    scores = SCORES.copy()
    scores[9] = 0.4
    found = figures_of(outputs_of(scores), gate=Gate(label_agreement=0.9, max_probability_error=1))
    assert found["accuracy_drop"].value == pytest.approx(-0.1)
    assert found["macro_auroc_drop"].value == pytest.approx(-1 / 25)
    assert found["accuracy_drop"]
    assert found["macro_auroc_drop"]


def test_map_of_another_scale_correlates_and_another_map_does_not():
    maps = outputs_of(SCORES)["activation_map"]
    scaled = figures_of(outputs_of(SCORES, activation_map=3 * maps + 1))
    assert scaled["least_map_correlation"].value == pytest.approx(1)
    maps = maps.copy()
    maps[4] = np.random.default_rng(3).normal(size=maps[4].shape)
    other = figures_of(outputs_of(SCORES, activation_map=maps))
    assert other["median_map_correlation"]
    assert abs(other["least_map_correlation"].value) < 0.2
    assert not other["least_map_correlation"]


def test_constant_map_fails():
    found = figures_of(outputs_of(SCORES, activation_map=np.ones((10, 14, 14, 2), np.float32)))
    assert not found["median_map_correlation"]


def test_domain_is_compared_by_each_model_s_own_threshold():
    distances = 10 * outputs_of(SCORES)["domain_distance"]
    scaled = outputs_of(SCORES, domain_distance=distances)
    assert figures_of(scaled, (8.5, 85.0))["in_domain_agreement"].value == 1
    assert figures_of(scaled, (8.5, 8.5))["in_domain_agreement"].value == pytest.approx(0.2)


def answers(scores: np.ndarray, scans: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of the scans: each scan's pixel is its number, plus 10 in the test split."""
    rows = scans[:, 0, 0, 0] % 10
    return {name: value[rows] for name, value in outputs_of(scores).items()}


def gated(runner):
    test = dataclasses.replace(LABELLED, pixels=LABELLED.pixels + np.uint8(10))
    [report] = compare_by_labels(
        {"valid": LABELLED, "test": test},
        ("FP32", lambda scans: answers(SCORES, scans), 8.5),
        {"engine": runner},
        8.5,
        Gate(),
    )
    return report


@pytest.mark.parametrize("split", ["valid", "test"])
def test_validation_scans_decide_and_test_scans_are_reported(split):
    def infer(scans):
        wrong = (scans[0, 0, 0, 0] >= 10) == (split == "test")
        return answers(1 - SCORES if wrong else SCORES, scans)

    report = gated(infer)
    assert bool(report) == (split == "test")
    drops = {name: figures[2].value for name, figures in report.figures.items()}
    assert drops[split] == pytest.approx(0.8)
    assert drops["valid" if split == "test" else "test"] == 0


def test_engine_that_lacks_an_output_fails_in_words():
    def lacking(scans):
        return {"probabilities": answers(SCORES, scans)["probabilities"]}

    assert "output activation_map is missing" in gated(lacking).describe()


def test_nothing_compared_is_a_failure():
    report = dataclasses.replace(gated(lambda scans: answers(SCORES, scans)), num_scans={})
    assert not report
    assert report.reasons == ["no scan was compared"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engines": ["tensorflow"]}, "engines.0 is 'tensorflow': expected pattern"),
        ({"engines": []}, "engines is .*: expected at least 1 item"),
        ({"gate": {"recall": 0.9}}, r"gate: unknown keys \['recall'\]; allowed are"),
        ({"gate": {"label_agreement": "high"}}, "gate.label_agreement is 'high': expected a valid"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_mapping(ParityConfig, changes, Path("parity.yaml"))


def test_openvino_answers_as_onnx_runtime_does_in_fp32(exported, scan_batch):
    report = compare(
        scan_batch[:9],
        ("onnxruntime", onnx_runner(exported)),
        ("openvino", openvino_runner(exported)),
        Tolerance(),
    )
    assert report, report.describe()
