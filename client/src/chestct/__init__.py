"""Thin client for a chest-CT classifier served by NVIDIA Triton. Not a medical device."""

from chestct.batch.pipeline import classify_paths
from chestct.contract import LUNG_WINDOW, NOT_A_MEDICAL_DEVICE, ModelFacts, Window
from chestct.errors import (
    ChestCTError,
    ContractError,
    DecoderCrashedError,
    InferenceError,
    InferenceTimeoutError,
    OutOfDomainError,
    ReportError,
    ScanDecodeError,
    ServerError,
    ServerUnavailableError,
    SpoolError,
    SpoolFullError,
)
from chestct.imaging.metadata import SliceMetadata
from chestct.imaging.prepare import (
    Scan,
    Slice,
    inspect_bytes,
    inspect_scan,
    inspect_scans,
    load_grey,
    load_scan,
    resize_scan,
)
from chestct.imaging.sources import SCAN_SUFFIXES, Source, list_scans, list_sources
from chestct.imaging.window import apply_window
from chestct.inference.client import AsyncScanClient, Health, Predictions, ScanClient, TLSOptions
from chestct.results.records import error_line, json_text, result_line
from chestct.results.series import SeriesSlice, group_series, series_record

__version__ = "0.1.0"

__all__ = [
    "LUNG_WINDOW",
    "NOT_A_MEDICAL_DEVICE",
    "SCAN_SUFFIXES",
    "AsyncScanClient",
    "ChestCTError",
    "ContractError",
    "DecoderCrashedError",
    "Health",
    "InferenceError",
    "InferenceTimeoutError",
    "ModelFacts",
    "OutOfDomainError",
    "Predictions",
    "ReportError",
    "Scan",
    "ScanClient",
    "ScanDecodeError",
    "SeriesSlice",
    "ServerError",
    "ServerUnavailableError",
    "Slice",
    "SliceMetadata",
    "Source",
    "SpoolError",
    "SpoolFullError",
    "TLSOptions",
    "Window",
    "apply_window",
    "classify_paths",
    "error_line",
    "group_series",
    "inspect_bytes",
    "inspect_scan",
    "inspect_scans",
    "json_text",
    "list_scans",
    "list_sources",
    "load_grey",
    "load_scan",
    "resize_scan",
    "result_line",
    "series_record",
]
