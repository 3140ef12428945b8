from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from chestct.contract import LUNG_WINDOW, OUTPUT_NAMES, ModelMetadata
from export.check.runners import onnx_runner, openvino_runner
from export.convert.int8 import (
    ACTIVATION_STEPS,
    backbone,
    best_range,
    first_kernel,
    pixel_map,
    quantized,
)
from export.convert.onnx import contract_differences, onnx_from_keras
from export.convert.quantize import QuantizeConfig, calibration_scans, main, write_int8
from export.convert.tensorrt_graph import for_tensorrt, tensorrt_objections
from training.common.atomic_io import sha256_of
from training.common.config import config_from_mapping
from training.data.dataset import ScanSet
from training.network.vgg16 import VGG_MEAN_BGR, build_classifier

pytestmark = pytest.mark.xdist_group("quantize")  # its fixtures are made once

NARROW = (8, 8, 8, 8, 12, 12, 12, 16, 16, 16, 16, 16, 16)
FACTS = ModelMetadata(("a", "b", "c", "d"), LUNG_WINDOW, 1.0, 30.0, "run", "hash")


def network(widths: tuple[int, ...], **options) -> onnx.ModelProto:
    """A VGG-16 whose activations keep their size from layer to layer (He et al. 2015)."""
    rng = np.random.default_rng(5)
    model = build_classifier(4, widths=widths, **options)
    for layer in model.layers:
        if "conv" in layer.name or layer.name == "activation_map":
            kernel, bias = layer.get_weights()
            size = np.sqrt(2 / np.prod(kernel.shape[:3]))
            # All biases are equal: the export then shares one constant among the layers.
            layer.set_weights([rng.normal(0, size, kernel.shape), np.full(bias.shape, 0.25)])
    return onnx_from_keras(model, FACTS)


@pytest.fixture(scope="module")
def narrow() -> onnx.ModelProto:
    return network(NARROW)


@pytest.fixture(scope="module")
def narrow_int8(narrow, scan_batch) -> onnx.ModelProto:
    return quantized(narrow, scan_batch[:6])


@pytest.fixture(scope="module")
def files(narrow, narrow_int8, tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("quantized")
    for name, model in (("fp32", narrow), ("int8", narrow_int8)):
        onnx.save(model, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in ("fp32", "int8")}


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def outputs_of(model: onnx.ModelProto, name: str, scans: np.ndarray) -> np.ndarray:
    """The tensor `name` inside a model."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = onnxruntime.InferenceSession(watched.SerializeToString())
    return session.run([name], {"scan": scans})[0]


def test_contract_and_metadata_stay(narrow, narrow_int8):
    assert contract_differences(narrow_int8, 4) == []
    assert narrow_int8.metadata_props == narrow.metadata_props


@pytest.mark.parametrize("runner", [onnx_runner, openvino_runner])
@pytest.mark.parametrize("batch", [1, 3])
def test_answers_stay_close_to_fp32(files, scan_batch, runner, batch):
    wanted = onnx_runner(files["fp32"])(scan_batch[:batch])
    got = runner(files["int8"])(scan_batch[:batch])
    np.testing.assert_allclose(got["probabilities"], wanted["probabilities"], atol=0.05)
    assert relative_error(got["activation_map"], wanted["activation_map"]) < 0.1
    assert relative_error(got["domain_distance"], wanted["domain_distance"]) < 0.1


def test_scans_that_were_not_calibrated_on_stay_close_too(files, scan_batch):
    wanted, got = (onnx_runner(files[name])(scan_batch[6:]) for name in ("fp32", "int8"))
    assert relative_error(got["activation_map"], wanted["activation_map"]) < 0.1


def test_both_engines_give_the_same_answers_from_one_file(files, scan_batch):
    one, other = (runner(files["int8"])(scan_batch) for runner in (onnx_runner, openvino_runner))
    for name in OUTPUT_NAMES:
        assert relative_error(one[name], other[name]) < 0.02, name


def test_onnx_runtime_runs_all_thirteen_convolutions_in_8_bits(files, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(files["int8"], options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 13
    assert sum(kind in ("Conv", "FusedConv") for kind in kinds) == 1  # the head


def test_openvino_runs_all_thirteen_convolutions_in_8_bits_with_their_biases(files):
    properties = {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = openvino.Core().compile_model(files["int8"], "CPU", properties).create_infer_request()
    request.infer({"scan": np.zeros((1, 224, 224, 1), np.uint8)})
    kinds: dict[str, list[str]] = {}
    for node in request.profiling_info:
        kinds.setdefault(node.node_type, []).append(node.exec_type)  # such as brgconv_avx512_I8
    assert sum(kind.lower().endswith("i8") for kind in kinds["Convolution"]) == 13
    assert sum(kind.lower().endswith("i8") for kind in kinds["MaxPool"]) == 4
    assert "Add" not in kinds  # a bias that is not fused costs a pass in FP32 over each layer


def test_three_channel_preprocessing_is_read_from_the_graph(full_width):
    a, b = pixel_map(onnx.load(full_width.onnx))
    np.testing.assert_allclose(a, [1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(b, [-mean for mean in VGG_MEAN_BGR], atol=1e-4)


def test_first_kernel_is_exact_where_weights_are_whole_steps():
    # Step 1: x (127) and the offset -128 * 127 = -16256 = 255 * -64 + 64.
    kernel = np.zeros((1, 1, 3, 3))
    kernel[0, 0, 1, 1] = 127
    pixels = np.array([1.0]), np.array([-128.0])
    weights, steps, error = first_kernel(kernel, pixels, np.zeros(1))
    assert weights[0, :, 1, 1].tolist() == [127, -64, 64]
    assert steps.tolist() == [1]
    assert not error.any()


def test_folded_preprocessing_is_right_at_the_border_too(narrow, narrow_int8):
    """A border of 0 in front of a shifted scan is not a border of 0 in front of raw pixels."""
    scan = np.full((1, 224, 224, 1), 200, np.uint8)
    name = backbone(narrow)[1].output[0]

    wanted, got = (outputs_of(model, name, scan) for model in (narrow, narrow_int8))
    assert np.abs(wanted[..., 0, :] - wanted[..., 100, :]).max() > 20
    np.testing.assert_allclose(got, wanted, atol=0.02 * wanted.max())


def with_channel(weights: np.ndarray) -> onnx.ModelProto:
    """The narrow network with other weights (in, 3, 3) in channel 3 of block1_conv2."""
    model = network(NARROW)
    name = backbone(model)[2].input[1]
    tensor = next(i for i in model.graph.initializer if i.name == name)
    kernel = onnx.numpy_helper.to_array(tensor).copy()
    kernel[3] = weights
    tensor.CopyFrom(onnx.numpy_helper.from_array(kernel, name))
    return model


def test_what_rounding_takes_from_the_mean_is_given_back_in_the_bias(scan_batch):
    # One weight of 127 steps, and 71 of 0.4 of a step, which are all rounded away.
    weights = np.full((8, 3, 3), 0.4 / 127, np.float32)
    weights[0, 1, 1] = 1
    model = with_channel(weights)
    small = quantized(model, scan_batch[:2])
    first, second = (backbone(model)[index].output[0] for index in (1, 2))

    def mean_of(source: onnx.ModelProto, name: str) -> np.ndarray:
        return outputs_of(source, name, scan_batch[:2]).mean(axis=(0, 2, 3))

    lost = (0.4 / 127 * (9 * mean_of(model, first).sum() - mean_of(model, first)[0])).item()
    shift = abs(mean_of(small, second)[3] - mean_of(model, second)[3])
    assert shift < 0.1 * lost  # all of it without the correction


def test_channel_without_weights_keeps_its_bias(scan_batch):
    model = with_channel(np.zeros((8, 3, 3), np.float32))
    small = quantized(model, scan_batch[:1])
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in small.graph.initializer}
    bias = arrays["convolution2_bias"] * arrays["convolution2_bias_float_step"].astype(np.float64)
    assert bias[3] == pytest.approx(0.25, rel=1e-3)


def histogram(values: np.ndarray) -> np.ndarray:
    return np.bincount(values.astype(np.float32).view(np.uint32) >> 16, minlength=1 << 15)


def test_range_without_outliers_is_the_largest_value():
    assert best_range(histogram(np.linspace(0, 1, 100_000))) == pytest.approx(1, rel=0.02)


def test_range_cuts_off_what_costs_more_than_it_gives():
    # A million values up to 1 and one of 3. With the range 3 they are off by (3/255)**2 / 12 each,
    # 11.5 in all; with the range 1, by (1/255)**2 / 12 each, 1.3 in all, and once by 2**2 = 4.
    values = np.append(np.linspace(0, 1, 1_000_000), 3)
    assert 1 <= best_range(histogram(values)) < 2
    assert ACTIVATION_STEPS == 255


def test_range_of_a_dead_layer_is_zero():
    assert best_range(histogram(np.zeros(10))) == 0


def scan_set(labels: list[int], groups: list[int]) -> ScanSet:
    pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    paths = tuple(str(index) for index in range(len(labels)))
    return ScanSet(pixels, np.array(labels), np.array(groups), paths, ("a", "b"))


def test_calibration_takes_one_scan_of_a_group_and_classes_in_equal_parts():
    everything = scan_set([0] * 10 + [1] * 6, [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 9, 9])
    chosen = calibration_scans(everything, 6)
    assert np.bincount(chosen.labels).tolist() == [3, 3]
    assert len(set(chosen.groups.tolist())) == 6
    assert chosen.paths == calibration_scans(everything, 6).paths
    assert len(calibration_scans(everything, 100)) == 10  # all groups there are


def test_tensorrt_form_is_one_that_it_reads_and_keeps_the_answers(files, narrow_int8, scan_batch):
    assert tensorrt_objections(narrow_int8)
    form = for_tensorrt(narrow_int8)
    assert tensorrt_objections(form) == []
    assert contract_differences(form, 4) == []
    wanted = onnx_runner(files["fp32"])(scan_batch[:2])
    session = onnxruntime.InferenceSession(form.SerializeToString())
    got = dict(zip(OUTPUT_NAMES, session.run(OUTPUT_NAMES, {"scan": scan_batch[:2]}), strict=True))
    assert relative_error(got["activation_map"], wanted["activation_map"]) < 0.2
    types = {i.name: i.data_type for i in form.graph.initializer}
    assert onnx.TensorProto.UINT8 not in types.values()


def test_a_quantized_model_is_not_quantized_again(narrow_int8, scan_batch):
    with pytest.raises(ValueError, match="Is the model quantized already"):
        quantized(narrow_int8, scan_batch[:1])


def test_no_scan_is_an_error(narrow, scan_batch):
    with pytest.raises(ValueError, match="no scan to calibrate on"):
        quantized(narrow, scan_batch[:0])
    with pytest.raises(ValueError, match="num_scans is 0"):
        config_from_mapping(QuantizeConfig, {"num_scans": 0}, Path("quantize.yaml"))


def test_variant_is_complete_and_calibrated_on_training_scans(trained, exported, tmp_path):
    source = tmp_path / "export"
    source.mkdir()
    shutil.copy(exported, source / "model.onnx")
    shutil.copy(trained.model / "facts.json", source)
    config = QuantizeConfig(source, trained.scans, trained.split, 8, tmp_path / "int8")
    write_int8(config)
    assert sorted(p.name for p in config.output.iterdir()) == [
        "facts.json", "model.onnx", "quantize.json",
    ]  # fmt: skip
    facts = ModelMetadata.from_parameters(json.loads((config.output / "facts.json").read_text()))
    assert facts.precision == "int8"
    model = onnx.load(config.output / "model.onnx")
    stored = {item.key: item.value for item in model.metadata_props}
    assert stored["precision"] == "int8"
    record = json.loads((config.output / "quantize.json").read_text())
    assert record["source_sha256"] == sha256_of(source / "model.onnx")
    assert record["calibration"]["part"] == "train"
    assert record["calibration"]["num_scans"] == 8
    assert set(record["calibration"]["scans_by_class"].values()) == {2}
    # In full width 0.25; a narrow network has more names than numbers.
    assert (config.output / "model.onnx").stat().st_size < 0.4 * exported.stat().st_size


def test_nothing_exported_is_one_line(tmp_path, capsys):
    (tmp_path / "quantize.yaml").write_text(f"source: {tmp_path / 'none'}\n")
    assert main(["--config", str(tmp_path / "quantize.yaml")]) == 1
    assert "no such file; run python -m export onnx" in capsys.readouterr().err
