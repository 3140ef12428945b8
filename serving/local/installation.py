"""Triton of the wheel `nvidia-pytriton`: its environment, its backends, its run directory."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = Path(".venv-triton")
SUPPORTED_PYTHONS = ("3.11", "3.12")  # numpy 1.26 and the wheel's backend processes share these
REMEDY = "Run `make environments`"
BACKENDS = Path(__file__).parents[1] / "backends"
CLIENT = Path(__file__).parents[2] / "client" / "src" / "chestct"
DRIVER_TIMEOUT_S = 30.0
_CUDA_PROVIDER = "lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so"
_INSPECT_ENVIRONMENT = """
import ctypes, importlib.metadata, json, os, sys, sysconfig
def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
library = "libpython%d.%d.so.1.0" % sys.version_info[:2]
folders = [sysconfig.get_config_var("LIBDIR") or "", os.path.join(sys.base_prefix, "lib"), ""]
for library_folder in folders:
    try:
        ctypes.CDLL(os.path.join(library_folder, library))
        break
    except OSError:
        library_folder = None
print(json.dumps({
    "python": "%d.%d" % sys.version_info[:2],
    "packages": {name: version(name) for name in ("nvidia-pytriton", "numpy", "onnxruntime")},
    "site_packages": sysconfig.get_path("purelib"),
    "library": library,
    "library_folder": library_folder,
}))
"""


class LocalTritonError(RuntimeError):
    """Triton cannot start or stay up; the message says why and names the remedy."""


@dataclass(frozen=True)
class Installation:
    """Paths of Triton inside its environment.

    Attributes:
        bin: Folder of the environment's `python3`, by which Triton's backend processes find numpy.
        server: Folder `tritonserver` of the wheel.
        stub: Backend process for the environment's version of Python.
        library_path: Value of `LD_LIBRARY_PATH` for the server.
    """

    bin: Path
    server: Path
    stub: Path
    library_path: str


def find_installation(environment: Path) -> Installation:
    """Find Triton in `environment`, a virtual environment with `serving/requirements.txt`.

    Raises:
        LocalTritonError: The platform, the environment or one of its packages does not fit.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise LocalTritonError(
            f"{platform.system()} on {platform.machine()}: the Triton wheel is for Linux on x86_64 "
            "only. Serve the model repository by the container nvcr.io/nvidia/tritonserver"
        )
    python = environment / "bin" / "python3"
    if not python.exists():
        raise LocalTritonError(f"{environment}: no Python environment there. {REMEDY}")
    try:
        output = subprocess.run(
            [python, "-I", "-c", _INSPECT_ENVIRONMENT], capture_output=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LocalTritonError(f"{python} does not run ({error}). {REMEDY}") from error
    found = json.loads(output)
    if found["python"] not in SUPPORTED_PYTHONS:
        raise LocalTritonError(
            f"{environment} has Python {found['python']}, expected {' or '.join(SUPPORTED_PYTHONS)}"
            ". Remove it and run `make environments` with one of these"
        )
    missing = [name for name, version in found["packages"].items() if version is None]
    if missing:
        raise LocalTritonError(f"{environment} lacks {', '.join(missing)}. {REMEDY}")
    if int(found["packages"]["numpy"].split(".")[0]) >= 2:
        raise LocalTritonError(
            f"{environment} has numpy {found['packages']['numpy']}, with which Triton answers with "
            f"empty tensors; expected numpy < 2. {REMEDY}"
        )
    if found["library_folder"] is None:
        raise LocalTritonError(
            f"{found['library']} is not on this machine, and Triton's backend processes need it. "
            f"Install it (on Debian and Ubuntu: apt install libpython{found['python']})"
        )
    site_packages = Path(found["site_packages"])
    server = site_packages / "pytriton" / "tritonserver"
    folders = [
        str(site_packages / "nvidia_pytriton.libs"),
        found["library_folder"],
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    return Installation(
        bin=python.parent.absolute(),
        server=server,
        stub=server / "python_backend_stubs" / found["python"] / "triton_python_backend_stub",
        library_path=":".join(folder for folder in folders if folder),
    )


def uses_gpu(environment: Path = ENVIRONMENT) -> bool:
    """Whether the server gets the GPU; if not, `configs/cpu.pbtxt` precedes a model's own config.

    The environment variable DEVICE=gpu must ask for it, the ONNX Runtime of `environment` must be
    built for CUDA (that of `serving/requirements.txt` is not), and a driver must answer. Otherwise
    GPUs are hidden from the server, where `KIND_AUTO` would choose one that no backend can use.
    """
    asked = os.environ.get("DEVICE") == "gpu"
    return asked and any(environment.glob(_CUDA_PROVIDER)) and _nvidia_driver_answers()


def _nvidia_driver_answers() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        done = subprocess.run([command, "-L"], capture_output=True, timeout=DRIVER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def make_run_directory(installation: Installation) -> Path:
    """Make a temporary folder for the server's files, with the backends laid out in it.

    Raises:
        OSError: The files cannot be written; nothing is left.
    """
    usual = tempfile.gettempdir()
    parent = usual if _needs_no_quotes(usual) else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="local-triton-", dir=parent))
    try:
        _write_backends(installation, folder / "backends")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _write_backends(installation: Installation, folder: Path) -> None:
    """Lay out the backend directory as Triton expects it."""
    python = folder / "python"
    python.mkdir(parents=True)
    shipped = installation.server / "backends" / "python"
    # Triton refuses a library that is a link out of its backend directory.
    shutil.copy(shipped / "libtriton_python.so", python)
    (python / "triton_python_backend_utils.py").symlink_to(
        shipped / "triton_python_backend_utils.py"
    )
    (python / "triton_python_backend_stub").symlink_to(installation.stub)
    no_cache = shutil.ignore_patterns("__pycache__")
    for backend in BACKENDS.iterdir():
        shutil.copytree(backend, folder / backend.name, ignore=no_cache)
    if CLIENT.is_dir():
        # A copy, so that a running server does not change with the checkout.
        shutil.copytree(CLIENT, folder / "chestct_scan" / "chestct", ignore=no_cache)


def plain_path(path: Path, link: Path) -> Path:
    """`path` absolute, or `link` made to point to it, where the path would need quotes in bash.

    Paths go through bash in Triton's command lines for its backend processes, unquoted.
    """
    if _needs_no_quotes(path.absolute()):
        return path.absolute()
    link.unlink(missing_ok=True)
    link.symlink_to(path.absolute())
    return link


def _needs_no_quotes(path: str | Path) -> bool:
    return re.fullmatch(r"[\w./+-]*", str(path)) is not None


def models_of(repository: Path) -> list[str]:
    """Names of the models in a repository."""
    return sorted(config.parent.name for config in repository.glob("*/config.pbtxt"))


def check_repository(repository: Path, models: Sequence[str]) -> None:
    """Check that a repository holds models, and all of `models`.

    Raises:
        LocalTritonError: It does not.
    """
    if not repository.is_dir():
        raise LocalTritonError(f"{repository}: no such folder; expected a model repository")
    found = models_of(repository)
    if not found:
        raise LocalTritonError(
            f"{repository} holds no models (folders with a config.pbtxt). Export one into it first"
        )
    missing = [name for name in models if name not in found]
    if missing:
        raise LocalTritonError(
            f"{repository} holds no {' and no '.join(missing)}; its models are {', '.join(found)}"
        )
