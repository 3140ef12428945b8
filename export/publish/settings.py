"""Settings of the model repository: `configs/serve.yaml`, and how one model is published."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chestct.contract import MODEL_NAME

GPU_ENGINES = ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt-plan")
ENGINES = ("onnxruntime", "openvino", *GPU_ENGINES)
MODES = ("latency", "throughput")
CANDIDATE = f"{MODEL_NAME}_candidate"  # what `export rollout` tries before the switch
ENCODED, DECODE = f"{MODEL_NAME}_encoded", f"{MODEL_NAME}_decode"  # the ensemble, its first step
VARIANT_KEYS = {"folder": str, "engine": str, "instances": int, "threads": int}


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
