"""Files that crash, hang or fill the decoding processes which the test starts.

`sitecustomize.py` in a folder of the search path changes how a process reads: of a file that begins
with `#fault`, it runs the rest. This process itself reads as ever.
"""

from __future__ import annotations

from pathlib import Path

from chestct.imaging.sources import Source

CUSTOMIZED = """
import ctypes, os, signal, time
from chestct.imaging.sources import Source
read = Source.read
def read_or_fail(source):
    data = read(source)
    if data.startswith(b"#fault "):
        exec(data.removeprefix(b"#fault ").decode())
    return data
Source.read = read_or_fail
"""


def install(folder: Path) -> None:
    """Make `folder`, which has to be on the search path, change the processes."""
    (folder / "sitecustomize.py").write_text(CUSTOMIZED)


def faulty(path: Path, code: str) -> Source:
    """A file that has the process run some code when it reads it."""
    path.write_text(f"#fault {code}")
    return Source(path)
