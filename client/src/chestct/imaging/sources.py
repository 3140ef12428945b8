"""Find scans: files, folders, zip archives of a study, and DICOMDIR indices."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from chestct.errors import ScanDecodeError
from chestct.imaging._warnings import without_warnings
from chestct.imaging.archives import (
    has_known_method,
    is_encrypted,
    is_hidden,
    open_archive,
    read_member,
    reading,
)
from chestct.imaging.limits import ACCEPTED, require_size

__all__ = [
    "INDEX_NAME",
    "SCAN_SUFFIXES",
    "Source",
    "has_scan_name",
    "list_scans",
    "list_sources",
]

SCAN_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
ARCHIVE_SUFFIX = ".zip"
INDEX_NAME = "DICOMDIR"  # the one name that DICOM PS3.10, section 8.6, allows

MAX_INDEX_BYTES = 32 * 2**20  # some 50,000 images


@dataclass(frozen=True)
class Source:
    """One scan file, on disk or in a zip archive.

    Attributes:
        path: The file, or the archive that holds it.
        member: Its name within the archive; empty for a file of its own.
    """

    path: Path
    member: str = ""

    @property
    def name(self) -> str:
        """The `path` of records: `study.zip!series/IM001.dcm` for a file in an archive."""
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    def num_bytes(self) -> int:
        """Size, unpacked; 0 if it is unknown."""
        try:
            if self.member:
                return open_archive(self.path).getinfo(self.member).file_size
            return os.stat(self.path).st_size
        except (ScanDecodeError, KeyError, OSError, ValueError):
            return 0

    def read(self) -> bytes:
        """The whole file; of an archive nothing is written to disk.

        Raises:
            ScanDecodeError: It cannot be read, is no regular file, is empty, encrypted, or too
                large.
        """
        if self.member:
            return _read_member(self)
        if self.path.suffix.lower() == ARCHIVE_SUFFIX:
            open_archive(self.path)
            raise ScanDecodeError(f"{self.name}: a zip archive, expected one of the files in it")
        return _read_file(self.path)


def list_sources(root: str | os.PathLike[str]) -> Iterator[Source]:
    """Scans under a path, one after the other, sorted within each folder.

    A file yields itself, whatever its name. A folder is walked recursively and yields files
    with one of `SCAN_SUFFIXES`, and files without a suffix (or with a number for one, as in
    names made from UIDs) that carry the DICOM preamble. Hidden files and links to folders are
    passed over. A zip archive is walked as if it were a folder, but not an archive within it.
    Where a `DICOMDIR` lists files and all of them are there, they are taken in its order and
    nothing else of its folder is. A folder or archive that cannot be read yields itself, so that
    reading it tells why.

    Raises:
        ScanDecodeError: Nothing is at `root`.
    """
    for path in _walk(_existing(root), with_index=True):
        if path.suffix.lower() == ARCHIVE_SUFFIX and not path.is_dir():
            yield from _members(path)
        else:
            yield Source(path)


def has_scan_name(name: str) -> bool:
    """Whether a file may be a scan by its name: one of `SCAN_SUFFIXES`, none, or a number."""
    suffix = PurePosixPath(name).suffix
    return suffix.lower() in (*SCAN_SUFFIXES, "") or suffix[1:].isdigit()


def list_scans(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Scan files under a path as `list_sources` finds them, without archives and indices.

    Raises:
        ScanDecodeError: Nothing is at `path`.
    """
    root = _existing(path)
    for found in _walk(root, with_index=False):
        if found == root or found.suffix.lower() != ARCHIVE_SUFFIX:
            yield found


def _existing(path: str | os.PathLike[str]) -> Path:
    root = Path(path)
    try:
        os.lstat(root)
    except (OSError, ValueError):
        raise ScanDecodeError(f"{path}: no such file or folder") from None
    return root


def _walk(root: Path, *, with_index: bool) -> Iterator[Path]:
    if not root.is_dir():
        listed = _listed(root) if with_index and root.name == INDEX_NAME else []
        yield from listed or [root]
        return
    # A stack of its own: folders may be nested deeper than Python's calls.
    levels = [_entries(root, with_index)]
    while levels:
        for path, is_folder in levels[-1]:
            if is_folder:
                levels.append(_entries(path, with_index))
                break
            yield path
        else:
            levels.pop()


def _entries(folder: Path, with_index: bool) -> Iterator[tuple[Path, bool]]:
    """Scans and folders directly in a folder, and whether each is a folder."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError:
        yield folder, False
        return
    if with_index and (INDEX_NAME, False) in found and (listed := _listed(folder / INDEX_NAME)):
        yield from ((path, False) for path in listed)
        return
    for name, is_folder in found:
        path = folder / name
        if not name.startswith(".") and name != INDEX_NAME and (is_folder or _is_scan(path)):
            yield path, is_folder


def _is_scan(path: Path) -> bool:
    if path.suffix.lower() in (*SCAN_SUFFIXES, ARCHIVE_SUFFIX):
        return True
    if not has_scan_name(path.name):
        return False
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return _has_preamble(file.read(132))
    except OSError:
        return False


def _has_preamble(head: bytes) -> bool:
    return head[128:] == b"DICM"


def _listed(index: Path) -> list[Path]:
    """Files that a DICOMDIR lists; none if it is unreadable or if one of them is missing."""
    try:
        if not index.is_file() or index.stat().st_size > MAX_INDEX_BYTES:
            return []
        paths = [index.parent.joinpath(*parts) for parts in _listed_parts(index.read_bytes())]
        return paths if all(path.is_file() for path in paths) else []
    except (OSError, ValueError):
        return []


def _listed_parts(data: bytes) -> list[tuple[str, ...]]:
    """Referenced File IDs in the order of the index, each once: DICOM PS3.3 F.3.2.2.

    Raises:
        ValueError: It cannot be read, or names something outside of its folder.
    """
    from pydicom import dcmread

    try:
        with without_warnings:
            dataset = dcmread(BytesIO(data), specific_tags=["DirectoryRecordSequence"])
            found = [record.get("ReferencedFileID") for record in dataset.DirectoryRecordSequence]
    except Exception as error:  # broken files make pydicom raise nearly anything
        raise ValueError("no readable DICOMDIR") from error
    parts = [(item,) if isinstance(item, str) else tuple(item) for item in found if item]
    for part in {part for names in parts for part in names}:
        if part in ("", ".", "..") or "/" in part or "\0" in part:
            raise ValueError(f"{part!r} in a DICOMDIR: expected the name of a file or folder")
    return list(dict.fromkeys(parts))


def _members(path: Path) -> Iterator[Source]:
    try:
        archive = open_archive(path)
    except ScanDecodeError:
        yield Source(path)
        return
    infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    for name in _members_by_index(archive, infos) or sorted(infos):
        is_left_out = is_hidden(name) or PurePosixPath(name).name == INDEX_NAME
        if not is_left_out and _is_scan_member(archive, infos[name]):
            yield Source(path, name)


def _members_by_index(archive: zipfile.ZipFile, infos: dict[str, Any]) -> list[str]:
    """Members that the only DICOMDIR lists; none if it is unreadable or if one is missing."""
    indices = [name for name in infos if PurePosixPath(name).name == INDEX_NAME]
    if len(indices) != 1 or infos[indices[0]].file_size > MAX_INDEX_BYTES:
        return []
    folder = indices[0].removesuffix(INDEX_NAME)
    try:
        names = [folder + "/".join(parts) for parts in _listed_parts(archive.read(indices[0]))]
    except Exception:  # broken archives make zipfile raise nearly anything
        return []
    return names if all(name in infos for name in names) else []


def _is_scan_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    if PurePosixPath(info.filename).suffix.lower() in SCAN_SUFFIXES:
        return True
    if not has_scan_name(info.filename) or not has_known_method(info):
        return False
    if is_encrypted(info):
        return True  # reading it tells why
    try:
        with archive.open(info) as file:
            return _has_preamble(file.read(132))
    except Exception:  # broken archives make zipfile raise nearly anything
        return True


def _read_member(source: Source) -> bytes:
    archive = open_archive(source.path)
    with reading(source.name, "cannot be unpacked"):
        info = archive.getinfo(source.member)
        require_size(info.file_size, source.name)
        if is_encrypted(info):
            raise ScanDecodeError(
                f"{source.name}: encrypted, expected an archive without a password. Unpack it."
            )
        if not has_known_method(info):
            raise ScanDecodeError(
                f"{source.name}: compression method {info.compress_type}, expected stored or "
                "deflated (0 or 8). Unpack it."
            )
        return read_member(archive, info)


def _read_file(path: Path) -> bytes:
    name = str(path)
    if "\0" in name:
        raise ScanDecodeError(f"{name!r}: not a file name: embedded null byte")
    with reading(name, "not a file name"):
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()
            raise ScanDecodeError(f"{name}: a folder, expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise ScanDecodeError(f"{name}: not a regular file, {ACCEPTED}")
        require_size(status.st_size, name)
        return path.read_bytes()
