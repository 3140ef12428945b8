from __future__ import annotations

import onnx
import onnxruntime
import pytest

from chestct.contract import NOT_A_MEDICAL_DEVICE, ModelMetadata
from export.convert.onnx import contract_differences, main
from training.network.vgg16 import load_trained


def test_file_keeps_the_contract(exported):
    model = onnx.load(exported)
    assert contract_differences(model, 4) == []
    assert [opset.version for opset in model.opset_import if not opset.domain] == [18]


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_axis_is_dynamic(exported, scan_batch, batch):
    session = onnxruntime.InferenceSession(str(exported))
    answers = session.run(["probabilities", "activation_map"], {"scan": scan_batch[:batch]})
    assert [answer.shape for answer in answers] == [(batch, 4), (batch, 14, 14, 4)]


def test_metadata_are_the_facts(exported, trained):
    stored = {item.key: item.value for item in onnx.load(exported).metadata_props}
    assert stored.pop("notice") == NOT_A_MEDICAL_DEVICE
    assert ModelMetadata.from_parameters(stored) == load_trained(trained.model)[1]


def test_differences_are_listed_all_at_once(exported):
    model = onnx.load(exported)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    next(o for o in model.graph.output if o.name == "probabilities").name = "prediction"
    found = contract_differences(model, 5)
    assert "input 'scan' has dtype FP32, expected UINT8" in found
    assert any(text.endswith("'prediction' is not in the contract") for text in found)
    assert sum("is missing" in text for text in found) == 1
    assert sum("expected (-1, 14, 14, 5)" in text for text in found) == 1


def test_missing_model_is_one_line(tmp_path, capsys):
    (tmp_path / "export.yaml").write_text(f"model: {tmp_path}\n")
    assert main(["--config", str(tmp_path / "export.yaml")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "no model.keras and no facts.json in it; run python -m training fit" in said[0]
