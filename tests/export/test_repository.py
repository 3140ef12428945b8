from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import training.files
from chestct.contract import ModelFacts
from export.onnx import sha256_of
from export.repository import (
    RepositoryConfig,
    config_pbtxt,
    main,
    parsed_config,
    roll_back,
    served_version,
    write_repository,
)


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
    facts = ModelFacts.from_parameters({k: v.string_value for k, v in parsed.parameters.items()})
    assert (folder / "1" / "labels.txt").read_text().split() == list(facts.labels)
    stored = json.loads((trained.model / "facts.json").read_text())
    assert facts == ModelFacts.from_parameters(stored)


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


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ({"holds": False}, "parity does not hold, nothing is written"),
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
    replace = training.files.os.replace

    def interrupted(source, target):
        if Path(target).name == "config.pbtxt":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(training.files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_repository(config)
    folder = config.repository / "chestct"
    assert served_version(folder) == 1
    monkeypatch.undo()
    assert write_repository(config) == 3
    assert served_version(folder) == 3


def test_labels_with_quotes_and_umlauts_survive(config):
    facts = ModelFacts.from_parameters(json.loads((config.model / "facts.json").read_text()))
    import dataclasses

    odd = dataclasses.replace(facts, labels=('Größe "1"', "back\\slash"))
    parsed = parsed_config(config_pbtxt(config, odd, 1))
    found = {k: v.string_value for k, v in parsed.parameters.items()}
    assert ModelFacts.from_parameters(found).labels == odd.labels


def test_another_number_of_classes_breaks_the_contract(config):
    facts = json.loads((config.model / "facts.json").read_text())
    facts["labels"] = '["a", "b"]'
    (config.model / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"breaks the contract: .*expected \(-1, 2\)"):
        write_repository(config)


def test_nothing_exported_is_one_line(tmp_path, capsys):
    (tmp_path / "publish.yaml").write_text(f"onnx: {tmp_path / 'none.onnx'}\n")
    assert main(["--config", str(tmp_path / "publish.yaml")]) == 1
    assert "no such file; run python -m export.onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warm_up": (64,)}, "warm_up is"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"keep_versions": 0}, "keep_versions is 0"),
    ],
)
def test_settings_that_triton_would_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        RepositoryConfig(**changes)
