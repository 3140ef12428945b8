from __future__ import annotations

import json
from pathlib import Path

import numpy

from benchmarks.environment import CPU_FLAGS, environment


def test_environment_names_what_a_figure_depends_on():
    found = environment()
    assert found["cpu"]
    assert set(found["cpu_flags"]) <= set(CPU_FLAGS)
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0
    assert found["packages"]["numpy"] == numpy.__version__
    assert None not in found["packages"].values()
    json.dumps(found)


def test_versions_of_the_server_are_those_of_its_own_environment(triton_environment):
    found = environment(triton_environment)["server"]
    assert found["nvidia-pytriton"] == "0.7.0"
    assert found["numpy"].startswith("1.")  # here numpy is 2
    assert None not in found.values()


def test_without_a_server_its_versions_are_missing_and_not_ours():
    assert set(environment(Path("no-such-folder"))["server"].values()) == {None}
