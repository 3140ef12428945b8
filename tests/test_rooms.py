"""The rooms import what the design allows, and nothing else."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.common.config import config_from_mapping, load_config, read_mapping

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
    "examples": {"training", "export", "serving", "benchmarks"} | HEAVY,
}
# What of training/ carries no training.
SHARED_BY_EXPORT = (
    "training.common", "training.network", "training.data.dataset", "training.track.registry",
)  # fmt: skip
# The packages and modules of a room from the ground up: each imports only from floors below its
# own. Within a package modules may import each other, without a circle.
FLOORS = {
    "chestct": [
        {"errors", "contract"}, {"imaging"}, {"inference"}, {"results"}, {"batch"},
        {"client"}, {"pacs", "web"}, {"cli"},
    ],
    "training": [
        {"common"}, {"data", "network", "track"}, {"learn"}, {"score"}, {"cards"},
        {"pipeline", "__main__"},
    ],
    "export": [{"check"}, {"convert"}, {"publish"}, {"__main__"}],
}  # fmt: skip


def imports_of(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in members if path_of(name)}
            names |= submodules or {node.module}
    return names


def path_of(module: str) -> str | None:
    """File of a module of this project, relative to the checkout."""
    top, *rest = module.split(".")
    if top not in ROOMS:
        return None
    stem = "/".join(["client/src/chestct" if top == "chestct" else top, *rest])
    return next(
        (name for name in (f"{stem}.py", f"{stem}/__init__.py") if (CHECKOUT / name).is_file()),
        None,
    )


def module_of(file: Path) -> str:
    parts = file.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[2:] if parts[:2] == ("client", "src") else parts)


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
    if room == "export" and file.name != "__main__.py":
        of_training = {name for name in found if name.startswith("training")}
        assert all(name.startswith(SHARED_BY_EXPORT) for name in of_training), of_training
    if room == "serving" and file.parent.name != "chestct_scan":  # the step that decodes files
        assert not any(name.split(".")[0] == "chestct" for name in found)


def test_importing_a_module_does_not_load_the_heavy_packages():
    """--help answers at once, and a missing GPU library breaks only what needs it."""
    code = (
        "import sys, training.cards.card, training.track.compare_plots, training.learn.distill, "
        "training.score.evaluate, training.learn.sweep, export.convert.onnx, "
        "export.convert.engine, export.convert.compress, export.publish.repository, "
        "export.publish.rollout, serving.local, "
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
    from export.check.parity import ParityConfig
    from export.convert.compress import CompressConfig
    from export.convert.engine import EngineConfig
    from export.convert.onnx import OnnxConfig
    from export.convert.quantize import QuantizeConfig
    from export.publish.rollout import RolloutConfig
    from export.publish.settings import ServeConfig
    from training.cards.run_records import CardConfig
    from training.data.audit import AuditConfig
    from training.data.phantom import PhantomConfig
    from training.data.settings import IngestConfig
    from training.data.split import SplitConfig
    from training.learn.crossvalidate import CrossValidateConfig
    from training.learn.distill import DistillConfig
    from training.learn.fit import FitConfig
    from training.learn.sweep import SweepConfig
    from training.score.evaluate import EvaluateConfig

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
            path = path_of(name)
            if path and path not in seen:
                seen.add(path)
                waiting.append(CHECKOUT / path)
    return {path for path in seen if not path.endswith("__init__.py")}


def test_no_import_runs_up_a_floor():
    for room, floors in FLOORS.items():
        number = {name: floor for floor, names in enumerate(floors) for name in names}
        root = CHECKOUT / ("client/src/chestct" if room == "chestct" else room)
        for file in root.rglob("*.py"):
            module = module_of(file)
            _, own, *_ = f"{module}.".split(".")
            if own == "__init__":
                continue
            assert own in number, f"{file} is on no floor"
            for name in imports_of(file):
                if not name.startswith(f"{room}."):
                    continue
                other = name.split(".")[1]
                if other in number and other != own:
                    assert number[other] < number[own], f"{module} imports {name}"


def test_no_module_imports_itself_through_others():
    graph = {
        module_of(file): {name for name in imports_of(file) if path_of(name)}
        for room in FORBIDDEN
        for file in (CHECKOUT / room).rglob("*.py")
        if file.name != "__init__.py"
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def dvc_stages() -> dict[str, dict[str, Any]]:
    files = [CHECKOUT / "dvc.yaml", CHECKOUT / "configs" / "protocols" / "dvc.yaml"]
    return {k: v for file in files for k, v in yaml.safe_load(file.read_text())["stages"].items()}


def test_dvc_stages_depend_on_all_code_that_they_run():
    stages = dvc_stages()
    # Errors, proxies and the shape of a line decide no result; nor does what tracks it.
    harmless = ("errors", "results/", "batch/", "inference/proxies")
    prefixes = tuple(f"client/src/chestct/{name}" for name in harmless)
    for name, stage in stages.items():
        commands = stage["cmd"] if isinstance(stage["cmd"], list) else [stage["cmd"]]
        covered = [dep if dep.endswith(".py") else f"{dep}/" for dep in stage["deps"]]
        for command in commands:
            room, verb = command.split()[2:4]
            module = importlib.import_module(f"{room}.__main__").MODULES[verb]
            path = path_of(module)
            assert path
            needed = {path} | project_imports(CHECKOUT / path)
            missing = {file for file in needed if not file.startswith((*covered, *prefixes))}
            assert not missing, f"stage {name} runs {sorted(missing)} and does not depend on them"


def test_dvc_stages_name_the_overrides_of_their_configs():
    stages = dvc_stages()
    for name, stage in stages.items():
        if name == "ingest":  # which writes them
            continue
        files = {file: keys for item in stage["params"] for file, keys in item.items()}
        sections = files.pop("data/overrides.yaml")
        assert sections == [Path(file).stem for file in files], name


@pytest.mark.parametrize("room", ["training", "export", "serving", "benchmarks"])
def test_a_room_lists_its_commands_and_runs_them(room):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", room, *arguments]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)

    listed = run()
    assert listed.returncode == 0, listed.stderr
    lines = re.findall(r"^  (\S+)  +(\S.*)$", listed.stdout, re.MULTILINE)
    modules = importlib.import_module(f"{room}.__main__").MODULES
    assert [name for name, _ in lines] == list(modules)
    with_main = {
        module_of(file)
        for file in (CHECKOUT / room).rglob("*.py")
        if re.search(r"^def main\(argv: ", file.read_text(), re.MULTILINE)
    }
    assert set(modules.values()) == with_main
    name = next(iter(modules))
    assert f"usage: python -m {room} {name} " in run(name, "--help").stdout
    unknown = run("nothing")
    assert unknown.returncode == 2
    assert "error: nothing is no command" in unknown.stderr


def test_lock_files_hold_hashes_and_no_addresses():
    for path in (*(CHECKOUT / "locks").glob("*.txt"), CHECKOUT / "serving" / "requirements.txt"):
        text = path.read_text()
        assert "://" not in text
        assert "--hash=sha256:" in text
        assert "chestct==" not in text
