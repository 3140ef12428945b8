"""The Triton model repository: written whole or not at all, and only if parity holds.

`configs/serve.yaml` lists the variants of the model. Each is published as `chestct_<variant>`, and
the promoted one a second time as `chestct`, which is what clients ask for. `chestct_encoded` takes
whole files: a step that decodes them (`serving/backends/chestct_scan`), then `chestct`.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chestct.contract import INPUT_NAME, MODEL_NAME, ModelMetadata, input_spec, output_specs
from export.convert.engine import profile_shape, read_record
from export.convert.onnx import contract_differences
from training.common.atomic_io import replaced, sha256_of
from training.common.cli import command_parser, run_command
from training.common.config import load_config

logger = logging.getLogger(__name__)

GPU_ENGINES = ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt-plan")
ENGINES = ("onnxruntime", "openvino", *GPU_ENGINES)
MODES = ("latency", "throughput")
CANDIDATE = f"{MODEL_NAME}_candidate"  # where `export rollout` tries a version before the switch
ENCODED, DECODE = f"{MODEL_NAME}_encoded", f"{MODEL_NAME}_decode"  # the ensemble, its first step
VARIANT_KEYS = {"folder": str, "engine": str, "instances": int, "threads": int}
# triton-inference-server/onnxruntime_backend, README, "Parameter mapping".
PRECISION_MODES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}

Texts = dict[str, str]  # name of a file to its content


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same for all models of a repository.

    Attributes:
        max_batch_size: Most scans in one inference; 32 scans of VGG-16 need about 1 GB.
        warm_up: Batch sizes that are run before the model is ready; the first call of each new
            shape is slow otherwise.
        max_queue_delay_us: How long a scan may wait for others to share its batch; None turns
            dynamic batching off.
        keep_versions: Versions that stay in the repository, the served one included.
        tensorrt_cache: Folder on the server for the engines that `onnxruntime-tensorrt` builds,
            which takes minutes; a volume that stays is to be mounted there.
        workspace_mb: Memory that `onnxruntime-tensorrt` may use while it builds and runs.
        cuda_graphs: Replay the kernel launches of a `tensorrt-plan` at the batch sizes of
            `warm_up`. A graph is recorded for one shape; other batch sizes run without.
        card: Summary of the model card, `summary.json` of `training card`; it becomes a
        parameter
            of each model, and is left out where the file is not there.
    """

    max_batch_size: int = 32
    warm_up: tuple[int, ...] = (1, 8)
    max_queue_delay_us: int | None = 0
    keep_versions: int = 2
    tensorrt_cache: Path = Path("/var/cache/chestct/tensorrt")
    workspace_mb: int = 2048
    cuda_graphs: bool = False
    card: Path | None = None

    def __post_init__(self) -> None:
        """Refuse settings that Triton would refuse later.

        Raises:
            ValueError: A number out of range.
        """
        for key in ("max_batch_size", "keep_versions", "workspace_mb"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; expected at least 1")
        if self.max_queue_delay_us is not None and self.max_queue_delay_us < 0:
            raise ValueError(f"max_queue_delay_us is {self.max_queue_delay_us}; expected 0 or more")
        if any(not 1 <= size <= self.max_batch_size for size in self.warm_up):
            raise ValueError(f"warm_up is {self.warm_up}; expected 1 to {self.max_batch_size}")


@dataclass(frozen=True)
class RepositoryConfig(Settings):
    """How one model is published.

    Attributes:
        onnx: The ONNX file; for `tensorrt-plan` that of which `model.plan` beside it was built.
        model: Folder of `facts.json`, which becomes the parameters.
        parity: Report of `export parity`; nothing is written unless it holds for this very
        file.
        repository: Triton's model repository.
        name: Name of the model in it.
        engine: What runs the model, one of `ENGINES`.
        instances: How many run side by side, each with its own copy of the weights; on GPUs, on
            each of them.
        threads: Threads of one instance on a CPU; 0 leaves it to the engine, which takes all cores.
    """

    onnx: Path = Path("results/export/model.onnx")
    model: Path = Path("results/export")
    parity: Path = Path("results/export/parity.json")
    repository: Path = Path("model_repository")
    name: str = MODEL_NAME
    engine: str = "onnxruntime"
    instances: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that Triton would refuse later.

        Raises:
            ValueError: A number out of range, a name that is no folder, or an unknown engine.
        """
        super().__post_init__()
        if self.instances < 1 or self.threads < 0:
            raise ValueError(
                f"instances is {self.instances} and threads {self.threads}; expected at least 1 "
                "and 0"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ValueError(f"name is {self.name!r}; expected letters, digits, . _ -")
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}; expected one of {ENGINES}")

    @property
    def served_file(self) -> Path:
        """The file that Triton loads: `model.onnx`, or `model.plan` beside it."""
        plan = self.engine == "tensorrt-plan"
        return self.onnx.with_name("model.plan") if plan else self.onnx


@dataclass(frozen=True)
class ServeConfig(Settings):
    """What `export repository` is told: which variants are served, and by which engine.

    Attributes:
        variants: For each name its `folder` (which holds `model.onnx`, `facts.json` and
            `parity.json`) and `engine`, and `instances` or `threads` where this one differs.
        promoted: The variant that is also published as `chestct`.
        mode: `latency` answers one scan as soon as possible: one instance with all cores.
            `throughput` answers most scans in a second: one instance of one thread for each core
            of this machine, so that none waits for the others; on a GPU two, so that one copies
            while the other computes.
        instances: Overrides the mode.
        threads: Overrides the mode; 0 leaves it to the engine.
        encoded: Publish `chestct_encoded`, which takes whole image files, beside `chestct`.
        repository: Triton's model repository.
    """

    variants: dict[str, Any] = field(default_factory=lambda: {"fp32": {"folder": "results/export"}})
    promoted: str = "fp32"
    mode: str = "latency"
    instances: int | None = None
    threads: int | None = None
    encoded: bool = False
    repository: Path = Path("model_repository")

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before anything is written.

        Raises:
            ValueError: An unknown mode, variant or key of a variant, or a value out of range.
        """
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; expected one of {MODES}")
        if self.promoted not in self.models():
            raise ValueError(
                f"promoted is {self.promoted!r}; expected one of {list(self.variants)}"
            )

    def models(self) -> dict[str, RepositoryConfig]:
        """How each variant is published, by the name of the variant."""
        models = {}
        for name, entry in self.variants.items():
            try:
                models[name] = self._model(name, entry)
            except ValueError as error:
                raise ValueError(f"variant {name}: {error}") from error
        return models

    def _model(self, name: str, entry: Any) -> RepositoryConfig:
        if f"{MODEL_NAME}_{name}" in (ENCODED, DECODE, CANDIDATE):
            raise ValueError(f"{MODEL_NAME}_{name} is another model's name; choose another one")
        if not isinstance(entry, dict) or "folder" not in entry:
            raise ValueError(f"{entry!r} has no folder; expected {{folder: ..., engine: ...}}")
        for key, value in entry.items():
            if key not in VARIANT_KEYS:
                raise ValueError(f"unknown key {key!r}; allowed are {list(VARIANT_KEYS)}")
            if type(value) is not VARIANT_KEYS[key]:
                raise ValueError(f"{key} is {value!r}; expected {VARIANT_KEYS[key].__name__}")
        folder, engine = Path(entry["folder"]), entry.get("engine", "onnxruntime")
        chosen: dict[str, Any]
        if self.mode == "latency":
            chosen = {"instances": 1, "threads": 0}
        elif engine in GPU_ENGINES:
            chosen = {"instances": 2, "threads": 0}
        else:
            chosen = {"instances": os.cpu_count() or 1, "threads": 1}
        for key in chosen:
            override = entry.get(key, getattr(self, key))
            chosen[key] = chosen[key] if override is None else override
        return RepositoryConfig(
            onnx=folder / "model.onnx",
            model=folder,
            parity=folder / "parity.json",
            repository=self.repository,
            name=f"{MODEL_NAME}_{name}",
            engine=engine,
            **chosen,
            **{key.name: getattr(self, key.name) for key in dataclasses.fields(Settings)},
        )


def config_pbtxt(
    config: RepositoryConfig, facts: ModelMetadata, *, version: int, onnx_sha256: str = ""
) -> str:
    """The text of `config.pbtxt`: tensors from the contract, parameters from the facts.

    The version policy names one version, so that replacing this one file is the moment at which
    another version is served.

    Args:
        config: How the model is published.
        facts: What it says of itself.
        version: The version that is served.
        onnx_sha256: Hash of the ONNX file, by which the cached engines of TensorRT are kept apart.

    Raises:
        ValueError: A precision that the engine does not have.
    """
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2

    scan = {"data_type": f"TYPE_{input_spec().dtype}", "dims": input_spec().shape[1:]}
    outputs: list[dict[str, Any]] = [
        {"name": spec.name, "data_type": f"TYPE_{spec.dtype}", "dims": spec.shape[1:]}
        for spec in output_specs(len(facts.class_names))
    ]
    outputs[0]["label_filename"] = f"{version}/labels.txt"
    parameters = facts.to_parameters()
    if config.engine in GPU_ENGINES:
        kind = "KIND_GPU"
        if config.engine != "tensorrt-plan":
            # 1 is HEURISTIC; the default tries all algorithms at each new batch size, in service.
            parameters["cudnn_conv_algo_search"] = "1"
    else:
        # KIND_AUTO is a GPU where there is one, else the CPU.
        kind = "KIND_CPU" if config.engine == "openvino" else "KIND_AUTO"
        if config.threads:
            parameters["intra_op_thread_count"] = str(config.threads)
    settings: dict[str, Any] = {
        "name": config.name,
        "backend": "tensorrt" if config.engine == "tensorrt-plan" else "onnxruntime",
        "max_batch_size": config.max_batch_size,
        "input": [{"name": INPUT_NAME, **scan}],
        "output": outputs,
        "version_policy": {"specific": {"versions": [version]}},
        "instance_group": [{"count": config.instances, "kind": kind}],
        "model_warmup": [
            {
                "name": f"batch {size}",
                "batch_size": size,
                "inputs": {INPUT_NAME: {**scan, "random_data": True}},
            }
            for size in config.warm_up
        ],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }
    optimization = _optimization(config, facts, onnx_sha256)
    if optimization:
        settings["optimization"] = optimization
    if config.max_queue_delay_us is not None:
        settings["dynamic_batching"] = {"max_queue_delay_microseconds": config.max_queue_delay_us}
    return _text(json_format.ParseDict(settings, model_config_pb2.ModelConfig()))


def _optimization(
    config: RepositoryConfig, facts: ModelMetadata, onnx_sha256: str
) -> dict[str, Any]:
    if config.engine == "openvino":
        accelerators: dict[str, Any] = {"cpu_execution_accelerator": [{"name": "openvino"}]}
    elif config.engine == "onnxruntime-cuda":
        # TF32 keeps ten bits of the FP32 head and of the domain distance.
        cuda = {"name": "cuda", "parameters": {"use_tf32": "0"}}
        accelerators = {"gpu_execution_accelerator": [cuda]}
    elif config.engine == "onnxruntime-tensorrt":
        tensorrt = {
            "name": "tensorrt",
            "parameters": tensorrt_parameters(config, facts, onnx_sha256),
        }
        accelerators = {"gpu_execution_accelerator": [tensorrt]}
    elif config.engine == "tensorrt-plan" and config.cuda_graphs:
        shape = {INPUT_NAME: {"dim": input_spec().shape[1:]}}
        graphs = [{"batch_size": size, "input": shape} for size in config.warm_up]
        return {"cuda": {"graphs": True, "graph_spec": graphs}}
    else:
        return {}
    return {"execution_accelerators": accelerators}


def tensorrt_parameters(
    config: RepositoryConfig, facts: ModelMetadata, onnx_sha256: str
) -> dict[str, str]:
    """Parameters of the native backend's TensorRT accelerator, by the names that it knows.

    ONNX Runtime names a cached engine after the graph without its weights: with one folder for all
    models, a new version would be answered by the engine of the old one.

    Raises:
        ValueError: A precision that the accelerator does not have.
    """
    if facts.precision not in PRECISION_MODES:
        raise ValueError(
            f"precision is {facts.precision!r}; onnxruntime-tensorrt takes {list(PRECISION_MODES)}"
        )
    best = max(config.warm_up, default=config.max_batch_size)
    return {
        "precision_mode": PRECISION_MODES[facts.precision],
        "max_workspace_size_bytes": str(config.workspace_mb * 1024 * 1024),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(config.tensorrt_cache / onnx_sha256[:16]),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(config.tensorrt_cache),
        "trt_profile_min_shapes": profile_shape(1),
        "trt_profile_opt_shapes": profile_shape(best),
        "trt_profile_max_shapes": profile_shape(config.max_batch_size),
    }


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

    for path, remedy in (
        (config.onnx, "export onnx"),
        (config.parity, "export parity"),
        (config.model / "facts.json", "export onnx"),
        (config.served_file, "export engine"),
    ):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run python -m {remedy}")
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
            "export parity"
        )
    facts = ModelMetadata.from_parameters(json.loads((config.model / "facts.json").read_text()))
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

    return _publish(config.repository / config.name, files, texts, config.keep_versions)


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
    """The run that trained the network that a variant stands for: of a student, its teacher's."""
    student = model / "student.json"
    return str(json.loads(student.read_text())["teacher"]) if student.is_file() else facts.run


def _strangers(models: Mapping[str, RepositoryConfig]) -> dict[str, str]:
    """What is wrong with each variant that stands for another network than the first one."""
    runs = {}
    for variant, model in models.items():
        path = model.model / "facts.json"
        if path.is_file() and model.served_file.is_file():
            facts = ModelMetadata.from_parameters(json.loads(path.read_text()))
            runs[variant] = _network_run(model.model, facts)
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
            message.version_policy.specific.versions[:] = [version]
            message.output[0].label_filename = f"{version}/labels.txt"
            found[path.name] = _text(message)
        return found

    files = {path.name: path for path in version_folder.iterdir() if path.suffix != ".pbtxt"}
    version = _publish(repository / name, files, texts, keep_versions)
    if name == MODEL_NAME:
        follow(repository, keep_versions)
    return version


def _publish(
    folder: Path, files: Mapping[str, Path], texts: Callable[[int], Texts], keep_versions: int
) -> int:
    served = served_version(folder)
    if served is not None and _is_same(folder / str(served), files, texts(served)):
        logger.info("%s version %d is already this model", folder, served)
        return served
    version = max(_versions(folder), default=0) + 1
    with replaced(folder / str(version)) as temporary:
        temporary.mkdir()
        for name, source in files.items():
            shutil.copyfile(source, temporary / name)
        for name, text in texts(version).items():
            (temporary / name).write_text(text, encoding="utf-8")
    serve(folder, version)
    for old in sorted(_versions(folder))[:-keep_versions]:
        shutil.rmtree(folder / str(old))
    logger.info("wrote %s version %d", folder, version)
    return version


def _is_same(version_folder: Path, files: Mapping[str, Path], texts: Texts) -> bool:
    models = [name for name in files if name.startswith("model.")]
    wanted = {name: text.encode() for name, text in texts.items()}
    if any(not (version_folder / name).is_file() for name in (*models, *wanted)):
        return False
    return all((version_folder / name).read_bytes() == wanted[name] for name in wanted) and all(
        filecmp.cmp(version_folder / name, files[name], shallow=False) for name in models
    )


def publish_variants(config: ServeConfig) -> list[str]:
    """Publish every variant that is there, and promote one; what failed, one sentence each.

    A variant that fails leaves what is served of it as it was, and the others go on. All must
    stand for one trained network, that of the first variant that is there.

    Raises:
        OSError: The repository cannot be written.
    """
    models = config.models()
    failures = {
        variant: f"{models[variant].name}: {reason}"
        for variant, reason in _strangers(models).items()
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

    The ensemble takes `file`, the bytes of a PNG, JPEG or DICOM file, and answers what `chestct`
    does and what a caller would have to look up or could not know: the labels in the order of the
    probabilities, the threshold of the domain distance, the notice, and the reasons that only the
    file tells. Labels, window and threshold are those of `chestct`, as its parameters.

    Raises:
        ValueError: There is no `chestct` in the repository.
        OSError: The repository cannot be written.
    """
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2

    model = _served_message(repository / MODEL_NAME)
    own = {key: value.string_value for key, value in model.parameters.items()}
    facts = ModelMetadata.from_parameters(own)
    file = {"name": "file", "data_type": "TYPE_STRING", "dims": [1]}
    scan = {"name": INPUT_NAME, "data_type": "TYPE_UINT8", "dims": input_spec().shape[1:]}
    told = [
        {"name": "reasons", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "labels", "data_type": "TYPE_STRING", "dims": [len(facts.class_names)]},
        {"name": "domain_threshold", "data_type": "TYPE_FP32", "dims": [1]},
        {"name": "notice", "data_type": "TYPE_STRING", "dims": [1]},
    ]
    answers = [
        {"name": spec.name, "data_type": f"TYPE_{spec.dtype}", "dims": spec.shape[1:]}
        for spec in output_specs(len(facts.class_names))
    ]
    names = {
        key: [item["name"] for item in items]
        for key, items in (("told", told), ("answers", answers))
    }
    common = {
        "max_batch_size": model.max_batch_size,
        "parameters": {
            key: {"string_value": value} for key, value in facts.to_parameters().items()
        },
    }
    decode = {
        "name": DECODE,
        "backend": "chestct_scan",
        "input": [file],
        "output": [scan, *told],
        # Each instance decodes on one core, and the network wants them too.
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
    }
    steps = [
        {
            "model_name": DECODE,
            "model_version": -1,
            "input_map": {"file": "file"},
            "output_map": {name: name for name in (INPUT_NAME, *names["told"])},
        },
        {
            "model_name": MODEL_NAME,
            "model_version": -1,
            "input_map": {INPUT_NAME: INPUT_NAME},
            "output_map": {name: name for name in names["answers"]},
        },
    ]
    ensemble = {
        "name": ENCODED,
        "platform": "ensemble",
        "input": [file],
        "output": [*answers, *told],
        "ensemble_scheduling": {"step": steps},
    }
    for settings in (decode, ensemble):

        def texts(version: int, settings: Mapping[str, Any] = settings) -> Texts:
            policy = {"version_policy": {"specific": {"versions": [version]}}}
            message = json_format.ParseDict(
                {**settings, **common, **policy}, model_config_pb2.ModelConfig()
            )
            return {"config.pbtxt": _text(message)}

        _publish(repository / str(settings["name"]), {}, texts, keep_versions)


def follow(repository: Path, keep_versions: int = 2) -> None:
    """Give `chestct_encoded` the labels and the window of what is served now, if it is there.

    Raises:
        OSError: The repository cannot be written.
    """
    if served_version(repository / ENCODED) is not None:
        write_encoded(repository, keep_versions)


def _served_message(folder: Path) -> Any:
    """The `ModelConfig` of a model of the repository.

    Raises:
        ValueError: There is no such model.
    """
    if not (folder / "config.pbtxt").is_file():
        raise ValueError(f"{folder}: no such model; run python -m export repository")
    return parsed_config((folder / "config.pbtxt").read_text(encoding="utf-8"))


def roll_back(folder: Path) -> int:
    """Serve the version before the served one again; returns its number.

    Raises:
        ValueError: There is no such model, or no earlier version of it.
    """
    served = served_version(folder)
    if served is None:
        raise ValueError(f"{folder}: no such model to roll back; run python -m export repository")
    earlier = [version for version in _versions(folder) if version < served]
    if not earlier:
        raise ValueError(f"{folder}: no version before {served} to go back to")
    serve(folder, max(earlier))
    if folder.name == MODEL_NAME:
        follow(folder.parent)
    logger.info("%s serves version %d again", folder, max(earlier))
    return max(earlier)


def served_version(folder: Path) -> int | None:
    """The version that the model folder's `config.pbtxt` names; None where there is no model."""
    if not (folder / "config.pbtxt").is_file():
        return None
    return int(_served_message(folder).version_policy.specific.versions[0])


def serve(folder: Path, version: int) -> None:
    """Make `version` the one that the model folder's `config.pbtxt` names.

    Raises:
        OSError: The repository cannot be written.
    """
    # config.pbtxt last: until then publishing again starts anew.
    on_cpu = folder / str(version) / "cpu.pbtxt"
    if on_cpu.is_file():
        with replaced(folder / "configs" / "cpu.pbtxt") as temporary:
            shutil.copyfile(on_cpu, temporary)
    else:
        (folder / "configs" / "cpu.pbtxt").unlink(missing_ok=True)
    with replaced(folder / "config.pbtxt") as temporary:
        shutil.copyfile(folder / str(version) / "config.pbtxt", temporary)


def _versions(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(entry.name) for entry in os.scandir(folder) if entry.name.isdigit()]


def _text(message: Any) -> str:
    from google.protobuf import text_format

    text: str = text_format.MessageToString(message, as_utf8=True)
    return text


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
