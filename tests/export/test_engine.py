from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export.engine import (
    EngineConfig,
    Gpu,
    NoGpuError,
    PlanRecord,
    build_plan,
    check_plan,
    find_gpu,
    graph_of_precision,
    main,
    nodes_after_features,
    plan_mismatches,
)
from export.onnx import contract_differences, sha256_of


@pytest.fixture
def no_driver(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def nvidia_smi(folder: Path, script: str) -> None:
    """A stand-in on PATH that answers what the real tool prints; the driver is not here."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_without_a_gpu_it_says_so_and_exits_cleanly(no_driver, exported, tmp_path, caplog):
    (tmp_path / "engine.yaml").write_text(f"onnx: {exported}\noutput: {tmp_path / 'engine'}\n")
    assert main(["--config", str(tmp_path / "engine.yaml")]) == 0
    assert caplog.messages[-1] == (
        "no TensorRT plan: no NVIDIA driver on this machine (nvidia-smi is not there). "
        "The ONNX model is served instead."
    )
    assert not (tmp_path / "engine").exists()


def test_gpu_is_read_from_the_driver(no_driver):
    nvidia_smi(no_driver, 'echo "NVIDIA L4, 24GB, 8.9"; echo "NVIDIA T4, 7.5"')
    assert find_gpu() == Gpu("NVIDIA L4, 24GB", "8.9")


def test_driver_that_fails_is_no_gpu(no_driver):
    nvidia_smi(no_driver, 'echo "NVIDIA-SMI has failed" >&2; exit 9')
    with pytest.raises(NoGpuError, match="NVIDIA-SMI has failed"):
        find_gpu()


def test_gpu_without_tensorrt_names_the_package(no_driver, exported, tmp_path):
    nvidia_smi(no_driver, 'echo "NVIDIA L4, 8.9"')
    pytest.importorskip("export.engine")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(NoGpuError, match="pip install tensorrt"):
            build_plan(EngineConfig(exported, tmp_path / "engine"))
    else:
        pytest.skip("TensorRT is installed here")


def test_half_precision_keeps_the_contract_and_the_label(exported, scan_batch):
    graph = graph_of_precision(onnx.load(exported), "fp16")
    assert contract_differences(graph, 4) == []
    kernels = [t for t in graph.graph.initializer if len(t.dims) == 4 and t.dims[2] == 3]
    assert len(kernels) == 13
    assert {t.data_type for t in kernels} == {onnx.TensorProto.FLOAT16}
    sessions = [
        onnxruntime.InferenceSession(data)
        for data in (exported.read_bytes(), graph.SerializeToString())
    ]
    full, half = (s.run(["probabilities"], {"scan": scan_batch})[0] for s in sessions)
    np.testing.assert_allclose(half, full, atol=2e-2)
    assert (half != full).any()


def test_head_softmax_and_distance_stay_in_float32(exported):
    model = onnx.load(exported)
    behind = set(nodes_after_features(model))
    types = {node.op_type for node in model.graph.node if node.name in behind}
    assert {"Softmax", "ReduceMean", "MatMul", "Sqrt"} <= types
    assert "MaxPool" not in types
    assert sum(node.op_type == "Conv" for node in model.graph.node if node.name in behind) == 1


def test_int8_needs_qdq_nodes(exported):
    with pytest.raises(ValueError, match="needs an ONNX file with Q/DQ nodes"):
        graph_of_precision(onnx.load(exported), "int8")


@pytest.fixture
def record(exported) -> PlanRecord:
    return PlanRecord("NVIDIA L4", "8.9", "11.4.0.106", sha256_of(exported), "fp16", (1, 8, 32))


def test_plan_of_this_machine_fits(record, exported):
    assert plan_mismatches(record, Gpu("NVIDIA L4", "8.9"), "11.4.0.106", exported) == []


def test_every_mismatch_is_named(record, exported):
    other = replace(record, onnx_sha256="0" * 64)
    found = plan_mismatches(other, Gpu("NVIDIA T4", "7.5"), "10.13.0", exported)
    assert found[:3] == [
        "built for gpu NVIDIA L4, here it is NVIDIA T4",
        "built for compute_capability 8.9, here it is 7.5",
        "built for tensorrt 11.4.0.106, here it is 10.13.0",
    ]
    assert found[3].startswith("built for onnx_sha256 0000")


def test_folder_without_a_plan_gives_the_remedy(tmp_path, exported, record):
    with pytest.raises(ValueError, match=r"no plan in it; run python -m export.engine"):
        check_plan(tmp_path, exported)
    (tmp_path / "plan.json").write_text(json.dumps(asdict(record)))
    with pytest.raises(ValueError, match="no plan in it"):
        check_plan(tmp_path, exported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "expected one of"),
        ({"min_batch": 4, "opt_batch": 2}, "expected 1 <= min <= opt <= max"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not os.path.exists("/dev/nvidia0"), reason="needs an NVIDIA GPU")
def test_plan_is_built_and_fits(exported, tmp_path):
    config = EngineConfig(exported, tmp_path / "engine")
    assert build_plan(config) == check_plan(config.output, exported)
