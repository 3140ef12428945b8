"""Setting up a checkout: `locks/install.sh`, make, git and DVC in the places where people clone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chestct.contract import LUNG_WINDOW, ModelMetadata

CHECKOUT = Path(__file__).resolve().parents[1]
LIMIT_S = 60.0
FACTS = ModelMetadata(("a", "b", "c"), LUNG_WINDOW, 1.0, 10.0, "run-7", "ab" * 32)
# Stands for the client: a build backend that needs nothing, and can be told to take its time.
BACKEND = """
import os, time, zipfile
from pathlib import Path

def build_editable(folder, config_settings=None, metadata_directory=None):
    place = Path.cwd()
    with (place.parent / "builds").open("a") as log:
        log.write("built\\n")
    while (place.parent / "hold").exists():
        time.sleep(0.02)
    name = "tiny-1.0-py3-none-any.whl"
    about = "tiny-1.0.dist-info"
    with zipfile.ZipFile(Path(folder) / name, "w") as wheel:
        wheel.writestr("tiny.pth", str(place))
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n")
        kind = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(f"{about}/WHEEL", kind)
        wheel.writestr(f"{about}/RECORD", "")
    return name
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tiny"
version = "1.0"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with empty locks, and the installer that the real one has fetched."""
    folder = tmp_path / "Prüf stand" / "ct demo"
    (folder / "locks").mkdir(parents=True)
    (folder / "serving").mkdir()
    (folder / "client").mkdir()
    shutil.copy(CHECKOUT / "Makefile", folder)
    for name in ("install.sh", "uv.txt"):
        shutil.copy(CHECKOUT / "locks" / name, folder / "locks")
    for name in ("locks/cpu.txt", "locks/gpu.txt", "locks/test.txt", "serving/requirements.txt"):
        (folder / name).write_text(f"# {name}\n")
    (folder / "client" / "pyproject.toml").write_text(PROJECT)
    (folder / "client" / "backend.py").write_text(BACKEND)
    (folder / ".tools").symlink_to(CHECKOUT / ".tools")
    return folder


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("DEVICE", "MAKEFLAGS", "MAKELEVEL")}
    kept.pop("CUDA_VISIBLE_DEVICES", None)
    return {**kept, "PYTHON": sys.executable, **changes}


def start(folder: Path, *command: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command or ("locks/install.sh", "main"),
        cwd=folder, env=environment(**changes), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = "".join(process.communicate(timeout=LIMIT_S))
    return process.returncode, said


def install(folder: Path, *parts: str, **changes: str) -> tuple[int, str]:
    return finish(start(folder, "locks/install.sh", *(parts or ("main",)), **changes))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.02)


def builds(folder: Path) -> int:
    log = folder / "builds"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def prefix(folder: Path, code: str = "import sys; print(sys.prefix)") -> str:
    command = [str(folder / ".venv" / "bin" / "python"), "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def program(folder: Path, name: str, text: str) -> Path:
    """A command that goes before the machine's own, for which PATH must name `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def interpreter(folder: Path, name: str, version: str, *, pip: bool = True) -> Path:
    """A Python that claims to be another version; for the rest it is this one."""
    lacks_pip = "" if pip else '*"-m pip"*) echo "No module named pip" >&2; exit 1 ;;'
    return program(
        folder,
        name,
        f'case "$*" in *version_info*) echo {version} ;; *realpath*) echo "$0" ;; {lacks_pip}\n'
        f'*) exec {sys.executable} "$@" ;; esac',
    )


def search_path(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_folder_with_spaces_and_umlauts_and_a_second_call_that_costs_nothing(checkout):
    code, said = install(checkout, "main", "test", "triton")
    assert code == 0, said
    assert prefix(checkout) == str(checkout / ".venv")
    assert str(checkout / "client") in prefix(checkout, "import sys; print(sys.path)")
    assert install(checkout, "main", "test", "triton") == (0, "")
    assert builds(checkout) == 1


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_moved_and_copied_folders_get_environments_of_their_own(checkout, how):
    assert install(checkout, "main", "triton")[0] == 0
    place = checkout.parent / "new place"
    if how == "moved":
        checkout.rename(place)
    else:
        shutil.copytree(checkout, place, symlinks=True)
    code, said = install(place, "main", "triton")
    assert code == 0, said
    assert "building .venv:" in said
    assert "building .venv-triton:" in said
    assert prefix(place) == str(place / ".venv")
    assert str(checkout / "client") not in prefix(place, "import sys; print(sys.path)")
    if how == "copied":
        assert prefix(checkout) == str(checkout / ".venv")
        assert install(checkout, "main", "triton") == (0, "")


def test_changed_lock_builds_anew(checkout):
    assert install(checkout)[0] == 0
    (checkout / "locks" / "cpu.txt").write_text("# changed\n")
    assert "building .venv:" in install(checkout)[1]


def test_killed_installation_is_taken_up_by_the_next(checkout):
    (checkout / "hold").touch()
    first = start(checkout)
    wait_until(lambda: builds(checkout) == 1)
    os.killpg(first.pid, signal.SIGKILL)  # its lock ends with it
    finish(first)
    (checkout / "hold").unlink()
    code, said = install(checkout)
    assert code == 0, said
    assert prefix(checkout) == str(checkout / ".venv")
    assert install(checkout) == (0, "")


def test_two_calls_at_once_build_once(checkout):
    (checkout / "hold").touch()
    first = start(checkout)
    wait_until(lambda: builds(checkout) == 1)
    second = start(checkout)
    assert second.stderr is not None
    assert second.stderr.readline() == f"waiting for another make in {checkout}\n"
    (checkout / "hold").unlink()
    assert finish(first)[0] == 0
    assert finish(second) == (0, "")
    assert builds(checkout) == 1


def test_only_newer_pythons_are_one_line_with_the_remedy(checkout, tmp_path):
    folder = tmp_path / "bin"
    for name in ("python3", "python3.12", "python3.11"):
        interpreter(folder, name, "3.14")
    code, said = install(checkout, PATH=search_path(folder), PYTHON="")
    assert code == 1
    assert said.startswith("error: Python 3.11 or 3.12 is needed, found python3 is 3.14,")
    assert "make PYTHON=/path/to/python3.12" in said
    assert said.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_older_python_beside_a_newer_one_is_found(checkout, tmp_path):
    folder = tmp_path / "bin"
    interpreter(folder, "python3", "3.14")
    interpreter(folder, "python3.12", "3.12")
    code, said = install(checkout, PATH=search_path(folder), PYTHON="")
    assert code == 0, said


def test_named_python_that_does_not_fit_or_is_not_there(checkout, tmp_path):
    newer = interpreter(tmp_path / "a bin", "python3.13", "3.13")
    code, said = install(checkout, PYTHON=str(newer))
    assert code == 1
    assert f"found {newer} is 3.13: install" in said
    code, said = install(checkout, PYTHON="/nowhere/python3")
    assert code == 1
    assert "found none" in said


def test_little_free_disk_is_one_line_with_the_remedy(checkout, tmp_path):
    folder = tmp_path / "bin"
    sizes = "disk 1000000 900000 7500 99% /"
    program(folder, "df", f"echo 'Filesystem 1M-blocks Used Available Use% Mounted'; echo {sizes}")
    code, said = install(checkout, PATH=search_path(folder))
    assert code == 1
    assert said == (
        f"error: 8 GB of free disk are needed in {checkout} for the environments and the models, "
        "7.3 GB are free: make room, or clone to another disk\n"
    )
    assert not (checkout / ".venv").exists()
    assert install(checkout)[0] == 0
    assert install(checkout, PATH=search_path(folder)) == (0, "")  # nothing is to be built


def test_python_without_pip_is_one_line_with_the_remedy(checkout, tmp_path):
    (checkout / ".tools").unlink()
    python = interpreter(tmp_path / "bin", "python3", "3.12", pip=False)
    code, said = install(checkout, PYTHON=str(python))
    assert code == 1
    assert said.startswith(f"error: {python} has no pip, which fetches the installer: install")
    assert "apt install python3-pip" in said
    assert said.count("\n") == 1


@pytest.fixture
def graphics_driver(tmp_path: Path) -> Iterator[str]:
    """A PATH with an `nvidia-smi` that nobody must ask."""
    folder = tmp_path / "driver"
    program(folder, "nvidia-smi", f"echo \"$@\" >> '{folder}/asked'; echo 'GPU 0: NVIDIA H100'")
    yield search_path(folder)
    assert not (folder / "asked").exists()


@pytest.mark.parametrize(("device", "hidden"), [(None, "-1"), ("cpu", "-1"), ("gpu", "None")])
def test_make_takes_the_cpu_unless_asked_whatever_the_driver(
    device, hidden, checkout, graphics_driver
):
    """`make serve` of a checkout whose server prints what it sees."""
    (checkout / "serving" / "__main__.py").write_text(
        "import os\nprint('sees', os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['DEVICE'])\n"
    )
    changes = {"PATH": graphics_driver} | ({"DEVICE": device} if device else {})
    code, said = finish(start(checkout, "make", "serve", **changes))
    assert code == 0, said
    assert said.splitlines()[0] == f"sees {hidden} {device or 'cpu'}"
    stamp = (checkout / ".venv" / ".installed-main").read_text()
    assert f"# locks/{device or 'cpu'}.txt" in stamp


def test_unknown_device_is_refused(checkout):
    assert install(checkout, DEVICE="tpu") == (
        1,
        "error: DEVICE is tpu: expected cpu or gpu\n",
    )


STAGES = "stages:\n  one:\n    cmd: echo 1 > one.txt\n    outs: [one.txt]\n"
STAGES += '  two:\n    cmd: \'echo "{\\"n\\": 1}" > n.json\'\n    metrics: [n.json]\n'


def dvc(folder: Path, *arguments: str) -> tuple[int, str]:
    return finish(start(folder, sys.executable, "-m", "dvc", *arguments))


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    return subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder, check=True, capture_output=True, text=True, timeout=60,
    ).stdout.strip()  # fmt: skip


def test_download_without_git_runs_dvc_also_inside_another_repository(checkout):
    outer = checkout.parent
    git(outer, "init", "--quiet")
    git(outer, "commit", "--quiet", "--allow-empty", "--message", "of another project")
    for name in (".dvc", "training", "client/src/chestct"):
        shutil.copytree(
            CHECKOUT / name, checkout / name,
            ignore=shutil.ignore_patterns("tmp", "cache", "config.local", "__pycache__"),
        )  # fmt: skip
    (checkout / "dvc.yaml").write_text(STAGES)
    (checkout / ".dvc" / "config.local").write_text("['remote \"own\"']\n    url = /Own\n")
    assert install(checkout)[0] == 0

    code, said = dvc(checkout, "repro")
    assert code == 0, said
    code, said = dvc(checkout, "metrics", "show")
    assert (code, "n.json" in said) == (0, True), said
    code = "from training.track.mlflow_run import git_commit; print(git_commit())"
    told = start(checkout, sys.executable, "-c", code, PYTHONPATH=str(checkout / "client" / "src"))
    assert finish(told) == (0, "unknown\n")

    # It becomes a repository: the setting goes, what else stood in the file stays.
    git(checkout, "init", "--quiet")
    assert install(checkout) == (0, "")
    settings = (checkout / ".dvc" / "config.local").read_text()
    assert "no_scm" not in settings
    assert "['remote \"own\"']\nurl = /Own" in settings
    assert dvc(checkout, "status")[0] == 0


def test_clone_by_git_for_windows_has_no_carriage_returns(tmp_path):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "-c", "core.autocrlf=true", str(CHECKOUT), str(clone))
    texts = [
        line.split("\t", 1)[1]
        for line in git(clone, "ls-files", "--eol").splitlines()
        if not line.startswith("i/-text")
    ]
    assert "docker/mlflow.sh" in texts
    assert [name for name in texts if b"\r" in (clone / name).read_bytes()] == []
    for name in ("client/docs/page.png", "client/src/chestct/web/static/phantom.dcm"):
        assert (clone / name).read_bytes() == (CHECKOUT / name).read_bytes()
    done = subprocess.run(
        ["bash", "-n", "docker/mlflow.sh"], cwd=clone, check=False, capture_output=True, timeout=60
    )
    assert done.stderr == b""


SERVE = """
import sys
from pathlib import Path
import numpy as np
from chestct.cli.__main__ import main
from serving.local import LocalTriton
from training.data.phantom import make_phantom, write_png
write_png(make_phantom("normal", 1), Path("Aufnahme 1 \u00fc.png"))
with LocalTriton(Path("model_repository")) as server:
    sys.exit(main(["classify", "Aufnahme 1 \u00fc.png", "--json", "--url", server.grpc_url]))
"""


@pytest.mark.slow
@pytest.mark.server
def test_real_environments_in_a_folder_with_spaces_behind_a_dead_proxy(
    tmp_path, triton_environment, write_model
):
    """Clone, environments from the real locks, a real Triton, the client, DVC."""
    place = tmp_path / "Prüf stand" / "ct demo"
    git(tmp_path, "clone", "--quiet", str(CHECKOUT), str(place))
    settings = {"PIP_REQUIRE_VIRTUALENV": "1", "PIP_USER": "1"}
    process = start(place, "locks/install.sh", "main", "triton", **settings)
    said = "".join(process.communicate(timeout=500))
    assert process.returncode == 0, said
    parameters = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}\n'
        for key, value in FACTS.to_parameters().items()
    )
    write_model(place / "model_repository", "chestct", parameters)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTPS_PROXY"), dead)
    python = str(place / ".venv" / "bin" / "python")
    code, said = finish(start(place, python, "-c", SERVE, **proxies))
    assert code == 0, said
    assert '"run": "run-7"' in said
    code, said = finish(start(place, python, "-c", "import chestct", LC_ALL="C"))
    assert code == 0, said
    # Its console script, whose first line cannot name a path with a space.
    code, said = finish(start(place, str(place / ".venv" / "bin" / "dvc"), "status"))
    assert (code, "ingest:" in said) == (0, True), said
