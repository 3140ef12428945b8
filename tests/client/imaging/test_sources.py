"""Where scans are found: folders, zip archives, DICOMDIR; and what cannot be read says why."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, generate_uid

from chestct.errors import ScanDecodeError
from chestct.imaging.prepare import inspect_scans
from chestct.imaging.sources import Source, list_scans, list_sources
from tests.support.scan_files import dicom_bytes, error_of, hu_slice, names_in


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


def test_list_scans_walks_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.txt", ".hidden.png", "sub/e.dicom", "sub/.d/f.png", "x.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    for name in ("IM0001", "1.2.840.99", "DICOMDIR", "notes.dat"):
        (tmp_path / "sub" / name).write_bytes(dicom_bytes(hu_slice()))
    (tmp_path / "sub" / "README").write_text("no preamble here")
    (tmp_path / "z.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in list_scans(tmp_path)]
    expected = ["a.jpg", "b.PNG", "sub/1.2.840.99", "sub/IM0001", "sub/e.dicom", "x.jpeg", "z.png"]
    assert names == expected


def test_list_scans_is_lazy(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    found = list_scans(tmp_path)
    assert isinstance(found, Iterator)
    assert next(found) == tmp_path / "a" / "1.png"
    (tmp_path / "b" / "2.png").touch()  # not read yet, so seen
    assert [path.name for path in found] == ["1.png", "2.png"]


def test_list_scans_of_one_file_and_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "odd.name"
    file.touch()
    assert list(list_scans(file)) == [file]
    with pytest.raises(ScanDecodeError, match="no such file or folder"):
        list(list_scans(tmp_path / "missing"))
