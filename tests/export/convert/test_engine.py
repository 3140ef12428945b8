from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import export.convert.quantize
from chestct.contract import SCAN_SHAPE, ModelMetadata
from export.convert.engine import (
    EngineConfig,
    Gpu,
    NoGpuError,
    PlanRecord,
    build_plan,
    check_plan,
    find_gpu,
    main,
    plan_mismatches,
    read_record,
    write_graph,
)
from export.convert.onnx import contract_differences
from export.convert.tensorrt_graph import cast_first, graph_of_precision, tensorrt_objections
from training.common.atomic_io import sha256_of
from training.common.config import config_from_mapping


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


@pytest.fixture
def config(trained, exported, tmp_path) -> EngineConfig:
    """The exported variant with its facts and a report beside it."""
    folder = tmp_path / "results" / "export"
    folder.mkdir(parents=True)
    shutil.copy(exported, folder / "model.onnx")
    shutil.copy(trained.model / "facts.json", folder)
    (folder / "parity.json").write_text("{}")
    return EngineConfig(
        folder / "model.onnx", folder.with_name("fp16"), timing_cache=tmp_path / "timing"
    )


def run_main(config: EngineConfig, *arguments: str) -> int:
    file = config.output.parent / "engine.yaml"
    file.write_text(
        f"onnx: {config.onnx}\noutput: {config.output}\nprecision: {config.precision}\n"
    )
    return main(["--config", str(file), *arguments])


def test_without_a_gpu_it_writes_the_graph_says_so_and_exits_cleanly(no_driver, config, caplog):
    assert run_main(config) == 0
    assert caplog.messages[-1] == (
        "no TensorRT plan: no NVIDIA driver on this machine (nvidia-smi is not there). "
        "The ONNX model is served instead."
    )
    assert sorted(path.name for path in config.output.iterdir()) == ["facts.json", "model.onnx"]


def test_looking_for_a_gpu_in_vain_is_one_line_and_exit_code_1(no_driver, config, capsys):
    assert run_main(config, "--find-gpu") == 1
    assert capsys.readouterr() == (
        "", "error: no NVIDIA driver on this machine (nvidia-smi is not there)\n",
    )  # fmt: skip


def test_gpu_is_read_from_the_driver(no_driver):
    nvidia_smi(no_driver, 'echo "NVIDIA L4, 24GB, 8.9"; echo "NVIDIA T4, 7.5"')
    assert find_gpu() == Gpu("NVIDIA L4, 24GB", "8.9")


def test_driver_that_fails_is_no_gpu(no_driver):
    nvidia_smi(no_driver, 'echo "NVIDIA-SMI has failed" >&2; exit 9')
    with pytest.raises(NoGpuError, match="NVIDIA-SMI has failed"):
        find_gpu()


def test_gpu_without_tensorrt_names_the_package(no_driver, config):
    nvidia_smi(no_driver, 'echo "NVIDIA L4, 8.9"')
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(NoGpuError, match="pip install tensorrt"):
            build_plan(config)
    else:
        pytest.skip("TensorRT is installed here")


def outputs_of(model: onnx.ModelProto, scans: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"scan": scans}), strict=True))


def test_half_precision_keeps_the_contract_and_nearly_the_answers(full_width, scan_batch):
    model = onnx.load(full_width.onnx)
    graph = graph_of_precision(model, "fp16")
    assert contract_differences(graph, 4) == []
    kernels = [t for t in graph.graph.initializer if len(t.dims) == 4 and t.dims[2] == 3]
    assert len(kernels) == 13
    assert {t.data_type for t in kernels} == {TensorProto.FLOAT16}
    # Noise is far out of domain: its squared distance is more than FP16 can hold.
    noise = np.random.default_rng(0).integers(0, 256, (1, *SCAN_SHAPE), dtype=np.uint8)
    scans = np.concatenate([scan_batch[:4], noise])
    full, half = outputs_of(model, scans), outputs_of(graph, scans)
    assert full["domain_distance"].max() ** 2 > 65504
    for name, wanted in full.items():
        assert half[name].dtype == np.float32
        # FP16 has 11 bits: 5e-4 a rounding, of which thirteen layers add up.
        error = np.abs(half[name] - wanted).max() / max(np.abs(wanted).max(), 1)
        assert 0 < error < 5e-3, name
    assert (half["probabilities"].argmax(1) == full["probabilities"].argmax(1)).all()


def test_all_behind_the_backbone_is_calculated_in_float32(exported):
    model = graph_of_precision(onnx.load(exported), "fp16")
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    last = [index for index, node in enumerate(graph.node) if node.op_type == "Relu"][-1]
    back, *behind = graph.node[last + 1 :]
    assert [types[name] for name in (*back.input, *back.output)] == [
        TensorProto.FLOAT16,
        TensorProto.FLOAT,
    ]
    assert {"Conv", "Softmax", "ReduceMean", "MatMul", "Sqrt"} <= {node.op_type for node in behind}
    used = {types[name] for node in behind for name in (*node.input, *node.output)}
    assert used == {TensorProto.FLOAT, TensorProto.INT64}  # INT64 are axes


def test_weight_beyond_half_precision_is_refused(exported):
    model = onnx.load(exported)
    kernel = next(t for t in model.graph.initializer if len(t.dims) == 4)
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * 1e9, kernel.name))
    with pytest.raises(ValueError, match="too large for FP16"):
        graph_of_precision(model, "fp16")


def test_cast_in_front_changes_no_answer(exported, scan_batch):
    model = onnx.load(exported)
    graph = cast_first(model)
    readers = [node.op_type for node in graph.graph.node if "scan" in node.input]
    assert readers == ["Cast"]
    assert cast_first(graph) is graph
    wanted, found = outputs_of(model, scan_batch[:2]), outputs_of(graph, scan_batch[:2])
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_int8_needs_qdq_nodes(exported):
    with pytest.raises(ValueError, match="needs an ONNX file with Q/DQ nodes"):
        graph_of_precision(onnx.load(exported), "int8")


def test_variant_for_tensorrt_has_its_own_precision_and_no_report_yet(config):
    write_graph(config)
    facts = ModelMetadata.from_parameters(json.loads((config.output / "facts.json").read_text()))
    source = ModelMetadata.from_parameters(
        json.loads(config.onnx.with_name("facts.json").read_text())
    )
    assert facts == replace(source, precision="fp16")
    metadata = {i.key: i.value for i in onnx.load(config.output / "model.onnx").metadata_props}
    assert metadata.items() >= facts.to_parameters().items()
    assert not (config.output / "parity.json").exists()


def test_unchanged_graph_takes_its_report_along(config):
    onnx.save(cast_first(onnx.load(config.onnx)), config.onnx)
    same = replace(config, precision="fp32")
    assert write_graph(same).read_bytes() == same.onnx.read_bytes()
    assert (same.output / "parity.json").read_text() == "{}"


def test_variant_keeps_its_report_and_plan_until_the_graph_changes(config):
    write_graph(config)
    for name in ("parity.json", "model.plan"):
        (config.output / name).write_text("made since")
    write_graph(config)
    assert (config.output / "parity.json").read_text() == "made since"
    model = onnx.load(config.onnx)
    model.producer_version = "another"
    onnx.save(model, config.onnx)
    write_graph(config)
    assert sorted(path.name for path in config.output.iterdir()) == ["facts.json", "model.onnx"]


def test_nothing_exported_gives_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no such file; run python -m export onnx"):
        write_graph(EngineConfig(tmp_path / "model.onnx"))


def test_trtexec_builds_the_same_profile(config, capsys):
    assert run_main(config, "--trtexec") == 0
    words = capsys.readouterr().out.split()
    assert words[0] == "trtexec"
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[1:])
    for option, batch in zip(("minShapes", "optShapes", "maxShapes"), config.profile, strict=True):
        name, _, dims = options[option].partition(":")
        assert (name, tuple(map(int, dims.split("x")))) == ("scan", (batch, *SCAN_SHAPE))
    assert Path(options["onnx"]) == config.output / "model.onnx"
    assert Path(options["saveEngine"]) == config.output / "model.plan"
    assert options["memPoolSize"] == "workspace:2048M"
    assert {"stronglyTyped", "noTF32", "timingCacheFile"} <= options.keys()
    assert onnx.load(options["onnx"]).graph.input[0].name == name


def test_trtexec_refuses_to_name_files_that_tensorrt_would_refuse(config, capsys):
    model = onnx.load(config.onnx)
    model.opset_import[0].version = 8
    onnx.save(model, config.onnx)
    assert run_main(replace(config, precision="fp32"), "--trtexec") == 1
    assert "opset is 8; expected 9 to 20" in capsys.readouterr().err


def qdq_model(
    *,
    dtype=np.int8,
    zero_point=0,
    scale=0.02,
    kernel_axis=0,
    bias=np.float32,
    per_channel_input=False,
    cast=True,
) -> onnx.ModelProto:
    """Cast, Q/DQ, and a 1x1 convolution whose kernel and bias may be quantized."""
    constants: dict[str, np.ndarray] = {
        "scale": np.full(1 if per_channel_input else (), scale, np.float32),
        "zero": np.full(1 if per_channel_input else (), zero_point, dtype),
        "kernel": np.ones((3, 1, 1, 1), np.int8),
        "kernel_scale": np.full(3 if kernel_axis == 0 else 1, 0.01, np.float32),
        "kernel_zero": np.zeros(3 if kernel_axis == 0 else 1, np.int8),
        "bias": np.ones(3, bias),
        "bias_scale": np.full(3, 0.01, np.float32),
        "bias_zero": np.zeros(3, np.int32),
    }
    if per_channel_input:
        constants |= {"scale": np.full(224, scale, np.float32), "zero": np.zeros(224, dtype)}
    if kernel_axis == 1:
        constants |= {
            "kernel": np.ones((3, 2, 1, 1), np.int8),
            "kernel_scale": np.full(2, 0.01, np.float32),
            "kernel_zero": np.zeros(2, np.int8),
        }
    real = "grey" if cast else "scan"
    nodes = [helper.make_node("Cast", ["scan"], ["grey"], to=TensorProto.FLOAT)] * cast
    nodes += [
        helper.make_node("QuantizeLinear", [real, "scale", "zero"], ["q"], name="Q", axis=1),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], name="DQ", axis=1),
        helper.make_node(
            "DequantizeLinear", ["kernel", "kernel_scale", "kernel_zero"], ["w"],
            name="kernel_DQ", axis=kernel_axis,
        ),
    ]  # fmt: skip
    if bias is np.int32:
        inputs = ["bias", "bias_scale", "bias_zero"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, ["b"], name="bias_DQ", axis=0))
    nodes.append(helper.make_node("Conv", ["x", "w", "b" if bias is np.int32 else "bias"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("scan", TensorProto.UINT8, ["N", 224, 224, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_symmetric_int8_is_what_tensorrt_takes():
    assert tensorrt_objections(qdq_model()) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exported_graph_is_what_tensorrt_takes(exported, precision):
    assert tensorrt_objections(graph_of_precision(onnx.load(exported), precision)) == []


def test_int8_of_this_project_is_rewritten_for_tensorrt(exported, scan_batch):
    """ONNX Runtime's CPU kernels want unsigned activations, and TensorRT signed ones."""
    quantized = export.convert.quantize.quantized(onnx.load(exported), scan_batch[:2])
    assert any("is uint8; expected int8" in reason for reason in tensorrt_objections(quantized))
    graph = graph_of_precision(quantized, "int8")
    assert tensorrt_objections(graph) == []
    assert contract_differences(graph, 4) == []
    assert graph_of_precision(graph, "int8") is graph


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"dtype": np.uint8}, "Q is uint8; expected int8 (and 1 more)"),
        (
            {"zero_point": -3},
            "Q has a zero point that is not 0; expected symmetric quantization (and 1 more)",
        ),
        (
            {"per_channel_input": True},
            "Q has a scale for each channel of an activation; expected one scale (and 1 more)",
        ),
        ({"scale": 0}, "Q has a scale that is not positive (and 1 more)"),
        ({"kernel_axis": 1}, "kernel_DQ has scales along axis 1 of a kernel; expected axis 0"),
        (
            {"bias": np.int32},
            "bias_DQ quantizes a bias to int32; expected biases in floating point",
        ),
        ({"cast": False}, "Q takes the uint8 input 'scan'; only a Cast may"),
    ],
)
def test_tensorrt_objects_to_one_fault(changes, objection):
    assert tensorrt_objections(qdq_model(**changes)) == [objection]


def test_tensorrt_objects_to_every_fault_at_once():
    model = qdq_model(dtype=np.uint8, bias=np.int32)
    model.graph.node[-1].op_type, model.graph.node[-1].name = "QLinearConv", "conv"
    model.graph.node[-2].domain = "com.microsoft"
    model.graph.node[1].input[:] = ["grey", "scale"]
    assert tensorrt_objections(model) == [
        "Q has no constant zero point, which means uint8; expected int8 zeros",
        "DQ is uint8; expected int8",
        "bias_DQ is of domain 'com.microsoft'; expected ONNX's own operators",
        "bias_DQ quantizes a bias to int32; expected biases in floating point",
        "conv is a QLinearConv; expected Q/DQ nodes around a Conv",
    ]


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


def test_folder_without_a_plan_gives_the_remedy(tmp_path, record):
    with pytest.raises(ValueError, match=r"no plan with its record in it; run python -m export"):
        check_plan(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(asdict(record)))
    with pytest.raises(ValueError, match="no plan"):
        check_plan(tmp_path)
    (tmp_path / "model.plan").write_bytes(b"plan")
    assert read_record(tmp_path) == record


def test_plan_that_trtexec_built_gets_its_record(no_driver, config):
    nvidia_smi(no_driver, 'echo "NVIDIA L4, 8.9"')
    write_graph(config)
    (config.output / "model.plan").write_bytes(b"plan")
    assert run_main(config, "--record", "10.13.3") == 0
    sha256 = sha256_of(config.output / "model.onnx")
    assert read_record(config.output) == PlanRecord(
        "NVIDIA L4", "8.9", "10.13.3", sha256, "fp16", (1, 8, 32)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "expected 'fp32', 'fp16' or 'int8'"),
        ({"min_batch": 4, "opt_batch": 2}, "expected min_batch <= opt_batch <= max_batch"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_mapping(EngineConfig, changes, Path("engine.yaml"))
