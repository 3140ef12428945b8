"""A local Triton as a context manager: start, check, watch, restart, stop."""

from __future__ import annotations

import http.client
import logging
import math
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from serving.local.health import ADMIN_HEADER, PROBE_TIMEOUT_S, HealthProbe
from serving.local.installation import (
    ENVIRONMENT,
    Installation,
    LocalTritonError,
    check_repository,
    find_installation,
    make_run_directory,
    plain_path,
    uses_gpu,
)
from serving.local.process import (
    HOST,
    PortTakenError,
    ServerProcess,
    check_free,
    explain,
    free_ports,
    log_path,
    shm_prefix,
)
from serving.local.tls import Certificates, start_nginx, stop_nginx

logger = logging.getLogger(__name__)

RESTART_LIMIT = 3
RESTART_WINDOW_S = 300.0
_PORT_ATTEMPTS = 5
_RESTRICTED = "model-repository,trace,logging"


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
            models: Names of the models to load, which lets the admin API load and unload others;
                empty for all, once.
            ready_timeout_s: How long loading may take.
            exit_timeout_s: How long requests in flight may take on stopping.
            extra_args: Further options of `tritonserver`.
            admin_key: Key of the admin APIs; a random one by default.
            certificates: TLS for gRPC and HTTP; HTTP needs nginx on this machine, and Triton's own
                port stays open in plain text on 127.0.0.1, for nginx and for the checks.
        """
        self._repository = model_repository
        self._wanted_ports = {"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port}
        if certificates is not None:
            self._wanted_ports |= {"HTTPS": http_port, "HTTP": 0}
        self._certificates = certificates
        self._nginx: subprocess.Popen[bytes] | None = None
        self._ports = dict(self._wanted_ports)
        self._environment = environment
        self._models = tuple(models)
        self._ready_timeout_s = ready_timeout_s
        self._exit_timeout_s = exit_timeout_s
        self._extra_args = tuple(extra_args)
        self._installation: Installation | None = None
        self._uses_gpu = False
        self._run_directory: Path | None = None
        self._process: ServerProcess | None = None
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
        """Process number of `tritonserver`, 0 before the start; it changes with a restart."""
        return self._process.pid if self._process else 0

    @property
    def log_path(self) -> Path:
        """The server's log; it lives as long as the server.

        Raises:
            LocalTritonError: The server is not started.
        """
        if self._run_directory is None:
            raise LocalTritonError("Triton is not started")
        return log_path(self._run_directory)

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
            LocalTritonError: It does not start; the message names the port, the model or the
                package at fault.
        """
        check_repository(self._repository, self._models)
        self._installation = find_installation(self._environment)
        self._uses_gpu = uses_gpu(self._environment)
        if os.environ.get("DEVICE") == "gpu" and not self._uses_gpu:
            logger.warning(
                "DEVICE=gpu: no NVIDIA driver answers, or the ONNX Runtime in %s is not built for "
                "CUDA; models are served on the CPU",
                self._environment,
            )
        try:
            self._run_directory = make_run_directory(self._installation)
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                self._choose_ports()
                try:
                    self._launch()
                    if self._certificates is not None:
                        self._nginx = start_nginx(
                            self._certificates,
                            port=self._ports["HTTPS"],
                            upstream_port=self._ports["HTTP"],
                            folder=self._run_directory,
                            log_path=self.log_path,
                        )
                    break
                except PortTakenError:
                    if attempt == _PORT_ATTEMPTS or 0 not in self._wanted_ports.values():
                        raise
        except OSError as error:
            self.stop()
            raise LocalTritonError(f"cannot lay out the server's files: {error}") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Let requests in flight finish, end the server, remove its files."""
        process, nginx = self._process, self._nginx
        self._nginx = None
        try:
            if nginx is not None:
                stop_nginx(nginx, self._exit_timeout_s)
            if process is not None and process.exit_code is None:
                code = process.end()
                if code:
                    logger.warning("Triton ended with code %d: %s", code, explain(process.log()))
        finally:
            if self._run_directory is not None:
                shutil.rmtree(self._run_directory, ignore_errors=True)
                self._run_directory = None

    def restart(self) -> None:
        """Kill the server, whatever state it is in, and start it again on the same ports.

        Raises:
            LocalTritonError: It does not start again.
        """
        if self._process is not None:
            # A server whose backend process died would use up its whole exit timeout.
            self._process.kill()
        self._launch()

    def models(self) -> list[tuple[str, str]]:
        """Name and version of every model that Triton calls ready.

        Raises:
            OSError: The server does not answer.
        """
        return self._probe.models()

    def peak_memory_mb(self) -> float:
        """Upper bound of the memory that the server and its backend processes have held, in MB.

        Raises:
            LocalTritonError: The server does not run.
        """
        if self._process is None:
            raise LocalTritonError("Triton does not run, so it holds no memory")
        return self._process.peak_memory_mb()

    def check(self, timeout_s: float = PROBE_TIMEOUT_S) -> list[str]:
        """Infer on every ready model; one sentence for each failure, empty when all is well.

        Triton goes on calling itself ready after one of its backend processes has died; only an
        inference shows it.
        """
        if self._process is None or self._process.exit_code is not None:
            return ["the server process has ended"]
        try:
            models = self._probe.models()
            if not models and not self._models:
                return ["no model is ready"]
            absent = [name for name in self._models if name not in dict(models)]
            if absent:
                return [f"model '{name}' is not ready" for name in absent]
            failures = [self._probe.failure(name, version, timeout_s) for name, version in models]
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

    @property
    def _probe(self) -> HealthProbe:
        return HealthProbe(self._ports["HTTP"], self.admin_key)

    def _choose_ports(self) -> None:
        given = [port for port in self._wanted_ports.values() if port]
        if len(set(given)) < len(given):
            raise LocalTritonError(f"ports {given}: expected three different ones")
        for name, port in self._wanted_ports.items():
            if port:
                check_free(name, port)
        free = iter(free_ports(len(self._wanted_ports)))
        self._ports = {name: port or next(free) for name, port in self._wanted_ports.items()}

    def _launch(self) -> None:
        """Start the server and wait for it; leaves nothing on failure."""
        installation, run_directory = self._installation, self._run_directory
        if installation is None or run_directory is None:
            raise LocalTritonError("Triton is not started")
        process = self._process = ServerProcess(
            self._command(installation, run_directory),
            {
                "HOME": os.environ.get("HOME", "/"),
                "PATH": f"{installation.bin}:{os.environ.get('PATH', os.defpath)}",
                "LD_LIBRARY_PATH": installation.library_path,
                **{k: v for k, v in os.environ.items() if k.startswith(("CUDA_", "NVIDIA_"))},
                **({} if self._uses_gpu else {"CUDA_VISIBLE_DEVICES": "-1"}),
            },
            run_directory,
            self._exit_timeout_s,
        )
        try:
            self._wait_until_ready(process)
        except BaseException:
            process.end()
            raise

    def _command(self, installation: Installation, run_directory: Path) -> list[str]:
        restricted = f"{_RESTRICTED}:{ADMIN_HEADER}={self.admin_key}"
        return [
            str(installation.server / "bin" / "tritonserver"),
            f"--model-repository={plain_path(self._repository, run_directory / 'models')}",
            f"--model-control-mode={'explicit' if self._models else 'none'}",
            *(f"--load-model={name}" for name in self._models),
            # The exported configs are complete, and guessing costs each model a second.
            "--disable-auto-complete-config",
            *([] if self._uses_gpu else ["--model-config-name=cpu"]),
            f"--backend-directory={run_directory / 'backends'}",
            f"--cache-directory={installation.server / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix(run_directory)}",
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

    def _wait_until_ready(self, process: ServerProcess) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while True:
            if process.exit_code is not None:
                raise process.start_error(f"ended with code {process.exit_code}")
            if self._probe.is_ready():
                break
            if time.monotonic() > deadline:
                raise process.start_error(f"is not ready after {self._ready_timeout_s:g} s")
            time.sleep(0.05)
        failures = self.check(max(deadline - time.monotonic(), 1.0))
        if failures:
            raise LocalTritonError(f"Triton started, but {'; '.join(failures)}")
