"""The command `chestct`, in this process and as one of its own."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

import chestct
from chestct.cli import __main__ as cli
from chestct.cli.options import fleet_of
from chestct.contract import NOT_A_MEDICAL_DEVICE
from tests.support.waiting import until
from training.data.phantom import dicom_from_phantom, make_phantom, write_dicom

COMMAND = [
    sys.executable,
    "-W",
    "error",
    "-m",
    "chestct.cli",
]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHESTCT_URL", raising=False)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it hides mistakes in flushing


@pytest.fixture
def good_folder(scan_folder: Path) -> Path:
    for path in scan_folder.glob("2 t*.png"):
        path.unlink()
    return scan_folder


def run(arguments: list[object], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


def classify(*arguments: object) -> int:
    return cli.main(["classify", *map(str, arguments)])


def test_table(peer: Any, good_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(good_folder, "--url", peer.url) == 0
    captured = capsys.readouterr()
    header, *rows, model, notice = captured.out.splitlines()
    assert header.split() == ["label", "probability", "in", "domain", "path"]
    column = header.index("path")
    assert [row[column:] for row in rows] == [
        str(good_folder / name)
        for name in ("0 (1).png", "1 (1).png", "2 (1).png", "3 (1).png", "inner/a.PNG")
    ]
    assert rows[2].split()[:3] == ["normal", "0.700", "yes"]
    assert re.search(r"5 scans, [\d.]+ scans/s: 2 adenocarcinoma, 1 large_cell,", captured.err)
    # A table in a file has to say it too, and whoever sends it there reads stderr.
    assert (model, notice) == ("model chestct version 1, run run-7", NOT_A_MEDICAL_DEVICE)
    assert captured.err.splitlines()[-2:] == [model, notice]
    assert "out of domain" not in captured.err
    assert "refused" not in captured.err


def test_bad_scans_are_told_and_counted(
    peer: Any,
    scan_folder: Path,
    chest_slice: Callable[..., np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(np.full((120, 120), 90, np.uint8)).save(scan_folder / "8 flat.png")
    Image.fromarray(chest_slice(40)[:90]).save(scan_folder / "9 low.png")
    write_dicom(make_phantom("normal", 3, size=128), scan_folder / "axial.dcm")
    coronal = dicom_from_phantom(make_phantom("normal", 3, size=128))
    coronal.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    coronal.save_as(scan_folder / "coronal.dcm", enforce_file_format=True)
    assert classify(scan_folder, "--url", peer.url) == 1
    captured = capsys.readouterr()
    rows = captured.out.splitlines()
    assert sum(row.startswith("ERROR") for row in rows) == 3
    assert "2 text.png: neither PNG, JPEG nor DICOM" in captured.out
    names = ("8 flat.png", "9 low.png", "axial.dcm", "coronal.dcm")
    rest = {name: row.split(maxsplit=2)[2] for name in names for row in rows if name in row}
    assert rest["8 flat.png"] == (
        f"NO         {scan_folder}/8 flat.png: blank: nearly all of it lies within 0 of 255 grey "
        "levels, expected at least 32; unlike the training scans: distance 40.0, limit 10.0"
    )
    assert rest["9 low.png"] == (
        f"NO         {scan_folder}/9 low.png: small: 160 x 90 pixels, expected at least 96 a side"
    )
    assert rest["axial.dcm"] == f"yes        {scan_folder}/axial.dcm"
    assert rest["coronal.dcm"].startswith(
        f"NO         {scan_folder}/coronal.dcm: no axial CT slice"
    )
    assert ": 3 adenocarcinoma, 2 large_cell, 1 normal, 2 squamous_cell, 2 failed" in captured.err
    assert "\n2 failed: 2 ScanDecodeError\n" in captured.err
    assert "\n1 skipped, no axial CT slice by the DICOM tags: 1 coronal\n" in captured.err
    kinds = "1 blank, 1 unlike the training scans, 1 small"
    assert f"\n2 out of domain, do not rely on their labels: {kinds}\n" in captured.err


def test_table_is_signed_even_when_nothing_was_classified(
    peer: Any, scan_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify(scan_folder / "2 text.png", "--url", peer.url) == 1
    signature = ["model chestct version 1, run run-7", NOT_A_MEDICAL_DEVICE]
    assert capsys.readouterr().out.splitlines()[2:] == signature
    peer.model.dies_at_request = 1
    assert classify(scan_folder / "0 (1).png", "--url", peer.url, "--patience-s", 0.2) == 3
    assert capsys.readouterr().out.splitlines()[1:] == signature


def test_table_names_every_model_that_answered(
    grpc_peer: Any,
    good_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "chestct.inference.limiter.ConcurrencyLimiter.FIRST", 1
    )  # one request after the other

    def roll_out(name: str, array: np.ndarray) -> np.ndarray:
        if len(grpc_peer.model.requests) == 3:
            grpc_peer.model.versions = ["2"]
            grpc_peer.model.parameters["training_run"] = "run-8"
        return array

    grpc_peer.model.bend_output = roll_out
    assert classify(good_folder, "--url", grpc_peer.url, "--batch-size", 1) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "model chestct version 1, run run-7",
        "model chestct version 2, run run-8",
        NOT_A_MEDICAL_DEVICE,
    ]


def test_json_lines(peer: Any, scan_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(scan_folder, "--url", peer.url, "--json") == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["status"] for line in lines] == ["ok"] * 3 + ["error"] * 2 + ["ok"] * 2
    assert lines[0]["label"] == "adenocarcinoma"
    assert lines[0]["model"] == {"name": "chestct", "version": "1", "run": "run-7"}
    assert lines[3]["error"]["type"] == "ScanDecodeError"
    assert {line["notice"] for line in lines} == {NOT_A_MEDICAL_DEVICE}


def test_output_holds_the_lines_of_stdout(
    peer: Any, scan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert classify(scan_folder, "--url", peer.url, "--json", "--output", output) == 1
    assert output.read_text() == capsys.readouterr().out


def test_existing_output_is_not_overwritten(
    grpc_peer: Any, good_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    assert classify(good_folder, "--url", grpc_peer.url, "--output", output) == 2
    assert "exists. Add --resume" in capsys.readouterr().err
    assert classify(good_folder, "--url", grpc_peer.url, "--output", output, "--resume") == 2
    assert "line 1 is not a record" in capsys.readouterr().err
    assert output.read_text() == "precious\n"
    assert grpc_peer.model.requests == []


def test_resume_does_what_is_left(
    grpc_peer: Any, good_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = (good_folder, "--url", grpc_peer.url, "--batch-size", 2, "--output", output)
    grpc_peer.model.failures = []
    assert classify(*arguments) == 0
    whole = output.read_text().splitlines(keepends=True)
    output.write_text("".join(whole[:2]) + whole[2][:40])  # as a crash leaves it
    grpc_peer.model.requests.clear()
    assert classify(*arguments, "--resume") == 0
    assert sorted(size for size, _ in grpc_peer.model.requests) == [1, 2]  # both under way at once
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["path"] for line in again] == [json.loads(line)["path"] for line in whole]
    capsys.readouterr()
    grpc_peer.die()
    assert classify(*arguments, "--resume") == 0  # nothing is left, so no server is needed
    assert "nothing to do" in capsys.readouterr().err


def test_resume_needs_an_output(good_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(good_folder, "--resume") == 2
    assert "--resume needs --output" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_errors_are_tried_again_when_asked_for(
    grpc_peer: Any, scan_folder: Path, tmp_path: Path, suffix: str, chest_slice: Any
) -> None:
    output = tmp_path / f"out.{suffix}"
    arguments = (scan_folder, "--url", grpc_peer.url, "--output", output)
    assert classify(*arguments) == 1
    Image.fromarray(chest_slice(100)).save(scan_folder / "2 torn.png")
    before = output.read_bytes()
    assert classify(*arguments, "--resume") == 0  # errors are done
    assert output.read_bytes() == before
    assert classify(*arguments, "--resume", "--retry-errors") == 1  # "2 text.png" is no picture yet
    text = output.read_text()
    assert text.count("2 torn.png") == 1
    assert text.count("2 text.png") == 2  # its path and its message
    assert text.count("ScanDecodeError") == 1
    assert num_rows(output) == 7
    assert classify(*arguments, "--retry-errors") == 2


def test_fail_fast_stops_at_the_first_bad_scan(
    grpc_peer: Any, scan_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (scan_folder, "--url", grpc_peer.url, "--json", "--fail-fast", "--batch-size", 1)
    assert classify(*arguments) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["status"] for line in lines] == ["ok", "ok", "ok", "error"]


def test_several_paths_and_single_files(
    grpc_peer: Any, good_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = (good_folder / "3 (1).png", good_folder / "inner", good_folder / "0 (1).png")
    assert classify(*paths, "--url", grpc_peer.url, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["3 (1).png", "a.PNG", "0 (1).png"]


def test_address_comes_from_the_environment(
    peer: Any, good_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHESTCT_URL", peer.url)
    assert classify(good_folder) == 0
    assert len(peer.model.requests) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["{empty}"], "no scans in .*empty: expected .png, .jpg"),
        (["{folder}", "missing"], "missing: no such file or folder"),
        (["{folder}", "--url", "localhost:8001"], "expected grpc://HOST:8001"),
        (["{folder}", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["{folder}", "--timeout-s", "0"], "timeout_s is 0.0: expected a positive number"),
        (["{folder}", "--output", "{empty}/a/b"], "the folder .*a is not there"),
        (["{folder}", "--output", "{empty}"], "a folder, expected a file to write to"),
        (["{folder}", "--tls-ca", "{folder}/0 (1).png"], "need grpcs:// or https://"),
        (["{folder}", "--tls-cert", "missing.pem"], "needs its key"),
    ],
)
def test_mistakes_of_the_user(
    good_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"folder": good_folder, "empty": tmp_path / "empty"}
    assert classify(*(part.format(**names) for part in change)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(f"chestct: .*{message}.*\n", captured.err)


@pytest.mark.parametrize("arguments", [[], ["classify"], ["classify", "a", "--batch-size", "x"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: chestct" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    expected = f"chestct {chestct.__version__} ({NOT_A_MEDICAL_DEVICE})\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("command", ["classify", "health"])
def test_help_shows_every_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(grpc://127.0.0.1:8001; the variable CHESTCT_URL" in text
    assert "name of the model (chestct)" in text
    assert NOT_A_MEDICAL_DEVICE in text


def test_health(peer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["health", "--url", peer.url]) == 0
    captured = capsys.readouterr()
    pattern = r"chestct version 1, run run-7: answered in \d+\.\d ms\n(.*)\n"
    answered = re.fullmatch(pattern, captured.out)
    assert answered is not None
    assert answered[1] == NOT_A_MEDICAL_DEVICE
    assert captured.err == ""


def test_health_as_json(peer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["health", "--json", "--url", peer.url]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("latency_ms") > 0
    assert answer == {
        "model": "chestct", "version": "1", "run": "run-7", "notice": NOT_A_MEDICAL_DEVICE,
    }  # fmt: skip


def test_start_of_the_node_as_json(grpc_peer: Any, tmp_path: Path) -> None:
    pytest.importorskip("pynetdicom")
    arguments = ["listen", "--queue", str(tmp_path), "--send-to", "PACS@127.0.0.1:104"]
    arguments += ["--port", "0", "--json", "--url", grpc_peer.url]
    with subprocess.Popen(
        [*COMMAND[:1], "-m", "chestct.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.pop("port") > 0
    assert said == {"ae_title": "CHESTCT", "host": "127.0.0.1", "notice": NOT_A_MEDICAL_DEVICE}


def test_schema_is_that_of_the_records(
    peer: Any, scan_folder: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["schema"]) == 0
    schema = jsonschema.Draft202012Validator(json.loads(capsys.readouterr().out))
    assert classify(scan_folder, study, "--url", peer.url, "--json", "--with-uids") == 1
    lines = records_of(capsys.readouterr().out)
    assert {"ok", "error"} == {line["status"] for line in lines}
    assert any("num_slices" in line for line in lines)
    for line in lines:
        schema.validate(line)


def test_completion_completes_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--print-completion", "bash"])
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "scan.png").touch()

    def completed(*words: str) -> list[str]:
        program = (
            f"source {script}; COMP_WORDS=({' '.join(repr(word) for word in words)}); "
            f"COMP_CWORD={len(words) - 1}; _shtab_chestct; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(
            ["bash", "-c", program], capture_output=True, text=True, timeout=30, cwd=tmp_path,
            check=True,
        )  # fmt: skip
        return done.stdout.split()

    assert completed("chestct", "cl") == ["classify"]
    assert completed("chestct", "classify", "--retry") == ["--retry-errors"]
    assert completed("chestct", "classify", "sc") == ["scan.png"]


def test_completion_without_shtab_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--print-completion", "bash"])
    assert 'pip install "chestct[completion]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], 60.0), (["--watch"], math.inf), (["--watch", "--patience-s", "5"], 5.0)],
)
def test_limit_of_the_time_without_a_server(options: list[str], expected: float) -> None:
    arguments = cli._parser().parse_args(["classify", "folder", *options])
    assert fleet_of(arguments).unavailable_timeout_s == expected


def test_no_server(
    good_folder: Path, tmp_path: Path, closed_port_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--url", closed_port_url, "--connect-timeout-s", "0.2")
    output = tmp_path / "out.jsonl"
    assert classify(good_folder, *options, "--output", output) == 3
    assert not output.exists()
    assert cli.main(["health", *options]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2


def test_another_contract(peer: Any, good_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer.model.num_classes = 7
    assert classify(good_folder, "--url", peer.url) == 3
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "has shape (-1, 7), expected (-1, 4)" in captured.err


def test_death_in_the_middle_keeps_what_is_done(
    peer: Any, good_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    peer.model.dies_at_request = 3
    options = ("--batch-size", 1, "--output", output, "--patience-s", 0.2)
    assert classify(good_folder, "--url", peer.url, *options) == 3
    done = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["path"] for line in done] == [
        str(good_folder / f"{index} (1).png") for index in range(len(done))
    ]
    assert len(done) < 3  # requests that were under way died with the server
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(f"chestct: {peer.url}: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a full disk")
def test_full_disk(grpc_peer: Any, good_folder: Path) -> None:
    arguments = ["classify", good_folder, "--url", grpc_peer.url]
    done = run([*arguments, "--output", "/dev/full"])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "chestct: cannot write the results: No space left on device"
    )
    with open("/dev/full", "w") as full:
        command = [*COMMAND, *map(str, arguments)]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_reader_that_goes_away(
    grpc_peer: Any, tmp_path: Path, grey_slice: Callable[..., np.ndarray]
) -> None:
    for index in range(12):
        Image.fromarray(grey_slice(100, seed=index)).save(tmp_path / f"{index}.png")
    grpc_peer.model.delay_s = 0.05
    command = [*COMMAND, "classify", str(tmp_path), "--url", grpc_peer.url, "--batch-size", "1"]
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["status"] == "ok"
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


def test_interrupt_keeps_what_is_done(peer: Any, good_folder: Path, tmp_path: Path) -> None:
    peer.model.delay_s = 0.4
    output = tmp_path / "out.jsonl"
    arguments = ["classify", str(good_folder), "--url", peer.url, "--output", str(output)]
    with subprocess.Popen(
        [*COMMAND, *arguments, "--batch-size", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(lambda: output.exists() and output.read_text(), "the first line")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert 1 <= len(lines) < 5
    assert errors.splitlines()[-1] == "chestct: interrupted; what was finished is kept"
    assert "Traceback" not in errors
    assert "KeyboardInterrupt" not in errors


def test_as_a_process_of_its_own(peer: Any, scan_folder: Path) -> None:
    done = run(["classify", scan_folder, "--json"], env={**os.environ, "CHESTCT_URL": peer.url})
    assert done.returncode == 1
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 7
    assert "\r" not in done.stderr  # progress is for terminals only
    assert "Traceback" not in done.stderr


def test_progress_on_a_terminal(grpc_peer: Any, good_folder: Path) -> None:
    terminal, end = os.openpty()
    command = [*COMMAND, "classify", str(good_folder), "--url", grpc_peer.url]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=end, timeout=60, check=False)
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert done.returncode == 0
    assert re.search(r"\r1 scan, [\d.]+ scans/s(\r\d scans, [^\r]*)*\r\x1b\[K5 scans", shown)


@pytest.mark.parametrize(("options", "times"), [([], 1), (["--json"], 6)])
def test_notice_on_one_terminal(
    grpc_peer: Any, good_folder: Path, options: list[str], times: int
) -> None:
    """Table and summary stand below each other there, and need it only once."""
    terminal, end = os.openpty()
    command = [*COMMAND, "classify", str(good_folder), "--url", grpc_peer.url, *options]
    done = subprocess.run(command, stdout=end, stderr=end, timeout=60, check=False)
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert done.returncode == 0
    assert shown.count(NOT_A_MEDICAL_DEVICE) == times  # five lines and the summary


def test_odd_file_names_do_not_reach_the_terminal(
    grpc_peer: Any, good_folder: Path, grey_slice: Callable[..., np.ndarray]
) -> None:
    name = os.fsencode(good_folder) + b"/\x1b[31m\xff\n\xc3\xa9.png"
    Image.fromarray(grey_slice(40)).save(os.fsdecode(name), "PNG")
    for encoding in ("utf-8", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = run(["classify", good_folder, "--url", grpc_peer.url], env=environment)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout
        assert len(done.stdout.splitlines()) == 9
        assert r"\x1b[31m\udcff\n" in done.stdout


def records_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two series in one folder, a localizer among them, and a picture in a folder below."""
    folder = tmp_path / "study"
    (folder / "below").mkdir(parents=True)
    for series in (1, 2):
        for index in range(4):
            dataset = dicom_from_phantom(make_phantom("normal", 10 * series + index, size=128))
            dataset.SeriesInstanceUID = f"1.2.3.{series}"
            dataset.StudyInstanceUID = "1.2.3"
            dataset.ImagePositionPatient = [0, 0, 5.0 * index]
            dataset.save_as(folder / f"{index}-{series}.dcm", enforce_file_format=True)
    scout = dicom_from_phantom(make_phantom("normal", 99, size=128))
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.save_as(folder / "scout.dcm", enforce_file_format=True)
    return folder


def test_series_are_summed_up_after_their_folder(
    grpc_peer: Any, study: Path, capsys: pytest.CaptureFixture[str], chest_slice: Any
) -> None:
    Image.fromarray(chest_slice(100)).save(study / "below" / "last.png")
    assert classify(study, "--url", grpc_peer.url, "--json") == 0  # a scout is no failure
    captured = capsys.readouterr()
    lines = records_of(captured.out)
    names = [Path(line["path"]).name + str(line.get("series", "")) for line in lines]
    slices = [f"{index}-{series}.dcm{series}" for index in range(4) for series in (1, 2)]
    assert names == [*slices, "last.png", "scout.dcm", "study1", "study2"]
    assert [line["num_slices"] for line in lines[-2:]] == [4, 4]
    assert Path(lines[-1]["slice"]["path"]).name in [f"{index}-2.dcm" for index in range(4)]
    assert "\n1 skipped, no axial CT slice by the DICOM tags: 1 localizer\n" in captured.err
    assert "\n2 series: " in captured.err
    assert "1.2.3" not in captured.out + captured.err
    assert "PHANTOM" not in (captured.out + captured.err).upper().replace(str(study).upper(), "")


def test_uids_only_when_asked_for(
    grpc_peer: Any, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (study, "--url", grpc_peer.url, "--json")
    assert classify(*arguments, "--with-uids") == 0
    captured = capsys.readouterr()
    *slices, _, first, second = records_of(captured.out)
    assert {line["series_uid"] for line in slices} == {"1.2.3.1", "1.2.3.2"}
    assert [first["series_uid"], second["study_uid"]] == ["1.2.3.1", "1.2.3"]
    assert "1.2.3" not in captured.err
    assert classify(*arguments, "--no-series") == 0
    assert not any("num_slices" in line for line in records_of(capsys.readouterr().out))


def test_named_scout_is_a_failure(
    grpc_peer: Any, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify(study / "scout.dcm", "--url", grpc_peer.url) == 1
    assert "1 failed: 1 OutOfDomainError" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_cut_of_a_run_is_resumed(
    grpc_peer: Any, study: Path, tmp_path: Path, suffix: str
) -> None:
    """Each slice and each series once, wherever the first run was cut off."""
    from chestct.results.formats import format_of, open_records
    from chestct.results.writers import DecodedInput

    whole, output = tmp_path / "whole.jsonl", tmp_path / f"out.{suffix}"
    arguments = (study, "--url", grpc_peer.url, "--json")
    assert classify(*arguments, "--output", whole) == 0
    records = records_of(whole.read_text())
    assert len(records) == 11
    for count in (0, 3, 8, 9, 10, 11):
        output.unlink(missing_ok=True)
        opened = open_records(output, format_of(output))
        opened.start(chestct_labels())
        for record in records[:count]:
            opened.add(record, DecodedInput(None))
        opened.close()
        assert classify(*arguments, "--output", output, "--resume") == 0
        again = open_records(output, format_of(output), resume=True)
        again.close()
        assert len(again.finished) == 11
        assert not again.finished.pending
        assert num_rows(output) == 11


def chestct_labels() -> list[str]:
    return ["adenocarcinoma", "large_cell", "normal", "squamous_cell"]


def num_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    return len(path.read_text().splitlines()) - (path.suffix == ".csv")


def test_choice_of_scans(
    grpc_peer: Any, scan_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def names(*options: str) -> list[str]:
        classify(scan_folder, "--url", grpc_peer.url, "--json", *options)
        return [Path(line["path"]).name for line in records_of(capsys.readouterr().out)]

    assert names("--exclude", "2 t*", "--include", "*.png") == [
        f"{index} (1).png" for index in range(4)
    ]
    assert names("--include", "*/inner/*") == ["a.PNG"]
    assert names("--limit", "2") == ["0 (1).png", "1 (1).png"]


def test_dry_run_lists_and_asks_nobody(
    closed_port_url: str, good_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    options = ("--url", closed_port_url, "--dry-run", "--output", output, "--limit", 3)
    assert classify(good_folder, *options) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(good_folder / f"{i} (1).png") for i in range(3)]
    assert captured.err == "3 files would be classified\n"
    assert not output.exists()


def test_list_on_stdin(grpc_peer: Any, good_folder: Path) -> None:
    listed = f"{good_folder}/3 (1).png\n\n{good_folder}/gone.png\n{good_folder}/inner\n"
    done = run(["classify", "-", "--json", "--url", grpc_peer.url], input=listed)
    assert done.returncode == 1
    outcomes = [(Path(line["path"]).name, line["status"]) for line in records_of(done.stdout)]
    assert outcomes == [("3 (1).png", "ok"), ("gone.png", "error"), ("a.PNG", "ok")]


def test_watch_takes_each_new_scan_once(
    grpc_peer: Any, good_folder: Path, tmp_path: Path, chest_slice: Any
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["classify", str(good_folder), "--watch", "--settle-s", "0.2", "--no-series"]
    arguments += ["--url", grpc_peer.url, "--output", str(output)]

    def wait_for(count: int) -> list[str]:
        until(lambda: output.exists() and output.read_text().count("\n") >= count, f"{count} lines")
        return [Path(line["path"]).name for line in records_of(output.read_text())]

    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert len(wait_for(5)) == 5
        Image.fromarray(chest_slice(100)).save(good_folder / "new.png")
        assert wait_for(6)[-1] == "new.png"
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "what was finished is kept" in errors
    assert len(set(wait_for(6))) == 6


def test_file_that_vanishes_and_folder_without_rights(
    grpc_peer: Any, good_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good_folder / "4 link.png").symlink_to(good_folder / "nowhere.png")
    (good_folder / "loop").symlink_to(good_folder)
    assert classify(good_folder, "--url", grpc_peer.url, "--json") == 1
    lines = records_of(capsys.readouterr().out)
    assert [line["status"] for line in lines] == ["ok"] * 4 + ["error", "ok"]
    assert "no such file" in lines[4]["error"]["message"]


def test_disk_that_fills_up_keeps_whole_lines(
    grpc_peer: Any, tmp_path: Path, chest_slice: Any
) -> None:
    """The limit of the process on the size of a file stands in for a small disk."""
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(chest_slice(100, seed=index)).save(folder / f"{index:02}.png")
    output = tmp_path / "out.jsonl"
    arguments = ["classify", folder, "--url", grpc_peer.url, "--output", output]
    limited = ["prlimit", "--fsize=2000", *COMMAND, *map(str, arguments)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "chestct: cannot write the results: File too large"
    assert output.stat().st_size == 2000  # the last line is torn
    done = run([*arguments, "--resume"])
    assert done.returncode == 0
    assert len({line["path"] for line in records_of(output.read_text())}) == 12
    assert len(records_of(output.read_text())) == 12


def test_overlays_and_page(grpc_peer: Any, study: Path, tmp_path: Path) -> None:
    overlays, page = tmp_path / "overlays", tmp_path / "page.html"
    options = ("--overlays", overlays, "--html", page, "--url", grpc_peer.url)
    assert classify(study, *options) == 0
    pictures = sorted(overlays.rglob("*.png"))
    assert len(pictures) == 8
    with Image.open(pictures[0]) as picture:
        assert picture.size == (224, 224)
        red, _, blue = np.asarray(picture.convert("RGB")).astype(int).transpose(2, 0, 1)
    assert (red > blue + 50).any()  # evidence is shown, and shown in colour
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 16
    assert "://" not in text.replace(grpc_peer.url, "")
    assert NOT_A_MEDICAL_DEVICE in text
    assert "holds images of patients" in text


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a folder where none may write")
def test_output_where_nothing_can_be_written(
    grpc_peer: Any, good_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify(good_folder, "--url", grpc_peer.url, "--output", "/proc/out.jsonl") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("chestct: cannot write the results: ")
    assert grpc_peer.model.requests == []


def test_several_servers(
    make_peer: Callable[..., Any], good_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [make_peer("grpc"), make_peer("grpc")]
    urls = [part for peer in peers for part in ("--url", peer.url)]
    assert classify(good_folder, *urls, "--batch-size", 1) == 0
    assert sum(len(peer.model.requests) for peer in peers) == 5
    peers[1].model.parameters["training_run"] = "run-8"
    assert classify(good_folder, *urls) == 3
    assert "is not that of the other servers: run is" in capsys.readouterr().err


def test_engine_ray_without_ray(
    good_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert classify(good_folder, "--engine", "ray") == 2
    assert 'pip install "chestct[ray]"' in capsys.readouterr().err


def test_archive_of_a_study(
    grpc_peer: Any, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in study.glob("*.dcm"):
            opened.write(path, f"inner/{path.name}")
    overlays = tmp_path / "overlays"
    options = ("--url", grpc_peer.url, "--json", "--isolate", "--overlays", overlays)
    assert classify(archive, *options) == 0
    lines = records_of(capsys.readouterr().out)
    assert [line["path"] for line in lines if "num_slices" in line] == [str(archive)] * 2
    assert {line["path"] for line in lines} - {str(archive)} == {
        f"{archive}!inner/{path.name}" for path in study.glob("*.dcm")
    }
    assert len(list(overlays.rglob("*.png"))) == 8
