"""On what a figure was measured: it stands beside every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from training.tracking import git_commit

PACKAGES = ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "tritonclient", "numpy")


def environment() -> dict[str, Any]:
    """CPU, memory, GPU, system, versions, commit and date of this measurement, as plain values."""
    memory_kb = 0
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        memory_kb = int(meminfo.read_text().split("MemTotal:")[1].split()[0])
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gb": round(memory_kb / 1e6, 1),
        "gpu": _gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu() -> str:
    """Model name, and family and model number: hypervisors hide the name behind `AMD EPYC`."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return (
        f"{fields.get('model name', platform.processor())} "
        f"(family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
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
