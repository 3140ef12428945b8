"""The rooms import what the design allows, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.config import config_from_mapping, load_config, read_mapping

CHECKOUT = Path(__file__).resolve().parents[1]

ROOMS = ("chestct", "training", "export", "serving", "benchmarks")
HEAVY = {"tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "mlflow", "sklearn", "torch"}
# What each room may not import, of the other rooms and of the packages outside.
FORBIDDEN = {
    "client/src/chestct": {"training", "export", "serving", "benchmarks"} | HEAVY,
    "training": {"export", "serving", "benchmarks"},
    "export": {"serving", "benchmarks", "mlflow"},
    "serving": {"training", "export", "benchmarks", "tensorflow", "keras", "mlflow"},
    "benchmarks": set(),
}
# The modules of training/ that carry no training.
SHARED_BY_EXPORT = {
    f"training.{name}"
    for name in ("command", "config", "files", "metrics", "model", "registry", "scans")
}


def imports_of(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def modules() -> list[tuple[str, Path]]:
    return [(room, file) for room in FORBIDDEN for file in sorted((CHECKOUT / room).rglob("*.py"))]


def test_every_room_is_looked_at():
    with_code = {path.parent for path in CHECKOUT.glob("*/*.py")} - {
        CHECKOUT / "docker",
        CHECKOUT / "tests",
    }
    with_code |= {path.parent for path in CHECKOUT.glob("client/src/*/*.py")}
    assert {room for room, _ in modules()} == {
        folder.relative_to(CHECKOUT).as_posix() for folder in with_code
    }


@pytest.mark.parametrize(
    ("room", "file"), modules(), ids=lambda value: str(getattr(value, "stem", value))
)
def test_imports_stay_within_the_rooms(room, file):
    found = imports_of(file)
    assert not {name.split(".")[0] for name in found} & FORBIDDEN[room]
    if room == "export":
        assert {name for name in found if name.startswith("training")} <= SHARED_BY_EXPORT
    if room == "serving" and file.parent.name != "chestct_scan":  # the step that decodes files
        assert not any(name.split(".")[0] == "chestct" for name in found)


def test_importing_a_module_does_not_load_the_heavy_packages():
    """--help answers at once, and a missing GPU library breaks only what needs it."""
    code = (
        "import sys, training.card, training.compare_plots, training.distill, training.evaluate, "
        "training.sweep, export.onnx, "
        "export.engine, export.compress, export.repository, export.rollout, serving.local, "
        "benchmarks.latency, benchmarks.throughput; "
        "heavy = {'tensorflow', 'keras', 'mlflow', 'onnx', 'openvino', 'tensorrt'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_config_fits_its_dataclass():
    from benchmarks.latency import LatencyConfig
    from benchmarks.throughput import ThroughputConfig
    from export.compress import CompressConfig
    from export.engine import EngineConfig
    from export.onnx import OnnxConfig
    from export.parity import ParityConfig
    from export.quantize import QuantizeConfig
    from export.repository import ServeConfig
    from export.rollout import RolloutConfig
    from training.artefacts import CardConfig
    from training.audit import AuditConfig
    from training.crossvalidate import CrossValidateConfig
    from training.distill import DistillConfig
    from training.evaluate import EvaluateConfig
    from training.fit import FitConfig
    from training.ingest import IngestConfig
    from training.phantom import PhantomConfig
    from training.split import SplitConfig
    from training.sweep import SweepConfig

    of_file = {
        "audit": AuditConfig,
        "card": CardConfig,
        "compress": CompressConfig,
        "crossvalidate": CrossValidateConfig,
        "distill": DistillConfig,
        "engine": EngineConfig,
        "evaluate": EvaluateConfig,
        "export": OnnxConfig,
        "ingest": IngestConfig,
        "latency": LatencyConfig,
        "parity": ParityConfig,
        "phantom": PhantomConfig,
        "quantize": QuantizeConfig,
        "rollout": RolloutConfig,
        "serve": ServeConfig,
        "split": SplitConfig,
        "sweep": SweepConfig,
        "throughput": ThroughputConfig,
        "train": FitConfig,
    }
    overrides = read_mapping(CHECKOUT / "configs" / "demo.yaml")
    found = [path for path in sorted((CHECKOUT / "configs").glob("*.yaml")) if path.stem != "demo"]
    # split-grouped.yaml is another setting of the command that reads split.yaml.
    assert {path.stem.split("-")[0] for path in found} == set(of_file)
    for path in found:
        cls = of_file[path.stem.split("-")[0]]
        load_config(cls, path)
        config_from_mapping(cls, {**read_mapping(path), **overrides.pop(path.stem, {})}, path)
    assert not overrides, f"configs/demo.yaml overrides no config: {overrides}"


def test_the_demo_keeps_every_gate():
    overrides = read_mapping(CHECKOUT / "configs" / "demo.yaml")
    assert not any("gate" in values for values in overrides.values())


def project_imports(file: Path) -> set[str]:
    """Files of this checkout that `file` imports, directly or through another one."""
    seen: set[str] = set()
    waiting = [file]
    while waiting:
        for name in imports_of(waiting.pop()):
            top, _, rest = name.partition(".")
            if top not in ROOMS or not rest:
                continue
            root = "client/src/chestct" if top == "chestct" else top
            path = f"{root}/{rest.replace('.', '/')}.py"
            if path not in seen:
                seen.add(path)
                waiting.append(CHECKOUT / path)
    return seen


def test_dvc_stages_depend_on_all_code_that_they_run():
    stages = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())["stages"]
    # Errors, proxies and the shape of a line decide no result; the page of the client neither.
    harmless_names = ("errors", "batch", "report", "cli", "proxies")
    harmless = {f"client/src/chestct/{name}.py" for name in harmless_names}
    for name, stage in stages.items():
        commands = stage["cmd"] if isinstance(stage["cmd"], list) else [stage["cmd"]]
        for command in commands:
            module = command.split()[2].replace(".", "/") + ".py"
            needed = {module} | project_imports(CHECKOUT / module)
            missing = needed - set(stage["deps"]) - harmless
            assert not missing, f"stage {name} runs {sorted(missing)} and does not depend on them"


def test_lock_files_hold_hashes_and_no_addresses():
    for path in (*(CHECKOUT / "locks").glob("*.txt"), CHECKOUT / "serving" / "requirements.txt"):
        text = path.read_text()
        assert "://" not in text
        assert "--hash=sha256:" in text
        assert "chestct==" not in text
