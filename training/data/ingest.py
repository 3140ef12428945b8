"""Bring scans in: from phantoms, a folder, a zip, an https address or a Google Drive link.

The result is `data/scans/` in one of two layouts, `train|valid|test/CLASS/*` or `CLASS/*`, and the
table `data/ingest.json`. Every accepted scan was decoded once; what could not be is listed with
its reason. The same source gives the same bytes in both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import ssl
import stat
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt
from tqdm import tqdm

from chestct.errors import ScanDecodeError
from chestct.imaging.archives import is_encrypted, is_hidden
from chestct.imaging.prepare import load_grey
from chestct.imaging.sources import has_scan_name
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import (
    config_class,
    load_config,
    read_overrides,
    use_overrides,
    write_overrides,
)
from training.data.dataset import SPLITS
from training.data.phantom import PhantomConfig, write_configured

PHANTOM = "phantom"
CHUNK_BYTES = 1 << 20
DRIVE_HOSTS = ("drive.google.com", "docs.google.com")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
# The Kaggle folder names carry site and stage behind the class:
# adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib, large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa.
STAGED_NAME = re.compile(r"([^_]+)_(?:(?:left|right)\.|T[0-4]).*", re.IGNORECASE)
FolderName = Annotated[str, Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$")]
EXPECTED_LAYOUT = "expected train|valid|test/CLASS/* or CLASS/* with PNG, JPEG or DICOM files"


@config_class
class IngestConfig:
    """Where scans come from and what is refused.

    Attributes:
        source: Used when neither `--source`, DATA nor an earlier `table` names one: `phantom`, a
            folder, a .zip, an https address of one, or a Google Drive link.
        sha256: Expected hash of the archive; only for sources that are one file.
        labels: Folder name to label, for names that the rule of `label_from_folder` does not fit.
        scans: Folder to write.
        table: JSON to write.
        phantom_config: Config of `training phantom`.
        max_download_bytes: 8 GiB: chest CT sets of PNG are below 1 GiB, of DICOM a few.
        max_unpacked_bytes: 32 GiB on disk.
        max_files: A folder of slices has thousands, a bomb has millions.
        max_compression_ratio: PNG and JPEG hardly shrink, DICOM two to four times, a bomb 1000.
        timeout_s: Longest silence of a server.
    """

    source: str = PHANTOM
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    labels: dict[str, FolderName] = field(default_factory=dict)
    scans: Path = Path("data/scans")
    table: Path = Path("data/ingest.json")
    phantom_config: Path = Path("configs/phantom.yaml")
    max_download_bytes: PositiveInt = 8 * 2**30
    max_unpacked_bytes: PositiveInt = 32 * 2**30
    max_files: PositiveInt = 500_000
    max_compression_ratio: Annotated[float, Field(ge=1)] = 100.0
    timeout_s: PositiveFloat = 30.0

    @property
    def overrides(self) -> Path:
        """YAML to write beside `table` for the later stages; see `training.common.config`."""
        return self.table.with_name("overrides.yaml")


@dataclass(frozen=True)
class ScanFile:
    """A file of a scan folder: path relative to it, split (None in the plain layout), label."""

    path: str
    split: str | None
    label: str


def list_scan_folder(scans: Path) -> list[ScanFile]:
    """The scans of a folder that `training ingest` wrote, sorted by path.

    Raises:
        ValueError: The folder is missing, holds no scan, or a file outside its two layouts.
    """
    paths = sorted(_walk(scans)[0]) if scans.is_dir() else []
    if not paths:
        raise ValueError(f"{scans}: no scans; run python -m training ingest first")
    found = []
    for path in paths:
        *split, label, _ = ["", *path.split("/")]
        if not label or len(split) > 2:
            raise ValueError(f"{scans}: {path} is in no class folder; run training ingest again")
        found.append(ScanFile(path, split[1] if len(split) == 2 else None, label))
    return found


def choose_source(flag: str | None, environment: Mapping[str, str], config: IngestConfig) -> str:
    """The source: the flag, else DATA, else the one that is recorded, else the config's.

    Raises:
        ValueError: The recorded table cannot be read.
    """
    if chosen := flag or environment.get("DATA"):
        return chosen
    recorded = read_table(config.table)
    return str(recorded["source"]) if recorded else config.source


def choose_overrides(
    flag: Path | None, source: str | None, environment: Mapping[str, str], config: IngestConfig
) -> dict[str, dict[str, Any]]:
    """Overrides for the whole pipeline: of the flag's file, else of the file that OVERRIDES names.

    With neither, a source that a flag or DATA names is taken with the full settings, and a run
    that names nothing keeps the recorded overrides.

    Args:
        flag: File that --overrides names.
        source: What --source names.
        environment: Of the process.
        config: Names the recorded overrides.

    Raises:
        ValueError: A file cannot be read or has another form.
    """
    if named := flag or environment.get("OVERRIDES"):
        return read_overrides(Path(named))
    if source or environment.get("DATA") or not config.overrides.is_file():
        return {}
    return read_overrides(config.overrides)


def read_table(path: Path) -> dict[str, Any] | None:
    """The content of an `ingest.json`; None if there is none.

    Raises:
        ValueError: The file is not what `training ingest` writes.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON; delete it and name the source again") from error
    if not isinstance(table, dict) or not {"source", "fingerprint", "data_hash"} <= set(table):
        raise ValueError(f"{path}: not an ingest table; delete it and name the source again")
    return table


def has_changed(source: str, config: IngestConfig) -> bool:
    """Whether `source` differs from what is recorded.

    Folders and zips are compared by content. Phantoms and remote sources are compared by name
    alone: phantoms follow from code and config, which DVC watches, and a remote file cannot be
    known without its download.

    Raises:
        ValueError: The source cannot be read.
    """
    recorded = read_table(config.table)
    if recorded is None or recorded["source"] != source or not config.scans.is_dir():
        return True
    if source == PHANTOM or _is_remote(source):
        return False
    path = _local_path(source)
    if path.is_dir():
        hashes = _hash_files(_walk(path)[0])
    else:
        with _opened_zip(path, source) as archive:
            members = _checked_members(archive, source, config)
            hashes = {name: _hash_member(archive, info) for name, info in members.items()}
    return bool(fingerprint(hashes) != recorded["fingerprint"])


def inputs_changed(environment: Mapping[str, str], config: IngestConfig) -> bool:
    """Whether the source or the overrides that `environment` chooses differ from the last run's.

    Raises:
        ValueError: The source, or one of the files, cannot be read.
    """
    overrides = choose_overrides(None, None, environment, config)
    if not config.overrides.is_file() or read_overrides(config.overrides) != overrides:
        return True
    return has_changed(choose_source(None, environment, config), config)


def fingerprint(hashes: Mapping[str, str]) -> str:
    """SHA-256 over sorted relative paths and the SHA-256 of each file."""
    digest = hashlib.sha256()
    for path in sorted(hashes):
        digest.update(f"{path}\0{hashes[path]}\n".encode())
    return digest.hexdigest()


def label_from_folder(name: str, labels: Mapping[str, str]) -> str:
    """The short label of a class folder.

    `labels` goes first; else what follows the first underscore is dropped if it begins with a
    site (`left.`, `right.`) or a stage (`T2`): `adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib` is
    `adenocarcinoma`; any other name stays.
    """
    if name in labels:
        return labels[name]
    match = STAGED_NAME.fullmatch(name)
    return match[1] if match else name


def ingest(source: str, config: IngestConfig) -> dict[str, Any]:
    """Bring `source` into `config.scans` and write `config.table`; the table.

    On an error, Ctrl-C included, an older folder and its table stay as they were.

    Raises:
        ValueError: The source is missing, empty, refused, or not a folder of classes.
        OSError: The target cannot be written.
    """
    config.scans.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ingest.", dir=config.scans.parent) as work:
        folder, archive_sha256 = _fetch(source, Path(work), config)
        files, folders = _walk(folder)
        if not files and not folders:
            raise ValueError(f"{source}: empty; {EXPECTED_LAYOUT}")
        root, layout = _find_root(source, set(files) | {f"{name}/" for name in folders})
        placed = _place(source, files, root, layout, config.labels)
        hashes = _hash_files(files)
        broken = _find_broken({path: files[path] for path in placed})
        accepted = {path: target for path, target in placed.items() if path not in broken}
        _require_classes(source, root, layout, folders, accepted, broken)
        table = {
            "source": source,
            **({"archive_sha256": archive_sha256} if archive_sha256 else {}),
            "fingerprint": fingerprint(hashes),
            "data_hash": fingerprint({accepted[path]: hashes[path] for path in accepted}),
            "layout": layout,
            "num_scans": len(accepted),
            "counts": _count(accepted.values()),
            "broken": [{"path": path, "reason": broken[path]} for path in sorted(broken)],
            "ignored": sorted(set(files) - set(placed)),
        }
        # A user's files are copied, not linked: DVC makes its files read-only, and would theirs.
        bring = os.replace if folder.is_relative_to(work) else shutil.copyfile
        with replaced(config.scans) as temporary:
            for path, target in sorted(accepted.items()):
                (temporary / target).parent.mkdir(parents=True, exist_ok=True)
                bring(files[path], temporary / target)
        write_json(config.table, table)
    return table


def _fetch(source: str, work: Path, config: IngestConfig) -> tuple[Path, str | None]:
    """The folder that holds the files of `source`, and the hash of its archive if it is one."""
    unpacked = work / "unpacked"
    is_folder = (
        source == PHANTOM
        or (_is_drive_link(source) and _is_drive_folder(source))
        or (not _is_remote(source) and _local_path(source).is_dir())
    )
    if is_folder and config.sha256 is not None:
        raise ValueError(f"{source}: sha256 is given, but the source is not one file; leave it out")
    if source == PHANTOM:
        write_configured(unpacked, load_config(PhantomConfig, config.phantom_config))
        return unpacked, None
    if is_folder and _is_remote(source):
        _download_drive_folder(source, unpacked, config)
        return unpacked, None
    if is_folder:
        return _local_path(source), None
    archive = work / "archive.zip"
    if not _is_remote(source):
        archive = _local_path(source)
    elif _is_drive_link(source):
        _download_drive_file(source, archive, config)
    else:
        download(source, archive, max_bytes=config.max_download_bytes, timeout_s=config.timeout_s)
    sha256 = _hash_file(archive)
    if config.sha256 is not None and sha256 != config.sha256.lower():
        raise ValueError(f"{source}: sha256 is {sha256}, expected {config.sha256.lower()}")
    extract(archive, unpacked, config, name=source)
    return unpacked, sha256


def _is_remote(source: str) -> bool:
    return "://" in source


def _is_drive_link(source: str) -> bool:
    return urllib.parse.urlsplit(source).hostname in DRIVE_HOSTS


def _is_drive_folder(source: str) -> bool:
    return "/folders/" in urllib.parse.urlsplit(source).path


def _local_path(source: str) -> Path:
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
    with _opened_zip(archive, name) as opened, replaced(folder) as temporary:
        temporary.mkdir()
        members = _checked_members(opened, name, config)
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
                raise ValueError(f"{name}: {member!r} is there twice") from error


@contextmanager
def _opened_zip(path: Path, name: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name}: not a readable zip archive: {error}") from error
    except (NotImplementedError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name}: damaged or packed in an unknown way: {error}") from error


def _checked_members(
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
                raise ValueError(f"{name}: {info.filename!r} is there twice")
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


def _walk(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Every file and every folder below `folder` by relative POSIX path; links are followed."""
    files: dict[str, Path] = {}
    folders: list[str] = []

    def fail(error: OSError) -> None:
        raise error

    for current, inner, names in os.walk(folder, followlinks=True, onerror=fail):
        here = Path(current)
        real = here.resolve()
        inner[:] = [  # a link to a parent would never end
            name for name in sorted(inner) if not real.is_relative_to((here / name).resolve())
        ]
        folders += [(here / name).relative_to(folder).as_posix() for name in inner]
        files |= {(here / name).relative_to(folder).as_posix(): here / name for name in names}
    return files, folders


def _hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    regular = {path: file for path, file in files.items() if file.is_file()}
    with ThreadPoolExecutor(2) as pool:
        hashes = pool.map(_hash_file, regular.values())
        progress = tqdm(hashes, desc="hash", total=len(regular), unit="file", disable=None)
        return dict(zip(regular, progress, strict=True))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    with archive.open(info) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _find_root(source: str, paths: Iterable[str]) -> tuple[str, str]:
    """Where the classes begin, "" or "Data/", and the layout there, `splits` or `classes`.

    As long as neither is found, the way goes down through folders that stand alone.

    Args:
        source: For the error message.
        paths: Relative paths of files, and of folders with a slash at the end.
    """
    root, below = "", {path for path in paths if not is_hidden(path)}
    while True:
        tops = {path.split("/")[0] for path in below if "/" in path}
        if any(top.lower() in SPLIT_NAMES for top in tops):
            return root, "splits"
        scans = [path for path in below if path.count("/") == 1 and _is_scan(path)]
        # A name without a suffix may be a licence beside the folders, if there is only one.
        if any(PurePosixPath(path).suffix for path in scans) or (scans and len(tops) > 1):
            return root, "classes"
        if len(tops) != 1:
            raise ValueError(f"{source}: {EXPECTED_LAYOUT}")
        top = f"{tops.pop()}/"
        root, below = root + top, {path.removeprefix(top) for path in below if path.startswith(top)}


def _target_folder(path: str, root: str, layout: str, labels: Mapping[str, str]) -> str | None:
    """`SPLIT/LABEL` or `LABEL` for a class folder's relative path; None for any other folder."""
    if not path.startswith(root) or is_hidden(path):
        return None
    parts = path.removeprefix(root).split("/")
    if layout == "classes" and len(parts) == 1:
        return label_from_folder(parts[0], labels)
    if layout == "splits" and len(parts) == 2 and parts[0].lower() in SPLIT_NAMES:
        return f"{SPLIT_NAMES[parts[0].lower()]}/{label_from_folder(parts[1], labels)}"
    return None


def _place(
    source: str, files: Iterable[str], root: str, layout: str, labels: Mapping[str, str]
) -> dict[str, str]:
    """Relative path of each scan in the source, and the one it gets in the scan folder."""
    placed: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path in sorted(files):
        folder, _, name = path.rpartition("/")
        target = _target_folder(folder, root, layout, labels) if folder else None
        if target is None or not _is_scan(path) or is_hidden(path):
            continue
        placed[path] = f"{target}/{name}"
        if placed[path] in taken:
            raise ValueError(
                f"{source}: {taken[placed[path]]} and {path} would both become {placed[path]}; "
                "rename one"
            )
        taken[placed[path]] = path
    return placed


def _is_scan(path: str) -> bool:
    """Whether a file is meant as a scan; scanners write DICOM without a suffix or with a number."""
    return not path.endswith("/") and has_scan_name(path)


def _find_broken(files: Mapping[str, Path]) -> dict[str, str]:
    """Relative path and reason of every file that does not decode."""

    def reason(item: tuple[str, Path]) -> str | None:
        path, file = item
        try:
            load_grey(file)
        except ScanDecodeError as error:
            # The place on this machine would make the table differ between machines.
            return str(error).replace(str(file), PurePosixPath(path).name)
        return None

    with ThreadPoolExecutor(2) as pool:
        reasons = pool.map(reason, files.items())
        progress = tqdm(reasons, desc="decode", total=len(files), unit="scan", disable=None)
        return {path: why for path, why in zip(files, progress, strict=True) if why}


def _require_classes(
    source: str,
    root: str,
    layout: str,
    folders: Iterable[str],
    accepted: Mapping[str, str],
    broken: Mapping[str, str],
) -> None:
    filled = {path.rpartition("/")[0] for path in accepted}
    for folder in folders:
        if _target_folder(folder, root, layout, {}) is not None and folder not in filled:
            reasons = [why for path, why in sorted(broken.items()) if path.startswith(f"{folder}/")]
            detail = f" ({len(reasons)} broken; {reasons[0]})" if reasons else ""
            raise ValueError(
                f"{source}: no readable scan in the class folder {folder}{detail}; fill it or "
                "take it away"
            )
    names = sorted({PurePosixPath(target).parent.name for target in accepted.values()})
    if len(names) < 2:
        raise ValueError(f"{source}: the only class is {names}; expected at least two")


def _count(targets: Iterable[str]) -> dict[str, dict[str, int]]:
    """Scans by split (`all` in the plain layout) and label."""
    counts: dict[str, dict[str, int]] = {}
    for target in sorted(targets):
        *split, label, _ = target.split("/")
        by_label = counts.setdefault(split[0] if split else "all", {})
        by_label[label] = by_label.get(label, 0) + 1
    return {split: counts[split] for split in (*SPLITS, "all") if split in counts}


def describe(table: Mapping[str, Any]) -> str:
    """The table as lines of text: counts by class and split, broken and ignored files."""
    counts = table["counts"]
    labels = sorted({label for by_label in counts.values() for label in by_label})
    width = max(len(label) for label in labels)
    lines = [f"{'class':{width}}" + "".join(f"{split:>8}" for split in counts)]
    for label in labels:
        row = "".join(f"{by_label.get(label, 0):8d}" for by_label in counts.values())
        lines.append(f"{label:{width}}{row}")
    lines.append(
        f"{table['num_scans']} scans from {table['source']}; {len(table['broken'])} broken, "
        f"{len(table['ignored'])} other files left out"
    )
    lines += [f"broken: {entry['path']}: {entry['reason']}" for entry in table["broken"]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Bring scans into data/scans."""
    parser = command_parser("training ingest", main.__doc__, "configs/ingest.yaml")
    parser.add_argument(
        "--source",
        help="phantom, a folder, a .zip, an https address or a Google Drive link; else DATA, "
        "else the source of the last run, else the config's",
    )
    parser.add_argument("--sha256", help="expected hash of the archive, instead of the config's")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(IngestConfig, arguments.config)
        if arguments.sha256 is not None:
            config = dataclasses.replace(config, sha256=arguments.sha256)
        source = choose_source(arguments.source, os.environ, config)
        overrides = choose_overrides(arguments.overrides, arguments.source, os.environ, config)
        if "ingest" in overrides:
            raise ValueError("overrides of ingest: name these settings in configs/ingest.yaml")
        use_overrides(overrides)
        table = ingest(source, config)
        write_overrides(config.overrides, overrides)
        sys.stdout.write(describe(table))

    return run_command(work, interrupted="interrupted: the scans of before are kept")
