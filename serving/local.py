"""Starts, watches and stops a real NVIDIA Triton on this machine, without Docker or a GPU.

The server is the one in the wheel `nvidia-pytriton`, installed in an environment of its own, and
serves the model repository as it is; `serving/backends/onnxruntime` stands in for NVIDIA's
onnxruntime backend. Everything listens on 127.0.0.1 only. With certificates gRPC has TLS by Triton
itself, and HTTP by an nginx in front of it (`serving/nginx.conf.template`).

    python -m serving local --repository model_repository --model chestct_compressed
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Literal, NoReturn, cast

__all__ = [
    "Certificates",
    "Installation",
    "LocalTriton",
    "LocalTritonError",
    "find_installation",
    "main",
    "uses_gpu",
]

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
ENVIRONMENT = Path(".venv-triton")
SUPPORTED_PYTHONS = ("3.11", "3.12")  # what numpy 1.26 and the wheel's backend processes share
REMEDY = "Run `make environments`"
_LISTENERS = ("http", "grpc", "metrics")
BACKENDS = Path(__file__).parent / "backends"
CLIENT = Path(__file__).parents[1] / "client" / "src" / "chestct"
NGINX_CONFIG = Path(__file__).parent / "nginx.conf.template"
PROBE_TIMEOUT_S = 30.0
DRIVER_TIMEOUT_S = 30.0
RESTART_LIMIT = 3
RESTART_WINDOW_S = 300.0
KILL_MARGIN_S = 5.0  # Triton itself needs up to 3 s after its last request
_PORT_ATTEMPTS = 5
_CUDA_PROVIDER = "lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so"
_GUARD = "--guard"
_KILL = signal.SIGUSR1  # to the guard: end the server without draining
_ADMIN_HEADER = "admin-key"
ADMIN_KEY = "CHESTCT_ADMIN_KEY"
_RESTRICTED = "model-repository,trace,logging"
_ELEMENT_BYTES = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
    "BYTES": 4,  # an empty string: its length, 0, as four bytes
}
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
    """Triton cannot start or stay up; the message says why and what to do."""


class _PortTakenError(LocalTritonError):
    """Somebody else took a port between its choice and Triton's bind."""


@dataclass(frozen=True)
class Installation:
    """Where the pieces of Triton lie in its environment.

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


@dataclass(frozen=True)
class Certificates:
    """PEM files for TLS.

    Attributes:
        cert: The server's certificate chain.
        key: Its private key.
        client_ca: Authorities whose certificates clients must show (mutual TLS); None asks nobody.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what is not there.

        Raises:
            LocalTritonError: A file is missing.
        """
        for path in (self.cert, self.key, self.client_ca):
            if path is not None and not path.is_file():
                raise LocalTritonError(f"TLS: {path} is not a file, expected PEM")

    def grpc_options(self) -> list[str]:
        """Options of `tritonserver` for gRPC."""
        options = [
            f"--grpc-server-cert={self.cert.absolute()}",
            f"--grpc-server-key={self.key.absolute()}",
        ]
        if self.client_ca is None:
            return ["--grpc-use-ssl=true", *options]
        root = f"--grpc-root-cert={self.client_ca.absolute()}"
        return ["--grpc-use-ssl-mutual=true", *options, root]

    def nginx_config(self, listen: str, upstream: str, folder: Path) -> str:
        """The configuration of an nginx that ends TLS in front of Triton's HTTP."""
        return string.Template(NGINX_CONFIG.read_text(encoding="utf-8")).substitute(
            TLS_LISTEN=listen,
            TLS_UPSTREAM=upstream,
            TLS_CERT=self.cert.absolute(),
            TLS_KEY=self.key.absolute(),
            TLS_VERIFY_CLIENT="off" if self.client_ca is None else "on",
            TLS_CLIENT_CA=(self.client_ca or self.cert).absolute(),
            TLS_RUN=folder.absolute(),
        )


def find_installation(environment: Path) -> Installation:
    """The Triton inside `environment`, a virtual environment with `serving/requirements.txt`.

    Raises:
        LocalTritonError: The platform, the environment or something in it does not fit.
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


def _write_backends(installation: Installation, folder: Path) -> None:
    """Lay out the backend directory as Triton wants it."""
    python = folder / "python"
    python.mkdir(parents=True)
    shipped = installation.server / "backends" / "python"
    # Triton refuses a library that is a link out of its backend directory.
    shutil.copy(shipped / "libtriton_python.so", python)
    (python / "triton_python_backend_utils.py").symlink_to(
        shipped / "triton_python_backend_utils.py"
    )
    (python / "triton_python_backend_stub").symlink_to(installation.stub)
    for backend in BACKENDS.iterdir():
        shutil.copytree(
            backend, folder / backend.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    if CLIENT.is_dir():
        # A copy, so that what runs does not change with the checkout.
        shutil.copytree(
            CLIENT,
            folder / "chestct_scan" / "chestct",
            ignore=shutil.ignore_patterns("__pycache__"),
        )


def _is_plain(path: str | Path) -> bool:
    """Whether a path can stand in Triton's command lines for its backend processes.

    They go through bash, and Triton does not quote them.
    """
    return re.fullmatch(r"[\w./+-]*", str(path)) is not None


def _make_run_directory() -> Path:
    """A temporary folder for the server's files."""
    usual = tempfile.gettempdir()
    folder = usual if _is_plain(usual) else "/tmp"
    return Path(tempfile.mkdtemp(prefix="local-triton-", dir=folder))


def _plain_link(path: Path, link: Path) -> Path:
    """The path itself, absolute, or else `link`, made to point to it."""
    if _is_plain(path.absolute()):
        return path.absolute()
    link.unlink(missing_ok=True)
    link.symlink_to(path.absolute())
    return link


def _models_of(repository: Path) -> list[str]:
    return sorted(config.parent.name for config in repository.glob("*/config.pbtxt"))


def _check_repository(repository: Path, models: Sequence[str]) -> None:
    if not repository.is_dir():
        raise LocalTritonError(f"{repository}: no such folder; expected a model repository")
    found = _models_of(repository)
    if not found:
        raise LocalTritonError(
            f"{repository} holds no models (folders with a config.pbtxt). Export one into it first"
        )
    missing = [name for name in models if name not in found]
    if missing:
        raise LocalTritonError(
            f"{repository} holds no {' and no '.join(missing)}; its models are {', '.join(found)}"
        )


def uses_gpu(environment: Path = ENVIRONMENT) -> bool:
    """Whether the server gets the GPU; if not, `configs/cpu.pbtxt` precedes a model's own config.

    The environment variable DEVICE=gpu must ask for it, the ONNX Runtime of `environment` must be
    built for CUDA (that of `serving/requirements.txt` is not), and a driver must answer. Otherwise
    GPUs are hidden from the server, where `KIND_AUTO` would choose one that nothing can use.
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


def _check_free(name: str, port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "expected 1 to 65535"
            raise LocalTritonError(
                f"{name} port {port} on {HOST}: {reason}. Stop what uses it, or choose another port"
            ) from error


def _free_ports(num_ports: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for listener in listeners:
            listener.bind((HOST, 0))
        return [listener.getsockname()[1] for listener in listeners]


def _zeros_request(metadata: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference on zeros, one row, for a model with this metadata.

    Open dimensions become 1. The form is the binary data extension of the V2 protocol.
    """
    inputs, body = [], b""
    for tensor in metadata["inputs"]:
        shape = [max(dim, 1) for dim in tensor["shape"]]
        data = bytes(math.prod(shape) * _ELEMENT_BYTES[tensor["datatype"]])
        inputs.append(
            {
                "name": tensor["name"],
                "shape": shape,
                "datatype": tensor["datatype"],
                "parameters": {"binary_data_size": len(data)},
            }
        )
        body += data
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return header + body, {"Inference-Header-Content-Length": str(len(header))}


def _failed_loads(log: str) -> list[str]:
    """What Triton's log says of models that did not load, one sentence a model."""
    reasons = []
    for quoted in re.findall(r'\] ("(?:failed to load|Poll failed)[^\n]*")$', log, re.MULTILINE):
        message = json.loads(quoted).split("\n\nAt:")[0]
        if ":" in message:
            reasons.append(message.replace("Internal: TritonModelException: ", "").strip())
    return reasons


def _explain(log: str) -> str:
    """Why the server ended, from its log: the models that failed, or else the last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("+-", "|"))]
    return "; ".join(_failed_loads(log) or lines[-5:]) or "it wrote nothing"


class LocalTriton:
    """A running Triton, as a context manager; on leaving it drains and ends.

    On entering, every model of the repository has answered a real inference. A guard process
    stands between this one and the server: it ends the server, its backend processes and their
    shared memory also when this process is killed.

    Attributes:
        admin_key: Opens the model-repository, trace and logging APIs, as the HTTP header
            `admin-key` or the gRPC metadata `triton-grpc-protocol-admin-key`.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        environment: Path = ENVIRONMENT,
        control_mode: Literal["none", "poll", "explicit"] = "none",
        models: Sequence[str] = (),
        ready_timeout_s: float = 120.0,
        exit_timeout_s: float = 15.0,
        extra_args: Sequence[str] = (),
        admin_key: str = "",
        certificates: Certificates | None = None,
    ) -> None:
        """Nothing starts before `with` or `start()`.

        Args:
            model_repository: Folder with one folder a model.
            http_port: Port of HTTP; 0 takes a free one, here and below.
            grpc_port: Port of gRPC.
            metrics_port: Port of the Prometheus metrics.
            environment: Virtual environment with `serving/requirements.txt`.
            control_mode: `none` loads everything once, `poll` follows changes of the repository,
                `explicit` loads what `models` or the admin API asks for.
            models: Names of the models to load, which makes the mode `explicit`; empty for all.
            ready_timeout_s: How long loading may take.
            exit_timeout_s: How long requests in flight may take on stopping.
            extra_args: Further options of `tritonserver`.
            admin_key: Key of the admin APIs; a random one by default.
            certificates: TLS for gRPC and HTTP; HTTP needs nginx on this machine, and Triton's own
                port stays open in plain text on 127.0.0.1, for nginx and for the checks.

        Raises:
            ValueError: `models` with the control mode `poll`, which loads every model.
        """
        if models and control_mode == "poll":
            raise ValueError("models: the control mode poll loads all; expected none or explicit")
        self._repository = model_repository
        self._wanted_ports = {"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port}
        if certificates is not None:
            self._wanted_ports |= {"HTTPS": http_port, "HTTP": 0}
        self._certificates = certificates
        self._nginx: subprocess.Popen[bytes] | None = None
        self._ports = dict(self._wanted_ports)
        self._environment = environment
        self._control_mode = "explicit" if models else control_mode
        self._models = tuple(models)
        self._ready_timeout_s = ready_timeout_s
        self._exit_timeout_s = exit_timeout_s
        self._extra_args = tuple(extra_args)
        self._installation: Installation | None = None
        self._uses_gpu = False
        self._run_directory: Path | None = None
        self._log_start = 0
        self._guard: subprocess.Popen[str] | None = None
        self._pid = 0
        self.admin_key = admin_key or secrets.token_hex(16)

    @property
    def http_url(self) -> str:
        """Address of HTTP, `http://127.0.0.1:PORT`, or `https://` with certificates."""
        if self._certificates is not None:
            return f"https://{HOST}:{self._ports['HTTPS']}"
        return f"http://{HOST}:{self._ports['HTTP']}"

    @property
    def grpc_url(self) -> str:
        """Address of gRPC, `grpc://127.0.0.1:PORT`, or `grpcs://` with certificates."""
        scheme = "grpc" if self._certificates is None else "grpcs"
        return f"{scheme}://{HOST}:{self._ports['gRPC']}"

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus metrics."""
        return f"http://{HOST}:{self._ports['metrics']}/metrics"

    @property
    def pid(self) -> int:
        """Process number of `tritonserver`; it changes with a restart."""
        return self._pid

    @property
    def log_path(self) -> Path:
        """The server's log; it lives as long as the server.

        Raises:
            LocalTritonError: The server is not started.
        """
        if self._run_directory is None:
            raise LocalTritonError("Triton is not started")
        return self._run_directory / "server.log"

    def __enter__(self) -> LocalTriton:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until every model has answered an inference.

        Raises:
            LocalTritonError: It does not start; the message names the port, the model or the piece
                at fault.
        """
        if self._models or self._control_mode != "explicit":
            _check_repository(self._repository, self._models)
        self._installation = find_installation(self._environment)
        self._uses_gpu = uses_gpu(self._environment)
        if os.environ.get("DEVICE") == "gpu" and not self._uses_gpu:
            logger.warning(
                "DEVICE=gpu: no NVIDIA driver answers, or the ONNX Runtime in %s is not built for "
                "CUDA; models are served on the CPU",
                self._environment,
            )
        try:
            self._run_directory = _make_run_directory()
            _write_backends(self._installation, self._run_directory / "backends")
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                self._choose_ports()
                try:
                    self._launch()
                    if self._certificates is not None:
                        self._nginx = self._start_nginx(self._certificates)
                    break
                except _PortTakenError:
                    if attempt == _PORT_ATTEMPTS or 0 not in self._wanted_ports.values():
                        raise
        except OSError as error:
            self.stop()
            raise LocalTritonError(f"cannot lay out the server's files: {error}") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Let requests in flight finish, end the server, remove what it leaves."""
        guard, self._guard = self._guard, None
        nginx, self._nginx = self._nginx, None
        try:
            if nginx is not None and nginx.poll() is None:
                nginx.send_signal(signal.SIGQUIT)  # requests in flight finish first
                try:
                    nginx.wait(self._exit_timeout_s)
                except subprocess.TimeoutExpired:
                    nginx.terminate()
                    nginx.wait(KILL_MARGIN_S)
            if guard is not None and guard.poll() is None:
                code = self._end(guard)
                if code:
                    logger.warning("Triton ended with code %d: %s", code, _explain(self._log()))
        finally:
            if self._run_directory is not None:
                shutil.rmtree(self._run_directory, ignore_errors=True)
                self._run_directory = None

    def restart(self) -> None:
        """Kill the server, whatever state it is in, and start it again on the same ports.

        Raises:
            LocalTritonError: It does not start again.
        """
        if self._guard is not None and self._guard.poll() is None:
            # A server whose backend process died would use up its whole exit timeout.
            self._guard.send_signal(_KILL)
            self._guard.wait(KILL_MARGIN_S)
        self._launch()

    def models(self) -> list[tuple[str, str]]:
        """Name and version of every model that Triton calls ready.

        Raises:
            OSError: The server does not answer.
        """
        status, body = self._request("POST", "/v2/repository/index", b"{}", PROBE_TIMEOUT_S)
        if status != http.client.OK:
            raise ConnectionError(f"the list of models is refused: {body.decode(errors='replace')}")
        index = json.loads(body)
        return [(m["name"], m["version"]) for m in index if m.get("state") == "READY"]

    def peak_memory_mb(self) -> float:
        """The most memory that the server and its backend processes have held, in MB (1e6 bytes).

        The sum of their peaks of resident memory (`VmHWM`, proc_pid_status(5)) since the server
        started. It is an upper bound: pages that processes share are counted for each of them, and
        the peaks need not have come at the same time.

        Raises:
            LocalTritonError: The server does not run.
        """
        try:
            tasks = Path(f"/proc/{self._pid}/task").iterdir()
            children = [pid for task in tasks for pid in (task / "children").read_text().split()]
            texts = [Path(f"/proc/{pid}/status").read_text() for pid in (self._pid, *children)]
            peaks_kb = [int(re.findall(r"VmHWM:\s+(\d+) kB", text)[0]) for text in texts]
        except (OSError, IndexError) as error:  # an ended process has no peak
            raise LocalTritonError("Triton does not run, so it holds no memory") from error
        return sum(peaks_kb) * 1024 / 1e6  # the kernel calls 1024 bytes a kB

    def check(self, timeout_s: float = PROBE_TIMEOUT_S) -> list[str]:
        """Infer on every ready model; what is wrong, one sentence each, empty when all is well.

        Triton goes on calling itself ready after one of its backend processes has died; only an
        inference shows it. A full queue (503) counts as alive.
        """
        if self._guard is None or self._guard.poll() is not None:
            return ["the server process has ended"]
        try:
            models = self.models()
            if not models and self._control_mode != "explicit":
                return ["no model is ready"]
            absent = [name for name in self._models if name not in dict(models)]
            if absent:
                return [f"model '{name}' is not ready" for name in absent]
            failures = [self._failure(name, version, timeout_s) for name, version in models]
        except (OSError, http.client.HTTPException) as error:
            return [f"the server does not answer over HTTP: {error or type(error).__name__}"]
        return [failure for failure in failures if failure]

    def watch(self, stop: threading.Event, *, period_s: float = 10.0) -> None:
        """Check the server each period until `stop` is set, and restart it when it fails.

        A failed check is repeated at once before it counts. Checks appear in Triton's statistics
        like any other inference.

        Raises:
            LocalTritonError: It had to be restarted more than three times within five minutes.
        """
        restarts_s: list[float] = []
        while not stop.wait(period_s):
            failures = self.check() and self.check()
            if not failures:
                continue
            restarts_s = [t for t in restarts_s if time.monotonic() - t < RESTART_WINDOW_S]
            if len(restarts_s) == RESTART_LIMIT:
                raise LocalTritonError(
                    f"Triton failed again after {RESTART_LIMIT} restarts within "
                    f"{RESTART_WINDOW_S:g} s: {'; '.join(failures)}"
                )
            restarts_s.append(time.monotonic())
            logger.warning("restarting Triton: %s", "; ".join(failures))
            try:
                self.restart()
            except LocalTritonError as error:
                logger.warning("%s", error)
            else:
                logger.info("ready again at %s", self.grpc_url)

    def _choose_ports(self) -> None:
        given = [port for port in self._wanted_ports.values() if port]
        if len(set(given)) < len(given):
            raise LocalTritonError(f"ports {given}: expected three different ones")
        for name, port in self._wanted_ports.items():
            if port:
                _check_free(name, port)
        free = iter(_free_ports(len(self._wanted_ports)))
        self._ports = {name: port or next(free) for name, port in self._wanted_ports.items()}

    def _start_nginx(self, certificates: Certificates) -> subprocess.Popen[bytes]:
        """TLS in front of HTTP; waits until it listens."""
        # Debian keeps it where only root's PATH leads.
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
        if program is None:
            raise LocalTritonError(
                "TLS over HTTP needs nginx, which is not on this machine (on Debian and Ubuntu: "
                "apt install nginx)"
            )
        folder = cast("Path", self._run_directory)
        port = self._ports["HTTPS"]
        config = folder / "nginx.conf"
        config.write_text(
            certificates.nginx_config(f"{HOST}:{port}", f"{HOST}:{self._ports['HTTP']}", folder)
        )
        libc = ctypes.CDLL(None)
        with self.log_path.open("ab") as log:
            nginx = subprocess.Popen(
                [program, "-p", folder, "-c", config, "-e", "stderr", "-g", "daemon off;"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # PR_SET_PDEATHSIG (prctl(2)): it does not outlive this process.
                preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),
            )
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        while nginx.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1.0):
                return nginx
            time.sleep(0.05)
        nginx.kill()
        nginx.wait()
        raise LocalTritonError(f"nginx does not start: {_explain(self._log())}")

    def _command(self, installation: Installation, backends: Path, shm_prefix: str) -> list[str]:
        restricted = f"{_RESTRICTED}:{_ADMIN_HEADER}={self.admin_key}"
        return [
            str(installation.server / "bin" / "tritonserver"),
            f"--model-repository={_plain_link(self._repository, backends.parent / 'models')}",
            f"--model-control-mode={self._control_mode}",
            *(["--repository-poll-secs=1"] if self._control_mode == "poll" else []),
            *(f"--load-model={name}" for name in self._models),
            # The exported configs are complete, and guessing costs each model a second.
            "--disable-auto-complete-config",
            *([] if self._uses_gpu else ["--model-config-name=cpu"]),
            f"--backend-directory={backends}",
            f"--cache-directory={installation.server / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            "--backend-config=python,shm-default-byte-size=4194304",
            f"--http-address={HOST}",
            f"--http-port={self._ports['HTTP']}",
            f"--http-restricted-api={restricted}",
            f"--grpc-address={HOST}",
            f"--grpc-port={self._ports['gRPC']}",
            f"--grpc-restricted-protocol={restricted}",
            *(self._certificates.grpc_options() if self._certificates else []),
            f"--metrics-address={HOST}",
            f"--metrics-port={self._ports['metrics']}",
            f"--exit-timeout-secs={math.ceil(self._exit_timeout_s)}",
            *self._extra_args,
        ]

    def _launch(self) -> None:
        """Start the server through its guard and wait for it; leaves nothing on failure."""
        installation, run_directory = self._installation, self._run_directory
        if installation is None or run_directory is None:
            raise LocalTritonError("Triton is not started")
        shm_prefix = f"{run_directory.name}-"
        order = {
            "command": self._command(installation, run_directory / "backends", shm_prefix),
            "environment": {
                "HOME": os.environ.get("HOME", "/"),
                "PATH": f"{installation.bin}:{os.environ.get('PATH', os.defpath)}",
                "LD_LIBRARY_PATH": installation.library_path,
                **{k: v for k, v in os.environ.items() if k.startswith(("CUDA_", "NVIDIA_"))},
                **({} if self._uses_gpu else {"CUDA_VISIBLE_DEVICES": "-1"}),
            },
            "parent_pid": os.getpid(),
            "kill_after_s": self._exit_timeout_s + KILL_MARGIN_S,
            "shm_prefix": shm_prefix,
            "run_directory": str(run_directory),
        }
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            guard = self._guard = subprocess.Popen(
                [sys.executable, "-I", __file__, _GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process, which then drains
            )
        try:
            with cast("IO[str]", guard.stdin) as orders:
                json.dump(order, orders)
            with cast("IO[str]", guard.stdout) as answers:
                answer = answers.readline()
            if not answer:
                guard.wait(KILL_MARGIN_S)
                raise self._start_error("could not be run")
            self._pid = int(answer)
            self._wait_until_ready(guard)
        except BaseException:
            self._end(guard)
            raise

    def _end(self, guard: subprocess.Popen[str]) -> int:
        guard.terminate()
        return guard.wait(self._exit_timeout_s + 2 * KILL_MARGIN_S)

    def _wait_until_ready(self, guard: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while True:
            if guard.poll() is not None:
                raise self._start_error(f"ended with code {guard.returncode}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _ = self._request("GET", "/v2/health/ready", None, 5.0)
                if status == http.client.OK:
                    break
            if time.monotonic() > deadline:
                raise self._start_error(f"is not ready after {self._ready_timeout_s:g} s")
            time.sleep(0.05)
        failures = self.check(max(deadline - time.monotonic(), 1.0))
        if failures:
            raise LocalTritonError(f"Triton started, but {'; '.join(failures)}")

    def _log(self) -> str:
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def _start_error(self, event: str) -> LocalTritonError:
        log = self._log()
        taken = re.search(rf"Socket '{re.escape(HOST)}:(\d+)' already in use", log)
        if taken:
            return _PortTakenError(
                f"port {taken[1]} on {HOST}: Address already in use. Stop what uses it, or choose "
                "another port"
            )
        return LocalTritonError(f"Triton {event}: {_explain(log)}")

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self._ports["HTTP"], timeout=timeout_s)
        # An idle connection would hold up the server's exit.
        fixed = {_ADMIN_HEADER: self.admin_key, "Connection": "close"}
        with contextlib.closing(connection):
            connection.request(method, path, body, {**fixed, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()

    def _failure(self, name: str, version: str, timeout_s: float) -> str | None:
        """What is wrong with one model, None if it answers."""
        path = f"/v2/models/{name}/versions/{version}"
        try:
            status, body = self._request("GET", path, None, timeout_s)
            if status == http.client.OK:
                metadata = json.loads(body)
                request, headers = _zeros_request(metadata)
                status, body = self._request("POST", f"{path}/infer", request, timeout_s, headers)
                # An empty string is bad input for a model that decodes files; refusing it is life.
                takes_files = any(t["datatype"] == "BYTES" for t in metadata["inputs"])
                if status == http.client.BAD_REQUEST and takes_files:
                    return None
        except TimeoutError:
            return f"model '{name}' version {version} did not answer within {timeout_s:.0f} s"
        if status in (http.client.OK, http.client.SERVICE_UNAVAILABLE):
            return None
        reason = body.decode(errors="replace")[:500]
        return f"model '{name}' version {version} answers with HTTP {status}: {reason}"


def _guard(order: Mapping[str, Any]) -> int:
    """Run the server as a child until it ends, then remove its processes and shared memory.

    SIGTERM, or the death of the process that started this one, asks the server to drain and end;
    one that takes too long is killed, and so is any on `_KILL`.
    """
    asked: set[int] = set()
    for number in (signal.SIGTERM, _KILL):
        signal.signal(number, lambda number, _: asked.add(number))
    libc = ctypes.CDLL(None)
    server = subprocess.Popen(
        order["command"],
        env=order["environment"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        start_new_session=True,
        # PR_SET_PDEATHSIG (prctl(2)): not even the death of the guard leaves a server behind.
        preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),
    )
    with sys.stdout:
        sys.stdout.write(f"{server.pid}\n")
    deadline: float | None = None
    # The ended server is left unreaped, so that its number still names its own process group.
    while os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        orphaned = os.getppid() != order["parent_pid"]
        if deadline is None and (orphaned or signal.SIGTERM in asked):
            server.terminate()
            deadline = time.monotonic() + order["kill_after_s"]
        if _KILL in asked or (deadline is not None and time.monotonic() > deadline):
            server.kill()
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    code = server.wait()
    for region in Path("/dev/shm").glob(f"{order['shm_prefix']}*"):
        region.unlink(missing_ok=True)
    if os.getppid() != order["parent_pid"]:
        shutil.rmtree(order["run_directory"], ignore_errors=True)
    return code if code >= 0 else 128 - code


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving local",
        description="Serve a model repository by a real Triton on 127.0.0.1 until interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--repository", type=Path, default=Path("model_repository"), help="model repository"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="load this model only; may be repeated; without it all are loaded",
    )
    parser.add_argument(
        "--explicit",
        action="store_true",
        help="let the admin API load and unload models, as a rollout needs; its key is taken "
        f"from the environment variable {ADMIN_KEY}",
    )
    parser.add_argument("--http-port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--grpc-port", type=int, default=8001, help="0 takes a free one")
    parser.add_argument("--metrics-port", type=int, default=8002, help="0 takes a free one")
    for name, text in (
        ("cert", "certificate chain for TLS, PEM"),
        ("key", "its private key"),
        ("client-ca", "authorities whose certificates clients must show: mutual TLS"),
    ):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--environment", type=Path, default=ENVIRONMENT, help="Triton's own environment"
    )
    parser.add_argument(
        "--address",
        default=HOST,
        help="where to listen; 0.0.0.0 only inside a container, whose network says who may connect",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve in the foreground; 0 after SIGINT or SIGTERM, 1 when Triton cannot run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.tls_cert is None) != (arguments.tls_key is None) or (
        arguments.tls_client_ca and not arguments.tls_cert
    ):
        parser.error("--tls-cert and --tls-key belong together, and --tls-client-ca needs them")
    if arguments.tls_cert and arguments.address != HOST:
        parser.error(f"--address {arguments.address} would open the plain HTTP port behind the TLS")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    started_s = time.monotonic()
    admin_key, models = os.environ.get(ADMIN_KEY, ""), arguments.model
    if arguments.explicit:
        if not admin_key:
            sys.stderr.write(f"--explicit needs a key in the environment variable {ADMIN_KEY}\n")
            return 2
        models = models or _models_of(arguments.repository)
    try:
        certificates = None
        if arguments.tls_cert:
            files = (arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
            certificates = Certificates(*files)
        logger.info("starting Triton on %s", arguments.repository)
        with LocalTriton(
            arguments.repository,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            environment=arguments.environment,
            models=models,
            admin_key=admin_key,
            certificates=certificates,
            extra_args=[f"--{name}-address={arguments.address}" for name in _LISTENERS],
        ) as server:
            logger.info(
                "ready at %s and %s after %.1f s, metrics at %s, log in %s",
                server.grpc_url,
                server.http_url,
                time.monotonic() - started_s,
                server.metrics_url,
                server.log_path,
            )
            for name, version in server.models():
                logger.info("model %s version %s", name, version)
            try:
                server.watch(threading.Event())
            finally:
                logger.info("stopping: requests in flight finish first")
    except KeyboardInterrupt:
        logger.info("stopped")
    except LocalTritonError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_guard(json.load(sys.stdin)) if sys.argv[1:] == [_GUARD] else main())
