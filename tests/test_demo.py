"""The first command of a newcomer, in a fresh clone with nothing built."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.checkout import copy_checkout

LIMIT_S = 1500  # ends a demo that hangs; on two idle cores it takes less than 360


@pytest.fixture(scope="module")
def clone(tmp_path_factory, triton_environment) -> Path:
    """A clone without environments, so that the demo cannot use what the tests add to theirs."""
    return copy_checkout(tmp_path_factory.mktemp("demo") / "clone")


def demo(clone: Path) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MLFLOW_TRACKING_URI", "VIRTUAL_ENV", "DATA", "OVERRIDES")
        and not name.startswith("PYTEST")
    }
    environment["PATH"] = environment["PATH"].replace(f"{Path.cwd() / '.venv' / 'bin'}:", "")
    done = subprocess.run(
        ["make", "demo"], cwd=clone, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(2 * LIMIT_S)
def test_demo_in_a_fresh_clone_and_again(clone):
    first = demo(clone)
    print(first)
    stages = re.findall(r"^ *(\d+)/13 ", first, re.MULTILINE)
    assert stages == [str(number) for number in range(1, 14)]
    assert "student quarter is within its gate" in first
    assert "parity holds: triton chestct_fp32 over gRPC against keras" in first
    assert re.search(r"^Classified: 24 scans .* 0 unreadable\.$", first, re.MULTILINE)
    for path in re.findall(r"results/\S+", first):
        assert (clone / path).exists(), path
    for name in ("chestct", "chestct_fp32", "chestct_int8", "chestct_compressed"):
        assert (clone / "model_repository" / name / "1" / "model.onnx").is_file()
    curve = json.loads((clone / "results/compressed/curve.json").read_text())
    assert not any(point["valid"]["refused_for"] for point in curve["points"])
    assert "Running stage" not in first  # chatter belongs into the logs

    second = demo(clone)
    assert second.count("unchanged") == 12, second
    assert not (clone / "model_repository" / "chestct" / "2").exists()
