"""Compare a new measurement with the committed one, by ratios and never by times."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from training.common.cli import run_command

# `predict` wavers by a third from run to run, so ratios to it say little; see the results.
SHARED_MEMORY = "triton_grpc_shm"  # measured as long as the client had it
RATIO = "times_faster_than_keras_compiled"
# What decides a ratio besides our own code.
PLACE = ("cpu", "cores", "gpu")
PACKAGES = ("tensorflow", "keras", "onnxruntime", "openvino")
SERVER_PACKAGES = ("nvidia-pytriton", "onnxruntime", "openvino")
KEYS = ("way", "engine", "variant", "batch")
OTHER_ENVIRONMENT = 3


def differences(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """How two environments differ in what decides a ratio, `cores is 4, was 2`."""

    def decisive(place: dict[str, Any]) -> dict[str, Any]:
        packages, server = place.get("packages", {}), place.get("server", {})
        return (
            {key: place.get(key) for key in PLACE}
            | {name: packages.get(name) for name in PACKAGES}
            | {f"{name} of the server": server.get(name) for name in SERVER_PACKAGES}
        )

    found, before = decisive(new), decisive(old)
    return [
        f"{key} is {found[key]}, was {before[key]}" for key in found if found[key] != before[key]
    ]


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Every row of a result of `latency` or `throughput` that has the ratio, by what it is about.

    Baselines are left out: they are compared with themselves.
    """
    rows = [*result.get("rows", []), *result.get("files", {}).get("rows", [])]
    return {
        " ".join(str(row[key]) for key in KEYS if key in row): float(row[RATIO])
        for row in rows
        if RATIO in row
        and not str(row.get("engine", row.get("way"))).startswith("keras")
        and row.get("engine") != SHARED_MEMORY
    }


def fallen(new: dict[str, float], old: dict[str, float], allowed: float) -> list[str]:
    """A line of a table for each ratio that is worse by more than `allowed`, or is gone.

    Args:
        new: From `ratios`.
        old: The same of the committed result.
        allowed: Part of a ratio that noise may take away, 0.15 for 15 %.
    """
    lines = []
    for name, before in old.items():
        if name not in new:
            lines.append(f"| {name} | {before:.2f} x | not measured | |")
        elif new[name] < before * (1 - allowed):
            change = 100 * (new[name] / before - 1)
            lines.append(f"| {name} | {before:.2f} x | {new[name]:.2f} x | {change:.0f} % |")
    return lines


def compare(result: Path, baseline: Path, allowed: float) -> int:
    """Compare two result files and report regressions; the exit code of the command.

    Raises:
        ValueError: A file is no result, the two have no row in common, or `allowed` is no part.
    """
    if not 0 <= allowed < 1:
        raise ValueError(f"allowed is {allowed}; expected 0 to 1, as 0.15 for 15 %")
    new, old = (_read(path) for path in (result, baseline))
    other = differences(new["environment"], old["environment"])
    if other:
        sys.stdout.write(
            f"not compared: {baseline} was measured in another environment: {'; '.join(other)}. "
            "Measure both on one machine.\n"
        )
        return OTHER_ENVIRONMENT
    now, before = ratios(new), ratios(old)
    common = sorted(now.keys() & before.keys())
    if not common:
        raise ValueError(f"{result} and {baseline} have no row in common, so nothing was compared")
    lines = fallen(now, before, allowed)
    if lines:
        heading = f"| {RATIO.replace('_', ' ')} | committed | now | change |\n|" + " --- |" * 4
        sys.stdout.write(heading + "\n" + "\n".join(lines) + "\n")
        return 1
    sys.stdout.write(
        f"{len(common)} ratios of {result} are within {allowed:.0%} of {baseline} or better\n"
    )
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no such file; `make bench` writes results/benchmark/latency.json and "
            "throughput.json"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict) or not {"environment", "rows"} <= found.keys():
        raise ValueError(f"{path}: no result of benchmarks latency or benchmarks throughput")
    return found


def main(argv: list[str] | None = None) -> int:
    """Compare the ratios of a new result with a committed one of the same environment.

    Exit codes: 0 nothing fell; 1 a ratio fell by more than is allowed or is gone, or the files
    cannot be compared; 2 wrong usage; 3 another environment, which is no verdict.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks regression-check",
        description=inspect.getdoc(main),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="JSON of benchmarks latency or throughput")
    parser.add_argument("--baseline", type=Path, required=True, help="the committed JSON")
    parser.add_argument(
        "--allowed", type=float, default=0.15, help="part that noise may take (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: compare(arguments.result, arguments.baseline, arguments.allowed))
