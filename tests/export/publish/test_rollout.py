"""Rolling out and back on a real Triton that answers requests all the while."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc
from onnx import numpy_helper

from chestct.client import ScanClient
from chestct.contract import LUNG_WINDOW, ModelMetadata
from export.publish.admin import ADMIN_KEY, TritonAdmin
from export.publish.config_pbtxt import config_pbtxt
from export.publish.repository import promote, write_encoded
from export.publish.rollout import RolloutConfig, main, roll_out, status, undo
from export.publish.settings import CANDIDATE, ENCODED, RepositoryConfig
from export.publish.versions import served_version
from serving.local import LocalTriton
from training.common.atomic_io import sha256_of

pytestmark = pytest.mark.server

FACTS = ModelMetadata(
    ("adenocarcinoma", "large.cell.carcinoma", "normal"),
    LUNG_WINDOW,
    1.0,
    10.0,
    "run-old",
    "ab" * 32,
)


@dataclass
class Stage:
    """A repository whose variants `old`, `new`, `bad` and `broken` are published, and a server."""

    config: RolloutConfig
    triton: LocalTriton
    server: TritonAdmin

    @property
    def model(self) -> Path:
        return self.config.repository / "chestct"


def publish(
    source: Path, repository: Path, variant: str, factor: float, facts: ModelMetadata
) -> None:
    """The tiny model with its kernel times `factor`, as a published variant."""
    folder = repository / f"chestct_{variant}" / "1"
    folder.mkdir(parents=True)
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name == "kernel":
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, "kernel")
            )
    onnx.save(model, folder / "model.onnx")
    parity = {"holds": True, "onnx_sha256": sha256_of(folder / "model.onnx")}
    (folder / "parity.json").write_text(json.dumps(parity))
    (folder / "labels.txt").write_text("\n".join(facts.class_names))
    config = RepositoryConfig(name=f"chestct_{variant}", max_batch_size=8)
    for path in (folder, folder.parent):
        (path / "config.pbtxt").write_text(config_pbtxt(config, facts, version=1))


@pytest.fixture
def stage(
    tmp_path: Path, phantoms: Any, write_model: Callable[..., Path], triton_environment: Path
) -> Iterator[Stage]:
    repository = tmp_path / "repository"
    source = write_model(tmp_path / "source", "chestct")
    new = dataclasses.replace(FACTS, run="run-new", git_commit="c0ffee")
    publish(source, repository, "old", 1.0, FACTS)
    publish(source, repository, "new", 1.02, new)
    publish(source, repository, "bad", -1.0, dataclasses.replace(FACTS, run="run-bad"))
    promote(repository, "old")
    write_encoded(repository)
    config = RolloutConfig(repository, phantoms.scans, phantoms.split, golden="test")
    with LocalTriton(
        repository,
        environment=triton_environment,
        models=["chestct", ENCODED],
        exit_timeout_s=5,
        admin_key="of-the-test",
    ) as triton:
        yield Stage(config, triton, TritonAdmin(triton.http_url, "of-the-test"))


@dataclass
class Load:
    """What requests were answered with while something else went on."""

    versions: list[str] = field(default_factory=list)
    files: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def under_load(triton: LocalTriton, scans: np.ndarray, file: bytes) -> Iterator[Load]:
    """Requests without a pause or a second try, over gRPC and HTTP, of scans and of files."""
    load, stop = Load(), threading.Event()

    def ask(url: str) -> None:
        with ScanClient(url, unavailable_timeout_s=0) as client:
            while not stop.is_set():
                try:
                    load.versions.append(client.infer(scans).model_version)
                except Exception as error:
                    load.failures.append(f"{url}: {error!r}")

    def send_files() -> None:
        address = triton.grpc_url.removeprefix("grpc://")
        with tritonclient.grpc.InferenceServerClient(address) as client:
            while not stop.is_set():
                tensor = tritonclient.grpc.InferInput("file", [1, 1], "BYTES")
                tensor.set_data_from_numpy(np.array([[file]], dtype=object))
                try:
                    client.infer(ENCODED, [tensor], client_timeout=30)
                    load.files += 1
                except Exception as error:
                    load.failures.append(f"file: {error!r}")

    threads = [
        threading.Thread(target=ask, args=(triton.grpc_url,)),
        threading.Thread(target=ask, args=(triton.http_url,)),
        threading.Thread(target=send_files),
    ]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def test_roll_out_and_back_under_load_fails_no_request(
    stage: Stage, phantoms: Any, scan_batch: np.ndarray
) -> None:
    file = next(phantoms.scans.rglob("*.png")).read_bytes()
    with under_load(stage.triton, scan_batch[:2], file) as load:
        record = roll_out(stage.config, stage.server, "new")
        assert status(stage.server)["run"] == "run-new"
        assert undo(stage.config, stage.server) == 1
        assert status(stage.server)["run"] == "run-old"
    assert load.failures == []
    assert set(load.versions) == {"1", "2"}
    assert load.files > 5
    # What is served can be traced.
    assert record["before"] == {
        "version": "1", "run": "run-old", "data_hash": "ab" * 32, "git_commit": "unknown",
        "precision": "fp32",
    }  # fmt: skip
    assert (
        record["after"] | {"version": "2", "run": "run-new", "git_commit": "c0ffee"}
        == (record["after"])
    )
    assert record["onnx_sha256"] == sha256_of(stage.model / "2" / "model.onnx")
    assert record["golden"]["num_scans"] == 12
    assert record["golden"]["label_agreement"] == 1.0
    kept = (stage.model / "rollouts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == [record]
    # The candidate is gone, the old version is there.
    assert CANDIDATE not in stage.server.ready()
    assert not (stage.config.repository / CANDIDATE).exists()
    assert (stage.model / "1" / "model.onnx").is_file()
    assert stage.triton.check() == []


def unchanged(stage: Stage) -> None:
    """What clients get is what they got, on disk and from the server."""
    assert served_version(stage.model) == 1
    assert status(stage.server) | {"version": "1", "run": "run-old"} == status(stage.server)
    assert not (stage.config.repository / CANDIDATE).exists()
    assert CANDIDATE not in stage.server.ready()
    assert not (stage.model / "rollouts.jsonl").exists()
    assert stage.triton.check() == []


def test_a_version_that_fails_the_golden_set_is_not_switched_to(
    stage: Stage, scan_batch: np.ndarray
) -> None:
    with (
        under_load(stage.triton, scan_batch[:1], b"") as load,
        pytest.raises(ValueError, match=r"the golden set fails on 12 scans: .*same label 0\.\d+"),
    ):
        roll_out(stage.config, stage.server, "bad")
    assert not [text for text in load.failures if not text.startswith("file:")]
    assert set(load.versions) == {"1"}
    unchanged(stage)


def test_a_version_without_parity_is_not_loaded(stage: Stage) -> None:
    report = stage.config.repository / "chestct_new" / "1" / "parity.json"
    whole = report.read_text()
    report.write_text(json.dumps(json.loads(whole) | {"holds": False}))
    with pytest.raises(ValueError, match="parity does not hold; nothing is loaded"):
        roll_out(stage.config, stage.server, "new")
    report.write_text(json.dumps({"holds": True, "onnx_sha256": "0"}))
    with pytest.raises(ValueError, match=r"about another model\.onnx; nothing is loaded"):
        roll_out(stage.config, stage.server, "new")
    with pytest.raises(ValueError, match="no such model; run python -m export"):
        roll_out(stage.config, stage.server, "absent")
    unchanged(stage)


def test_a_server_that_answers_otherwise_than_the_file_is_found_out(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file on disk is exchanged after Triton has loaded it."""
    load = stage.server.load

    def exchanged(model: str) -> None:
        load(model)
        other = stage.config.repository / "chestct_bad" / "1" / "model.onnx"
        shutil.copy(other, stage.config.repository / "chestct_new" / "1" / "model.onnx")

    monkeypatch.setattr(stage.server, "load", exchanged)
    with pytest.raises(ValueError, match="nothing is switched: parity FAILS"):
        roll_out(stage.config, stage.server, "new")
    unchanged(stage)


def test_a_version_that_triton_cannot_load_is_not_switched_to(stage: Stage) -> None:
    folder = stage.config.repository / "chestct_new" / "1"
    (folder / "model.onnx").write_bytes(b"no model")
    parity = {"holds": True, "onnx_sha256": sha256_of(folder / "model.onnx")}
    (folder / "parity.json").write_text(json.dumps(parity))
    with pytest.raises(ValueError, match=r"models/chestct_candidate/load: HTTP 400: "):
        roll_out(stage.config, stage.server, "new")
    unchanged(stage)


def test_an_answer_that_changes_with_the_switch_is_rolled_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file gets into the version that is switched to."""
    load = stage.server.load

    def sabotaged(model: str) -> None:
        if model == "chestct" and served_version(stage.model) == 2:
            other = stage.config.repository / "chestct_bad" / "1" / "model.onnx"
            shutil.copy(other, stage.model / "2" / "model.onnx")
        load(model)

    monkeypatch.setattr(stage.server, "load", sabotaged)
    with pytest.raises(ValueError, match="answers otherwise than it was tried"):
        roll_out(stage.config, stage.server, "new")
    unchanged(stage)


def test_commands_and_the_key(
    stage: Stage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "rollout.yaml"
    config.write_text(
        f"repository: {stage.config.repository}\nscans: {stage.config.scans}\n"
        f"split: {stage.config.split}\ngolden: test\n"
    )
    base = ["--config", str(config), "--url", stage.triton.http_url]
    monkeypatch.delenv(ADMIN_KEY, raising=False)
    assert main([*base, "--variant", "new"]) == 1
    assert f"into the environment as {ADMIN_KEY}" in capsys.readouterr().err
    monkeypatch.setenv(ADMIN_KEY, "another")
    assert main([*base, "--variant", "new"]) == 1
    assert "HTTP 403" in capsys.readouterr().err
    assert status(stage.server)["version"] == "1"
    monkeypatch.setenv(ADMIN_KEY, "of-the-test")
    assert main([*base, "--variant", "new"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "run-new"
    assert main([*base, "--roll-back"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "run-old"
    assert main([*base, "--roll-back"]) == 1
    assert "no version before 1" in capsys.readouterr().err
    assert main([*base, "--status"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "1"


def test_the_name_of_the_variable_is_the_servers() -> None:
    """The rooms may not import each other, so each names it for itself."""
    from serving.local.__main__ import ADMIN_KEY as OF_SERVER

    assert OF_SERVER == ADMIN_KEY


def tiny_run(folder: Path) -> str:
    """A finished run in MLflow that holds a network which answers in a millisecond."""
    import keras
    from keras import layers

    from training.track.mlflow_run import tracked_run

    keras.utils.set_random_seed(5)
    scan = keras.Input((224, 224, 1), dtype="uint8", name="scan")
    small = layers.AveragePooling2D(16)(layers.Rescaling(1 / 255)(scan))
    evidence = layers.Conv2D(3, 3, padding="same", name="activation_map")(small)
    logits = layers.GlobalAveragePooling2D()(evidence)
    distance = keras.ops.norm(logits, axis=-1, keepdims=True)
    outputs = {
        "probabilities": layers.Softmax(name="probabilities")(logits),
        "activation_map": evidence,
        "domain_distance": distance,
    }
    folder.mkdir()
    keras.Model(scan, outputs).save(folder / "model.keras")
    with tracked_run("tiny") as run:
        facts = dataclasses.replace(FACTS, run=run.run_id, git_commit=run.git_commit)
        (folder / "facts.json").write_text(json.dumps(facts.to_parameters()))
        for name in ("model.keras", "facts.json"):
            run.log_file(folder / name, "model")
        return run.run_id


def test_the_champion_of_mlflow_is_served_by_one_command(
    stage: Stage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from training.track import registry
    from training.track.mlflow_run import git_commit

    run, commit = tiny_run(tmp_path / "run"), git_commit()
    registry.promote(run, {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ADMIN_KEY, "of-the-test")
    config = tmp_path / "rollout.yaml"
    config.write_text(
        f"repository: {stage.config.repository}\nscans: {stage.config.scans}\n"
        f"split: {stage.config.split}\ngolden: test\naccuracy_drop: 1.0\nleast_agreement: 0.0\n"
    )
    served = tmp_path / "serve.yaml"
    served.write_text("max_batch_size: 8\n")
    options = ["--config", str(config), "--serve-config", str(served)]
    assert main([*options, "--url", stage.triton.http_url, "--champion"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["version"], answer["run"]) == ("2", run)
    assert answer["git_commit"] == commit
    assert (stage.config.repository / "chestct_fp32" / "1" / "parity.json").is_file()
