"""Thin client for a chest-CT classifier served by NVIDIA Triton. Not a medical device."""

from chestct.batch import classify_paths, finished_paths
from chestct.client import AsyncScanClient, Health, Predictions, ScanClient, TLSOptions
from chestct.contract import LUNG_WINDOW, NOT_A_MEDICAL_DEVICE, ModelFacts, Window
from chestct.errors import (
    ChestCTError,
    ContractError,
    InferenceError,
    InferenceTimeoutError,
    OutOfDomainError,
    ScanDecodeError,
    ServerError,
    ServerUnavailableError,
)
from chestct.report import error_line, json_text, result_line
from chestct.scan import (
    SCAN_SUFFIXES,
    Scan,
    Slice,
    SliceFacts,
    apply_window,
    decode_scan,
    inspect_scan,
    inspect_scans,
    list_scans,
    load_grey,
    load_scan,
    resize_scan,
)
from chestct.series import SeriesSlice, group_series, series_record
from chestct.sources import Source, list_sources

__version__ = "0.1.0"

__all__ = [
    "LUNG_WINDOW",
    "NOT_A_MEDICAL_DEVICE",
    "SCAN_SUFFIXES",
    "AsyncScanClient",
    "ChestCTError",
    "ContractError",
    "Health",
    "InferenceError",
    "InferenceTimeoutError",
    "ModelFacts",
    "OutOfDomainError",
    "Predictions",
    "Scan",
    "ScanClient",
    "ScanDecodeError",
    "SeriesSlice",
    "ServerError",
    "ServerUnavailableError",
    "Slice",
    "SliceFacts",
    "Source",
    "TLSOptions",
    "Window",
    "apply_window",
    "classify_paths",
    "decode_scan",
    "error_line",
    "finished_paths",
    "group_series",
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
