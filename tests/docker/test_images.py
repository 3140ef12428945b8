"""Builds and runs the images; minutes, so only where it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import docker_images_check as images_check
import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_images_are_built_and_work_together():
    if not os.environ.get("CHESTCT_IMAGES"):
        pytest.skip("takes minutes: set CHESTCT_IMAGES=1, or run make images-check")
    lacking = images_check.missing_tools()
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")
    done = subprocess.run(
        [sys.executable, images_check.__file__],
        cwd=images_check.CHECKOUT, capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "all holds" in done.stderr


def test_a_check_that_does_not_hold_is_an_error():
    with pytest.raises(images_check.CheckError, match="edge runs as: 0"):
        images_check.expect(False, "edge runs as", 0)


def test_mirrors_of_this_machine_reach_the_build_and_nothing_else(tmp_path, monkeypatch):
    index, wheels = tmp_path / "index" / "simple", tmp_path / "wheels"
    index.mkdir(parents=True)
    wheels.mkdir()
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{index}")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    mounts = images_check.pip_mounts(tmp_path)
    written = (tmp_path / "pip.conf").read_text()
    assert f"extra-index-url = file://{index}" in written
    assert f"--volume={tmp_path / 'pip.conf'}:/etc/pip.conf:ro" in mounts
    assert f"--volume={wheels}:{wheels}:ro" in mounts
    assert f"--volume={index.parent}:{index.parent}:ro" in mounts
    assert all(mount.endswith(":ro") for mount in mounts)
