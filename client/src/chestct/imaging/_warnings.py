"""Silence the decoders' warnings in every thread, and turn their errors into one type."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from chestct.errors import ScanDecodeError

__all__ = ["decoding", "without_warnings"]


class _WithoutWarnings:
    """Ignore `warnings` as long as any thread is inside.

    `warnings.catch_warnings` changes the whole process: threads that overlap would restore each
    other's filters, and one at a time could not decode side by side.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._caught.__exit__(None, None, None)


without_warnings = _WithoutWarnings()


@contextmanager
def decoding(file_format: str, name: str) -> Iterator[None]:
    """Ignore warnings and raise `ScanDecodeError` for nearly any error of a decoder.

    Broken files make pydicom, Pillow and the codecs raise nearly anything.

    Args:
        file_format: For the message, such as `DICOM`.
        name: Name of the file or frame for the message.

    Raises:
        ScanDecodeError: The decoder failed.
        MemoryError: Passed on; see `chestct.imaging.limits.limit_memory`.
    """
    try:
        with without_warnings:
            yield
    except (ScanDecodeError, MemoryError):
        raise
    except BaseException as error:
        # A codec written in Rust panics with an exception that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ScanDecodeError(
            f"{name}: broken or unsupported {file_format} file ({reason}). Export the slice again."
        ) from error
