"""The record of a scan or series: its fields, JSON line, table columns and JSON Schema.

`SliceResult` and `SeriesResult` state every field once. The columns of CSV and Parquet, the JSON
Schema (`chestct schema`), the OpenAPI description of the page and the table in the README are
derived from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from chestct.contract import NOT_A_MEDICAL_DEVICE

if TYPE_CHECKING:
    import numpy as np

    from chestct.inference.predictions import Predictions

__all__ = [
    "KeySlice",
    "Probability",
    "Record",
    "SeriesResult",
    "SliceResult",
    "error_line",
    "fields_of",
    "json_schema",
    "json_text",
    "plain_text",
    "record_schema",
    "result_line",
]

Record = Mapping[str, Any]  # a `SliceResult` or a `SeriesResult`
Status = Literal["ok", "error"]


# Fields that are always there with one `status`, and never with the other one.
ONLY_WITH: dict[str, Status] = {
    **dict.fromkeys(("label", "probabilities", "in_domain", "domain_distance", "model"), "ok"),
    **dict.fromkeys(("ms", "aggregation", "slice"), "ok"),
    "error": "error",
}
Probability = Annotated[float, {"minimum": 0, "maximum": 1}]  # as JSON Schema says it


class ModelName(TypedDict):
    """The model that answered.

    Attributes:
        name: Name in the model repository.
        version: Served version.
        run: Training run.
    """

    name: str
    version: str
    run: str


class Times(TypedDict):
    """Milliseconds.

    Attributes:
        decode: Reading, decoding, windowing and resizing the scan.
        infer: Wall time of the request over the number of its scans.
    """

    decode: float
    infer: float


class Failure(TypedDict):
    """Why there is no classification.

    Attributes:
        type: Class of the error in `chestct.errors`.
        kind: What a skipped file is: `localizer`, `coronal`, `other modality` ...
        message: What was found, what was expected, and what to do.
    """

    type: str
    kind: NotRequired[str]
    message: str


class Aggregation(TypedDict):
    """How slices were summed up.

    Attributes:
        rule: The rule in words.
        num_slices: How many slices it took.
    """

    rule: str
    num_slices: int


class KeySlice(TypedDict):
    """The slice with the highest probability of anything but `normal`, or else of `label`.

    Attributes:
        path: Its `path`.
        position_mm: Along the axis of the patient, upwards.
        evidence: Probability of everything but `normal`.
    """

    path: str
    position_mm: NotRequired[float]
    evidence: NotRequired[float]


class SliceResult(TypedDict):
    """The result of one slice.

    Attributes:
        path: The file as it was named; `a.zip!b` in an archive, `a.dcm#3` for a frame.
        status: `ok` or `error`: whether there is a classification.
        label: The most probable class.
        probabilities: By class, calibrated; their sum is 1.
        in_domain: Whether nothing speaks against an axial chest-CT slice.
        reasons: Why it is out of domain: of the file, then of the network.
        domain_distance: Distance from the training scans.
        model: The model that answered.
        ms: Milliseconds.
        error: Why there is no classification.
        series: Number of its DICOM series within its folder or archive.
        study_uid: Study Instance UID, if asked for.
        series_uid: Series Instance UID, if asked for.
        sop_uid: SOP Instance UID, if asked for.
        notice: That this is for research use only.
    """

    path: str
    status: Status
    label: NotRequired[str]
    probabilities: NotRequired[dict[str, Probability]]
    in_domain: NotRequired[bool]
    reasons: NotRequired[list[str]]
    domain_distance: NotRequired[float]
    model: NotRequired[ModelName]
    ms: NotRequired[Times]
    error: NotRequired[Failure]
    series: NotRequired[int]
    study_uid: NotRequired[str]
    series_uid: NotRequired[str]
    sop_uid: NotRequired[str]
    notice: str


class SeriesResult(TypedDict):
    """The result of one series of slices, by the rule of `chestct.results.series`.

    Attributes:
        path: The folder, archive or file that holds the slices.
        status: `error` where no slice is in domain.
        label: The most probable class.
        probabilities: By class: the mean over the slices that `aggregation` took.
        error: Why there is no classification.
        series: Its number within `path`.
        study_uid: Study Instance UID, if asked for.
        series_uid: Series Instance UID, if asked for.
        num_slices: Different slices that were classified.
        num_out_of_domain: How many of these are out of domain and left out.
        num_failed: Files of the folder that could not be read.
        aggregation: How the slices were summed up.
        slice: The slice that decides most.
        kernel: Convolution kernel, if all slices have the same.
        gaps_mm: Positions below and above each gap between slices.
        warnings: What makes the series doubtful.
        notice: That this is for research use only.
    """

    path: str
    status: Status
    label: NotRequired[str]
    probabilities: NotRequired[dict[str, Probability]]
    error: NotRequired[Failure]
    series: NotRequired[int]
    study_uid: NotRequired[str]
    series_uid: NotRequired[str]
    num_slices: int
    num_out_of_domain: int
    num_failed: int
    aggregation: NotRequired[Aggregation]
    slice: NotRequired[KeySlice]
    kernel: NotRequired[str]
    gaps_mm: list[list[float]]
    warnings: list[str]
    notice: str


def record_schema() -> dict[str, Any]:
    """The JSON Schema of a line of JSON: of a slice or of a series, classified or not."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of `chestct classify --json`",
        "anyOf": [*json_schema(SliceResult)["anyOf"], *json_schema(SeriesResult)["anyOf"]],
    }


def json_schema(hint: Any) -> dict[str, Any]:
    """The JSON Schema of a type: a `TypedDict` of what records hold, or one of their fields.

    A `TypedDict` whose fields depend on `status` becomes one object for each status.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        fields = fields_of(hint)
        if not any(field.when for field in fields):
            return _object_schema(hint, fields)
        variants = []
        for status in get_args(Status):
            there = [field for field in fields if field.when in (None, status)]
            schema = _object_schema(hint, there)
            schema["properties"]["status"]["enum"] = [status]
            variants.append(schema)
        return {"anyOf": variants}
    if origin is Annotated:
        return {**json_schema(arguments[0]), **arguments[1]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": json_schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": json_schema(arguments[1])}
    if origin is UnionType:
        return {"anyOf": [json_schema(each) for each in arguments]}
    names = {str: "string", float: "number", int: "integer", bool: "boolean", NoneType: "null"}
    return {"type": names[hint]}


def _object_schema(record: Any, fields: Sequence[Field]) -> dict[str, Any]:
    return {
        "title": record.__name__,
        "type": "object",
        "properties": {
            field.name: json_schema(field.hint)
            | ({"description": field.meaning} if field.meaning else {})
            for field in fields
        },
        "required": [field.name for field in fields if field.is_required or field.when],
        "additionalProperties": False,
    }


@dataclass(frozen=True)
class Field:
    """One field of a `TypedDict`.

    Attributes:
        name: Its key.
        hint: Its type without `NotRequired`.
        is_required: Whether it is always there.
        when: The `status` with which it is always there, and without which it never is.
        meaning: By the docstring of the `TypedDict`.
    """

    name: str
    hint: Any
    is_required: bool
    when: Status | None
    meaning: str


def fields_of(record: Any) -> list[Field]:
    """The fields of a `TypedDict` in the order of their declaration."""
    meanings = dict(re.findall(r"^ {8}(\w+): (.+)$", record.__doc__ or "", re.MULTILINE))
    fields = []
    for name, hint in get_type_hints(record, include_extras=True).items():
        is_required = get_origin(hint) is not NotRequired
        hint = hint if is_required else get_args(hint)[0]
        when = None if is_required else ONLY_WITH.get(name)
        fields.append(Field(name, hint, is_required, when, meanings.get(name, "")))
    return fields


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
) -> SliceResult:
    """The record of a classified slice.

    Args:
        path: The scan, as the user named it.
        predictions: Answer that holds the scan.
        index: Place of the scan in that answer.
        decode_ms: Time to read, decode, window and resize it.
        infer_ms: Its share of the request that carried it: wall time over number of scans.
        reasons: What its file tells against it: `chestct.imaging.prepare.Scan.reasons`.

    Returns:
        With `reasons` only if there are any: those of the file, then that of the network.
    """
    facts = predictions.metadata
    why_not = [*reasons, *predictions.reasons[index]]
    line: SliceResult = {
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
        "reasons": why_not,
        "domain_distance": _shortest(predictions.domain_distance[index]),
        "model": {
            "name": predictions.model_name,
            "version": predictions.model_version,
            "run": predictions.run,
        },
        "ms": {"decode": round(decode_ms, 3), "infer": round(infer_ms, 3)},
        "notice": predictions.notice,
    }
    if not why_not:
        del line["reasons"]
    return line


def error_line(path: str, error: Exception) -> SliceResult:
    """The record of a slice that could not be classified."""
    failure: Failure = {"type": type(error).__name__, "message": str(error)}
    if kind := getattr(error, "kind", ""):
        failure = {"type": failure["type"], "kind": kind, "message": failure["message"]}
    return {"path": path, "status": "error", "error": failure, "notice": NOT_A_MEDICAL_DEVICE}


def json_text(line: Record) -> str:
    """A record as one line of JSON, newline included, in ASCII whatever the path holds.

    Its fields come in the order in which they are declared above, `notice` last.
    """
    ordered = dict(sorted(line.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))))
    return json.dumps(ordered, allow_nan=False) + "\n"


def _shortest(value: np.float32) -> float:
    """The shortest number that reads back as the same float32: 0.1, not 0.10000000149."""
    return float(str(value))


_FIELDS = (*fields_of(SliceResult)[:-1], *fields_of(SeriesResult))
_ORDER = {name: n for n, name in enumerate(dict.fromkeys(field.name for field in _FIELDS))}
