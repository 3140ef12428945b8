from __future__ import annotations

import dataclasses
import json

import keras
import numpy as np
import onnx
import pytest
import yaml

from export.check.gate import Gate
from export.convert.compress import CompressConfig, compress, fastest_allowed, latencies_ms
from export.convert.onnx import contract_differences
from training.common.atomic_io import write_json
from training.network.vgg16 import build_classifier, load_trained

pytestmark = pytest.mark.xdist_group("compress")  # its fixtures are made once

WIDTHS = {
    "tiny": (8, 8, 8, 8, 12, 12, 12, 16, 16, 16, 16, 16, 16),
    "smaller": (4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 8),
}
ANYTHING = {
    limit.name: -1.0 if "agreement" in limit.name or "correlation" in limit.name else 1.0
    for limit in dataclasses.fields(Gate)
}


@pytest.fixture(scope="module")
def config(trained, exported, tmp_path_factory) -> CompressConfig:
    """Two students that were never taught; the FP32 model stands in for the full INT8 one."""
    folder = tmp_path_factory.mktemp("compress")
    _, facts = load_trained(trained.model)
    keras.utils.set_random_seed(1)
    for name, widths in WIDTHS.items():
        student = build_classifier(len(facts.class_names), widths=widths)
        kernel, bias = student.get_layer("activation_map").get_weights()
        rng = np.random.default_rng(1)
        student.get_layer("activation_map").set_weights(
            [rng.normal(0, 0.01, kernel.shape).astype(np.float32), bias]
        )
        (folder / "students" / name).mkdir(parents=True)
        student.save(folder / "students" / name / "model.keras")
        write_json(folder / "students" / name / "facts.json", facts.to_parameters())
        write_json(folder / "students" / name / "student.json", {"run": name, "teacher": facts.run})
    parity = {
        "variant": folder / "compressed",
        "reference": exported.parent,
        "scans": trained.scans,
        "split": trained.split,
    }
    for name, gate in (("strict", {}), ("loose", ANYTHING)):
        text = yaml.safe_dump({key: str(path) for key, path in parity.items()} | {"gate": gate})
        (folder / f"{name}.yaml").write_text(text)
    return CompressConfig(
        students=folder / "students",
        int8=exported.parent,
        parity=folder / "strict.yaml",
        num_scans=4,
        rounds=5,
    )


def test_students_that_lose_too_much_are_not_written(config):
    """Only the full network, which needs no student, keeps within the gate."""
    output = config.parity.with_name("compressed")
    assert compress(config) is None
    assert sorted(path.name for path in output.iterdir()) == ["curve.json", "curve.md"]
    points = json.loads((output / "curve.json").read_text())["points"]
    assert {point["name"] for point in points} == {"full", "tiny", "smaller"}
    assert not any(point["chosen"] for point in points)
    refused = {point["name"]: point["valid"]["refused_for"] for point in points}
    assert refused["tiny"]
    assert not refused["full"]


def test_the_fastest_student_within_the_gate_is_written(config):
    output = config.parity.with_name("compressed")
    loose = dataclasses.replace(config, parity=config.parity.with_name("loose.yaml"))
    chosen = compress(loose)
    curve = json.loads((output / "curve.json").read_text())
    by_name = {point["name"]: point for point in curve["points"]}
    assert chosen == min(WIDTHS, key=lambda name: by_name[name]["latency_ms"])
    assert json.loads((output / "student.json").read_text())["run"] == chosen
    written = onnx.load(output / "model.onnx")
    assert contract_differences(written, 4) == []
    kernels = [i for i in written.graph.initializer if i.name.endswith("_weights")]
    assert tuple(kernel.dims[0] for kernel in kernels) == WIDTHS[chosen]
    facts = json.loads((output / "facts.json").read_text())
    assert facts["precision"] == "int8"
    assert {item.key: item.value for item in written.metadata_props}.items() >= facts.items()
    assert [name for name, point in by_name.items() if point["chosen"]] == [chosen]
    assert curve["reference"]["test"]["n"] == 12
    assert f"| {chosen} |" in (output / "curve.md").read_text()
    report = json.loads((output / "parity.json").read_text())
    assert report["holds"] is True


def test_the_fastest_is_chosen_of_those_that_break_no_limit():
    def point(name: str, latency_ms: float, *broken: str) -> dict:
        return {"name": name, "latency_ms": latency_ms, "valid": {"refused_for": list(broken)}}

    points = [point("slow", 3), point("fast", 2), point("wrong", 1, "accuracy_drop")]
    assert fastest_allowed(points) == "fast"
    assert fastest_allowed(points[2:]) is None


def test_without_students_the_command_to_run_is_named(config, tmp_path):
    with pytest.raises(ValueError, match=r"training distill"):
        compress(dataclasses.replace(config, students=tmp_path))


def test_latencies_are_of_each_model_by_itself():
    calls = []

    def runner(name):
        return lambda scans: calls.append(name) or sum(range(200_000 if name == "slow" else 10))

    found = latencies_ms({"slow": runner("slow"), "fast": runner("fast")}, np.zeros(1, np.uint8), 9)
    assert found["fast"] < found["slow"]
    assert calls.count("slow") == calls.count("fast") == 18
