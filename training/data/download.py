"""Fetch a source of scans: a folder, a zip, an https address or a Google Drive link."""

from __future__ import annotations

import http.client
import lzma
import re
import shutil
import ssl
import stat
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm

from chestct.imaging.archives import is_encrypted
from training.common.atomic_io import replaced, sha256_of
from training.common.config import (
    load_config,
)
from training.data.phantom import PhantomConfig, write_configured
from training.data.settings import PHANTOM, IngestConfig

CHUNK_BYTES = 1 << 20
DRIVE_HOSTS = ("drive.google.com", "docs.google.com")
# The Kaggle folder names carry site and stage behind the class:
# adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib, large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa.
FolderName = Annotated[str, Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$")]


def fetch(source: str, work: Path, config: IngestConfig) -> tuple[Path, str | None]:
    """The folder that holds the files of `source`, and the hash of its archive if it is one."""
    unpacked = work / "unpacked"
    is_folder = (
        source == PHANTOM
        or (_is_drive_link(source) and _is_drive_folder(source))
        or (not is_remote(source) and local_path(source).is_dir())
    )
    if is_folder and config.sha256 is not None:
        raise ValueError(f"{source}: sha256 is given, but the source is not one file; leave it out")
    if source == PHANTOM:
        write_configured(unpacked, load_config(PhantomConfig, config.phantom_config))
        return unpacked, None
    if is_folder and is_remote(source):
        _download_drive_folder(source, unpacked, config)
        return unpacked, None
    if is_folder:
        return local_path(source), None
    archive = work / "archive.zip"
    if not is_remote(source):
        archive = local_path(source)
    elif _is_drive_link(source):
        _download_drive_file(source, archive, config)
    else:
        download(source, archive, max_bytes=config.max_download_bytes, timeout_s=config.timeout_s)
    sha256 = sha256_of(archive)
    if config.sha256 is not None and sha256 != config.sha256.lower():
        raise ValueError(f"{source}: sha256 is {sha256}, expected {config.sha256.lower()}")
    extract(archive, unpacked, config, name=source)
    return unpacked, sha256


def is_remote(source: str) -> bool:
    """Whether the source is an address."""
    return "://" in source


def _is_drive_link(source: str) -> bool:
    return urllib.parse.urlsplit(source).hostname in DRIVE_HOSTS


def _is_drive_folder(source: str) -> bool:
    return "/folders/" in urllib.parse.urlsplit(source).path


def local_path(source: str) -> Path:
    """Path of a local source.

    Raises:
        ValueError: Neither a folder nor a file is there.
    """
    path = Path(source).expanduser()
    if path.is_dir() or path.is_file():
        return path
    raise ValueError(
        f"{source}: no such folder or file; expected 'phantom', a folder, a .zip, an https "
        "address or a Google Drive link (--source or DATA)"
    )


def download(url: str, path: Path, *, max_bytes: int, timeout_s: float) -> None:
    """Fetch `url` over https into `path`, whole or not at all, with progress on a terminal.

    Raises:
        ValueError: Not https (redirects included), refused by the server, larger than
            `max_bytes`, broken off, or silent for `timeout_s`.
    """
    _require_https(url)
    context = ssl.create_default_context()
    opener = urllib.request.build_opener(
        _HttpsRedirects(), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with replaced(path) as temporary, opener.open(url, timeout=timeout_s) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
            _require_size(url, total or 0, max_bytes)
            received = 0
            with (
                temporary.open("xb") as file,
                tqdm(total=total, desc="download", unit="B", unit_scale=True, disable=None) as bar,
            ):
                while chunk := response.read(CHUNK_BYTES):
                    received += len(chunk)
                    _require_size(url, received, max_bytes)
                    file.write(chunk)
                    bar.update(len(chunk))
            if total is not None and received != total:
                raise ValueError(f"{url}: broke off after {received} of {total} bytes; try again")
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(f"{url}: the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise ValueError(f"{url}: cannot be reached: {error.reason}") from error
    except (http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{url}: broke off: {reason}; try again") from error


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError(f"{url}: expected an https address")


def _require_size(name: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise ValueError(f"{name}: more than {limit} bytes; raise the limit in the config if meant")


@contextmanager
def _drive_errors(source: str) -> Iterator[None]:
    """Turn what gdown and its HTTP library raise into one line."""
    from gdown.exceptions import DownloadError

    try:
        yield
    except (DownloadError, OSError) as error:  # its HTTP errors are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source}: Google Drive did not give it: {reason}") from error


def _download_drive_file(source: str, path: Path, config: IngestConfig, *, before: int = 0) -> None:
    import gdown

    _require_https(source)

    def check(received: int, total: int | None) -> None:
        _require_size(source, before + max(received, total or 0), config.max_download_bytes)

    with _drive_errors(source), replaced(path) as temporary:
        gdown.download(
            source,
            str(temporary),
            quiet=not sys.stderr.isatty(),
            use_cookies=False,
            progress=check,
            timeout=config.timeout_s,
        )


def _download_drive_folder(source: str, folder: Path, config: IngestConfig) -> None:
    import gdown

    _require_https(source)
    with _drive_errors(source):
        entries = gdown.download_folder(
            source,
            output=str(folder),
            quiet=True,
            use_cookies=False,
            skip_download=True,
            timeout=config.timeout_s,
        )
    if len(entries) > config.max_files:
        raise ValueError(f"{source}: more than {config.max_files} files")
    received = 0
    for entry in tqdm(entries, desc="download", unit="file", disable=None):
        name = Path(entry.path).as_posix()
        _require_safe_name(name, source)
        target = folder / name
        address = f"https://drive.google.com/uc?id={entry.id}"
        _download_drive_file(address, target, config, before=received)
        received += target.stat().st_size


def extract(archive: Path, folder: Path, config: IngestConfig, *, name: str) -> None:
    """Unpack a zip into the new `folder`, whole or not at all.

    Nothing is written outside: absolute names, `..`, drive letters, backslashes and links are
    refused before the first byte, as are too many files, too many bytes and compression that
    only a bomb reaches.

    Raises:
        ValueError: Refused, encrypted, damaged or not a zip; the message begins with `name`.
    """
    with opened_zip(archive, name) as opened, replaced(folder) as temporary:
        temporary.mkdir()
        members = checked_members(opened, name, config)
        for info in opened.infolist():
            if info.is_dir():
                (temporary / info.filename).mkdir(parents=True, exist_ok=True)
        for member, info in tqdm(members.items(), desc="unpack", unit="file", disable=None):
            target = temporary / member
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(info) as packed, target.open("xb") as file:
                    shutil.copyfileobj(packed, file, CHUNK_BYTES)
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                raise ValueError(f"{name}: {member!r} is listed twice") from error


@contextmanager
def opened_zip(path: Path, name: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive; errors name it as `name`.

    Raises:
        ValueError: It is no zip archive, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name}: not a readable zip archive: {error}") from error
    except (NotImplementedError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name}: damaged or packed in an unknown way: {error}") from error


def checked_members(
    archive: zipfile.ZipFile, name: str, config: IngestConfig
) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by safe relative name, if the whole archive is acceptable.

    The declared sizes can be trusted as limits: `zipfile` stops reading a member there and checks
    its CRC.
    """
    entries = archive.infolist()
    if len(entries) > config.max_files:
        raise ValueError(f"{name}: {len(entries)} entries, more than {config.max_files}")
    total = sum(info.file_size for info in entries)
    _require_size(name, total, config.max_unpacked_bytes)
    _require_ratio(name, total, archive.start_dir, config)
    members = {}
    for info in entries:
        _require_safe_name(info.orig_filename, name)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{name}: {info.filename!r} is a link or device; refused")
        if is_encrypted(info):
            raise ValueError(f"{name}: {info.filename!r} is encrypted; unpack it yourself first")
        _require_ratio(f"{name}: {info.filename!r}", info.file_size, info.compress_size, config)
        if not info.is_dir():
            if info.filename in members:
                raise ValueError(f"{name}: {info.filename!r} is listed twice")
            members[info.filename] = info
    return members


def _require_ratio(name: str, unpacked: int, packed: int, config: IngestConfig) -> None:
    ratio = unpacked / max(1, packed)
    if unpacked > CHUNK_BYTES and ratio > config.max_compression_ratio:
        raise ValueError(
            f"{name} unpacks to {ratio:.0f} times its size, more than "
            f"{config.max_compression_ratio:.0f}; refused as a zip bomb"
        )


def _require_safe_name(name: str, source: str) -> None:
    """Refuse a relative name that could leave the folder it is joined to, on any system."""
    parts = name.rstrip("/").split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in name
        or "\0" in name
        or re.match(r"[A-Za-z]:", name)
    ):
        raise ValueError(f"{source}: the name {name!r} would leave the target folder; refused")
