from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator

import mlflow
import pytest

from chestct.contract import ModelMetadata
from training.track.registry import model_folder, promote


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[None]:
    """Downloads go into a folder of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def registered(trained) -> str:
    """The run of the trained phantom model, which is the champion."""
    run = json.loads((trained.model / "run.json").read_text())["run"]
    promote(run, {"metric": "none"})
    return run


def version_of(run: str) -> str:
    [version] = mlflow.MlflowClient().search_model_versions(f"run_id='{run}'")
    return str(version.version)


def test_a_folder_is_itself(tmp_path):
    assert model_folder(tmp_path) == tmp_path
    assert model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("kind", ["alias", "version", "run"])
def test_every_address_gives_the_folder_of_the_training(registered, trained, here, kind):
    address = {
        "alias": "models:/chestct@champion",
        "version": f"models:/chestct/{version_of(registered)}",
        "run": f"runs:/{registered}",
    }[kind]
    folder = model_folder(address)
    for name in ("model.keras", "facts.json"):
        assert (folder / name).read_bytes() == (trained.model / name).read_bytes(), name
    # Its settings are parameters of the run already.
    fetched = json.loads((folder / "run.json").read_text())
    of_training = json.loads((trained.model / "run.json").read_text())
    commit = json.loads((trained.model / "facts.json").read_text())["git_commit"]
    expected = {key: of_training[key] for key in ("run", "weights")}
    assert fetched == expected | {"git_commit": commit}
    assert folder == model_folder(f"runs:/{registered}/model")


def test_a_download_is_made_once_and_needs_no_server_then(registered, here, monkeypatch):
    folder = model_folder("models:/chestct@champion")
    (folder / "facts.json").write_text("seen")
    assert model_folder("models:/chestct@champion") == folder
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert model_folder(f"runs:/{registered}") == folder
    assert (folder / "facts.json").read_text() == "seen"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/chestct", "expected a folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs"),
        ("models:/chestct/latest", "expected a folder, models:/NAME@ALIAS"),
        ("runs:/../../etc", "expected a folder, models:/NAME@ALIAS"),
        ("models:/chestct@nobody", "alias nobody not found"),
        ("models:/nothing@champion", "nothing not found"),
        ("models:/chestct/987", "version=987) not found"),
        (f"runs:/{'0' * 32}", "not found"),
    ],
)
def test_address_of_nothing_is_one_line_and_leaves_no_folder(
    registered, here, tmp_path, address, message
):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        model_folder(address)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.keras"))


def test_run_without_a_model_leaves_no_half_folder(here, tmp_path):
    from training.track.mlflow_run import tracked_run

    with tracked_run("empty") as run:
        (tmp_path / "model.keras").write_text("model")
        run.log_file(tmp_path / "model.keras", "model")
    with pytest.raises((ValueError, OSError)):
        model_folder(f"runs:/{run.run_id}")
    assert not (tmp_path / ".cache" / "models" / run.run_id).exists()


def test_version_that_is_no_folder_of_a_training_is_refused(registered, here, tmp_path):
    client = mlflow.MlflowClient()
    version = client.create_model_version("chestct", tmp_path.as_uri(), registered).version
    try:
        with pytest.raises(ValueError, match="expected the folder model of a run"):
            model_folder(f"models:/chestct/{version}")
    finally:
        client.delete_model_version("chestct", str(version))


def test_export_and_parity_take_the_champion(registered, trained, here, tmp_path, capsys):
    """`results/train` is of a later run: parity still compares with what was exported."""
    import export.check.parity
    import export.convert.onnx

    later = tmp_path / "results" / "train"
    shutil.copytree(trained.model, later)
    facts = json.loads((later / "facts.json").read_text())
    (later / "facts.json").write_text(json.dumps(facts | {"training_run": "0" * 32}))
    (later / "model.keras").write_bytes(b"another network")
    (tmp_path / "export.yaml").write_text("model: models:/chestct/999\n")
    assert export.convert.onnx.main(["--config", "export.yaml"]) == 1
    assert "version=999) not found" in capsys.readouterr().err
    command = ["--config", "export.yaml", "--model", "models:/chestct@champion"]
    assert export.convert.onnx.main(command) == 0
    exported = json.loads((tmp_path / "results/export/facts.json").read_text())
    assert ModelMetadata.from_parameters(exported).run == registered

    (tmp_path / "parity.yaml").write_text(f"scans: {trained.scans}\nnum_scans: 9\n")
    assert export.check.parity.main(["--config", "parity.yaml"]) == 0
    report = json.loads((tmp_path / "results/export/parity.json").read_text())
    assert report["holds"] is True


def test_parity_without_the_exported_model_is_one_line(exported, trained, here, tmp_path, capsys):
    import export.check.parity

    variant = tmp_path / "variant"
    variant.mkdir()
    shutil.copy(exported, variant)
    facts = json.loads((trained.model / "facts.json").read_text())
    (variant / "facts.json").write_text(json.dumps(facts | {"training_run": "f" * 32}))
    (tmp_path / "parity.yaml").write_text(
        f"scans: {trained.scans}\nmodel: {trained.model}\nvariant: {variant}\n"
    )
    assert export.check.parity.main(["--config", "parity.yaml"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"is not the model of run {'f' * 32}, from which the variant was exported" in said
    assert said.endswith("export again")
