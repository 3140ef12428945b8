"""The registered versions of the model, which of them is the champion, and how it is fetched.

A version is the folder `model` among the files of a training run: `model.keras`, `facts.json` and
`history.csv`, plain files (`training track` says why no flavour of MLflow). The alias
`champion` names the version to export, `previous` the one that was it before.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chestct.contract import MODEL_NAME
from training.common.atomic_io import replaced, write_json
from training.track.mlflow_run import connected, shown_address

logger = logging.getLogger(__name__)

CHAMPION = "champion"
PREVIOUS = "previous"
MODEL_FILES = ("model.keras", "facts.json")
MODEL_CACHE = Path(".cache/models")
MODEL_URI = re.compile(
    r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))|runs:/(?P<run>\w+)(/model)?"
)


class Promotion(NamedTuple):
    """The champion's version before (None at first) and after."""

    before: int | None
    after: int

    def in_words(self) -> str:
        """One line that tells what clients of the alias get now."""
        if self.before == self.after:
            return f"{MODEL_NAME}@{CHAMPION}: version {self.after} already"
        before = "none" if self.before is None else f"version {self.before}"
        return f"{MODEL_NAME}@{CHAMPION}: {before} -> version {self.after}"


def promote(run_id: str, tags: Mapping[str, str]) -> Promotion:
    """Register the model of a run, unless it is, and give its version the alias `champion`.

    The champion before becomes `previous`. Promoting the champion again changes its tags alone.

    Args:
        run_id: A finished run of `training fit`.
        tags: What the version says of itself, beside the model's files.

    Raises:
        ValueError: The run is not finished or holds no model, or the server refuses.
    """
    with connected() as mlflow:
        client = mlflow.MlflowClient()
        run = client.get_run(run_id)
        if run.info.status != "FINISHED":
            raise ValueError(f"run {run_id} is {run.info.status}; expected FINISHED")
        stored = {file.path for file in client.list_artifacts(run_id, "model")}
        missing = [name for name in MODEL_FILES if f"model/{name}" not in stored]
        if missing:
            raise ValueError(
                f"run {run_id} holds no {' and no '.join(f'model/{name}' for name in missing)}; "
                "expected a run of python -m training fit"
            )
        before = _aliases(client).get(CHAMPION)
        versions = client.search_model_versions(f"name='{MODEL_NAME}'")
        of_run = [int(version.version) for version in versions if version.run_id == run_id]
        if of_run:
            after = max(of_run)
        else:
            if before is None and not client.search_registered_models(f"name='{MODEL_NAME}'"):
                client.create_registered_model(MODEL_NAME)
            source = f"{run.info.artifact_uri}/model"
            after = int(client.create_model_version(MODEL_NAME, source, run_id).version)
        for key, value in tags.items():
            client.set_model_version_tag(MODEL_NAME, str(after), key, value)
        return _move_champion(client, before, after)


def roll_back() -> Promotion:
    """Make `previous` the champion and the champion `previous`; a second call undoes the first.

    Raises:
        ValueError: There is no version to go back to, or the server refuses.
    """
    with connected() as mlflow:
        client = mlflow.MlflowClient()
        aliases = _aliases(client)
        if PREVIOUS not in aliases:
            raise ValueError(
                f"{MODEL_NAME} in {shown_address()} has no version with the alias {PREVIOUS}: "
                "nothing to roll back to"
            )
        return _move_champion(client, aliases.get(CHAMPION), aliases[PREVIOUS])


def aliases_of_runs() -> dict[str, list[str]]:
    """The aliases of the registered versions, by the run that each version came from."""
    with connected() as mlflow:
        client = mlflow.MlflowClient()
        found: dict[str, list[str]] = {}
        for alias, version in sorted(_aliases(client).items()):
            run = client.get_model_version(MODEL_NAME, str(version)).run_id
            found.setdefault(run, []).append(alias)
        return found


def model_folder(source: str | Path) -> Path:
    """The folder of a trained model: `source` itself, or a download of what it names.

    Args:
        source: A folder that `training fit` wrote, or `models:/NAME@ALIAS`,
            `models:/NAME/VERSION` or `runs:/ID`. A download is kept in `.cache/models`, by run,
            and holds the model, its facts, and of `run.json` what export reads.

    Raises:
        ValueError: The address is malformed, names nothing, or holds no model.
        OSError: The files cannot be fetched or written.
    """
    uri = str(source)
    if not uri.startswith(("models:", "runs:")):
        return Path(source)
    match = MODEL_URI.fullmatch(uri)
    if match is None:
        raise ValueError(
            f"model is {uri!r}; expected a folder, models:/NAME@ALIAS, models:/NAME/VERSION or "
            "runs:/ID"
        )
    run_id = match["run"] or _run_of_version(match["name"], match["alias"], match["version"])
    folder = MODEL_CACHE / run_id
    if not folder.is_dir():
        with connected() as mlflow, replaced(folder) as temporary:
            run = mlflow.get_run(run_id)
            temporary.mkdir()
            for file in MODEL_FILES:
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"runs:/{run_id}/model/{file}", dst_path=str(temporary)
                )
            weights = run.data.params.get("weights.source", "unknown")
            commit = run.data.tags.get("git_commit", "")
            about = {"run": run_id, "weights": weights, "git_commit": commit}
            write_json(temporary / "run.json", about)
    logger.info("%s is the model of run %s: %s", uri, run_id, folder)
    return folder


def _run_of_version(name: str, alias: str | None, version: str | None) -> str:
    with connected() as mlflow:
        client = mlflow.MlflowClient()
        if alias:
            version = str(client.get_model_version_by_alias(name, alias).version)
        found = client.get_model_version(name, version)
    if not found.run_id or not str(found.source).endswith("/model"):
        raise ValueError(
            f"version {version} of {name} is {found.source!r} of run {found.run_id!r}; expected "
            "the folder model of a run, as python -m training compare --promote registers it"
        )
    logger.info("%s version %s", name, version)
    return str(found.run_id)


def _aliases(client: Any) -> dict[str, int]:
    """The aliases of the registered model; empty where it was never registered."""
    for model in client.search_registered_models(f"name='{MODEL_NAME}'"):
        return {alias: int(version) for alias, version in model.aliases.items()}
    return {}


def _move_champion(client: Any, before: int | None, after: int) -> Promotion:
    if before != after:
        if before is not None:
            client.set_registered_model_alias(MODEL_NAME, PREVIOUS, str(before))
        client.set_registered_model_alias(MODEL_NAME, CHAMPION, str(after))
    return Promotion(before, after)
