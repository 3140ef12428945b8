"""Zip archives: bounds against decompression bombs, and members that can be read."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import FileIO
from pathlib import Path, PurePosixPath

from chestct.errors import ScanDecodeError
from chestct.imaging.limits import ACCEPTED, MAX_FILE_BYTES

__all__ = [
    "ZIP_SIGNATURES",
    "has_known_method",
    "is_encrypted",
    "is_hidden",
    "open_archive",
    "read_member",
    "reading",
]

ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")  # PKWARE APPNOTE, sections 4.3.7 and 4.3.16
MAX_DIRECTORY_BYTES = 8 * 2**20  # some 80,000 files
MAX_INFLATION = 200  # of a whole archive; slices of a CT shrink to a half or a third


def is_hidden(name: str) -> bool:
    """Whether a member is hidden or one of the resource forks that macOS adds."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def is_encrypted(info: zipfile.ZipInfo) -> bool:
    """General purpose bit 0: PKWARE APPNOTE, section 4.4.4."""
    return bool(info.flag_bits & 0x1)


def has_known_method(info: zipfile.ZipInfo) -> bool:
    """Whether a member is stored or deflated; other methods may ask for gigabytes."""
    return info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The content of a member: no more than its directory promises, whatever the stream holds."""
    with archive.open(info) as file:
        return file.read(info.file_size + 1)


class _BoundedFile(FileIO):
    """A file of which no more than `limit` bytes are read at once."""

    limit = MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self.limit:
            raise zipfile.BadZipFile(f"its directory is larger than {self.limit // 2**20} MiB")
        return super().read(size) or b""


class _Archive(zipfile.ZipFile):
    """A zip archive with a directory of bounded size that promises no decompression bomb."""

    def __init__(self, path: Path) -> None:
        self._file = _BoundedFile(path)
        try:
            super().__init__(self._file)
            self._file.limit = MAX_FILE_BYTES + 1
            promised = sum(info.file_size for info in self.infolist())
            if promised > MAX_FILE_BYTES + MAX_INFLATION * os.fstat(self._file.fileno()).st_size:
                raise zipfile.BadZipFile(f"it would unpack to {promised / 2**30:.1f} GiB")
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        super().close()
        self._file.close()


def open_archive(path: Path) -> zipfile.ZipFile:
    """The archive, open; the last few stay open.

    Raises:
        ScanDecodeError: It cannot be read, is damaged, or is a decompression bomb.
    """
    with reading(str(path), "no readable zip archive"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ScanDecodeError(f"{path}: not a regular file, {ACCEPTED}")
        return _archive(path, status.st_size, status.st_mtime_ns, os.getpid())


# A process that was forked must not share the place in an open file with its parent.
@lru_cache(maxsize=4)
def _archive(path: Path, num_bytes: int, changed_ns: int, process: int) -> _Archive:
    return _Archive(path)


@contextmanager
def reading(name: str, problem: str) -> Iterator[None]:
    """Raise `ScanDecodeError` for any error in reading: broken archives raise nearly anything.

    Args:
        name: Name of the file or member for the message.
        problem: For errors that are not of the operating system.
    """
    try:
        yield
    except (ScanDecodeError, MemoryError):
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ScanDecodeError(f"{name}: cannot be read: {reason}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ScanDecodeError(f"{name}: {problem}: {reason}") from error
