"""What the tests themselves rest on."""

from __future__ import annotations

import os
import subprocess
import sys

GROUPED = """
import os, pathlib, pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(6))
def test_grouped(number):
    with pathlib.Path({log!r}).open("a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")
"""


def test_a_group_of_tests_stays_in_one_worker(tmp_path):
    """Not so where pytest-xdist does not fit pytest: then all goes on, slower and less reliably."""
    log = tmp_path / "workers"
    (tmp_path / "test_grouped.py").write_text(GROUPED.format(log=str(log)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing the others takes seconds
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-n", "2", "--dist", "loadgroup", "test_grouped.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    workers = log.read_text().split()
    assert len(workers) == 6
    assert len(set(workers)) == 1
