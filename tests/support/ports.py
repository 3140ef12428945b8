"""Ports for programs that cannot take port 0 and tell which one they were given."""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
PORTS = range(20_000, 32_768)  # from 32768 on Linux deals them out to whoever asks for port 0


def free_port() -> int:
    """A TCP port that is free now, and that no other caller gets while this process lives.

    The UDP port of the same number serves as the lock: other workers and other test runs on this
    machine find it taken, and it needs no file that somebody would have to remove.
    """
    for port in random.sample(PORTS, len(PORTS)):
        lock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            lock.bind((HOST, port))
            with socket.socket() as probe:
                probe.bind((HOST, port))
        except OSError:
            lock.close()
            continue
        lock.detach()  # held until the process ends
        return port
    raise AssertionError(f"no free port in {PORTS}")
