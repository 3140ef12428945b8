"""Health of a running Triton over HTTP: readiness, its models, an inference on zeros."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.local.process import HOST

ADMIN_HEADER = "admin-key"
PROBE_TIMEOUT_S = 30.0
_READY_TIMEOUT_S = 5.0
_ELEMENT_BYTES = {"BOOL": 1, "BYTES": 4}  # of an empty string: its length, 0, as four bytes
_ELEMENT_BYTES |= {
    f"{kind}{bits}": bits // 8 for kind in ("UINT", "INT", "FP", "BF") for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class HealthProbe:
    """Asks the Triton that listens on a port of this machine.

    Attributes:
        port: Port of plain HTTP.
        admin_key: Key of the admin APIs.
    """

    port: int
    admin_key: str

    def is_ready(self) -> bool:
        """Whether the server calls itself and all its models ready; false without an answer."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, _ = self._request("GET", "/v2/health/ready", timeout_s=_READY_TIMEOUT_S)
            return status == http.client.OK
        return False

    def models(self) -> list[tuple[str, str]]:
        """Name and version of every model that Triton calls ready.

        Raises:
            OSError: The server does not answer.
        """
        status, body = self._request("POST", "/v2/repository/index", b"{}")
        if status != http.client.OK:
            raise ConnectionError(f"the list of models is refused: {body.decode(errors='replace')}")
        index = json.loads(body)
        return [(m["name"], m["version"]) for m in index if m.get("state") == "READY"]

    def failure(self, model: str, version: str, timeout_s: float) -> str | None:
        """Why an inference on zeros fails, None if it succeeds; a full queue (503) counts as alive.

        Raises:
            OSError: The server does not answer.
            http.client.HTTPException: It breaks off.
        """
        path = f"/v2/models/{model}/versions/{version}"
        try:
            status, body = self._request("GET", path, timeout_s=timeout_s)
            if status == http.client.OK:
                metadata = json.loads(body)
                request, headers = _zeros_request(metadata)
                status, body = self._request("POST", f"{path}/infer", request, timeout_s, headers)
                # A model that decodes files refuses an empty string, and is alive.
                takes_files = any(t["datatype"] == "BYTES" for t in metadata["inputs"])
                if status == http.client.BAD_REQUEST and takes_files:
                    return None
        except TimeoutError:
            return f"model '{model}' version {version} did not answer within {timeout_s:.0f} s"
        if status in (http.client.OK, http.client.SERVICE_UNAVAILABLE):
            return None
        reason = body.decode(errors="replace")[:500]
        return f"model '{model}' version {version} answers with HTTP {status}: {reason}"

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        timeout_s: float = PROBE_TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        # An idle connection would hold up the server's exit.
        fixed = {ADMIN_HEADER: self.admin_key, "Connection": "close"}
        with contextlib.closing(connection):
            connection.request(method, path, body, {**fixed, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()


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
