"""Ingest scans from phantoms, a folder, a zip, an https address or a Google Drive link.

The result is `data/scans/` in one of two layouts, `train|valid|test/CLASS/*` or `CLASS/*`, and the
table `data/ingest.json`. Every accepted scan was decoded once; what could not be is listed with
its reason. The same source gives the same bytes in both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from chestct.errors import ScanDecodeError
from chestct.imaging.archives import is_hidden
from chestct.imaging.prepare import load_grey
from chestct.imaging.sources import has_scan_name
from training.common.atomic_io import replaced, sha256_of, write_json
from training.common.cli import command_parser, run_command
from training.common.config import (
    load_config,
    read_overrides,
    use_overrides,
    write_overrides,
)
from training.data.dataset import SPLITS, walk
from training.data.download import checked_members, fetch, is_remote, local_path, opened_zip
from training.data.settings import PHANTOM, IngestConfig

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
EXPECTED_LAYOUT = "expected train|valid|test/CLASS/* or CLASS/* with PNG, JPEG or DICOM files"


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
    if source == PHANTOM or is_remote(source):
        return False
    path = local_path(source)
    if path.is_dir():
        hashes = _hash_files(walk(path)[0])
    else:
        with opened_zip(path, source) as archive:
            members = checked_members(archive, source, config)
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
        folder, archive_sha256 = fetch(source, Path(work), config)
        files, folders = walk(folder)
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


def _hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    regular = {path: file for path, file in files.items() if file.is_file()}
    with ThreadPoolExecutor(2) as pool:
        hashes = pool.map(sha256_of, regular.values())
        progress = tqdm(hashes, desc="hash", total=len(regular), unit="file", disable=None)
        return dict(zip(regular, progress, strict=True))


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
