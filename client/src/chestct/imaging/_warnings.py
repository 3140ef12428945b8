"""No warnings of the decoders on a user's screen, in any thread."""

from __future__ import annotations

import threading
import warnings

__all__ = ["without_warnings"]


class _WithoutWarnings:
    """Silence of `warnings` as long as any thread is inside.

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
