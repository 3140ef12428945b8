"""Scans in zip archives, and archives that lie."""

from __future__ import annotations

import io
import pickle
import resource
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from chestct.errors import ScanDecodeError
from chestct.imaging import archives, limits
from chestct.imaging.prepare import inspect_scans
from chestct.imaging.sources import Source, list_sources
from tests.support.scan_files import error_of


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_is_walked_as_a_folder(tmp_path: Path, slice_bytes: bytes, method: int) -> None:
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in ("b/IM2", "b/IM1", "a.DCM", "b/1.2.840.9", "../up.dcm", "b/", "c/noext.txt"):
            archive.writestr(name, slice_bytes)
        for name in (".hidden.dcm", "__MACOSX/a.dcm", "b/DICOMDIR", "inner.zip", "b/README"):
            archive.writestr(name, b"x" * 200)
    (tmp_path / "notes.txt").write_text("none")
    expected = ["../up.dcm", "a.DCM", "b/1.2.840.9", "b/IM1", "b/IM2"]
    expected.remove("../up.dcm")  # a part that begins with a dot is hidden
    for root in (tmp_path, path):
        found = list(list_sources(root))
        assert [source.name for source in found] == [f"{path}!{name}" for name in expected]
    assert all(source.read() == slice_bytes for source in found)
    (only,) = inspect_scans(pickle.loads(pickle.dumps(found[0])))
    assert not isinstance(only.scan, ScanDecodeError)
    assert only.name == f"{path}!a.DCM"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "study.zip"]


def test_members_are_read_by_threads_and_by_forked_processes(
    tmp_path: Path, slice_bytes: bytes
) -> None:
    path = tmp_path / "study.zip"
    contents = {f"{n:02}.dcm": slice_bytes + bytes([n]) * (n + 1) * 1000 for n in range(12)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    found = list(list_sources(path))
    wrong: list[str] = []

    def read_all() -> None:
        for _ in range(5):
            wrong.extend(s.name for s in found if s.read() != contents[s.member])

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from chestct.imaging.sources import list_sources\n"
        "found = list(list_sources(Path(sys.argv[1])))\n"
        "expected = [source.read() for source in found]\n"
        "children = []\n"
        "for _ in range(4):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        same = all([s.read() for s in found] == expected for _ in range(10))\n"
        "        os._exit(0 if same else 1)\n"
        "    children.append(child)\n"
        "sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_encrypted_members_say_so(tmp_path: Path, slice_bytes: bytes) -> None:
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("IM1", slice_bytes)
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # APPNOTE 4.3.7, 4.3.12
        data[data.index(signature) + place] |= 1
    path.write_bytes(data)
    (source,) = list_sources(path)
    assert error_of(source) == (
        f"{path}!IM1: encrypted, expected an archive without a password. Unpack it."
    )


def test_other_compression_methods_say_so(tmp_path: Path, slice_bytes: bytes) -> None:
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.dcm", slice_bytes)
    (source,) = list_sources(path)
    assert "compression method 14, expected stored or deflated" in error_of(source)


def test_broken_archives_yield_themselves(tmp_path: Path, slice_bytes: bytes) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a.dcm", slice_bytes)
    for content in (b"", b"no archive", whole.getvalue()[:-30]):
        path = tmp_path / "study.zip"
        path.write_bytes(content)
        (source,) = list_sources(tmp_path)
        assert source == Source(path)
        assert error_of(source).startswith(f"{path}: no readable zip archive: ")
    path.write_bytes(whole.getvalue())
    assert "expected one of the files in it" in error_of(Source(path))
    damaged = bytearray(whole.getvalue())
    damaged[1000] ^= 255
    path.write_bytes(damaged)
    (source,) = list_sources(path)
    assert "cannot be unpacked: Bad CRC-32" in error_of(source)
    assert 'cannot be unpacked: "There is no item' in error_of(Source(path, "gone.dcm"))


def test_archive_that_changes_is_read_anew(tmp_path: Path, slice_bytes: bytes) -> None:
    path = tmp_path / "study.zip"
    for names in (["a.dcm"], ["a.dcm", "b.dcm"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, slice_bytes)
        assert [source.member for source in list_sources(path)] == names


def test_zip_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"{number}.dcm", bytes(2**20))
    assert len(list(list_sources(path))) == 20
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 1000)
    assert "expected at most" in error_of(next(list_sources(path)))
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
    archives._archive.cache_clear()
    assert "it would unpack to 0.0 GiB" in error_of(next(list_sources(path)))


def test_archive_of_a_million_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(100):
            archive.writestr(f"{number}.dcm", b"")
    monkeypatch.setattr(archives._BoundedFile, "limit", 4000)
    assert "its directory is larger than" in error_of(next(list_sources(path)))


def test_member_that_lies_about_its_size_fills_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(512 * 2**20))
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # APPNOTE 4.3.7, 4.3.12
        start = data.index(signature) + place
        data[start : start + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    (source,) = list_sources(path)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "cannot be unpacked" in error_of(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 * 1024
