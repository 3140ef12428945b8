"""Where scans are found: folders, zip archives, DICOMDIR; and what cannot be read says why."""

from __future__ import annotations

import io
import os
import pickle
import resource
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, generate_uid

from chestct.errors import ScanDecodeError
from chestct.imaging import archives, limits
from chestct.imaging.prepare import inspect_scans
from chestct.imaging.sources import Source, list_scans, list_sources
from training.data.phantom import dicom_from_phantom, make_phantom


@pytest.fixture(scope="module")
def slice_bytes() -> bytes:
    file = io.BytesIO()
    dicom_from_phantom(make_phantom("normal", 5, size=128)).save_as(file, enforce_file_format=True)
    return file.getvalue()


def names_in(root: Path) -> list[str]:
    return [source.name.removeprefix(f"{root}/") for source in list_sources(root)]


def write_index(folder: Path, listed: list[list[str] | str]) -> bytes:
    """A DICOMDIR that lists files, one IMAGE record each, below a PATIENT record without one."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    index = Dataset()
    index.file_meta = meta
    index.SOPClassUID, index.SOPInstanceUID = meta[0x00020002].value, meta[0x00020003].value
    records = [Dataset()]
    records[0].DirectoryRecordType = "PATIENT"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names are not allowed
        for names in listed:
            records.append(Dataset())
            records[-1].DirectoryRecordType = "IMAGE"
            records[-1].ReferencedFileID = names
    index.DirectoryRecordSequence = records
    folder.mkdir(exist_ok=True, parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index.save_as(folder / "DICOMDIR", enforce_file_format=True)
    return (folder / "DICOMDIR").read_bytes()


def error_of(source: Source) -> str:
    (only,) = inspect_scans(source)
    assert isinstance(only.scan, ScanDecodeError)
    assert only.name == source.name
    return str(only.scan)


# Zip archives


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


# DICOMDIR


def test_index_names_the_scans_of_its_folder(tmp_path: Path, slice_bytes: bytes) -> None:
    listed = [["IMG", "Z"], ["IMG", "A.1"], "TOP"]
    write_index(tmp_path / "cd", [*listed, listed[0]])
    (tmp_path / "cd" / "IMG").mkdir()
    for name in ("IMG/Z", "IMG/A.1", "TOP", "viewer.png"):
        (tmp_path / "cd" / name).write_bytes(slice_bytes)
    (tmp_path / "a.png").touch()
    expected = ["cd/IMG/Z", "cd/IMG/A.1", "cd/TOP"]
    assert names_in(tmp_path) == ["a.png", *expected]
    assert names_in(tmp_path / "cd" / "DICOMDIR") == [str(tmp_path / name) for name in expected]
    scans = [path.relative_to(tmp_path).as_posix() for path in list_scans(tmp_path)]
    assert scans == ["a.png", "cd/IMG/A.1", "cd/IMG/Z", "cd/TOP", "cd/viewer.png"]


@pytest.mark.parametrize(
    "listed",
    [[], [["IMG", "A"], ["GONE"]], [["..", "secret.dcm"]], [["/etc", "passwd"]], [["IMG"]]],
)
def test_index_that_does_not_fit_is_passed_over(
    tmp_path: Path, slice_bytes: bytes, listed: list[list[str] | str]
) -> None:
    (tmp_path / "secret.dcm").write_bytes(slice_bytes)
    cd = tmp_path / "cd"
    write_index(cd, listed)
    (cd / "IMG").mkdir()
    (cd / "IMG" / "A").write_bytes(slice_bytes)
    (cd / "b.png").touch()
    assert names_in(cd) == ["IMG/A", "b.png"]


def test_broken_index_is_passed_over(tmp_path: Path, slice_bytes: bytes) -> None:
    whole = write_index(tmp_path, [["A"]])
    (tmp_path / "A").write_bytes(slice_bytes)
    (tmp_path / "b.dcm").write_bytes(slice_bytes)
    assert names_in(tmp_path) == ["A"]
    for content in (b"", b"DICM" * 50, whole[: len(whole) // 2], slice_bytes):
        (tmp_path / "DICOMDIR").write_bytes(content)
        assert names_in(tmp_path) == ["A", "b.dcm"]


def test_index_in_an_archive(tmp_path: Path, slice_bytes: bytes) -> None:
    index = write_index(tmp_path / "cd", [["IMG", "A.1"]])
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        archive.writestr("cd/DICOMDIR", index)
        archive.writestr("cd/viewer.png", b"x")
        archive.writestr("cd/IMG/A.1", slice_bytes)
    (source,) = list_sources(tmp_path / "study.zip")
    assert source.member == "cd/IMG/A.1"
    assert source.read() == slice_bytes


# Files and folders


def test_links_in_a_circle_are_harmless(tmp_path: Path, slice_bytes: bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "scan.dcm").write_bytes(slice_bytes)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self.dcm").symlink_to(tmp_path / "self.dcm")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert names_in(tmp_path) == ["a/scan.dcm", "self.dcm"]
    assert "too many levels of symbolic links" in error_of(Source(tmp_path / "self.dcm"))
    (source,) = list_sources(tmp_path / "self")
    assert "too many levels of symbolic links" in error_of(source)


def test_names_in_other_encodings(tmp_path: Path, slice_bytes: bytes) -> None:
    raw = os.fsencode(tmp_path) + b"/Thorax_\xe4\xff.dcm"  # Latin-1, no UTF-8
    with open(raw, "wb") as file:
        file.write(slice_bytes)
    (source,) = list_sources(tmp_path)
    (only,) = inspect_scans(source)
    assert not isinstance(only.scan, ScanDecodeError)
    assert os.fsencode(only.name) == raw
    with open(raw, "wb"):
        pass
    message = error_of(source)
    assert message.endswith("the file is empty, expected an axial slice as PNG, JPEG or DICOM")
    assert os.fsencode(message).startswith(raw)


def test_files_that_vanish_while_listed(tmp_path: Path, slice_bytes: bytes) -> None:
    for name in ("a/1.dcm", "b/2.dcm", "c.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(slice_bytes)
    found = list_sources(tmp_path)
    assert isinstance(found, Iterator)
    first = next(found)
    (tmp_path / "a/1.dcm").unlink()
    (tmp_path / "b/2.dcm").unlink()
    (tmp_path / "b").rmdir()
    (tmp_path / "c.dcm").unlink()
    for source in (first, *found):
        assert "cannot be read: no such file or directory" in error_of(source)


def test_folders_deeper_than_calls_may_be_nested(tmp_path: Path, slice_bytes: bytes) -> None:
    depth, folder = 300, tmp_path
    for _ in range(depth):
        folder = folder / "d"
    folder.mkdir(parents=True)
    (folder / "scan.dcm").write_bytes(slice_bytes)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(250)
    try:
        (source,) = list_sources(tmp_path)
    finally:
        sys.setrecursionlimit(before)
    assert source.path == folder / "scan.dcm"


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.zip")
    os.mkfifo(tmp_path / "DICOMDIR")
    os.mkfifo(tmp_path / "IM1")
    (source,) = list_sources(tmp_path)
    assert error_of(source).startswith(f"{tmp_path}/pipe.zip: not a regular file")
    with pytest.raises(ScanDecodeError, match="no such file or folder"):
        next(list_sources(tmp_path / "missing"))


RIGHTS = """
import os, sys
from pathlib import Path
import numpy, PIL.Image, pydicom  # while they may be read
import chestct.batch.pipeline
os.setgid(65534); os.setuid(65534)
from chestct.imaging.prepare import inspect_scans
from chestct.imaging.sources import list_sources
for source in list_sources(Path(sys.argv[1])):
    for found in inspect_scans(source):
        print(found.scan)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folders_files_and_archives_without_rights_say_so(slice_bytes: bytes) -> None:
    import shutil
    import tempfile

    root = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folder is closed to others
    try:
        root.chmod(0o755)
        (root / "closed").mkdir(mode=0o700)
        for name in ("closed/in.dcm", "file.dcm", "study.zip", "IM1"):
            (root / name).write_bytes(slice_bytes)
            (root / name).chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", RIGHTS, str(root)], capture_output=True, text=True, timeout=60
        )
    finally:
        shutil.rmtree(root)
    assert done.stdout.splitlines() == [
        f"{root}/{name}: cannot be read: permission denied"
        for name in ("closed", "file.dcm", "study.zip")
    ], done.stderr
