"""Programs of Debian that speak DICOM, as peers of ours."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.waiting import until


def program(name: str) -> str:
    """A Debian program; pynetdicom installs others by the names of dcmtk into the environment."""
    found = shutil.which(name, path="/usr/bin:/usr/sbin:/usr/local/bin:/opt/homebrew/bin")
    if found is None:
        pytest.skip(f"no {name}: see .ci/run for the Debian packages")
    return found


class StoreScp:
    """dcmtk's storescp; its folder has every object that it took, its log every request."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._log_path = folder.parent / "storescp.log"
        folder.mkdir(exist_ok=True)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [program("storescp"), "-v", "-uf", "-od", folder, str(port)],
                stdout=log, stderr=log,
            )  # fmt: skip
        until(self._answers, "storescp")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log_path.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def num_requests(self) -> int:
        return self._log_path.read_text().count("Received Store Request")

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
