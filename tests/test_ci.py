"""What CI runs: no skip in silence, each test in one part, and programs that are missing."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.waiting import until

CHECKOUT = Path(__file__).parents[1]
PARTS = {"unit": "test-unit", "servers": "test-servers", "pipeline": "test-slow"}
WORKERS = [(), ("-n", "2")]
EXPECTED = """
import pytest

def test_passes(): pass

@pytest.mark.parametrize("tag", range(3))
def test_tag(tag): pytest.skip("pydicom cannot write it")

@pytest.mark.skip(reason="no perf_analyzer on PATH: name it with PERF_ANALYZER")
def test_measures(): pass

@pytest.mark.xfail
def test_known(): assert False
"""
UNEXPECTED = """
import pytest

@pytest.fixture
def thing(): pytest.skip("no thing here")

def test_passes(): pass
def test_thing(thing): pass
def test_tensorrt(): pytest.skip("TensorRT is installed here")
"""
WHOLE_MODULE = "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass\n"


def run_pytest(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A pytest of its own, with the plugin and without this project's settings."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n  server\n")
    plugins = ("-p", "xdist", "-p", "tests.support.skips", "-p", "no:cacheprovider")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "pytest.ini", *plugins, *options],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("workers", WORKERS, ids=" ".join)
def test_expected_skips_pass_and_are_counted(tmp_path, workers):
    (tmp_path / "test_expected.py").write_text(EXPECTED)
    done = run_pytest(tmp_path, *workers, CI="true", SKIPS_LOG=str(tmp_path / "log"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^   3  unwritable-tag$", done.stdout, re.MULTILINE)
    assert "unexpected" not in done.stdout
    counts = Counter((tmp_path / "log").read_text().splitlines())
    assert counts == {"unwritable-tag": 3, "perf_analyzer": 1}


@pytest.mark.parametrize("workers", WORKERS, ids=" ".join)
def test_unexpected_skips_fail_a_run_of_ci_only(tmp_path, workers):
    (tmp_path / "test_unexpected.py").write_text(UNEXPECTED)
    (tmp_path / "test_module.py").write_text(WHOLE_MODULE)
    done = run_pytest(tmp_path, *workers, CI="true")
    assert done.returncode == 1, done.stdout + done.stderr
    _, _, listed = done.stdout.partition("unexpected skips: with CI=true the run fails")
    assert listed.count("test_unexpected.py::test_thing: no thing here\n") == 1
    assert listed.count("test_unexpected.py::test_tensorrt: TensorRT is installed here\n") == 1
    assert listed.count("test_module.py: could not import 'no_such_module'") == 1
    assert done.stdout.splitlines()[-1].strip("= ").startswith("1 passed, 3 skipped")

    done = run_pytest(tmp_path, *workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "they would fail a run with CI=true" in done.stdout


def test_a_run_of_nothing_but_unexpected_skips_fails(tmp_path):
    (tmp_path / "test_module.py").write_text(WHOLE_MODULE)
    assert run_pytest(tmp_path, CI="true").returncode == 1


def test_what_may_be_missing_depends_on_the_place(tmp_path):
    (tmp_path / "test_place.py").write_text(
        "import pytest\ndef test_it(): pytest.skip('TensorRT is installed here')\n"
    )
    assert run_pytest(tmp_path, CI="true", DEVICE="gpu").returncode == 0
    assert run_pytest(tmp_path, CI="true", DEVICE="cpu").returncode == 1


def skip_reasons() -> list[tuple[str, str]]:
    """Where the suite skips, and why; an expression inside the reason is written {}."""
    found = []
    for file in sorted((CHECKOUT / "tests").rglob("*.py")):
        if file.name == Path(__file__).name:
            continue
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            if not re.search(r"(^|\.)(skip|skipif|importorskip)$", name):
                continue
            reasons = [word.value for word in call.keywords if word.arg == "reason"]
            if not reasons and name.endswith("importorskip"):
                text = f"could not import {ast.unparse(call.args[0])}"
            else:
                reason = (reasons or call.args)[0]
                parts = reason.values if isinstance(reason, ast.JoinedStr) else [reason]
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts
                )
            found.append((f"{file.relative_to(CHECKOUT)}:{call.lineno}", text))
    return found


def test_every_skip_of_the_suite_has_an_entry_and_no_entry_is_left_over():
    entries = programs.read()
    words = [program for entry in entries for program in entry.programs]
    used, without = set(), []
    for where, text in skip_reasons():
        if text == "{}":  # the text of an error
            continue
        fitting = {
            entry.name
            for entry in entries
            for word in words
            if entry.reason.search(text.replace("{}", word))
        }
        used |= fitting
        if not fitting:
            without.append(f"{where}: {text}")
    assert not without
    texts_of_errors = {"triton", "keras-download"}
    # A group without a skip of its own serves another one's tests.
    assert {entry.name for entry in entries if not entry.programs} - used == texts_of_errors


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}")
    (folder / name).chmod(0o755)


def test_a_group_that_cannot_be_installed_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "bin"
    program(
        folder,
        "apt-get",
        'echo "$*" >> "$CALLS"\n'
        "case $* in *unknown*) echo E: no unknown >&2; exit 100 ;; *slow*) sleep 30 ;; esac\n"
        'install -m 755 /dev/null "${CALLS%/*}/bin/gadget"\n',
    )
    file = tmp_path / "programs.toml"
    file.write_text(
        '[groups.first]\nprograms = ["no-first"]\npackages = ["unknown"]\n'
        '[groups.second]\nprograms = ["no-second"]\npackages = ["slow"]\n'
        'may_be_missing = ["anywhere"]\n'
        '[groups.third]\nprograms = ["gadget"]\npackages = ["there"]\n'
        '[groups.fourth]\nprograms = ["sh"]\npackages = ["not-asked"]\n[skips]\n'
    )
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(programs, "GROUP_LIMIT_S", 1)
    entries = programs.read(file)
    programs.install(entries)
    assert capsys.readouterr().out.splitlines() == [
        "first: E: no unknown",
        "second: not done within 1 s",
        "third: installed",
    ]
    assert "not-asked" not in (tmp_path / "calls").read_text()
    lines = programs.table(entries, {"first": 4, "second": 1}).splitlines()
    assert [line.split(maxsplit=2) for line in lines[1:]] == [
        ["first", "missing", "4 (no no-first) MUST NOT BE MISSING HERE"],
        ["second", "missing", "1 (no no-second)"],
        ["third", "yes", "0"],
        ["fourth", "yes", "0"],
    ]


def test_each_test_belongs_to_one_part(tmp_path):
    """By its marks, so a test with each pair of them stands for all."""
    (tmp_path / "test_marks.py").write_text(
        "import pytest\n"
        "def test_plain(): pass\n"
        "@pytest.mark.server\ndef test_server(): pass\n"
        "@pytest.mark.slow\ndef test_slow(): pass\n"
        "@pytest.mark.server\n@pytest.mark.slow\ndef test_both(): pass\n"
    )

    def collected(target: str) -> list[str]:
        done = subprocess.run(
            ["make", "-n", target], cwd=CHECKOUT, capture_output=True, text=True, timeout=60
        )
        (marks,) = re.findall(r'pytest .*-m "(.+)"', done.stdout)
        listed = run_pytest(tmp_path, "--collect-only", "-q", "-m", marks).stdout
        return re.findall(r"^test_marks.py::(\w+)$", listed, re.MULTILINE) or [listed]

    whole = ["test_both", "test_plain", "test_server", "test_slow"]
    of_part = {part: collected(target) for part, target in PARTS.items()}
    assert sorted(name for names in of_part.values() for name in names) == whole
    assert sorted(collected("test")) == sorted(of_part["unit"] + of_part["servers"])
    assert sorted(collected("test") + collected("test-slow")) == whole


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files that .ci/run reads, and a `make` that records its targets and fails on FAULT."""
    for name in (".ci/run", ".ci/programs.toml", "tests/support/programs.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / name)
    program(
        tmp_path / "bin",
        "make",
        'echo "$*" >> "$CALLS"\n[ "$*" != test ] || printf "curl\\ncurl\\n" >> "$SKIPS_LOG"\n'
        'echo "===== 3 passed, $CI in 1.00s ====="\n[ "$*" != "$FAULT" ]\n',
    )
    program(tmp_path / "bin", "apt-get", "exit 100\n")
    return tmp_path


def start_ci(checkout: Path, *parts: str, fault: str = "none") -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(checkout / ".ci/run"), *parts],
        env={
            "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(checkout / "calls"),
            "PYTHON": sys.executable,
            "FAULT": fault,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ci_run(checkout: Path, *parts: str, fault: str = "none") -> subprocess.CompletedProcess[str]:
    with start_ci(checkout, *parts, fault=fault) as run:
        output, _ = run.communicate(timeout=60)
    return subprocess.CompletedProcess(run.args, run.returncode, output)


def test_ci_runs_everything_once_and_reports_programs_skips_and_times(checkout):
    done = ci_run(checkout)
    assert done.returncode == 0, done.stdout
    assert (checkout / "calls").read_text().split("\n") == ["check", "test", "test-slow", ""]
    assert re.search(r"^curl +\w+ +2\b", done.stdout, re.MULTILINE)
    _, _, steps = done.stdout.partition(" s in all, exit code 0\n")
    found = re.findall(r"^(\w+) +\d+ s  exit code 0 (.*)$", steps, re.MULTILINE)
    assert [name for name, _ in found] == ["programs", "check", "test", "slow"]
    assert found[-1][1].strip() == "===== 3 passed, true in 1.00s ====="


def test_ci_stops_at_a_failure_and_still_reports(checkout):
    done = ci_run(checkout, fault="test")
    assert done.returncode == 1
    assert (checkout / "calls").read_text().split() == ["check", "test"]
    assert re.search(r"^test +\d+ s  exit code 1 ", done.stdout, re.MULTILINE)
    assert re.search(r"^curl +\w+ +2\b", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("part", ["check", *PARTS])
def test_ci_runs_one_part(checkout, part):
    done = ci_run(checkout, part)
    assert done.returncode == 0, done.stdout
    assert (checkout / "calls").read_text().split() == [PARTS.get(part, part)]
    assert ("programs" in done.stdout) == (part != "check")


def test_ci_refuses_an_unknown_part(checkout):
    done = ci_run(checkout, "unit", "nothing")
    assert done.returncode == 2
    assert "no part is called nothing" in done.stdout
    assert not (checkout / "calls").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ci_passes_an_interruption_on_to_what_it_runs(checkout, name):
    program(
        checkout / "bin",
        "make",
        "trap 'echo ended >> ended; exit 1' INT\ntouch begun\nwhile :; do sleep 0.1; done\n",
    )
    run = start_ci(checkout, "check")
    until((checkout / "begun").exists, "the step")
    run.send_signal(getattr(signal, name))
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert (checkout / "ended").read_text() == "ended\n"
    assert "exit code 130" in output
