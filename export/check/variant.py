"""Files of a model variant: a folder with `model.onnx` and `facts.json`."""

from __future__ import annotations

import json
from pathlib import Path

from chestct.contract import ModelMetadata


def require_file(
    path: Path,
    remedy: str = "make the variant first, by python -m export onnx (FP32), quantize (INT8), "
    "compress or engine",
) -> None:
    """Check that a file of a variant is there.

    Raises:
        ValueError: It is not; the message gives the remedy.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {remedy}")


def facts_of(variant: Path) -> ModelMetadata:
    """The metadata that lies beside the model of a variant, in `facts.json`.

    Raises:
        ValueError: There is none.
    """
    file = variant / "facts.json"
    require_file(file)
    return ModelMetadata.from_parameters(json.loads(file.read_text(encoding="utf-8")))
