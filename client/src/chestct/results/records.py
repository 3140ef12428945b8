"""The record of one scan, as it stands in every JSON line, and as a row of a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from chestct.contract import NOT_A_MEDICAL_DEVICE

if TYPE_CHECKING:
    import numpy as np

    from chestct.inference.predictions import Predictions

__all__ = [
    "Column",
    "columns_of",
    "error_line",
    "flat_record",
    "json_text",
    "nested_record",
    "plain_text",
    "result_line",
]


@dataclass(frozen=True)
class Column:
    """One column of a table of records.

    Attributes:
        name: Key of the record; `key.inner` for what stands in an object within it.
        kind: What its values are; `texts` is a list of sentences, `json` anything else.
    """

    name: str
    kind: Literal["text", "texts", "number", "count", "truth", "json"] = "text"


def columns_of(labels: Sequence[str]) -> list[Column]:
    """The columns of every record of a model with these labels, in order.

    Those of series, as made by `chestct.results.series.series_record`, are among them.
    """
    return [
        Column("path"),
        Column("status"),
        Column("label"),
        *(Column(f"probabilities.{label}", "number") for label in labels),
        Column("in_domain", "truth"),
        Column("reasons", "texts"),
        Column("domain_distance", "number"),
        Column("model.name"),
        Column("model.version"),
        Column("model.run"),
        Column("ms.decode", "number"),
        Column("ms.infer", "number"),
        Column("error.type"),
        Column("error.kind"),
        Column("error.message"),
        Column("series", "count"),
        Column("study_uid"),
        Column("series_uid"),
        Column("sop_uid"),
        Column("num_slices", "count"),
        Column("num_out_of_domain", "count"),
        Column("num_failed", "count"),
        Column("aggregation.rule"),
        Column("aggregation.num_slices", "count"),
        Column("slice.path"),
        Column("slice.position_mm", "number"),
        Column("slice.evidence", "number"),
        Column("kernel"),
        Column("gaps_mm", "json"),
        Column("warnings", "texts"),
        Column("notice"),
    ]


def flat_record(record: Mapping[str, Any], columns: Sequence[Column]) -> list[Any]:
    """The values of a record in the order of the columns; None for what it does not have.

    Raises:
        ValueError: The record holds something that has no column.
    """
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": kept for inner, kept in value.items()})
        else:
            flat[key] = value
    row = [flat.pop(column.name, None) for column in columns]
    if flat:
        raise ValueError(f"no column for {', '.join(flat)} in this output")
    return row


def nested_record(row: Sequence[Any], columns: Sequence[Column]) -> dict[str, Any]:
    """The record that `flat_record` made a row of."""
    record: dict[str, Any] = {}
    for value, column in zip(row, columns, strict=True):
        key, dot, inner = column.name.partition(".")
        if value is None:
            continue
        if dot:
            record.setdefault(key, {})[inner] = value
        else:
            record[key] = value
    return record


def plain_text(text: str) -> str:
    r"""Text on one line that any encoding of Unicode takes.

    Control characters and the bytes of file names that are not UTF-8 become escapes such as
    `\n` and `\udcff`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
        reasons: What its file tells against it: `chestct.imaging.scan.Scan.reasons`.

    Returns:
        `path`, `status`, `label`, `probabilities`, `in_domain`, `reasons` (only if there are any:
        those of the file, then that of the network), `domain_distance`, `model`, `ms`, `notice`.
    """
    facts = predictions.metadata
    why_not = [*reasons, *predictions.reasons[index]]
    return {
        "path": path,
        "status": "ok",
        "label": predictions.predicted_labels[index],
        "probabilities": {
            label: _shortest(value)
            for label, value in zip(
                facts.class_names, predictions.probabilities[index], strict=True
            )
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
    """The record of a scan that could not be classified: `path`, `status`, `error`, `notice`.

    `error` holds `type`, `message` and, of what is no axial CT slice, the `kind` of thing it is.
    """
    kind = getattr(error, "kind", "")
    return {
        "path": path,
        "status": "error",
        "error": {
            "type": type(error).__name__,
            **({"kind": kind} if kind else {}),
            "message": str(error),
        },
        "notice": NOT_A_MEDICAL_DEVICE,
    }


def json_text(line: dict[str, Any]) -> str:
    """A record as one line of JSON, newline included, in ASCII whatever the path holds."""
    return json.dumps(line, allow_nan=False) + "\n"


def _shortest(value: np.float32) -> float:
    """The shortest number that reads back as the same float32: 0.1, not 0.10000000149."""
    return float(str(value))
