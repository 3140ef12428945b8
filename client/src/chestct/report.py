"""The record of one scan, as it stands in every JSON line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chestct.contract import NOT_A_MEDICAL_DEVICE

if TYPE_CHECKING:
    import numpy as np

    from chestct.client import Predictions

__all__ = ["error_line", "json_text", "result_line"]


def result_line(
    path: str,
    predictions: Predictions,
    index: int,
    *,
    decode_ms: float,
    infer_ms: float,
    reasons: Sequence[str] = (),
) -> dict[str, Any]:
    """The record of a classified scan.

    Args:
        path: The scan, as the user named it.
        predictions: Answer that holds the scan.
        index: Place of the scan in that answer.
        decode_ms: Time to read, decode, window and resize it.
        infer_ms: Its share of the request that carried it: wall time over number of scans.
        reasons: What its file tells against it: `chestct.scan.Scan.reasons`.

    Returns:
        `path`, `status`, `label`, `probabilities`, `in_domain`, `reasons` (only if there are any:
        those of the file, then that of the network), `domain_distance`, `model`, `ms`, `notice`.
    """
    facts = predictions.facts
    why_not = [*reasons, *predictions.reasons[index]]
    return {
        "path": path,
        "status": "ok",
        "label": predictions.labels[index],
        "probabilities": {
            label: _shortest(value)
            for label, value in zip(facts.labels, predictions.probabilities[index], strict=True)
        },
        "in_domain": not why_not,
        **({"reasons": why_not} if why_not else {}),
        "domain_distance": _shortest(predictions.domain_distance[index]),
        "model": {
            "name": predictions.model_name,
            "version": predictions.model_version,
            "run": predictions.run,
        },
        "ms": {"decode": round(decode_ms, 3), "infer": round(infer_ms, 3)},
        "notice": predictions.notice,
    }


def error_line(path: str, error: Exception) -> dict[str, Any]:
    """The record of a scan that could not be classified: `path`, `status`, `error`, `notice`."""
    return {
        "path": path,
        "status": "error",
        "error": {"type": type(error).__name__, "message": str(error)},
        "notice": NOT_A_MEDICAL_DEVICE,
    }


def json_text(line: dict[str, Any]) -> str:
    """A record as one line of JSON, newline included, in ASCII whatever the path holds."""
    return json.dumps(line, allow_nan=False) + "\n"


def _shortest(value: np.float32) -> float:
    """The shortest number that reads back as the same float32: 0.1, not 0.10000000149."""
    return float(str(value))
