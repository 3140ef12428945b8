"""Thin client for a chest-CT classifier served by NVIDIA Triton. Not a medical device.

Names are imported on first use, so `import chestct` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chestct.client import AsyncScanClient, CallOptions, ScanClient
    from chestct.contract import LUNG_WINDOW, NOT_A_MEDICAL_DEVICE, ModelMetadata, Window
    from chestct.errors import (
        ChestCTError,
        ContractError,
        DecoderCrashedError,
        InferenceError,
        InferenceTimeoutError,
        ModelExchangedError,
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
    from chestct.inference.predictions import Health, Predictions
    from chestct.inference.wires import TLSOptions
    from chestct.results.records import error_line, json_text, result_line
    from chestct.results.series import SeriesSlice, group_series, series_record

__version__ = "0.1.0"

__all__ = [
    "LUNG_WINDOW",
    "NOT_A_MEDICAL_DEVICE",
    "SCAN_SUFFIXES",
    "AsyncScanClient",
    "CallOptions",
    "ChestCTError",
    "ContractError",
    "DecoderCrashedError",
    "Health",
    "InferenceError",
    "InferenceTimeoutError",
    "ModelExchangedError",
    "ModelMetadata",
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

# The light ones first: a name is looked for in each until it is found.
_MODULES = (
    "errors",
    "contract",
    "imaging.sources",
    "imaging.prepare",
    "imaging.window",
    "imaging.metadata",
    "results.records",
    "results.series",
    "inference.wires",
    "inference.predictions",
    "client",
)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in __all__:
        for module in _MODULES:
            found = importlib.import_module(f"chestct.{module}")
            if name in found.__all__:
                value = globals()[name] = getattr(found, name)
                return value
    raise AttributeError(f"module 'chestct' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return [*globals(), *__all__]
