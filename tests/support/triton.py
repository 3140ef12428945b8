"""Real Tritons for tests that need a server and do not test its life."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chestct.contract import LUNG_WINDOW, ModelMetadata
from serving.local import LocalTriton

LABELS = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")
SMALL_FACTS = ModelMetadata(("a", "b", "c"), LUNG_WINDOW, 1.0, 10.0, "run-7", "ab" * 32)


def config_parameters(facts: ModelMetadata, without: str = "") -> str:
    """The facts as `parameters` of a config.pbtxt; `without` names one that is left out."""
    return "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}\n'
        for key, value in facts.to_parameters().items()
        if key != without
    )


@contextlib.contextmanager
def serve(repository: Path, environment: Path, **options: Any) -> Iterator[LocalTriton]:
    """A server of the repository, ended at once on leaving."""
    server = LocalTriton(repository, environment=environment, **options)
    server.start()
    try:
        yield server
    finally:
        end(server)


def end(server: LocalTriton) -> None:
    """Ends a server without the three seconds in which Triton drains, and removes what it leaves.

    How a server stops in order is for tests/serving/test_local.py to tell.
    """
    if server._process is not None:
        server._process.kill()
    server.stop()


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Inside, what the code under test starts with `with LocalTriton(...)` is ended by `end`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalTriton, "__exit__", lambda server, *_: end(server))
        yield
