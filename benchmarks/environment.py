"""Environment of a measurement: CPU, memory, GPU, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from training.track.mlflow_run import git_commit

PACKAGES = (
    "tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "openvino", "tritonclient", "numpy",
)  # fmt: skip
SERVER_PACKAGES = ("nvidia-pytriton", "onnxruntime", "openvino", "numpy")
# What decides how fast INT8 and bfloat16 are multiplied, by the names of /proc/cpuinfo.
CPU_FLAGS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip


def environment(server: Path = Path(".venv-triton")) -> dict[str, Any]:
    """CPU, memory, GPU, system, versions, commit and date of this measurement, as plain values.

    Args:
        server: Virtual environment of the Triton server; its versions stand under `server`, None
            where there is no such package. `nvidia-pytriton` 0.7.0 holds `tritonserver` 2.51.0.
    """
    memory_kb = 0
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        memory_kb = int(meminfo.read_text().split("MemTotal:")[1].split()[0])
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", "").split()
    return {
        "cpu": _cpu(cpuinfo),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": cores(),
        "memory_gb": round(memory_kb / 1e6, 1),
        "gpu": _gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "server": _server_versions(server),
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def describe_environment(place: dict[str, Any]) -> str:
    """The environment of a result, as one sentence."""
    return (
        f"{place['cpu']} ({' '.join(place['cpu_flags'])}), {place['cores']} cores, GPU: "
        f"{place['gpu'] or 'none'}; commit {place['commit'][:12]}, {place['date']}."
    )


def cores() -> int:
    """Cores that this process may use, which is also the number of threads of each engine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return {}
    pairs = (line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu(cpuinfo: dict[str, str]) -> str:
    """Model name, and family and model number: hypervisors hide the name behind `AMD EPYC`."""
    if not cpuinfo:
        return platform.processor()
    return (
        f"{cpuinfo.get('model name', platform.processor())} "
        f"(family {cpuinfo.get('cpu family', '?')}, model {cpuinfo.get('model', '?')})"
    )


def _gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    for name in (package, f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _server_versions(environment: Path) -> dict[str, str | None]:
    folders = [str(path) for path in environment.glob("lib/python*/site-packages")]
    found = {
        item.metadata["Name"].lower(): item.version
        for item in importlib.metadata.distributions(path=folders)
    }
    return {name: found.get(name, found.get(f"{name}-gpu")) for name in SERVER_PACKAGES}
