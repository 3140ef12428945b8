"""What only a machine with an NVIDIA GPU can show: `make gpu-check`. Not run on a GPU yet.

The plans are built by the TensorRT of this environment, and Triton runs in NVIDIA's container
(`TRITON_IMAGE` names it; its TensorRT must be of the same version), or wherever CHESTCT_URL
points; that server must see the folder of CHESTCT_REPOSITORY and load what appears in it
(`--model-control-mode=poll`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import export.convert.quantize
from chestct.client import ScanClient
from export.check.runners import keras_runner, triton_runner
from export.convert.engine import EngineConfig, build_plan, check_plan, write_graph
from export.publish.repository import publish_variants
from export.publish.settings import ServeConfig
from training.common.atomic_io import sha256_of
from training.common.config import load_config
from training.network.vgg16 import load_trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.path.exists("/dev/nvidia0"), reason="needs an NVIDIA GPU"),
]
CHECKOUT = Path(__file__).resolve().parents[2]
ROUTES = load_config(ServeConfig, CHECKOUT / "configs" / "serve-gpu.yaml")
PROBABILITY_ERROR = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.1}
READY_TIMEOUT_S = 1200  # onnxruntime-tensorrt builds its engine while the model loads


@pytest.fixture(scope="module")
def variants(full_width, scan_batch, tmp_path_factory) -> Path:
    """The folders that serve-gpu.yaml names, with plans for this GPU; the graphs hold by fiat."""
    results = tmp_path_factory.mktemp("gpu") / "results"
    for name in ("export", "int8"):
        (results / name).mkdir(parents=True)
        shutil.copy(full_width.model / "facts.json", results / name)
    shutil.copy(full_width.onnx, results / "export" / "model.onnx")
    quantized = export.convert.quantize.quantized(onnx.load(full_width.onnx), scan_batch)
    onnx.save(quantized, results / "int8" / "model.onnx")
    for name in ("engine", "engine-int8"):
        config = load_config(EngineConfig, CHECKOUT / "configs" / f"{name}.yaml")
        config = dataclasses.replace(
            config,
            onnx=results.parent / config.onnx,
            output=results.parent / config.output,
            timing_cache=results / "timing",
        )
        write_graph(config)
        assert build_plan(config) == check_plan(config.output)
    for folder in results.iterdir():
        if folder.is_dir():
            report = {"holds": True, "onnx_sha256": sha256_of(folder / "model.onnx")}
            (folder / "parity.json").write_text(json.dumps(report))
    return results.parent


@pytest.fixture(scope="module")
def url(variants, tmp_path_factory) -> Iterator[str]:
    """A Triton that serves every route."""
    server, image = os.environ.get("CHESTCT_URL"), os.environ.get("TRITON_IMAGE")
    given = os.environ.get("CHESTCT_REPOSITORY") if server else None
    repository = Path(given) if given else tmp_path_factory.mktemp("served") / "model_repository"
    entries = {
        name: dataclasses.replace(entry, folder=variants / entry.folder)
        for name, entry in ROUTES.variants.items()
    }
    config = dataclasses.replace(ROUTES, variants=entries, repository=repository)
    assert publish_variants(config) == []
    if server:
        yield server
        return
    if image is None or shutil.which("docker") is None:
        pytest.fail("no Triton: set TRITON_IMAGE (and install docker), or CHESTCT_URL")
    command = [
        "docker", "run", "--rm", "--detach", "--gpus=all", "--shm-size=1g",
        "--publish=127.0.0.1::8001", f"--volume={repository}:/models:ro",
        f"--volume={variants / 'cache'}:{ROUTES.tensorrt_cache}", image,
        "tritonserver", "--model-repository=/models",
    ]  # fmt: skip
    (variants / "cache").mkdir()
    container = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=600
    ).stdout.strip()
    try:
        port = subprocess.run(
            ["docker", "port", container, "8001/tcp"],
            check=True, capture_output=True, text=True, timeout=30,
        ).stdout.split()[0]  # fmt: skip
        yield f"grpc://{port}"
    finally:
        subprocess.run(["docker", "logs", "--tail=50", container], check=False, timeout=30)
        subprocess.run(["docker", "stop", container], check=False, timeout=60)


@pytest.mark.parametrize("route", ROUTES.variants)
def test_route_answers_as_keras_does_and_how_fast(
    url, full_width, scan_batch, route, record_property
):
    wanted = keras_runner(load_trained(full_width.model)[0])(scan_batch)
    client = ScanClient(url, f"chestct_{route}", timeout_s=60, connect_timeout_s=READY_TIMEOUT_S)
    with client:
        got = triton_runner(client)(scan_batch)
        limit = PROBABILITY_ERROR[client.metadata.precision]
        assert np.abs(got["probabilities"] - wanted["probabilities"]).max() <= limit
        for name in ("activation_map", "domain_distance"):
            scale = np.abs(wanted[name]).max()
            assert np.abs(got[name] - wanted[name]).max() <= max(limit, 1e-3) * scale, name
        for batch in (1, 8):
            times_ms = []
            for _ in range(60):
                started = time.perf_counter()
                client.infer(scan_batch[:batch], with_map=True)
                times_ms.append(1000 * (time.perf_counter() - started))
            text = f"p50 {np.median(times_ms[10:]):.2f} ms, least {min(times_ms):.2f} ms"
            record_property(f"batch {batch}", text)
            print(f"chestct_{route}, batch {batch}: {text}")
