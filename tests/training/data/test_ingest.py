from __future__ import annotations

import datetime
import io
import ipaddress
import json
import os
import signal
import ssl
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from training.common.config import (
    config_from_mapping,
    load_config,
    read_overrides,
    use_overrides,
)
from training.data.dataset import list_scan_folder
from training.data.download import download, extract
from training.data.ingest import (
    choose_source,
    fingerprint,
    has_changed,
    ingest,
    inputs_changed,
    label_from_folder,
    main,
)
from training.data.phantom import PhantomConfig
from training.data.settings import IngestConfig

CHECKOUT = Path(__file__).parents[3]
LONG_NAMES = {
    "adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib": "adenocarcinoma",
    "large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa": "large.cell.carcinoma",
    "squamous.cell.carcinoma_left.hilum_T1_N2_M0_IIIa": "squamous.cell.carcinoma",
}


def picture(seed: int) -> bytes:
    """A PNG of 48 x 40 pixels: a slope with noise."""
    rng = np.random.default_rng(seed)
    slope = np.add.outer(np.arange(40), np.arange(48)) + 20 * (seed % 5)
    grey = (slope + rng.integers(0, 60, slope.shape)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


def contents(*folders: str, each: int = 2) -> dict[str, bytes]:
    """Relative names and bytes of `each` pictures in every folder, all different."""
    return {
        f"{folder}/{number}.png": picture(100 * index + number)
        for index, folder in enumerate(folders)
        for number in range(each)
    }


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def config(tmp_path: Path) -> IngestConfig:
    """Limits that small files can pass or break; targets in tmp_path/data."""
    (tmp_path / "phantom.yaml").write_text("train: 1\nvalid: 1\ntest: 1\n")
    return IngestConfig(
        scans=tmp_path / "data/scans",
        table=tmp_path / "data/ingest.json",
        phantom_config=tmp_path / "phantom.yaml",
        max_download_bytes=2**20,
        max_unpacked_bytes=2**24,
        max_files=100,
        timeout_s=5.0,
    )


# Layouts and labels


def test_split_folders_keep_their_splits_and_get_short_labels(
    tmp_path: Path, config: IngestConfig
) -> None:
    files = contents(*(f"train/{name}" for name in LONG_NAMES), "train/normal")
    files |= contents("validation/normal", "VAL/adenocarcinoma", "test/normal", each=1)
    files["manifest.csv"] = b"path\n"
    table = ingest(str(written(tmp_path / "in", files)), config)
    assert table["layout"] == "splits"
    assert table["counts"] == {
        "train": {**dict.fromkeys(sorted(LONG_NAMES.values()), 2), "normal": 2},
        "valid": {"adenocarcinoma": 1, "normal": 1},
        "test": {"normal": 1},
    }
    assert table["ignored"] == ["manifest.csv"]
    target = config.scans / "train/large.cell.carcinoma/1.png"
    name = "train/large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa/1.png"
    assert target.read_bytes() == files[name]
    assert json.loads(config.table.read_text()) == table


def test_class_folders_without_splits(tmp_path: Path, config: IngestConfig) -> None:
    table = ingest(str(written(tmp_path / "in", contents("normal", "sick", each=3))), config)
    assert table["layout"] == "classes"
    assert table["counts"] == {"all": {"normal": 3, "sick": 3}}
    assert sorted(tree(config.scans)) == [
        f"{label}/{number}.png" for label in ("normal", "sick") for number in range(3)
    ]


@pytest.mark.parametrize("prefix", ["Data/", "archive/Data/"])
@pytest.mark.parametrize("folders", [("train/a", "train/b", "test/a"), ("a", "b")])
def test_nested_folders_are_entered(
    tmp_path: Path, config: IngestConfig, prefix: str, folders: tuple[str, ...]
) -> None:
    files = {f"{prefix}{name}": data for name, data in contents(*folders).items()}
    files |= {f"{prefix}LICENSE": b"free", "__MACOSX/Data/._a": b"junk", ".DS_Store": b"junk"}
    table = ingest(str(written(tmp_path / "in", files)), config)
    assert table["num_scans"] == 2 * len(folders)
    assert table["ignored"] == sorted([f"{prefix}LICENSE", "__MACOSX/Data/._a", ".DS_Store"])
    assert {name.rpartition("/")[0] for name in tree(config.scans)} == set(folders)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *LONG_NAMES.items(),
        ("normal", "normal"),
        ("large.cell.carcinoma", "large.cell.carcinoma"),
        ("covid_positive", "covid_positive"),
        ("adenocarcinoma_T1_N0_M0", "adenocarcinoma"),
        ("Bengin cases", "benign"),
    ],
)
def test_folder_name_becomes_label(name: str, label: str) -> None:
    assert label_from_folder(name, {"Bengin cases": "benign"}) == label


def test_two_files_for_one_place_are_an_error(tmp_path: Path, config: IngestConfig) -> None:
    source = written(tmp_path / "in", contents("train/a", "train/b", "train/a_T1_N0_M0", each=1))
    with pytest.raises(ValueError, match=r"would both become train/a/0\.png; rename one"):
        ingest(str(source), config)


def test_linked_folders_are_followed_but_not_in_circles(
    tmp_path: Path, config: IngestConfig
) -> None:
    written(tmp_path / "elsewhere", contents("sick"))
    source = written(tmp_path / "in", contents("normal"))
    (source / "sick").symlink_to(tmp_path / "elsewhere/sick")
    (source / "normal/loop").symlink_to(source)
    assert ingest(str(source), config)["counts"] == {"all": {"normal": 2, "sick": 2}}


def test_the_users_own_files_are_copied(tmp_path: Path, config: IngestConfig) -> None:
    source = written(tmp_path / "in", contents("a", "b"))
    ingest(str(source), config)
    for path in config.scans.rglob("*.png"):
        assert path.stat().st_nlink == 1
        path.write_bytes(b"changed")
    assert tree(source) == contents("a", "b")


# What is broken or missing


def test_broken_files_are_listed_with_reasons_and_left_out(
    tmp_path: Path, config: IngestConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    files = contents("train/a", "train/b")
    files["train/a/text.png"] = b"this is no picture"
    files["train/a/cut.png"] = picture(9)[:200]
    files["train/b/empty.jpg"] = b""
    files["train/b/README"] = b"a text without a suffix"
    files["train/b/notes.txt"] = b"notes"
    source = written(tmp_path / "in", files)
    table = ingest(str(source), config)
    assert [entry["path"] for entry in table["broken"]] == [
        "train/a/cut.png",
        "train/a/text.png",
        "train/b/README",
        "train/b/empty.jpg",
    ]
    reasons = {entry["path"]: entry["reason"] for entry in table["broken"]}
    assert reasons["train/a/text.png"].startswith("text.png: neither PNG, JPEG nor DICOM")
    assert "empty" in reasons["train/b/empty.jpg"]
    assert table["ignored"] == ["train/b/notes.txt"]
    assert table["counts"] == {"train": {"a": 2, "b": 2}}
    assert len(tree(config.scans)) == 4
    assert str(tmp_path) not in json.dumps(table["broken"])


@pytest.mark.parametrize(
    ("files", "folders", "message"),
    [
        ({}, (), "empty; expected train"),
        ({"a.png": picture(0)}, (), "expected train"),
        (contents("x/y/a", "z/y/b"), (), "expected train"),
        (contents("normal"), (), r"the only class is \['normal'\]; expected at least two"),
        (contents("train/a", "test/a"), (), r"the only class is \['a'\]"),
        (contents("a", "b"), ("c",), "no readable scan in the class folder c; fill it"),
        (contents("train/a", "train/b"), ("test/a",), "no readable scan in the class folder test"),
        (
            {**contents("a", "b"), "c/x.png": b"nothing", "c/y.png": b""},
            (),
            r"class folder c \(2 broken; x.png: neither PNG",
        ),
    ],
)
def test_unusable_folder_is_one_line_and_keeps_the_old_data(
    tmp_path: Path,
    config: IngestConfig,
    files: dict[str, bytes],
    folders: tuple[str, ...],
    message: str,
) -> None:
    ingest(str(written(tmp_path / "before", contents("old", "older"))), config)
    kept = tree(tmp_path / "data")
    source = written(tmp_path / "in", files)
    for folder in ("", *folders):
        (source / folder).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match=message) as caught:
        ingest(str(source), config)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path / "data") == kept


def test_missing_source_ends_with_one_line(
    tmp_path: Path, config: IngestConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ingest.yaml").write_text(f"scans: {config.scans}\ntable: {config.table}\n")
    arguments = ["--config", str(tmp_path / "ingest.yaml"), "--source", str(tmp_path / "nowhere")]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "nowhere: no such folder or file; expected 'phantom'" in message
    assert not config.scans.exists()


def test_unwritable_target_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    # A limit of 4 KiB on each file stands for a full disk: the copy of the scans fails for real.
    rng = np.random.default_rng(0)
    big = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (200, 200), np.uint8)).save(big, "PNG")
    written(tmp_path / "in", {**contents("a", "b"), "a/big.png": big.getvalue()})
    (tmp_path / "ingest.yaml").write_text("{}\n")
    ended = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -f 4; exec "$0" -m training ingest --config ingest.yaml --source in',
            sys.executable,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "too large" in ended.stderr
    assert not list((tmp_path / "data").iterdir())


# Sources


def test_phantoms_are_a_source(config: IngestConfig) -> None:
    table = ingest("phantom", config)
    assert table["source"] == "phantom"
    assert {split: sum(by.values()) for split, by in table["counts"].items()} == {
        "train": 4,
        "valid": 4,
        "test": 4,
    }
    assert all(b"Synthetic phantom" in data for data in tree(config.scans).values())


def test_same_source_same_bytes(tmp_path: Path, config: IngestConfig) -> None:
    source = written(tmp_path / "in", {**contents("a", "b"), "a/x.png": b"broken"})
    other = replace(
        config, scans=tmp_path / "other/deeper/scans", table=tmp_path / "other/ingest.json"
    )
    ingest(str(source), config)
    ingest(str(source), other)
    assert config.table.read_bytes() == other.table.read_bytes()
    assert tree(config.scans) == tree(other.scans)


def test_data_hash_follows_the_accepted_scans_only(tmp_path: Path, config: IngestConfig) -> None:
    plain = written(tmp_path / "plain", contents("train/a", "train/b"))
    noted = written(tmp_path / "noted", {**contents("Data/train/a", "Data/train/b")})
    (noted / "Data/notes.txt").write_text("notes")
    first, second = ingest(str(plain), config), ingest(str(noted), config)
    assert first["data_hash"] == second["data_hash"]
    assert first["fingerprint"] != second["fingerprint"]
    (plain / "train/a/0.png").write_bytes(picture(77))
    assert ingest(str(plain), config)["data_hash"] != first["data_hash"]


def test_fingerprint_is_sha256_over_sorted_paths_and_hashes() -> None:
    # printf 'a\00011\nb\00022\n' | sha256sum
    expected = "8d6be472c8298e2437303c249c6bd0f768d986f1e3f91ff57cd7e610c5a360e1"
    assert fingerprint({"b": "22", "a": "11"}) == fingerprint({"a": "11", "b": "22"})
    assert fingerprint({"a": "11", "b": "22"}) == expected


def test_flag_beats_environment_beats_record_beats_config(
    tmp_path: Path, config: IngestConfig
) -> None:
    assert choose_source(None, {}, config) == "phantom"
    source = written(tmp_path / "in", contents("a", "b"))
    ingest(str(source), config)
    assert choose_source(None, {}, config) == str(source)
    assert choose_source(None, {"DATA": ""}, config) == str(source)
    assert choose_source(None, {"DATA": "there"}, config) == "there"
    assert choose_source("here", {"DATA": "there"}, config) == "here"


def test_a_run_without_data_keeps_the_real_scans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ingest.yaml").write_text("source: phantom\n")
    written(tmp_path / "real", contents("a", "b"))
    monkeypatch.setenv("DATA", "real")
    assert main(["--config", "ingest.yaml"]) == 0
    before = (tmp_path / "data/ingest.json").read_bytes()
    monkeypatch.delenv("DATA")
    assert main(["--config", "ingest.yaml"]) == 0
    assert (tmp_path / "data/ingest.json").read_bytes() == before
    assert json.loads(before)["source"] == "real"
    assert "4 scans from real" in capsys.readouterr().out


def test_unreadable_record_is_an_error_not_a_swap(config: IngestConfig) -> None:
    config.table.parent.mkdir()
    config.table.write_text("{")
    with pytest.raises(ValueError, match="not JSON; delete it and name the source again"):
        choose_source(None, {}, config)


def test_changed_inputs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA", raising=False)
    (tmp_path / "ingest.yaml").write_text("{}\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").write_text("epochs: 12\n")
    (tmp_path / "small.yaml").write_text("train: {epochs: 1}\n")
    config = IngestConfig()
    files = contents("a", "b")
    written(tmp_path / "real", files)
    zipped(tmp_path / "real.zip", files)

    def changed(**environment: str) -> bool:
        return inputs_changed(environment, config)

    assert changed()
    for source in ("real", "real.zip"):
        assert main(["--config", "ingest.yaml", "--source", source]) == 0
        assert not changed()
        assert not changed(DATA=source)
        assert changed(DATA="phantom")
        assert changed(DATA=source, OVERRIDES="small.yaml")
    monkeypatch.setenv("OVERRIDES", "small.yaml")
    assert main(["--config", "ingest.yaml"]) == 0
    assert read_overrides(config.overrides) == {"train": {"epochs": 1}}
    assert not changed()  # what names nothing keeps what the last run took
    assert changed(DATA="real.zip")  # and a source is taken with the full settings
    (tmp_path / "small.yaml").write_text("train: {epochs: 2}\n")
    assert changed(OVERRIDES="small.yaml")
    files["a/0.png"] = picture(50)
    zipped(tmp_path / "real.zip", files)
    assert changed()


def test_overrides_replace_keys_of_the_config_they_name(tmp_path: Path) -> None:
    (tmp_path / "phantom.yaml").write_text("train: 60\nvalid: 16\ntest: 24\n")
    use_overrides({"phantom": {"train": 5}, "train": {"epochs": 1}})
    try:
        config = load_config(PhantomConfig, tmp_path / "phantom.yaml")
        assert (config.train, config.valid) == (5, 16)
        use_overrides({"phantom": {"trains": 5}})
        with pytest.raises(ValueError, match="overrides of trains: unknown keys \\['trains'\\]"):
            load_config(PhantomConfig, tmp_path / "phantom.yaml")
    finally:
        use_overrides({})
    assert load_config(PhantomConfig, tmp_path / "phantom.yaml").train == 60


def test_overrides_of_another_form_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    path = tmp_path / "demo.yaml"
    path.write_text("trian: {epochs: 1}\n")
    with pytest.raises(ValueError, match=r"trian is no config: there is no configs/trian\.yaml"):
        read_overrides(path)
    path.write_text("train: 5\n")
    with pytest.raises(ValueError, match="train is 5; expected keys and values of configs/train"):
        read_overrides(path)


# Archives


def test_zip_gives_the_same_scans_as_its_folder(tmp_path: Path, config: IngestConfig) -> None:
    files = {f"Data/{name}": data for name, data in contents("train/a", "train/b").items()}
    folder = ingest(str(written(tmp_path / "in", files)), config)
    archive = zipped(tmp_path / "in.zip", files)
    table = ingest(str(archive), config)
    assert table["fingerprint"] == folder["fingerprint"]
    assert table["data_hash"] == folder["data_hash"]
    assert len(table["archive_sha256"]) == 64
    right = replace(config, sha256=table["archive_sha256"].upper())
    assert ingest(str(archive), right) == table
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith(".")]


def test_wrong_sha256_is_refused(tmp_path: Path, config: IngestConfig) -> None:
    archive = zipped(tmp_path / "in.zip", contents("a", "b"))
    with pytest.raises(ValueError, match=r"sha256 is [0-9a-f]{64}, expected 0{64}"):
        ingest(str(archive), replace(config, sha256="0" * 64))
    assert not config.scans.exists()


def test_sha256_of_a_folder_is_refused(tmp_path: Path, config: IngestConfig) -> None:
    source = written(tmp_path / "in", contents("a", "b"))
    with pytest.raises(ValueError, match="not one file; leave it out"):
        ingest(str(source), replace(config, sha256="0" * 64))


@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "a/../../x.png",
        "/tmp/x.png",
        "C:/x.png",
        "c:x.png",
        "a\\..\\x.png",
        "a//x.png",
        "./x.png",
    ],
)
def test_names_that_leave_the_target_are_refused(
    tmp_path: Path, config: IngestConfig, name: str
) -> None:
    archive = zipped(tmp_path / "in.zip", {**contents("a", "b"), name: picture(1)})
    with pytest.raises(ValueError, match="would leave the target folder; refused"):
        extract(archive, tmp_path / "deep/er/out", config, name="in.zip")
    assert not list((tmp_path / "deep").rglob("*.png"))
    assert not (tmp_path / "deep/er/out").exists()
    assert not (tmp_path / "deep/x.png").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path: Path, config: IngestConfig, kind: int) -> None:
    entry = zipfile.ZipInfo("a/link.png")
    entry.create_system = 3
    entry.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(ValueError, match="is a link or device; refused"):
        extract(tmp_path / "in.zip", tmp_path / "out", config, name="in.zip")
    assert not (tmp_path / "out").exists()


def test_bombs_are_refused_before_the_first_byte(tmp_path: Path, config: IngestConfig) -> None:
    zeros = bytes(2**21)
    archive = zipped(tmp_path / "in.zip", {**contents("a", "b"), "a/zeros.png": zeros})
    with pytest.raises(ValueError, match="refused as a zip bomb"):
        extract(archive, tmp_path / "out", config, name="in.zip")
    # Many small entries: each below the size from which the ratio counts, together above.
    many = {f"a/{number}.png": bytes(2**19) for number in range(8)}
    archive = zipped(tmp_path / "many.zip", many)
    with pytest.raises(ValueError, match="refused as a zip bomb"):
        extract(archive, tmp_path / "out", config, name="many.zip")
    assert not (tmp_path / "out").exists()


def test_size_and_number_of_files_are_limited(tmp_path: Path, config: IngestConfig) -> None:
    archive = zipped(tmp_path / "in.zip", contents("a", "b"))
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        extract(archive, tmp_path / "out", replace(config, max_unpacked_bytes=1000), name="in.zip")
    with pytest.raises(ValueError, match="4 entries, more than 3"):
        extract(archive, tmp_path / "out", replace(config, max_files=3), name="in.zip")


def test_declared_sizes_that_lie_are_found_out(tmp_path: Path, config: IngestConfig) -> None:
    data = os.urandom(5000)
    archive = zipped(tmp_path / "in.zip", {"a/x.png": data}, zipfile.ZIP_STORED)
    raw = archive.read_bytes()
    # Both headers say 50 bytes instead of 5000 (little-endian, 4 bytes each).
    archive.write_bytes(raw.replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"in\.zip: not a readable zip archive"):
        extract(archive, tmp_path / "out", config, name="in.zip")
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, config: IngestConfig) -> None:
    archive = zipped(tmp_path / "in.zip", contents("a", "b"), zipfile.ZIP_STORED)
    raw = bytearray(archive.read_bytes())
    raw[200] ^= 0xFF
    archive.write_bytes(raw)
    with pytest.raises(ValueError, match="not a readable zip archive: Bad CRC-32"):
        extract(archive, tmp_path / "out", config, name="in.zip")
    (tmp_path / "scan.zip").write_bytes(picture(0))
    with pytest.raises(ValueError, match=r"scan\.zip: not a readable zip archive"):
        ingest(str(tmp_path / "scan.zip"), config)
    assert not (tmp_path / "out").exists()


def test_a_name_twice_is_refused(tmp_path: Path, config: IngestConfig) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("a/x.png", picture(0))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/x.png", picture(1))
    with pytest.raises(ValueError, match=r"'a/x\.png' is listed twice"):
        extract(tmp_path / "in.zip", tmp_path / "out", config, name="in.zip")


def test_an_empty_class_folder_in_a_zip_is_seen(tmp_path: Path, config: IngestConfig) -> None:
    archive = zipped(tmp_path / "in.zip", {**contents("a", "b"), "c/": b""})
    with pytest.raises(ValueError, match="no readable scan in the class folder c"):
        ingest(str(archive), config)


# Downloads


class Server:
    """A TLS server on 127.0.0.1 whose answers are chosen by the path."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.bodies: dict[str, bytes] = {}
        self.asked = threading.Event()
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.httpd.socket = context.wrap_socket(self.httpd.socket, server_side=True)
        self.httpd.handle_error = lambda *_: None  # clients that hang up are the point
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.05,))
        self.thread.start()

    def url(self, path: str) -> str:
        return f"https://127.0.0.1:{self.httpd.server_address[1]}{path}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        kind = request.path.split("/")[1]
        body = self.bodies.get(request.path, b"x" * 1000)
        self.asked.set()
        if kind == "missing":
            request.send_error(404)
            return
        if kind in ("to-http", "to-https"):
            request.send_response(302)
            target = self.url("/scans.zip")
            request.send_header("Location", target.replace("https", kind[3:], 1))
            request.end_headers()
            return
        request.send_response(200)
        if kind != "unsized":
            request.send_header("Content-Length", str(len(body) * (2 if kind == "short" else 1)))
        request.end_headers()
        if kind == "slow":
            request.wfile.write(body[:10])
            self.release.wait(20)
            return
        request.wfile.write(body)

    def close(self) -> None:
        self.release.set()
        self.httpd.shutdown()
        self.thread.join(10)
        self.httpd.server_close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture
def server(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server(*certificate)
    yield running
    running.close()


def test_zip_over_https_is_ingested(tmp_path: Path, config: IngestConfig, server: Server) -> None:
    archive = zipped(tmp_path / "in.zip", contents("train/a", "train/b"))
    server.bodies["/scans.zip"] = archive.read_bytes()
    local = ingest(str(archive), config)
    for url in (server.url("/scans.zip"), server.url("/to-https/scans.zip")):
        table = ingest(url, replace(config, sha256=local["archive_sha256"]))
        assert {**table, "source": local["source"]} == local
        assert not has_changed(url, config)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/short/scans.zip", "broke off after 1000 of 2000 bytes; try again"),
        ("/missing/scans.zip", "the server answered 404"),
        ("/to-http/scans.zip", r"http://127\.0\.0\.1:\d+/scans\.zip: expected an https address"),
        ("/big/scans.zip", "more than 900 bytes"),
        ("/unsized/scans.zip", "more than 900 bytes"),
        ("/slow/scans.zip", "broke off: .*timed out; try again"),
    ],
)
def test_download_that_fails_leaves_nothing(
    tmp_path: Path, server: Server, path: str, message: str
) -> None:
    limit = 900 if "900" in message else 10**6
    with pytest.raises(ValueError, match=message):
        download(server.url(path), tmp_path / "out/scans.zip", max_bytes=limit, timeout_s=0.5)
    assert not list((tmp_path / "out").iterdir())


def test_unknown_certificate_is_refused(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ValueError, match=r"cannot be reached: .*certificate"):
        download(server.url("/scans.zip"), tmp_path / "x.zip", max_bytes=10**6, timeout_s=5)
    assert not list(tmp_path.iterdir())


def test_nobody_at_the_address(
    tmp_path: Path, server: Server, certificate: tuple[Path, Path]
) -> None:
    gone = Server(*certificate)
    url = gone.url("/scans.zip")
    gone.close()
    with pytest.raises(ValueError, match="cannot be reached"):
        download(url, tmp_path / "x.zip", max_bytes=10**6, timeout_s=5)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/scans.zip", "ftp://host/scans.zip", "file:///etc/passwd", "https:///x.zip"],
)
def test_other_schemes_are_refused(config: IngestConfig, url: str) -> None:
    with pytest.raises(ValueError, match="expected an https address"):
        ingest(url, config)


@pytest.mark.parametrize(
    "link",
    ["https://drive.google.com/file/d/abc123/view", "https://drive.google.com/drive/folders/abc"],
)
def test_drive_that_cannot_be_reached_is_one_line(
    config: IngestConfig, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    # A proxy on a port where nobody listens: the way out is closed on any machine.
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="Google Drive did not give it") as caught:
        ingest(link, config)
    assert "\n" not in str(caught.value)
    assert not list(config.scans.parent.iterdir())


def test_interrupt_during_a_download_keeps_the_old_data(tmp_path: Path, server: Server) -> None:
    written(tmp_path / "real", contents("a", "b"))
    (tmp_path / "ingest.yaml").write_text("{}\n")
    command = [sys.executable, "-m", "training", "ingest", "--config", "ingest.yaml", "--source"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    subprocess.run(
        [*command, "real"],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )
    kept = tree(tmp_path / "data")
    with subprocess.Popen(
        [*command, server.url("/slow/scans.zip")],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert server.asked.wait(30)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert message == "interrupted: the scans of before are kept\n"
    assert tree(tmp_path / "data") == kept


# Config and listing


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_files": 0},
        {"timeout_s": -1.0},
        {"max_compression_ratio": 0.5},
        {"sha256": "abc"},
        {"labels": {"x": "../y"}},
        {"labels": {"x": ""}},
    ],
)
def test_config_refuses_what_cannot_be_meant(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        config_from_mapping(IngestConfig, wrong, Path("ingest.yaml"))


def test_scan_folder_is_listed_with_split_and_label(tmp_path: Path) -> None:
    written(tmp_path, contents("train/a", "test/b", each=1))
    listed = [(scan.path, scan.split, scan.label) for scan in list_scan_folder(tmp_path)]
    assert listed == [("test/b/0.png", "test", "b"), ("train/a/0.png", "train", "a")]
    with pytest.raises(ValueError, match=r"no scans; run python -m training ingest first"):
        list_scan_folder(tmp_path / "nothing")


@pytest.mark.real_scans
def test_real_scans_come_in_whole(config: IngestConfig) -> None:
    folder = Path(os.environ.get("CHESTCT_REAL_SCANS", CHECKOUT / "../shared/data")) / "chest-ct"
    if not folder.is_dir():
        pytest.skip("set CHESTCT_REAL_SCANS to the folder that holds chest-ct/")
    table = ingest(str(folder), config)
    assert table["num_scans"] == 957
    assert table["broken"] == []
    assert table["ignored"] == ["manifest.csv"]
    assert table["counts"]["test"] == {
        "adenocarcinoma": 102,
        "large.cell.carcinoma": 43,
        "normal": 50,
        "squamous.cell.carcinoma": 77,
    }
