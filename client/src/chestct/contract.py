"""The contract between every client and the served model: names, dtypes, shapes, parameters.

The exported graph is written from this module, `config.pbtxt` is written from this module, and
the client compares what a server offers with this module before it sends a pixel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "INPUT_NAME",
    "LUNG_WINDOW",
    "MAP_SIZE",
    "MODEL_NAME",
    "NOT_A_MEDICAL_DEVICE",
    "OUTPUT_NAMES",
    "PREPARATION",
    "SCAN_SHAPE",
    "SCAN_SIZE",
    "ModelMetadata",
    "TensorSpec",
    "Window",
    "input_spec",
    "output_specs",
    "tensor_differences",
]

MODEL_NAME = "chestct"
INPUT_NAME = "scan"
OUTPUT_NAMES = ("probabilities", "activation_map", "domain_distance")
SCAN_SIZE = 224  # pixels; the input side of VGG-16 (Simonyan and Zisserman 2015, section 2.1)
SCAN_SHAPE = (SCAN_SIZE, SCAN_SIZE, 1)
MAP_SIZE = 14  # places along a side of block5_conv3: 224 / 2**4
# How `chestct.imaging` frames a slice; a model trained on other frames must not be fed these.
PREPARATION = "body-box-1"
NOT_A_MEDICAL_DEVICE = "Research use only. Not a medical device."


@dataclass(frozen=True)
class Window:
    """A linear grey window over Hounsfield units (DICOM PS3.3 C.11.2.1.2.1)."""

    center_hu: float
    width_hu: float

    def __post_init__(self) -> None:
        """Refuse a window that shows nothing.

        Raises:
            ValueError: A width below 1 HU (the least that DICOM allows) or a value not finite.
        """
        if not (math.isfinite(self.center_hu) and math.isfinite(self.width_hu)):
            raise ValueError(f"window {self.center_hu}/{self.width_hu} HU: values must be finite")
        if self.width_hu < 1:
            raise ValueError(f"window width {self.width_hu} HU: expected at least 1 HU")


LUNG_WINDOW = Window(center_hu=-600.0, width_hu=1500.0)


@dataclass(frozen=True)
class TensorSpec:
    """Name, Triton dtype and shape of one tensor; -1 stands for the batch axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def input_spec() -> TensorSpec:
    """`scan`: UINT8 (N, 224, 224, 1), 0 = floor of the window, 255 = its ceiling."""
    return TensorSpec(INPUT_NAME, "UINT8", (-1, *SCAN_SHAPE))


def output_specs(num_classes: int) -> tuple[TensorSpec, ...]:
    """The three outputs of a model with `num_classes` classes, all FP32.

    `probabilities` (N, C), rows sum to 1; `activation_map` (N, 14, 14, C), whose mean over the
    places is the logit before temperature; `domain_distance` (N, 1).
    """
    return (
        TensorSpec("probabilities", "FP32", (-1, num_classes)),
        TensorSpec("activation_map", "FP32", (-1, MAP_SIZE, MAP_SIZE, num_classes)),
        TensorSpec("domain_distance", "FP32", (-1, 1)),
    )


@dataclass(frozen=True)
class ModelMetadata:
    """Metadata of a served model, stored as `parameters` in its `config.pbtxt`.

    Attributes:
        class_names: One short name a class, in the order of the columns of `probabilities`.
        window: Window in which the network was trained; DICOM slices are shown to it in this one.
        temperature: Divisor of the logits, already inside the graph.
        domain_threshold: A scan whose `domain_distance` lies above it is out of domain.
        run: Identifier of the training run.
        data_hash: SHA-256 of the training scans.
        precision: `fp32`, `fp16` or `int8`.
        card: Summary of the model card, JSON; empty where none was published. Its `run` is that
            of the network whose scores it holds: for a compressed model, of its teacher.
        git_commit: Commit of the code that the run was made with; empty where it is not known.
    """

    class_names: tuple[str, ...]
    window: Window
    temperature: float
    domain_threshold: float
    run: str
    data_hash: str
    precision: str = "fp32"
    card: str = ""
    git_commit: str = ""

    def __post_init__(self) -> None:
        """Refuse facts that no model can have.

        Raises:
            ValueError: Fewer than two labels, repeated labels, or a number not positive.
        """
        if len(self.class_names) < 2 or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"labels {self.class_names}: expected at least two, all different")
        for name in ("temperature", "domain_threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}: expected a positive number")

    def to_parameters(self) -> dict[str, str]:
        """These facts as the string parameters of `config.pbtxt`."""
        return {
            "labels": json.dumps(list(self.class_names)),
            "window_center_hu": repr(self.window.center_hu),
            "window_width_hu": repr(self.window.width_hu),
            "temperature": repr(self.temperature),
            "domain_threshold": repr(self.domain_threshold),
            "input_size": str(SCAN_SIZE),
            "preparation": PREPARATION,
            "training_run": self.run,
            "data_hash": self.data_hash,
            "precision": self.precision,
            **({"card": self.card} if self.card else {}),
            **({"git_commit": self.git_commit} if self.git_commit else {}),
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ModelMetadata:
        """Facts from the string parameters of a server's model config.

        Raises:
            ValueError: Parameters are missing or unreadable; the message lists all of them.
        """
        wrong: list[str] = []

        def read(key: str) -> str:
            if key not in parameters:
                wrong.append(f"parameter {key!r} is missing")
            return parameters.get(key, "")

        def number(key: str) -> float:
            text = read(key)
            try:
                return float(text)
            except ValueError:
                if key in parameters:
                    wrong.append(f"parameter {key!r} is {text!r}, expected a number")
                return 1.0

        labels_text = read("labels")
        try:
            labels = tuple(str(label) for label in json.loads(labels_text))
        except (ValueError, TypeError):
            labels = ()
            if labels_text:
                wrong.append(f"parameter 'labels' is {labels_text!r}, expected a JSON list")
        for key, expected in (("input_size", str(SCAN_SIZE)), ("preparation", PREPARATION)):
            found = read(key)
            if found and found != expected:
                wrong.append(f"parameter {key!r} is {found!r}, expected {expected!r}")
        center, width = number("window_center_hu"), number("window_width_hu")
        temperature, threshold = number("temperature"), number("domain_threshold")
        run, data_hash, precision = read("training_run"), read("data_hash"), read("precision")
        if wrong:
            raise ValueError("; ".join(wrong))
        window, card = Window(center, width), parameters.get("card", "")
        commit = parameters.get("git_commit", "")
        return cls(labels, window, temperature, threshold, run, data_hash, precision, card, commit)


def tensor_differences(
    kind: str, expected: Sequence[TensorSpec], found: Sequence[TensorSpec]
) -> list[str]:
    """Every difference between expected and found tensors, one sentence each.

    Args:
        kind: `input` or `output`, for the sentences.
        expected: What the contract asks for.
        found: What a server or a model file offers.
    """
    by_name = {spec.name: spec for spec in found}
    differences = []
    for want in expected:
        have = by_name.pop(want.name, None)
        if have is None:
            differences.append(f"{kind} {want.name!r} is missing")
            continue
        if have.dtype != want.dtype:
            differences.append(
                f"{kind} {want.name!r} has dtype {have.dtype}, expected {want.dtype}"
            )
        if tuple(have.shape) != want.shape:
            differences.append(
                f"{kind} {want.name!r} has shape {tuple(have.shape)}, expected {want.shape}"
            )
    differences += [f"{kind} {name!r} is not in the contract" for name in by_name]
    return differences
