"""The record of one scan, field by field."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from chestct.contract import LUNG_WINDOW, NOT_A_MEDICAL_DEVICE, ModelMetadata
from chestct.errors import ScanDecodeError
from chestct.inference.predictions import Predictions
from chestct.results.records import error_line, json_text, result_line


@pytest.fixture
def predictions() -> Predictions:
    facts = ModelMetadata(("cancer", "normal"), LUNG_WINDOW, 1.2, 5.0, "run-3", "cd" * 32)
    probabilities = np.array([[0.1, 0.9], [0.7, 0.3]], np.float32)
    return Predictions(probabilities, None, np.array([1.5, 7.1], np.float32), facts, "chestct", "4")


def test_result_line_has_the_fields_of_the_design(predictions: Predictions) -> None:
    line = result_line("a/b.dcm", predictions, 1, decode_ms=1.23456, infer_ms=20.0)
    assert line == {
        "path": "a/b.dcm",
        "status": "ok",
        "label": "cancer",
        "probabilities": {"cancer": 0.7, "normal": 0.3},
        "in_domain": False,
        "reasons": ["unlike the training scans: distance 7.1, limit 5.0"],
        "domain_distance": 7.1,
        "model": {"name": "chestct", "version": "4", "run": "run-3"},
        "ms": {"decode": 1.235, "infer": 20.0},
        "notice": NOT_A_MEDICAL_DEVICE,
    }
    assert list(line) == [
        "path",
        "status",
        "label",
        "probabilities",
        "in_domain",
        "reasons",
        "domain_distance",
        "model",
        "ms",
        "notice",
    ]


def test_in_domain_is_no_reason_at_all(predictions: Predictions) -> None:
    def line(index: int, *reasons: str) -> dict[str, Any]:
        return result_line("a", predictions, index, decode_ms=0, infer_ms=0, reasons=reasons)

    assert line(0)["in_domain"] is True
    assert "reasons" not in line(0)
    assert line(0, "small: very")["in_domain"] is False
    assert line(0, "small: very")["reasons"] == ["small: very"]
    assert line(1, "small: very", "blank: yes")["reasons"] == [
        "small: very",
        "blank: yes",
        "unlike the training scans: distance 7.1, limit 5.0",
    ]


def test_numbers_read_back_as_the_same_float32(predictions: Predictions) -> None:
    values = np.random.default_rng(1).random((50, 2), np.float32) * np.float32(1e-6)
    for index, value in enumerate(values):
        answer = Predictions(values, None, values[:, 0], predictions.metadata, "chestct", "4")
        line = json.loads(json_text(result_line("a", answer, index, decode_ms=0, infer_ms=0)))
        assert np.float32(line["probabilities"]["cancer"]) == value[0]
        assert np.float32(line["domain_distance"]) == value[0]


def test_error_line_leaves_out_what_does_not_apply() -> None:
    line = error_line("a.png", ScanDecodeError("a.png: the file is empty"))
    assert line == {
        "path": "a.png",
        "status": "error",
        "error": {"type": "ScanDecodeError", "message": "a.png: the file is empty"},
        "notice": NOT_A_MEDICAL_DEVICE,
    }


def test_json_text_is_one_line_whatever_the_path() -> None:
    path = b"sc\xe9n\n\xff \xc3\xa9.png".decode("utf-8", "surrogateescape")
    text = json_text(error_line(path, ScanDecodeError(f"{path}: broken")))
    assert text.isascii()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert json.loads(text)["path"] == path
