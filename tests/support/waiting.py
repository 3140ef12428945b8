"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], what: str = "", limit_s: float = 90.0) -> T:
    """The first true value of `condition`; fails the test when there is none for too long.

    The limit only ends a test that would hang: no test may need it to pass.
    """
    deadline_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"waited in vain for {what or condition}"
        time.sleep(0.02)
    return found
