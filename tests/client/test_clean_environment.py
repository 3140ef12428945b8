"""The thin client works where nothing but its own dependencies is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
NEED_AN_EXTRA = ("chestct.web.app", "chestct.web.schemas", "chestct.web.metrics")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(CHECKOUT / "client")]
    subprocess.run(command, check=True, timeout=300)
    return next(folder.glob("chestct-*.whl"))


def test_wheel_is_thin(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.file_size for info in archive.infolist())
    assert "chestct/py.typed" in names
    assert size < 800_000  # of which the page and its sample take 200,000
    assert all(name.startswith(("chestct/", "chestct-")) for name in names)


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(wheel, tmp_path):
    """Neither TensorFlow nor ONNX is there, and every module but those of an extra is imported."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=600)
    code = (
        "import importlib, pkgutil, chestct\n"
        "for module in pkgutil.walk_packages(chestct.__path__, 'chestct.'):\n"
        "    try:\n"
        "        importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError:\n"
        f"        assert module.name in {NEED_AN_EXTRA}, module.name\n"
        "import importlib.metadata as m\n"
        "print(sorted(d.name for d in m.distributions()))"
    )
    done = subprocess.run(
        [str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for heavy in ("tensorflow", "keras", "onnx", "mlflow", "torch", "scipy"):
        assert f"'{heavy}'" not in done.stdout
    command = tmp_path / "venv" / "bin" / "chestct"
    done = subprocess.run(
        [str(command), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "classify" in done.stdout
    done = subprocess.run(
        [str(command), "health", "--url", "grpc://127.0.0.1:9", "--connect-timeout-s", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
