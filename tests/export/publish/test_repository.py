from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

import training.common.atomic_io
from chestct.client import ScanClient
from chestct.contract import PREPARATION, ModelMetadata, input_spec, output_specs
from export.convert.engine import PlanRecord
from export.publish.config_pbtxt import config_pbtxt, parsed_config
from export.publish.repository import (
    main,
    promote,
    publish_variants,
    roll_back,
    write_encoded,
    write_repository,
)
from export.publish.settings import (
    DECODE,
    ENCODED,
    ENGINES,
    GPU_ENGINES,
    RepositoryConfig,
    ServeConfig,
    VariantConfig,
)
from export.publish.versions import served_version
from serving.local import LocalTriton
from training.common.atomic_io import sha256_of
from training.common.config import config_from_mapping, load_config

CHECKOUT = Path(__file__).resolve().parents[3]
FACTS = ModelMetadata.from_parameters(
    {
        "labels": '["a", "b", "c"]',
        "window_center_hu": "-600.0",
        "window_width_hu": "1500.0",
        "temperature": "1.5",
        "domain_threshold": "30.0",
        "input_size": "224",
        "preparation": PREPARATION,
        "training_run": "r",
        "data_hash": "d",
        "precision": "fp16",
    }
)
# Of OrtTensorRTProviderOptionsV2 (onnxruntime, tensorrt_execution_provider_info.cc), those that
# Triton's native backend passes on under the same name, and the two that it renames.
# fmt: off
NATIVE_TENSORRT_KEYS = {
    "precision_mode", "max_workspace_size_bytes", "int8_calibration_table_name",
    "int8_use_native_calibration_table", "trt_max_partition_iterations", "trt_min_subgraph_size",
    "trt_dla_enable", "trt_dla_core", "trt_engine_cache_enable", "trt_engine_cache_path",
    "trt_engine_cache_prefix", "trt_dump_subgraphs", "trt_force_sequential_engine_build",
    "trt_context_memory_sharing_enable", "trt_layer_norm_fp32_fallback", "trt_timing_cache_enable",
    "trt_timing_cache_path", "trt_force_timing_cache", "trt_detailed_build_log",
    "trt_build_heuristics_enable", "trt_sparsity_enable", "trt_builder_optimization_level",
    "trt_auxiliary_streams", "trt_tactic_sources", "trt_extra_plugin_lib_paths",
    "trt_profile_min_shapes", "trt_profile_max_shapes", "trt_profile_opt_shapes",
    "trt_cuda_graph_enable", "trt_dump_ep_context_model", "trt_ep_context_file_path",
    "trt_ep_context_embed_mode",
}
# fmt: on


@pytest.fixture
def config(trained, exported, tmp_path) -> RepositoryConfig:
    shutil.copytree(trained.model, tmp_path / "train")
    onnx = Path(shutil.copy(exported, tmp_path / "model.onnx"))
    parity = tmp_path / "parity.json"
    parity.write_text(json.dumps({"holds": True, "onnx_sha256": sha256_of(onnx)}))
    return RepositoryConfig(onnx, tmp_path / "train", parity, tmp_path / "repository")


def another_model(config: RepositoryConfig) -> None:
    """Change the ONNX file without breaking it: protobuf lets a field be set twice."""
    with config.onnx.open("ab") as file:
        file.write(b"\x1a\x01" + b"x")  # producer_version = "x"
    verdict = {"holds": True, "onnx_sha256": sha256_of(config.onnx)}
    config.parity.write_text(json.dumps(verdict))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def gpu_config(engine: str, **changes) -> RepositoryConfig:
    return RepositoryConfig(engine=engine, name="chestct_gpu", **changes)


def test_first_version_is_complete(config, trained):
    assert write_repository(config) == 1
    folder = config.repository / "chestct"
    assert names(folder) == ["1", "config.pbtxt"]
    assert names(folder / "1") == ["config.pbtxt", "labels.txt", "model.onnx", "parity.json"]
    parsed = parsed_config((folder / "config.pbtxt").read_text())
    assert parsed.backend == "onnxruntime"
    assert [(i.name, list(i.dims)) for i in parsed.input] == [("scan", [224, 224, 1])]
    assert {o.name: list(o.dims) for o in parsed.output} == {
        "probabilities": [4],
        "activation_map": [14, 14, 4],
        "domain_distance": [1],
    }
    assert [warm.batch_size for warm in parsed.model_warmup] == [1, 8]
    facts = ModelMetadata.from_parameters({k: v.string_value for k, v in parsed.parameters.items()})
    assert (folder / "1" / "labels.txt").read_text().split() == list(facts.class_names)
    stored = json.loads((trained.model / "facts.json").read_text())
    assert facts == ModelMetadata.from_parameters(stored)


def test_publishing_again_changes_nothing(config):
    write_repository(config)
    before = {p: p.stat().st_mtime_ns for p in config.repository.rglob("*")}
    assert write_repository(config) == 1
    assert {p: p.stat().st_mtime_ns for p in config.repository.rglob("*")} == before


def test_versions_count_up_and_the_one_before_stays(config):
    folder = config.repository / "chestct"
    for version in (1, 2, 3):
        assert write_repository(config) == version
        assert served_version(folder) == version
        another_model(config)
    assert names(folder) == ["2", "3", "config.pbtxt"]


def test_roll_back_serves_the_version_before(config):
    folder = config.repository / "chestct"
    write_repository(config)
    first = (folder / "config.pbtxt").read_text()
    another_model(config)
    write_repository(config)
    assert roll_back(folder) == 1
    assert (folder / "config.pbtxt").read_text() == first
    with pytest.raises(ValueError, match="no version before 1 to go back to"):
        roll_back(folder)
    with pytest.raises(ValueError, match=r"no such model to roll back; run python -m export"):
        roll_back(folder / "absent")


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ({"holds": False, "reasons": ["AUROC fell"]}, "nothing is written: AUROC fell$"),
        ({"holds": False}, "the report gives no reason"),
        (
            {"holds": True, "reports": [{"candidate": "openvino"}]},
            r"judged \['openvino'\], not onnxruntime; name it among the engines",
        ),
        ({"holds": True, "onnx_sha256": "0"}, "is about another file"),
        ({}, "is about another file"),
    ],
)
def test_nothing_is_written_unless_parity_holds_for_this_file(config, verdict, message):
    config.parity.write_text(json.dumps({"onnx_sha256": sha256_of(config.onnx)} | verdict))
    if not verdict:
        config.parity.write_text("{}")
    with pytest.raises(ValueError, match=message):
        write_repository(config)
    assert not config.repository.exists()


def test_a_full_disk_leaves_the_repository_as_it_was(config, monkeypatch):
    write_repository(config)
    before = {p: p.read_bytes() for p in config.repository.rglob("*") if p.is_file()}
    another_model(config)

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        write_repository(config)
    assert {p: p.read_bytes() for p in config.repository.rglob("*") if p.is_file()} == before


def test_an_interruption_before_the_switch_keeps_serving_the_old_version(config, monkeypatch):
    write_repository(config)
    another_model(config)
    replace = training.common.atomic_io.os.replace

    def interrupted(source, target):
        if Path(target).name == "config.pbtxt":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(training.common.atomic_io.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_repository(config)
    folder = config.repository / "chestct"
    assert served_version(folder) == 1
    monkeypatch.undo()
    assert write_repository(config) == 3
    assert served_version(folder) == 3


def test_labels_with_quotes_and_umlauts_survive(config):
    facts = ModelMetadata.from_parameters(json.loads((config.model / "facts.json").read_text()))
    odd = dataclasses.replace(facts, class_names=('Größe "1"', "back\\slash"))
    parsed = parsed_config(config_pbtxt(config, odd, version=1))
    found = {k: v.string_value for k, v in parsed.parameters.items()}
    assert ModelMetadata.from_parameters(found).class_names == odd.class_names


def test_another_number_of_classes_breaks_the_contract(config):
    facts = json.loads((config.model / "facts.json").read_text())
    facts["labels"] = '["a", "b"]'
    (config.model / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"breaks the contract: .*expected \(-1, 2\)"):
        write_repository(config)


def test_nothing_exported_gives_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no such file; run python -m export onnx"):
        write_repository(RepositoryConfig(tmp_path / "none.onnx"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warm_up": [64]}, "warm_up is"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"keep_versions": 0}, "keep_versions is 0"),
        ({"max_queue_delay_us": -1}, "max_queue_delay_us is -1"),
        ({"instances": 0}, "instances is 0: expected greater than 0"),
        ({"threads": -1}, "threads is -1: expected"),
        ({"engine": "tensorflow"}, "engine is 'tensorflow': expected .*'openvino'"),
    ],
)
def test_settings_that_triton_would_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_mapping(RepositoryConfig, changes, Path("serve.yaml"))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_keeps_names_dtypes_and_shapes_of_the_contract(engine):
    parsed = parsed_config(config_pbtxt(gpu_config(engine), FACTS, version=3))
    assert parsed.backend == ("tensorrt" if engine == "tensorrt-plan" else "onnxruntime")
    assert list(parsed.version_policy.specific.versions) == [3]
    types = parsed.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    found = [
        (tensor.name, types[tensor.data_type].name.removeprefix("TYPE_"), (-1, *tensor.dims))
        for tensor in (*parsed.input, *parsed.output)
    ]
    assert found == [(s.name, s.dtype, s.shape) for s in (input_spec(), *output_specs(3))]
    kind = parsed.instance_group[0]
    kinds = {"onnxruntime": kind.KIND_AUTO, "openvino": kind.KIND_CPU}
    assert kind.kind == kinds.get(engine, kind.KIND_GPU)


def test_openvino_is_asked_for_and_threads_are_told():
    config = RepositoryConfig(engine="openvino", instances=2, threads=1)
    parsed = parsed_config(config_pbtxt(config, FACTS, version=1))
    accelerators = parsed.optimization.execution_accelerators.cpu_execution_accelerator
    assert [entry.name for entry in accelerators] == ["openvino"]
    assert parsed.instance_group[0].count == 2
    assert parsed.parameters["intra_op_thread_count"].string_value == "1"


def test_tensorrt_accelerator_has_names_that_the_native_backend_knows():
    config = gpu_config("onnxruntime-tensorrt", max_batch_size=16, workspace_mb=3)
    parsed = parsed_config(config_pbtxt(config, FACTS, version=1, onnx_sha256="ab" * 32))
    entry = parsed.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert entry.name == "tensorrt"
    assert set(entry.parameters) <= NATIVE_TENSORRT_KEYS
    assert dict(entry.parameters) == {
        "precision_mode": "FP16",
        "max_workspace_size_bytes": "3145728",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/var/cache/chestct/tensorrt/abababababababab",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "/var/cache/chestct/tensorrt",
        "trt_profile_min_shapes": "scan:1x224x224x1",
        "trt_profile_opt_shapes": "scan:8x224x224x1",
        "trt_profile_max_shapes": "scan:16x224x224x1",
    }


def test_precision_that_the_accelerator_lacks_is_refused():
    facts = dataclasses.replace(FACTS, precision="int4")
    with pytest.raises(ValueError, match=r"precision is 'int4'; onnxruntime-tensorrt takes"):
        config_pbtxt(gpu_config("onnxruntime-tensorrt"), facts, version=1)


def test_cuda_route_keeps_fp32_and_does_not_search_in_service():
    parsed = parsed_config(config_pbtxt(gpu_config("onnxruntime-cuda"), FACTS, version=1))
    entry = parsed.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert (entry.name, dict(entry.parameters)) == ("cuda", {"use_tf32": "0"})
    assert parsed.parameters["cudnn_conv_algo_search"].string_value == "1"


def test_cuda_graphs_are_recorded_at_the_warmed_up_sizes():
    config = gpu_config("tensorrt-plan", cuda_graphs=True)
    cuda = parsed_config(config_pbtxt(config, FACTS, version=1)).optimization.cuda
    assert cuda.graphs
    assert [spec.batch_size for spec in cuda.graph_spec] == [1, 8]
    assert all(list(spec.input["scan"].dim) == [224, 224, 1] for spec in cuda.graph_spec)


def test_dynamic_batching_can_be_turned_off():
    on, off = (
        parsed_config(config_pbtxt(RepositoryConfig(max_queue_delay_us=delay), FACTS, version=1))
        for delay in (0, None)
    )
    assert on.HasField("dynamic_batching")
    assert not off.HasField("dynamic_batching")


def test_gpu_model_has_a_config_for_servers_without_a_gpu(config):
    gpu = dataclasses.replace(config, engine="onnxruntime-cuda", instances=2)
    write_repository(gpu)
    folder = config.repository / "chestct"
    assert names(folder) == ["1", "config.pbtxt", "configs"]
    on_cpu = parsed_config((folder / "configs" / "cpu.pbtxt").read_text())
    assert on_cpu.instance_group[0].kind == on_cpu.instance_group[0].KIND_AUTO
    assert on_cpu.instance_group[0].count == 1
    assert not on_cpu.HasField("optimization")
    assert "cudnn_conv_algo_search" not in on_cpu.parameters
    write_repository(config)
    assert names(folder / "configs") == []
    assert roll_back(folder) == 1
    assert names(folder / "configs") == ["cpu.pbtxt"]


@pytest.fixture
def with_plan(config) -> RepositoryConfig:
    """A plan that a GPU would have built; nothing here reads its bytes."""
    record = PlanRecord("GPU", "8.9", "10.13", sha256_of(config.onnx), "fp16", (1, 8, 32))
    config.onnx.with_name("model.plan").write_bytes(b"plan")
    config.onnx.with_name("plan.json").write_text(json.dumps(dataclasses.asdict(record)))
    return dataclasses.replace(config, engine="tensorrt-plan")


def change_record(config: RepositoryConfig, **changes) -> None:
    file = config.onnx.with_name("plan.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_plan_is_published_without_its_onnx_file(with_plan):
    write_repository(with_plan)
    folder = with_plan.repository / "chestct"
    assert names(folder) == ["1", "config.pbtxt"]
    assert names(folder / "1") == [
        "config.pbtxt", "labels.txt", "model.plan", "parity.json", "plan.json",
    ]  # fmt: skip
    before = files(with_plan.repository)
    assert write_repository(with_plan) == 1
    assert files(with_plan.repository) == before
    with_plan.served_file.write_bytes(b"another plan")
    assert write_repository(with_plan) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"onnx_sha256": "0"}, "was built from another file than"),
        ({"profile": [1, 8, 16]}, "takes batches from 1 to 16; expected 1 to max_batch_size, 32"),
        ({"profile": [2, 8, 32]}, "takes batches from 2 to 32; expected 1"),
    ],
)
def test_plan_that_does_not_fit_is_refused(with_plan, changes, message):
    change_record(with_plan, **changes)
    with pytest.raises(ValueError, match=message):
        write_repository(with_plan)
    assert not with_plan.repository.exists()


@pytest.fixture
def variants(trained, exported, tmp_path) -> ServeConfig:
    """FP32 and, under the name int8, the same graph with other bytes."""
    for name, tail in (("fp32", b""), ("int8", b"\x1a\x01x")):  # producer_version = "x"
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(exported.read_bytes() + tail)
        shutil.copy(trained.model / "facts.json", folder)
        report = {"holds": True, "onnx_sha256": sha256_of(folder / "model.onnx")}
        (folder / "parity.json").write_text(json.dumps(report))
    return ServeConfig(
        variants={
            "fp32": VariantConfig(tmp_path / "results" / "fp32"),
            "int8": VariantConfig(tmp_path / "results" / "int8", "openvino"),
            "compressed": VariantConfig(tmp_path / "results" / "compressed"),
        },
        promoted="int8",
        repository=tmp_path / "repository",
    )


def run_main(config: ServeConfig, *arguments: str) -> int:
    file = config.repository.parent / "serve.yaml"
    file.write_text(TypeAdapter(ServeConfig).dump_json(config).decode())  # which is YAML
    return main(["--config", str(file), *arguments])


def test_variants_are_published_and_one_is_promoted(variants, caplog):
    caplog.set_level("INFO")
    assert run_main(variants) == 0
    assert names(variants.repository) == ["chestct", "chestct_fp32", "chestct_int8"]
    assert [m for m in caplog.messages if m.startswith("skipped")] == [
        f"skipped chestct_compressed: {variants.models()['compressed'].onnx} is not there"
    ]
    promoted, source = variants.repository / "chestct", variants.repository / "chestct_int8"
    assert names(promoted / "1") == names(source / "1")
    for name in ("model.onnx", "parity.json", "labels.txt"):
        assert (promoted / "1" / name).read_bytes() == (source / "1" / name).read_bytes()
    text = (source / "config.pbtxt").read_text()
    assert (promoted / "config.pbtxt").read_text() == text.replace('"chestct_int8"', '"chestct"')


def test_publishing_all_again_changes_nothing(variants):
    publish_variants(variants)
    before = files(variants.repository)
    assert publish_variants(variants) == []
    assert files(variants.repository) == before


def test_variant_that_fails_its_gate_keeps_what_is_served_and_the_others_go_on(variants, capsys):
    publish_variants(variants)
    kept = files(variants.repository / "chestct_fp32")
    fp32, int8 = (variants.models()[name] for name in ("fp32", "int8"))
    another_model(fp32)
    another_model(int8)
    report = json.loads(fp32.parity.read_text())
    fp32.parity.write_text(json.dumps(report | {"holds": False, "reasons": ["AUROC fell by 0.1"]}))
    assert run_main(variants) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: chestct_fp32: ")
    assert "nothing is written: AUROC fell by 0.1" in error
    assert files(variants.repository / "chestct_fp32") == kept
    assert served_version(variants.repository / "chestct_int8") == 2
    assert served_version(variants.repository / "chestct") == 2


@pytest.mark.parametrize("gone", [True, False])
def test_promoted_variant_that_cannot_be_published_leaves_the_one_before(variants, gone, capsys):
    publish_variants(variants)
    promote(variants.repository, "fp32")
    kept = files(variants.repository / "chestct")
    int8 = variants.models()["int8"]
    if gone:
        shutil.rmtree(int8.model)
    else:
        another_model(int8)
        int8.parity.write_text("{}")
    assert run_main(variants) == 1
    assert "error: chestct_int8" in capsys.readouterr().err
    assert files(variants.repository / "chestct") == kept


@pytest.mark.parametrize("teacher", [None, "older"])
def test_variant_of_another_network_is_refused(variants, teacher, capsys):
    publish_variants(variants)
    kept = files(variants.repository)
    int8 = variants.models()["int8"].model
    if teacher:
        (int8 / "student.json").write_text(json.dumps({"teacher": teacher}))
    else:
        facts = json.loads((int8 / "facts.json").read_text())
        (int8 / "facts.json").write_text(json.dumps(facts | {"training_run": "older"}))
    assert run_main(variants) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: chestct_int8: {int8} is of run older, ")
    assert "Make it again from that run" in error
    assert files(variants.repository) == kept


def test_another_variant_is_promoted_and_rolled_back_without_touching_the_rest(variants):
    publish_variants(variants)
    others = [variants.repository / name for name in ("chestct_fp32", "chestct_int8")]
    before = [files(folder) for folder in others]
    assert run_main(variants, "--promote", "fp32") == 0
    chestct = variants.repository / "chestct"
    assert served_version(chestct) == 2
    parsed = parsed_config((chestct / "config.pbtxt").read_text())
    assert not parsed.HasField("optimization")
    assert parsed.output[0].label_filename == "2/labels.txt"
    assert run_main(variants, "--roll-back") == 0
    assert served_version(chestct) == 1
    assert [files(folder) for folder in others] == before


def test_unpublished_variant_cannot_be_promoted(variants, capsys):
    publish_variants(variants)
    assert run_main(variants, "--promote", "compressed") == 1
    assert "published are ['chestct_fp32', 'chestct_int8']" in capsys.readouterr().err


def test_mode_chooses_instances_and_threads_unless_they_are_given(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    folders = {
        "a": VariantConfig(Path("a")),
        "b": VariantConfig(Path("b"), "tensorrt-plan"),
        "c": VariantConfig(Path("c"), instances=3, threads=0),
    }

    def chosen(**changes):
        models = ServeConfig(variants=folders, promoted="a", **changes).models()
        return {name: (model.instances, model.threads) for name, model in models.items()}

    assert chosen() == {"a": (1, 0), "b": (1, 0), "c": (3, 0)}
    assert chosen(mode="throughput") == {"a": (6, 1), "b": (2, 0), "c": (3, 0)}
    assert chosen(mode="throughput", threads=2) == {"a": (6, 2), "b": (2, 2), "c": (3, 0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast': expected 'latency' or 'throughput'"),
        ({"promoted": "int8"}, r"promoted is 'int8': expected one of \['fp32'\]"),
        ({"variants": {"a": "results/a"}}, "variants.a is 'results/a': expected a mapping"),
        ({"variants": {"a": {"engine": "openvino"}}}, "variants.a.folder is missing"),
        (
            {"variants": {"a": {"folder": "a", "thread": 2}}},
            r"variants.a: unknown keys \['thread'\]; allowed are \['folder', 'engine', 'instances'",
        ),
        ({"variants": {"a": {"folder": "a", "engine": "gpu"}}}, "variants.a.engine is 'gpu'"),
        (
            {"variants": {"a": {"folder": "a", "instances": True}}},
            "variants.a.instances is True: expected a valid integer",
        ),
        ({"variants": {"a/b": {"folder": "a"}}}, "'a/b': expected pattern"),
        ({"max_batch_size": 4}, "warm_up is"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_mapping(ServeConfig, changes, Path("serve.yaml"))


def test_gpu_routes_of_the_checkout_cover_every_gpu_engine():
    routes = load_config(ServeConfig, CHECKOUT / "configs" / "serve-gpu.yaml").models().values()
    assert {model.engine for model in routes} == set(GPU_ENGINES)


@pytest.mark.server
def test_real_triton_serves_every_variant_as_it_was_published(
    variants, scan_batch, triton_environment
):
    """Instances of KIND_AUTO and KIND_CPU, and a GPU model by its `configs/cpu.pbtxt`."""
    entries = dict(variants.variants)
    entries["cuda"] = VariantConfig(entries["fp32"].folder, "onnxruntime-cuda")
    config = dataclasses.replace(variants, variants=entries, instances=2, threads=1, warm_up=(1,))
    assert publish_variants(config) == []
    with LocalTriton(config.repository, environment=triton_environment) as server:
        log = server.log_path.read_text()
        found = {}
        for name in ("chestct", "chestct_fp32", "chestct_int8", "chestct_cuda"):
            with ScanClient(server.grpc_url, name) as client:
                found[name] = client.infer(scan_batch[:3]).probabilities
    for name, probabilities in found.items():
        np.testing.assert_allclose(probabilities, found["chestct_fp32"], atol=1e-4, err_msg=name)
    for name, count in (("fp32", 2), ("int8", 2), ("cuda", 1)):
        started = {
            f"chestct_{name}_0_{index}" for index in range(4) if f"chestct_{name}_0_{index} " in log
        }
        assert len(started) == count, (name, started)


def tiny_variant(repository: Path, variant: str, facts: ModelMetadata) -> None:
    """A published variant, as far as `promote` reads it."""
    folder = repository / f"chestct_{variant}" / "1"
    folder.mkdir(parents=True)
    config = dataclasses.replace(RepositoryConfig(), name=f"chestct_{variant}")
    text = config_pbtxt(config, facts, version=1)
    for path in (folder, folder.parent):
        (path / "config.pbtxt").write_text(text)
    (folder / "model.onnx").write_bytes(variant.encode())


def window_of(repository: Path, model: str) -> tuple[str, str]:
    found = parsed_config((repository / model / "config.pbtxt").read_text()).parameters
    return found["window_center_hu"].string_value, found["training_run"].string_value


def test_encoded_follows_what_is_served(tmp_path):
    """A file must be shown in the window of the model that answers, after each switch."""
    tiny_variant(tmp_path, "old", FACTS)
    window = dataclasses.replace(FACTS.window, center_hu=40.0)
    tiny_variant(tmp_path, "new", dataclasses.replace(FACTS, window=window, run="r2"))
    promote(tmp_path, "old")
    assert not (tmp_path / ENCODED).exists()  # only where serve.yaml asks for it
    write_encoded(tmp_path)
    for model in (ENCODED, DECODE):
        assert window_of(tmp_path, model) == ("-600.0", "r")
    promote(tmp_path, "new")
    for model in (ENCODED, DECODE):
        assert window_of(tmp_path, model) == ("40.0", "r2")
    roll_back(tmp_path / "chestct")
    for model in (ENCODED, DECODE):
        assert window_of(tmp_path, model) == ("-600.0", "r")
    before = files(tmp_path)
    write_encoded(tmp_path)
    assert files(tmp_path) == before
    steps = parsed_config((tmp_path / ENCODED / "config.pbtxt").read_text()).ensemble_scheduling
    assert [step.model_name for step in steps.step] == [DECODE, "chestct"]


def test_encoded_needs_a_served_model(tmp_path):
    with pytest.raises(ValueError, match=r"no such model; run python -m export repository"):
        write_encoded(tmp_path)
    with pytest.raises(ValueError, match="chestct_encoded is another model's name"):
        ServeConfig(variants={"encoded": VariantConfig(Path("x"))}, promoted="encoded")
