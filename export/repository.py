"""The Triton model repository: written whole or not at all, and only if parity holds."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chestct.contract import MODEL_NAME, ModelFacts, input_spec, output_specs
from export.onnx import contract_differences, sha256_of
from training.command import command_parser, run_command
from training.config import load_config
from training.files import replaced

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepositoryConfig:
    """What `export.repository` is told.

    Attributes:
        onnx: The exported model.
        model: Folder that `training.fit` wrote; its facts become the parameters.
        parity: Report of `export.parity`; nothing is written unless it holds for this very file.
        repository: Triton's model repository.
        name: Name of the model in it.
        max_batch_size: Most scans in one inference; 32 scans of VGG-16 need about 1 GB.
        warm_up: Batch sizes that are run before the model is ready; the first call of each new
            shape is slow otherwise.
        max_queue_delay_us: How long a scan may wait for others to share its batch.
        keep_versions: Versions that stay in the repository, the served one included.
    """

    onnx: Path = Path("results/export/model.onnx")
    model: Path = Path("results/train")
    parity: Path = Path("results/export/parity.json")
    repository: Path = Path("model_repository")
    name: str = MODEL_NAME
    max_batch_size: int = 32
    warm_up: tuple[int, ...] = (1, 8)
    max_queue_delay_us: int = 0
    keep_versions: int = 2

    def __post_init__(self) -> None:
        """Refuse settings that Triton would refuse later.

        Raises:
            ValueError: A number out of range.
        """
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size is {self.max_batch_size}; expected at least 1")
        if any(not 1 <= size <= self.max_batch_size for size in self.warm_up):
            raise ValueError(f"warm_up is {self.warm_up}; expected 1 to {self.max_batch_size}")
        if self.keep_versions < 1:
            raise ValueError(f"keep_versions is {self.keep_versions}; expected at least 1")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ValueError(f"name is {self.name!r}; expected letters, digits, . _ -")


def config_pbtxt(config: RepositoryConfig, facts: ModelFacts, version: int) -> str:
    """The text of `config.pbtxt`: tensors from the contract, parameters from the facts.

    The version policy names one version, so that replacing this one file is the moment at which
    another version is served. Instances are KIND_AUTO: a GPU where there is one, else the CPU.
    """
    specs = [("input", input_spec())]
    specs += [("output", spec) for spec in output_specs(len(facts.labels))]
    parts = [
        f"name: {_text(config.name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {config.max_batch_size}",
    ]
    for kind, spec in specs:
        dims = ", ".join(str(size) for size in spec.shape[1:])
        label = f" label_filename: {_text(f'{version}/labels.txt')}" * (
            spec.name == "probabilities"
        )
        parts.append(
            f"{kind} [{{ name: {_text(spec.name)} data_type: TYPE_{spec.dtype} "
            f"dims: [{dims}]{label} }}]"
        )
    parts += [
        f"version_policy {{ specific {{ versions: [{version}] }} }}",
        "instance_group [{ count: 1 kind: KIND_AUTO }]",
        f"dynamic_batching {{ max_queue_delay_microseconds: {config.max_queue_delay_us} }}",
    ]
    scan = input_spec()
    dims = ", ".join(str(size) for size in scan.shape[1:])
    for size in config.warm_up:
        parts.append(
            f'model_warmup [{{ name: "batch {size}" batch_size: {size} inputs {{ '
            f"key: {_text(scan.name)} value {{ data_type: TYPE_{scan.dtype} dims: [{dims}] "
            "random_data: true } } }]"
        )
    for key, value in facts.to_parameters().items():
        parts.append(f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}")
    text = "\n".join(parts) + "\n"
    parsed_config(text)
    return text


def parsed_config(text: str) -> Any:
    """The protobuf message of a `config.pbtxt`, as Triton's own schema reads it.

    Raises:
        ValueError: The text does not fit the schema.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(f"config.pbtxt does not parse: {error}") from error


def write_repository(config: RepositoryConfig) -> int:
    """Publish the exported model as a new version and return its number.

    The version folder is complete before it appears (temporary folder, then a rename), and it is
    served only when `config.pbtxt` is replaced, in one step. The version before stays, with its
    own config inside, for a rollback. Publishing the served model again changes nothing.

    Raises:
        ValueError: No model, parity does not hold for it, or it breaks the contract.
        OSError: The repository cannot be written; it is as it was.
    """
    import onnx

    for path, remedy in (
        (config.onnx, "export.onnx"),
        (config.parity, "export.parity"),
        (config.model / "facts.json", "training.fit"),
    ):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run python -m {remedy}")
    sha256 = sha256_of(config.onnx)
    parity = json.loads(config.parity.read_text())
    if parity.get("onnx_sha256") != sha256:
        raise ValueError(
            f"{config.parity} is about another file than {config.onnx}; run python -m export.parity"
        )
    if parity.get("holds") is not True:
        raise ValueError(f"{config.parity}: parity does not hold, nothing is written")
    facts = ModelFacts.from_parameters(json.loads((config.model / "facts.json").read_text()))
    differences = contract_differences(onnx.load(config.onnx), len(facts.labels))
    if differences:
        raise ValueError(f"{config.onnx} breaks the contract: {'; '.join(differences)}")

    folder = config.repository / config.name
    served = served_version(folder)
    if (
        served is not None
        and sha256_of(folder / str(served) / "model.onnx") == sha256
        and (folder / "config.pbtxt").read_text() == config_pbtxt(config, facts, served)
    ):
        logger.info("%s version %d is already this model", folder, served)
        return served
    version = max(_versions(folder), default=0) + 1
    text = config_pbtxt(config, facts, version)
    with replaced(folder / str(version)) as temporary:
        temporary.mkdir()
        shutil.copyfile(config.onnx, temporary / "model.onnx")
        shutil.copyfile(config.parity, temporary / "parity.json")
        (temporary / "labels.txt").write_text("\n".join(facts.labels) + "\n", encoding="utf-8")
        (temporary / "config.pbtxt").write_text(text, encoding="utf-8")
    _serve(folder, version)
    for old in sorted(_versions(folder))[: -config.keep_versions]:
        shutil.rmtree(folder / str(old))
    logger.info("wrote %s version %d", folder, version)
    return version


def roll_back(folder: Path) -> int:
    """Serve the version before the served one again; returns its number.

    Raises:
        ValueError: There is no earlier version in the repository.
    """
    served = served_version(folder)
    earlier = [version for version in _versions(folder) if served is None or version < served]
    if not earlier:
        raise ValueError(f"{folder}: no version before {served} to go back to")
    _serve(folder, max(earlier))
    logger.info("%s serves version %d again", folder, max(earlier))
    return max(earlier)


def served_version(folder: Path) -> int | None:
    """The version that the model folder's `config.pbtxt` names; None where there is no model."""
    if not (folder / "config.pbtxt").is_file():
        return None
    policy = parsed_config((folder / "config.pbtxt").read_text()).version_policy
    return int(policy.specific.versions[0])


def _serve(folder: Path, version: int) -> None:
    with replaced(folder / "config.pbtxt") as temporary:
        shutil.copyfile(folder / str(version) / "config.pbtxt", temporary)


def _versions(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(entry.name) for entry in os.scandir(folder) if entry.name.isdigit()]


def _text(value: str) -> str:
    """A protobuf text-format string; it shares JSON's escapes once letters stay unescaped."""
    return json.dumps(value, ensure_ascii=False)


def main(argv: list[str] | None = None) -> int:
    """Publish the exported model in Triton's model repository."""
    parser = command_parser("export.repository", main.__doc__, "configs/publish.yaml")
    parser.add_argument("--roll-back", action="store_true", help="serve the version before again")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(RepositoryConfig, arguments.config)
        if arguments.roll_back:
            roll_back(config.repository / config.name)
        else:
            write_repository(config)

    return run_command(work, interrupted="interrupted: the repository serves what it served")


if __name__ == "__main__":
    sys.exit(main())
