"""The `tritonserver` process: free ports, start behind a guard process, log, memory, end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from serving.local import guard
from serving.local.installation import LocalTritonError

HOST = "127.0.0.1"
_KILL_TIMEOUT_S = 30.0  # on a machine under load
KILL_MARGIN_S = 5.0  # Triton itself needs up to 3 s after its last request


class PortTakenError(LocalTritonError):
    """Another process took a port between its choice and Triton's bind."""


def check_free(name: str, port: int) -> None:
    """Check that a port of `HOST` can be bound.

    Raises:
        LocalTritonError: It cannot.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "expected 1 to 65535"
            raise LocalTritonError(
                f"{name} port {port} on {HOST}: {reason}. Stop what uses it, or choose another port"
            ) from error


def free_ports(num_ports: int) -> list[int]:
    """Different ports of `HOST` that no process listens on."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for listener in listeners:
            listener.bind((HOST, 0))
        return [listener.getsockname()[1] for listener in listeners]


def explain(log: str) -> str:
    """Why a server ended, from its log: the models that failed to load, or else the last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("+-", "|"))]
    return "; ".join(_failed_loads(log) or lines[-5:]) or "it wrote nothing"


def _failed_loads(log: str) -> list[str]:
    """One sentence for each model that did not load, from Triton's log."""
    reasons = []
    for quoted in re.findall(r'\] ("(?:failed to load|Poll failed)[^\n]*")$', log, re.MULTILINE):
        message = json.loads(quoted).split("\n\nAt:")[0]
        if ":" in message:
            reasons.append(message.replace("Internal: TritonModelException: ", "").strip())
    return reasons


def log_path(run_directory: Path) -> Path:
    """The log of the server with this run directory."""
    return run_directory / "server.log"


def shm_prefix(run_directory: Path) -> str:
    """Start of the names of the server's shared memory."""
    return f"{run_directory.name}-"


class ServerProcess:
    """A running `tritonserver` behind its guard process (`serving.local.guard`).

    The guard ends the server, its backend processes and their shared memory, also when this
    process is killed.

    Attributes:
        pid: Process number of `tritonserver`.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        run_directory: Path,
        exit_timeout_s: float,
    ) -> None:
        """Starts the process; it is not ready yet.

        Args:
            command: Command line of the server.
            environment: Its environment variables.
            run_directory: Folder of the log, which the guard removes if this process is killed.
            exit_timeout_s: How long the server may take to drain.

        Raises:
            LocalTritonError: The command cannot be run.
        """
        order = {
            "command": list(command),
            "environment": dict(environment),
            "parent_pid": os.getpid(),
            "kill_after_s": exit_timeout_s + KILL_MARGIN_S,
            "shm_prefix": shm_prefix(run_directory),
            "run_directory": str(run_directory),
        }
        self._exit_timeout_s = exit_timeout_s
        self._log_path = log_path(run_directory)
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-I", guard.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process, which then drains
            )
        try:
            with cast("IO[str]", self._guard.stdin) as orders:
                json.dump(order, orders)
            with cast("IO[str]", self._guard.stdout) as answers:
                answer = answers.readline()
            if not answer:
                self._guard.wait(KILL_MARGIN_S)
                raise self.start_error("could not be run")
            self.pid = int(answer)
        except BaseException:
            self.end()
            raise

    @property
    def exit_code(self) -> int | None:
        """The exit code of the server, None while it runs."""
        return self._guard.poll()

    def end(self) -> int:
        """Let requests in flight finish and end the server; gives its exit code."""
        self._guard.terminate()
        return self._guard.wait(self._exit_timeout_s + 2 * KILL_MARGIN_S)

    def kill(self) -> None:
        """End the server at once; nothing happens where it has ended."""
        if self.exit_code is None:
            self._guard.send_signal(guard.KILL_SIGNAL)
            self._guard.wait(_KILL_TIMEOUT_S)

    def log(self) -> str:
        """The log since the start of this process."""
        return self._log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def start_error(self, event: str) -> LocalTritonError:
        """The error for a start that failed, explained by the log."""
        log = self.log()
        taken = re.search(rf"Socket '{re.escape(HOST)}:(\d+)' already in use", log)
        if taken:
            return PortTakenError(
                f"port {taken[1]} on {HOST}: Address already in use. Stop what uses it, or choose "
                "another port"
            )
        return LocalTritonError(f"Triton {event}: {explain(log)}")

    def peak_memory_mb(self) -> float:
        """Upper bound of the memory that the server and its backend processes have held, in MB.

        The sum of their peaks of resident memory (`VmHWM`, proc_pid_status(5)) since the start, in
        1e6 bytes. Pages that processes share are counted for each of them, and the peaks need not
        have come at the same time.

        Raises:
            LocalTritonError: The server does not run.
        """
        try:
            tasks = Path(f"/proc/{self.pid}/task").iterdir()
            children = [pid for task in tasks for pid in (task / "children").read_text().split()]
            texts = [Path(f"/proc/{pid}/status").read_text() for pid in (self.pid, *children)]
            peaks_kb = [int(re.findall(r"VmHWM:\s+(\d+) kB", text)[0]) for text in texts]
        except (OSError, IndexError) as error:  # an ended process has no peak
            raise LocalTritonError("Triton does not run, so it holds no memory") from error
        return sum(peaks_kb) * 1024 / 1e6  # the kernel calls 1024 bytes a kB
