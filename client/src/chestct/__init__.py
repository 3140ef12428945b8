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
    ReportError,
    ScanDecodeError,
    ServerError,
    ServerUnavailableError,
    SpoolError,
    SpoolFullError,
)
from chestct.report import error_line, json_text, result_line
from chestct.scan import (
    SCAN_SUFFIXES,
    Scan,
    apply_window,
    decode_scan,
    inspect_scan,
    list_scans,
    load_grey,
    load_scan,
    resize_scan,
)

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
    "ReportError",
    "Scan",
    "ScanClient",
    "ScanDecodeError",
    "ServerError",
    "ServerUnavailableError",
    "SpoolError",
    "SpoolFullError",
    "TLSOptions",
    "Window",
    "apply_window",
    "classify_paths",
    "decode_scan",
    "error_line",
    "finished_paths",
    "inspect_scan",
    "json_text",
    "list_scans",
    "load_grey",
    "load_scan",
    "resize_scan",
    "result_line",
]
