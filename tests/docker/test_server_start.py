"""The first process of the GPU image. No GPU here: `nvidia-smi` and `trtexec` are stand-ins."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import docker_server_start as server_start
import pytest
from docker_images_check import write_small_repository

from export.convert.engine import EngineConfig, Gpu, read_record
from export.publish.config_pbtxt import parsed_config
from tests.support.triton import serve

GPU = Gpu("Test GPU", "8.9")
TRTEXEC = """#!/usr/bin/env python3
import pathlib, sys
if "--help" in sys.argv:
    print("&&&& RUNNING TensorRT.trtexec [TensorRT v101302] [b6]")
elif pathlib.Path("{folder}/refuse").exists():
    sys.exit("cannot build")
else:
    with open("{folder}/calls", "a") as calls:
        calls.write("build\\n")
    [plan] = [a.partition("=")[2] for a in sys.argv if a.startswith("--saveEngine=")]
    pathlib.Path(plan).write_bytes(b"plan")
"""


@pytest.fixture
def started(tmp_path, monkeypatch) -> Path:
    """The volume it starts in, with the exported variants taken in."""
    write_small_repository(tmp_path / "made")
    results = tmp_path / "read-only"
    for variant in ("export", "fp16"):
        (results / variant).mkdir(parents=True)
        for file in (tmp_path / "made" / "export").iterdir():
            (results / variant / file.name).write_bytes(file.read_bytes())
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.chdir(volume)
    monkeypatch.setattr(server_start, "RESULTS", results)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "trtexec"
    tool.write_text(TRTEXEC.replace("{folder}", str(tmp_path)))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    server_start.take_in(results, Path("results"))
    return tmp_path


def test_plan_is_built_once_and_again_for_another_gpu(started):
    config = EngineConfig()
    version = server_start.tensorrt_version()
    assert version == "10.13.2"
    for gpu in (GPU, GPU, Gpu("Other", "9.0")):
        server_start.provide_plan(config, gpu, version)
    assert (started / "calls").read_text().count("build") == 2
    assert read_record(config.output).gpu == "Other"
    assert sorted(p.name for p in config.output.iterdir()) == [
        "facts.json", "model.onnx", "model.plan", "parity.json", "plan.json",
    ]  # fmt: skip


def test_plan_is_served_as_chestct(started):
    server_start.provide_plan(EngineConfig(), GPU, "10.13.2")
    assert server_start.publish()
    served = parsed_config(Path("model_repository/chestct/config.pbtxt").read_text())
    assert served.backend == "tensorrt"


def test_failed_build_falls_back_to_onnx_and_says_so(started, caplog):
    (started / "refuse").touch()
    with caplog.at_level(logging.INFO):
        server_start.provide_plan(EngineConfig(), GPU, "10.13.2")
        assert server_start.publish()
    assert "the ONNX model is served instead" in caplog.text
    assert "trt has no file; fp16 is served as chestct" in caplog.text
    served = parsed_config(Path("model_repository/chestct/config.pbtxt").read_text())
    assert served.backend == "onnxruntime"
    assert json.loads(Path("results/fp16/parity.json").read_text())["holds"] is True


def test_nothing_to_serve_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server_start, "RESULTS", tmp_path)
    assert server_start.main([]) == 1
    assert "mount the folder `results`" in capsys.readouterr().err


@pytest.mark.server
def test_without_a_gpu_a_real_triton_serves_what_was_published(started, triton_environment):
    command: list[str] = []

    class ReplacedError(Exception):
        pass

    def replace(_: str, words: list[str]) -> None:
        command.extend(words)
        raise ReplacedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_start.os, "execvp", replace)
        with pytest.raises(ReplacedError):
            server_start.main(["--http-address=0.0.0.0"])
    assert command[0] == "tritonserver"
    assert command[-1] == "--http-address=0.0.0.0"
    assert {"--load-model=chestct", "--model-config-name=cpu"} <= set(command)
    with serve(Path("model_repository"), triton_environment, models=["chestct"]) as server:
        assert server.models() == [("chestct", "1")]
