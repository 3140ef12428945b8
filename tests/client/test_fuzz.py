"""A short fuzz run of decoding; `make fuzz` runs longer."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seconds", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="no atheris: needs Linux on x86-64"
)
def test_damaged_files_give_slices_or_decode_errors(tmp_path: Path, seconds: int) -> None:
    done = subprocess.run(
        [sys.executable, "tests/client/fuzz_scan.py", str(seconds), str(tmp_path)],
        cwd=CHECKOUT, capture_output=True, text=True, errors="replace", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    counts = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    assert sum(map(int, counts)) > 50
