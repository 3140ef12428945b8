"""Guard process: runs `tritonserver` as its child and cleans up after it.

It is started by its file path with `python -I`, so it imports the standard library only. Its order
comes as JSON on stdin; the process number of the server goes to stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KILL_SIGNAL = signal.SIGUSR1  # ends the server without draining


def run(order: Mapping[str, Any]) -> int:
    """Run the server until it ends, then remove its processes and shared memory.

    SIGTERM, or the death of the process that started this one, asks the server to drain and end.
    The guard kills a server that takes too long, and any server on `KILL_SIGNAL`.

    Returns:
        The exit code of the server, 128 plus the number of the signal that ended it.
    """
    asked: set[int] = set()
    for number in (signal.SIGTERM, KILL_SIGNAL):
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
        if KILL_SIGNAL in asked or (deadline is not None and time.monotonic() > deadline):
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


if __name__ == "__main__":
    sys.exit(run(json.load(sys.stdin)))
