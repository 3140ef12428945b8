"""Publish the model variants in Triton's model repository.

A version is written whole or not at all, and only if parity holds. `configs/serve.yaml` lists the
variants of the model. Each is published as `chestct_<variant>`, and the promoted one a second time
as `chestct`, which is what clients ask for. `chestct_encoded` takes whole files: a step that
decodes them (`serving/backends/chestct_scan`), then `chestct`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chestct.contract import MODEL_NAME, ModelMetadata
from export.check.variant import facts_of, require_file
from export.convert.engine import read_record
from export.convert.onnx import contract_differences
from export.publish.config_pbtxt import (
    config_pbtxt,
    config_text,
    encoded_configs,
    parsed_config,
)
from export.publish.settings import (
    CANDIDATE,
    DECODE,
    ENCODED,
    GPU_ENGINES,
    RepositoryConfig,
    ServeConfig,
)
from export.publish.versions import (
    Texts,
    publish_version,
    served_config,
    served_version,
    set_served_version,
    versions_of,
)
from training.common.atomic_io import sha256_of
from training.common.cli import command_parser, run_command
from training.common.config import load_config

logger = logging.getLogger(__name__)


def write_repository(config: RepositoryConfig) -> int:
    """Publish one model as a new version and return its number.

    The version folder is complete before it appears (temporary folder, then a rename), and it is
    served only when `config.pbtxt` is replaced, in one step. The version before stays, with its
    own config inside, for a rollback. Publishing the served model again changes nothing.

    Raises:
        ValueError: No model, parity does not hold for it, it breaks the contract, its card is of
            another run, or its plan was built from another file or for smaller batches.
        OSError: The repository cannot be written; it is as it was.
    """
    import onnx

    for path, command in (
        (config.onnx, "onnx"),
        (config.parity, "parity"),
        (config.model / "facts.json", "onnx"),
        (config.served_file, "engine"),
    ):
        require_file(path, f"run python -m export {command}")
    sha256 = sha256_of(config.onnx)
    parity = json.loads(config.parity.read_text())
    if parity.get("onnx_sha256") != sha256:
        raise ValueError(
            f"{config.parity} is about another file than {config.onnx}; run python -m export parity"
        )
    if parity.get("holds") is not True:
        reasons = "; ".join(parity.get("reasons", ())) or "the report gives no reason"
        raise ValueError(f"{config.parity}: parity does not hold, nothing is written: {reasons}")
    judged = [report["candidate"] for report in parity.get("reports", ())]
    if judged and config.engine in ("onnxruntime", "openvino") and config.engine not in judged:
        raise ValueError(
            f"{config.parity} judged {judged}, not {config.engine}; name it among the engines of "
            "the parity config"
        )
    facts = facts_of(config.model)
    facts = dataclasses.replace(facts, card=_card_of(config, facts))
    differences = contract_differences(onnx.load(config.onnx), len(facts.class_names))
    if differences:
        raise ValueError(f"{config.onnx} breaks the contract: {'; '.join(differences)}")
    files = {config.served_file.name: config.served_file, "parity.json": config.parity}
    if config.engine == "tensorrt-plan":
        record = read_record(config.onnx.parent)
        if record.onnx_sha256 != sha256:
            raise ValueError(
                f"{config.served_file} was built from another file than {config.onnx}; run python "
                "-m export engine"
            )
        if record.profile[0] > 1 or record.profile[2] < config.max_batch_size:
            raise ValueError(
                f"{config.served_file} takes batches from {record.profile[0]} to "
                f"{record.profile[2]}; expected 1 to max_batch_size, {config.max_batch_size}"
            )
        files["plan.json"] = config.served_file.with_name("plan.json")

    def texts(version: int) -> Texts:
        found = {
            "config.pbtxt": config_pbtxt(config, facts, version=version, onnx_sha256=sha256),
            "labels.txt": "\n".join(facts.class_names) + "\n",
        }
        if config.engine in GPU_ENGINES and config.engine != "tensorrt-plan":
            # A server without a GPU takes this one, because it refuses a model of KIND_GPU.
            on_cpu = dataclasses.replace(config, engine="onnxruntime", instances=1)
            found["cpu.pbtxt"] = config_pbtxt(on_cpu, facts, version=version)
        return found

    return publish_version(config.repository / config.name, files, texts, config.keep_versions)


def _card_of(config: RepositoryConfig, facts: ModelMetadata) -> str:
    """The summary of the model's card as one line of JSON, empty where there is none.

    Raises:
        ValueError: It is no card, or that of another run.
    """
    if config.card is None:
        return ""
    if not config.card.is_file():
        logger.info("%s has no model card: %s is not there", config.name, config.card)
        return ""
    try:
        card = json.loads(config.card.read_text(encoding="utf-8"))
        run = card["run"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{config.card}: no card; run python -m training card again") from error
    expected = _network_run(config.model, facts)
    if run != expected:
        raise ValueError(
            f"{config.card} is the card of run {run}, {config.model} is of run {expected}; run "
            "python -m training card again"
        )
    return json.dumps(card, separators=(",", ":"))


def _network_run(model: Path, facts: ModelMetadata) -> str:
    """The training run of a variant's network; of a student, its teacher's."""
    student = model / "student.json"
    return str(json.loads(student.read_text())["teacher"]) if student.is_file() else facts.run


def variants_of_other_runs(models: Mapping[str, RepositoryConfig]) -> dict[str, str]:
    """The variants of another training run than the first one's, with the reason to refuse each."""
    runs = {}
    for variant, model in models.items():
        if (model.model / "facts.json").is_file() and model.served_file.is_file():
            runs[variant] = _network_run(model.model, facts_of(model.model))
    first = next(iter(runs), "")
    return {
        variant: f"{models[variant].model} is of run {run}, {models[first].model} of run "
        f"{runs[first]}: they would answer differently. Make it again from that run, or remove it"
        for variant, run in runs.items()
        if run != runs[first]
    }


def promote(
    repository: Path, variant: str, keep_versions: int = 2, *, name: str = MODEL_NAME
) -> int:
    """Publish the served version of a variant as `chestct`; returns the number it has there.

    `name` publishes it under another name instead, where clients do not look.

    Raises:
        ValueError: The variant is not in the repository.
        OSError: The repository cannot be written; it is as it was.
    """
    source = repository / f"{MODEL_NAME}_{variant}"
    served = served_version(source)
    if served is None:
        published = sorted(path.parent.name for path in repository.glob("*_*/config.pbtxt"))
        published = [name for name in published if name not in (ENCODED, DECODE, CANDIDATE)]
        raise ValueError(f"{source}: no such model to promote; published are {published}")
    version_folder = source / str(served)

    def texts(version: int) -> Texts:
        found = {}
        for path in version_folder.glob("*.pbtxt"):
            message = parsed_config(path.read_text(encoding="utf-8"))
            message.name = name
            message.output[0].label_filename = f"{version}/labels.txt"
            found[path.name] = config_text(message, version)
        return found

    files = {path.name: path for path in version_folder.iterdir() if path.suffix != ".pbtxt"}
    version = publish_version(repository / name, files, texts, keep_versions)
    if name == MODEL_NAME:
        sync_encoded_ensemble(repository, keep_versions)
    return version


def publish_variants(config: ServeConfig) -> list[str]:
    """Publish every variant that is there, and promote one; one sentence for each failure.

    A variant that fails keeps its served version, and the others go on. All must come from one
    trained network, that of the first variant that is there.

    Raises:
        OSError: The repository cannot be written.
    """
    models = config.models()
    failures = {
        variant: f"{models[variant].name}: {reason}"
        for variant, reason in variants_of_other_runs(models).items()
    }
    for variant, model in models.items():
        if not model.served_file.is_file():
            logger.info("skipped %s: %s is not there", model.name, model.served_file)
            continue
        if variant in failures:
            continue
        try:
            write_repository(model)
        except ValueError as error:
            failures[variant] = f"{model.name}: {error}"
    wanted = models[config.promoted]
    if not wanted.served_file.is_file():
        failures[config.promoted] = (
            f"{wanted.name} is to be promoted, and {wanted.served_file} is not there; make it, or "
            "name another variant as `promoted`"
        )
    if config.promoted not in failures:
        promote(config.repository, config.promoted, config.keep_versions)
        if config.encoded:
            write_encoded(config.repository, config.keep_versions)
    return list(failures.values())


def write_encoded(repository: Path, keep_versions: int = 2) -> None:
    """Publish `chestct_encoded` and its first step for the served version of `chestct`.

    The ensemble takes `file`, the bytes of a PNG, JPEG or DICOM file. To the outputs of `chestct`
    it adds the labels in the order of the probabilities, the threshold of the domain distance, the
    notice, and the reasons that speak against the file.

    Raises:
        ValueError: There is no `chestct` in the repository.
        OSError: The repository cannot be written.
    """
    for message in encoded_configs(served_config(repository / MODEL_NAME)):

        def texts(version: int, message: Any = message) -> Texts:
            return {"config.pbtxt": config_text(message, version)}

        publish_version(repository / message.name, {}, texts, keep_versions)


def sync_encoded_ensemble(repository: Path, keep_versions: int = 2) -> None:
    """Publish `chestct_encoded` again for the served version of `chestct`, if it is published.

    Raises:
        OSError: The repository cannot be written.
    """
    if served_version(repository / ENCODED) is not None:
        write_encoded(repository, keep_versions)


def roll_back(folder: Path) -> int:
    """Serve the version before the served one again; returns its number.

    Raises:
        ValueError: There is no such model, or no earlier version of it.
    """
    served = served_version(folder)
    if served is None:
        raise ValueError(f"{folder}: no such model to roll back; run python -m export repository")
    earlier = [version for version in versions_of(folder) if version < served]
    if not earlier:
        raise ValueError(f"{folder}: no version before {served} to go back to")
    set_served_version(folder, max(earlier))
    if folder.name == MODEL_NAME:
        sync_encoded_ensemble(folder.parent)
    logger.info("%s serves version %d again", folder, max(earlier))
    return max(earlier)


def main(argv: list[str] | None = None) -> int:
    """Publish the variants of the model in Triton's model repository, and promote one."""
    parser = command_parser("export repository", main.__doc__, "configs/serve.yaml")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--promote", metavar="VARIANT", help="only promote this published variant")
    instead.add_argument("--roll-back", action="store_true", help="serve the version before again")
    arguments = parser.parse_args(argv)

    def work() -> int:
        config = load_config(ServeConfig, arguments.config)
        if arguments.roll_back:
            roll_back(config.repository / MODEL_NAME)
        elif arguments.promote:
            promote(config.repository, arguments.promote, config.keep_versions)
        else:
            failures = publish_variants(config)
            for failure in failures:
                sys.stderr.write(f"error: {failure}\n")
            return 1 if failures else 0
        return 0

    return run_command(work, interrupted="interrupted: the repository serves what it served")
