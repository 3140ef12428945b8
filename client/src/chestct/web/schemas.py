"""The bodies of the API in words and examples, for its OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from chestct.contract import NOT_A_MEDICAL_DEVICE, SCAN_SIZE

__all__ = ["CLASSIFY", "ErrorBody", "HealthBody", "ModelBody", "error_responses"]

Probability = Annotated[float, Field(ge=0, le=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorFacts(_Body):
    """What went wrong."""

    type: str = Field(examples=["ScanDecodeError"])
    message: str = Field(examples=["notes.txt: neither PNG, JPEG nor DICOM by its content"])
    kind: str = Field("", description="Of what is no axial slice by its tags: `coronal` and so on.")


class ErrorBody(_Body):
    """A refusal of the whole request."""

    error: ErrorFacts


class ModelName(_Body):
    """Which model answered."""

    name: str = Field(examples=["chestct"])
    version: str = Field(examples=["1"])
    run: str = Field(examples=["60ff88c87f7845a597c6515011b9a400"])


class Times(_Body):
    """Milliseconds: decoding in the worker, and the model's answer with wire and queue."""

    decode: float = Field(examples=[4.1])
    infer: float = Field(examples=[31.7])


class Raster(_Body):
    """A picture, row by row.

    `data` is base64 of `height * width * channels` numbers, little-endian: `uint8` grey or RGB, or
    `int16` in Hounsfield units.
    """

    width: int = Field(ge=1, le=512)
    height: int = Field(ge=1, le=512)
    channels: Literal[1, 3]
    kind: Literal["uint8", "int16"]
    data: str


class Size(_Body):
    """Of the picture in the file, in pixels."""

    width: int
    height: int


class Box(_Body):
    """The part of the original that the network saw, as parts of its height and width."""

    top: Probability
    left: Probability
    bottom: Probability
    right: Probability


class View(_Body):
    """Only with `images`: what is needed to show the slice.

    `network` is the very input of the network. Where `inverted`, low values of `original` are
    bright (MONOCHROME1). `activation_map` holds, for each label, class evidence at 14 x 14 places
    over `box`; its mean is the logit before temperature. Slices with the same `series` belong
    together; it is another word after a restart, and no UID.
    """

    network: Raster
    original: Raster
    inverted: bool
    size: Size
    box: Box
    activation_map: dict[str, list[list[float]]]
    series: str
    position_mm: float | None


class ResultBody(_Body):
    """The record of a classified slice."""

    path: str = Field(description="The file as it was named; `#` and a number for a frame.")
    status: Literal["ok"]
    label: str
    probabilities: dict[str, Probability] = Field(description="Calibrated; their sum is 1.")
    in_domain: bool
    reasons: list[str] = Field(default=[], description="Why the slice is out of domain.")
    domain_distance: float
    model: ModelName
    ms: Times
    notice: str
    view: View | None = None


class ErrorRecord(_Body):
    """The record of a file that could not be classified."""

    path: str
    status: Literal["error"]
    error: ErrorFacts
    notice: str


class ResultsBody(_Body):
    """One record for each slice, in the order of the files."""

    results: list[ResultBody | ErrorRecord]


class WindowBody(_Body):
    """Hounsfield units; DICOM PS3.3 C.11.2."""

    center_hu: float
    width_hu: float


class Limits(_Body):
    """Of one upload."""

    upload_bytes: int
    scans: int


class ModelBody(_Body):
    """What the served model tells of itself."""

    name: str
    version: str
    run: str
    precision: str
    labels: list[str]
    window: WindowBody
    temperature: float
    domain_threshold: float
    data_hash: str
    card: dict[str, Any] | None = Field(description="Summary of the model card, if published.")
    limits: Limits
    notice: str

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "chestct",
                    "version": "1",
                    "run": "60ff88c87f7845a597c6515011b9a400",
                    "precision": "int8",
                    "labels": ["adenocarcinoma", "normal"],
                    "window": {"center_hu": -600.0, "width_hu": 1500.0},
                    "temperature": 1.1,
                    "domain_threshold": 22.9,
                    "data_hash": "00" * 32,
                    "card": None,
                    "limits": {"upload_bytes": 268435456, "scans": 2000},
                    "notice": NOT_A_MEDICAL_DEVICE,
                }
            ]
        },
    )


class HealthBody(_Body):
    """The outcome of a real inference with a synthetic slice."""

    model: str
    version: str
    run: str
    latency_ms: float
    notice: str


RECORDS = [
    {
        "path": "slice.dcm",
        "status": "ok",
        "label": "normal",
        "probabilities": {"adenocarcinoma": 0.04, "normal": 0.96},
        "in_domain": True,
        "domain_distance": 16.7,
        "model": {"name": "chestct", "version": "1", "run": "60ff88c87f7845a597c6515011b9a400"},
        "ms": {"decode": 4.1, "infer": 31.7},
        "notice": NOT_A_MEDICAL_DEVICE,
    },
    {
        "path": "notes.txt",
        "status": "error",
        "error": {
            "type": "ScanDecodeError",
            "message": "notes.txt: neither PNG, JPEG nor DICOM by its content, "
            "expected an axial slice as PNG, JPEG or DICOM",
        },
        "notice": NOT_A_MEDICAL_DEVICE,
    },
]
MEANINGS = {
    400: "No file, or a broken body",
    401: "A token, or the proxy, is needed",
    403: "Sent by another site",
    408: "The upload took too long",
    413: "Too large",
    415: "No multipart/form-data",
    421: "This server has another name",
    429: "Too many uploads; see Retry-After",
    503: "No usable model, or too many uploads at once; see Retry-After",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of one address, for FastAPI; 421 is one of all."""
    return {
        status: {"model": ErrorBody, "description": MEANINGS[status]} for status in (*statuses, 421)
    }


CLASSIFY: dict[str, Any] = {
    "tags": ["scans"],
    "response_model": ResultsBody,
    "response_model_exclude_none": True,
    "responses": {
        200: {
            "description": f"Records. `network` pictures are {SCAN_SIZE} x {SCAN_SIZE}.",
            "content": {
                "application/json": {"example": {"results": RECORDS}},
                "application/x-ndjson": {
                    "schema": {"type": "string", "description": "One record for each line."}
                },
            },
        },
        **error_responses(400, 401, 403, 408, 413, 415, 429, 503),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["files"],
                        "properties": {
                            "files": {
                                "type": "array",
                                "minItems": 1,
                                "items": {"type": "string", "format": "binary"},
                                "description": "PNG, JPEG, DICOM, or a zip of them.",
                            }
                        },
                    }
                }
            },
        }
    },
}
