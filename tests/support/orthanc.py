"""Orthanc, a real PACS on this machine."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread

from tests.support.dcmtk import program
from tests.support.ports import free_port
from tests.support.waiting import until


class Orthanc:
    """A real PACS on this machine, reached by its REST interface."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.dicom_port, self.http_port = free_port(), free_port()
        config = {
            "Name": "test", "DicomAet": "ORTHANC", "DicomPort": self.dicom_port,
            "HttpPort": self.http_port, "RemoteAccessAllowed": False, "DicomCheckCalledAet": True,
            "AuthenticationEnabled": False, "Plugins": [], "DicomAlwaysAllowStore": True,
            "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "HttpsCACertificates": "", "StableAge": 1, "DicomAssociationCloseDelay": 0,
        }  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(config))
        self._log = (folder / "orthanc.log").open("wb")
        self._process = subprocess.Popen(
            [program("Orthanc"), folder / "orthanc.json"], stdout=self._log, stderr=self._log
        )
        until(self._is_up)

    def _is_up(self) -> bool:
        assert self._process.poll() is None, "Orthanc ended"
        try:
            return bool(self.get("/system"))
        except OSError:
            return False

    def call(self, path: str, data: bytes | None = None, method: str | None = None) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}{path}", data=data, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.call(path))

    def post(self, path: str, data: bytes) -> Any:
        return json.loads(self.call(path, data))

    def instances(self, modality: str) -> list[Dataset]:
        return [
            dcmread(BytesIO(self.call(f"/instances/{instance}/file")))
            for series in self.get("/series?expand")
            if series["MainDicomTags"]["Modality"] == modality
            for instance in series["Instances"]
        ]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        self._log.close()
