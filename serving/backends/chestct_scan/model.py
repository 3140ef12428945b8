"""Triton backend called `chestct_scan`: decode an image file into the network's uint8 input.

First step of the ensemble `chestct_encoded`. Decoding, windowing and resizing are those of
`chestct.imaging.prepare`, so a file gives the same numbers here as in the client. `serving.local`
lays the package `chestct` beside this file; elsewhere it is installed into the Python that Triton
runs.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

sys.path.append(str(Path(__file__).parent))

from chestct.contract import INPUT_NAME, NOT_A_MEDICAL_DEVICE, ModelMetadata
from chestct.errors import ScanDecodeError
from chestct.imaging.limits import DECODE_MEMORY_BYTES, limit_memory
from chestct.imaging.prepare import inspect_bytes

Tensors = dict[str, np.ndarray]


def facts_of(config: Mapping[str, Any]) -> ModelMetadata:
    """Labels, window and domain threshold, from the parameters of a model config.

    Raises:
        ValueError: Parameters are missing or unreadable.
    """
    found = config.get("parameters", {})
    return ModelMetadata.from_parameters({key: item["string_value"] for key, item in found.items()})


def plain(data: bytes) -> bytes:
    """The file itself, where `data` is its base64 text: all that a JSON request can carry.

    No PNG, JPEG or DICOM file can be mistaken: each has bytes that are not of base64 (RFC 4648,
    section 4) within its first 140.
    """
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        return data


def decoded(files: np.ndarray, facts: ModelMetadata) -> Tensors:
    """The outputs for the files of one request.

    Args:
        files: bytes (N, 1), whole files, as they are or as base64.
        facts: Labels, window and domain threshold of the model that answers.

    Returns:
        `scan` uint8 (N, 224, 224, 1), 0 = floor of the window; `reasons` bytes (N, 1), a JSON list
        of sentences that speak against the scan; and, the same for each scan, `labels` bytes
        (N, C), `domain_threshold` float32 (N, 1) and `notice` bytes (N, 1).

    Raises:
        ScanDecodeError: One of the files cannot be decoded; the message says which.
    """
    num_files = len(files)
    names = (
        ["file"]
        if num_files == 1
        else [f"file {n} of {num_files}" for n in range(1, num_files + 1)]
    )
    scans = [
        inspect_bytes(plain(data), name, facts.window)
        for data, name in zip(files[:, 0], names, strict=True)
    ]

    def texts(rows: list[list[str]]) -> np.ndarray:
        return np.array([[text.encode() for text in row] for row in rows], dtype=object)

    return {
        INPUT_NAME: np.stack([scan.pixels for scan in scans]),
        "reasons": texts([[json.dumps(scan.reasons)] for scan in scans]),
        "labels": texts([list(facts.class_names)] * num_files),
        "domain_threshold": np.full((num_files, 1), facts.domain_threshold, np.float32),
        "notice": texts([[NOT_A_MEDICAL_DEVICE]] * num_files),
    }


class TritonPythonModel:
    """One instance of the step, in a process of its own; Triton calls its methods."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Leave the config as `export repository` wrote it."""
        return auto_complete_model_config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read labels, window and threshold from the model config, and bound the memory."""
        with contextlib.suppress(ValueError, OSError):  # the container has a lower limit
            limit_memory(DECODE_MEMORY_BYTES)
        self.facts = facts_of(json.loads(args["model_config"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Decode the files of each request; a bad file fails the request that brought it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        files = pb.get_input_tensor_by_name(request, "file").as_numpy()
        try:
            outputs = decoded(files, self.facts)
        except ScanDecodeError as error:
            return _refusal(f"{type(error).__name__}: {error}")
        except MemoryError:
            return _refusal("decoding needs more memory than it may take. Export the slice again.")
        wanted = request.requested_output_names()
        return pb.InferenceResponse([pb.Tensor(name, outputs[name]) for name in wanted])


def _refusal(message: str) -> Any:
    # Without the code it would be an INTERNAL error, HTTP 500: the server's fault.
    return pb.InferenceResponse([], pb.TritonError(message, pb.TritonError.INVALID_ARG))
