from __future__ import annotations

import json

import numpy

from benchmarks.environment import environment


def test_environment_names_what_a_figure_depends_on():
    found = environment()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0
    assert found["packages"]["numpy"] == numpy.__version__
    assert None not in found["packages"].values()
    json.dumps(found)
