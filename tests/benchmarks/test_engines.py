from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.engines import BASELINES, ENGINES, first_answer, open_engine
from chestct.contract import OUTPUT_NAMES


@pytest.mark.parametrize("engine", [*BASELINES[1:], *ENGINES])
def test_every_engine_gives_the_answers_of_keras(published, scan_batch, engine):
    results = published.folder / "results"
    folder = results / ("train" if engine in BASELINES else "export")
    expected = open_engine("keras_predict", results / "train")(scan_batch)
    got = open_engine(engine, folder, threads=1)(scan_batch)
    assert set(got) == set(OUTPUT_NAMES)
    # bfloat16 has 8 bits: 2**-8 relative for each product
    tolerance = 0.02 if engine == "openvino_bf16" else 1e-5
    for name in OUTPUT_NAMES:
        np.testing.assert_allclose(got[name], expected[name], atol=tolerance, rtol=tolerance)


def test_openvino_does_not_take_bfloat16_by_itself(published, scan_batch):
    folder = published.folder / "results" / "export"
    exact, coarse = (
        open_engine(engine, folder)(scan_batch)["activation_map"]
        for engine in ("onnxruntime", "openvino")
    )
    assert np.abs(exact - coarse).max() < 1e-5


def test_unknown_engine_and_missing_model_are_refused(published, tmp_path):
    with pytest.raises(ValueError, match="expected one of"):
        open_engine("abacus", published.folder / "results" / "export")
    with pytest.raises(ValueError, match=r"no model\.onnx in it"):
        open_engine("onnxruntime", tmp_path)


def test_first_answer_of_a_new_process_has_its_own_memory(published):
    folder = published.folder / "results" / "export"
    seconds, memory_mb = first_answer("onnxruntime", folder, 1, 2)
    assert 0.05 < seconds < 60
    # That of this process, which holds TensorFlow, is several times as large.
    here_mb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3
    assert 20 < memory_mb < here_mb / 2


def test_failed_process_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"onnxruntime on .*no model\.onnx in it"):
        first_answer("onnxruntime", tmp_path, 0, 1)
