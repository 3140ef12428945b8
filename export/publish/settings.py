"""Settings of the model repository: `configs/serve.yaml`, and how one model is published."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import KW_ONLY, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import NonNegativeInt, PositiveInt

from chestct.contract import MODEL_NAME
from training.common.config import Name, config_class

GpuEngine = Literal["onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt-plan"]
Engine = Literal["onnxruntime", "openvino", GpuEngine]
GPU_ENGINES, ENGINES = get_args(GpuEngine), get_args(Engine)
CANDIDATE = f"{MODEL_NAME}_candidate"  # what `export rollout` tries before the switch
ENCODED, DECODE = f"{MODEL_NAME}_encoded", f"{MODEL_NAME}_decode"  # the ensemble, its first step


@config_class
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
        card: Summary of the model card, `summary.json` of `training card`; it becomes
            a parameter of each model, and is left out where the file is not there.
    """

    _: KW_ONLY
    max_batch_size: PositiveInt = 32
    warm_up: tuple[PositiveInt, ...] = (1, 8)
    max_queue_delay_us: NonNegativeInt | None = 0
    keep_versions: PositiveInt = 2
    tensorrt_cache: Path = Path("/var/cache/chestct/tensorrt")
    workspace_mb: PositiveInt = 2048
    cuda_graphs: bool = False
    card: Path | None = None

    def __post_init__(self) -> None:
        """Refuse to warm up with more than a batch.

        Raises:
            ValueError: `warm_up` is beyond `max_batch_size`.
        """
        if max(self.warm_up, default=0) > self.max_batch_size:
            raise ValueError(f"warm_up is {self.warm_up}: expected at most {self.max_batch_size}")


@config_class
class RepositoryConfig(Settings):
    """How one model is published.

    Attributes:
        onnx: The ONNX file; for `tensorrt-plan` that of which `model.plan` beside it was built.
        model: Folder of `facts.json`, which becomes the parameters.
        parity: Report of `export parity`; nothing is written unless it holds for this
            very file.
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
    name: Name = MODEL_NAME
    engine: Engine = "onnxruntime"
    instances: PositiveInt = 1
    threads: NonNegativeInt = 0

    @property
    def served_file(self) -> Path:
        """The file that Triton loads: `model.onnx`, or `model.plan` beside it."""
        plan = self.engine == "tensorrt-plan"
        return self.onnx.with_name("model.plan") if plan else self.onnx


@config_class
class VariantConfig:
    """One variant of the model in `configs/serve.yaml`.

    Attributes:
        folder: Holds `model.onnx`, `facts.json` and `parity.json`.
        engine: What runs it.
        instances: Where this variant differs from the others.
        threads: Likewise.
    """

    folder: Path
    engine: Engine = "onnxruntime"
    instances: PositiveInt | None = None
    threads: NonNegativeInt | None = None


@config_class
class ServeConfig(Settings):
    """Settings of `export repository`: which variants are served, and by which engine.

    Attributes:
        variants: What is published, by name.
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

    variants: dict[Name, VariantConfig] = field(
        default_factory=lambda: {"fp32": VariantConfig(Path("results/export"))}
    )
    promoted: str = "fp32"
    mode: Literal["latency", "throughput"] = "latency"
    instances: PositiveInt | None = None
    threads: NonNegativeInt | None = None
    encoded: bool = False
    repository: Path = Path("model_repository")

    def __post_init__(self) -> None:
        """Refuse names that mean nothing, or another model.

        Raises:
            ValueError: `promoted` is no variant, or a variant has the name of another model.
        """
        super().__post_init__()
        if self.promoted not in self.variants:
            raise ValueError(
                f"promoted is {self.promoted!r}: expected one of {list(self.variants)}"
            )
        for name in self.variants:
            if f"{MODEL_NAME}_{name}" in (ENCODED, DECODE, CANDIDATE):
                raise ValueError(
                    f"variants: {MODEL_NAME}_{name} is another model's name; choose another one"
                )

    def models(self) -> dict[str, RepositoryConfig]:
        """How each variant is published, by the name of the variant."""
        return {name: self._model(name, entry) for name, entry in self.variants.items()}

    def _model(self, name: str, entry: VariantConfig) -> RepositoryConfig:
        chosen: dict[str, Any]
        if self.mode == "latency":
            chosen = {"instances": 1, "threads": 0}
        elif entry.engine in GPU_ENGINES:
            chosen = {"instances": 2, "threads": 0}
        else:
            chosen = {"instances": os.cpu_count() or 1, "threads": 1}
        for settings in (self, entry):
            given = {key: getattr(settings, key) for key in chosen}
            chosen |= {key: value for key, value in given.items() if value is not None}
        return RepositoryConfig(
            onnx=entry.folder / "model.onnx",
            model=entry.folder,
            parity=entry.folder / "parity.json",
            repository=self.repository,
            name=f"{MODEL_NAME}_{name}",
            engine=entry.engine,
            **chosen,
            **{key.name: getattr(self, key.name) for key in dataclasses.fields(Settings)},
        )
