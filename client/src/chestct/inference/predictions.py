"""The outputs of the model for some scans, and their check against the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chestct.contract import (
    NOT_A_MEDICAL_DEVICE,
    SCAN_SHAPE,
    SCAN_SIZE,
    ModelMetadata,
    output_specs,
)
from chestct.errors import InferenceError

__all__ = ["Health", "Predictions"]

Float32Array = npt.NDArray[np.float32]
ScanArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Predictions:
    """The model's outputs for N scans.

    Attributes:
        probabilities: float32 (N, C), rows sum to 1, columns as in `metadata.class_names`.
        activation_map: float32 (N, 14, 14, C), class evidence at each place; None if not asked for.
        domain_distance: float32 (N,), how far from the training scans.
        metadata: Labels, window, training run and so on of the model that answered.
        model_name: Its name.
        model_version: Its version.
    """

    probabilities: Float32Array
    activation_map: Float32Array | None
    domain_distance: Float32Array
    metadata: ModelMetadata
    model_name: str
    model_version: str

    @property
    def predicted_labels(self) -> list[str]:
        """The most probable label of each scan."""
        return [self.metadata.class_names[index] for index in self.probabilities.argmax(axis=1)]

    @property
    def in_domain(self) -> npt.NDArray[np.bool_]:
        """Bool (N,): whether each scan resembles the training scans to the network.

        What a file itself tells against a scan stands in `Scan.reasons`.
        """
        inside: npt.NDArray[np.bool_] = self.domain_distance <= self.metadata.domain_threshold
        return inside

    @property
    def reasons(self) -> list[list[str]]:
        """Why each scan is not in domain, in words; empty for one that is."""
        return [
            []
            if is_inside
            else [
                f"unlike the training scans: distance {distance:.1f}, "
                f"limit {self.metadata.domain_threshold:.1f}"
            ]
            for is_inside, distance in zip(self.in_domain, self.domain_distance, strict=True)
        ]

    @property
    def run(self) -> str:
        """The training run of the model that answered."""
        return self.metadata.run

    @property
    def notice(self) -> str:
        """The notice that goes with every answer: not a medical device."""
        return NOT_A_MEDICAL_DEVICE


@dataclass(frozen=True)
class Health:
    """A model that has just answered a real request.

    Attributes:
        model: Its name.
        version: Its version.
        run: Its training run.
        latency_ms: Wall time of the request, wire included.
        notice: The notice that goes with every answer: not a medical device.
    """

    model: str
    version: str
    run: str
    latency_ms: float
    notice: str = NOT_A_MEDICAL_DEVICE


def require_scans(scans: ScanArray) -> None:
    expected = ("N", *SCAN_SHAPE)
    if scans.dtype != np.uint8 or scans.ndim != 4 or scans.shape[1:] != SCAN_SHAPE:
        raise ValueError(f"scans are {scans.dtype} {scans.shape}: expected uint8 {expected}")
    if len(scans) == 0:
        raise ValueError("no scans: expected at least one")


def output_arrays(
    tensors: Mapping[str, npt.NDArray[Any]], names: Sequence[str], num_scans: int, num_classes: int
) -> dict[str, Float32Array]:
    """The outputs by name, each of the shape and dtype of the contract and finite.

    Raises:
        InferenceError: An output is missing, empty, of another shape or dtype, or not finite.
    """
    arrays = {}
    for spec in output_specs(num_classes):
        if spec.name not in names:
            continue
        expected = (num_scans, *spec.shape[1:])
        array = tensors.get(spec.name)
        if array is None or array.shape != expected or array.dtype != np.float32:
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            hint = ""
            if array is not None and array.size == 0:
                hint = ". A Python backend under numpy 2 sends empty tensors: it needs numpy < 2"
            raise InferenceError(
                f"output {spec.name!r} is {found}, expected float32 {expected}{hint}"
            )
        if not np.isfinite(array).all():
            raise InferenceError(f"output {spec.name!r} holds values that are not finite")
        arrays[spec.name] = array
    return arrays


def synthetic_scan() -> ScanArray:
    """One slice with texture, uint8 (1, 224, 224, 1): two dark fields in a grey body, and noise."""
    rows, columns = np.mgrid[-1 : 1 : SCAN_SIZE * 1j, -1 : 1 : SCAN_SIZE * 1j]
    body = 150.0 * (rows**2 / 0.6 + columns**2 / 0.9 < 1)
    lungs = rows**2 / 0.3 + (np.abs(columns) - 0.42) ** 2 / 0.1 < 1
    noise = np.random.default_rng(0).normal(0, 6, rows.shape)
    grey = np.where(lungs, 40 + 20 * rows, body) + noise
    scan: ScanArray = np.clip(grey, 0, 255).astype(np.uint8)[np.newaxis, :, :, np.newaxis]
    return scan
