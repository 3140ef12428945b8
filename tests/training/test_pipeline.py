"""What a user sees of the pipeline: one line a stage, and log files."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import until
from training import pipeline
from training.pipeline import Screen, StageFailedError, output_of, reproduce, run_step

STAGES = """
stages:
  ingest:
    desc: Copy every scan
    cmd: python ingest.py
    outs: [first.txt]
  train:
    desc: Fit something
    cmd: python fit.py
    deps: [fit.py, first.txt]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real DVC project of two stages, without git."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "inputs_changed", lambda *_: False)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ingest.yaml").write_text("{}\n")
    (tmp_path / "dvc.yaml").write_text(STAGES)
    code = "open('first.txt', 'w').write('1'); print('chatter of ingest')\n"
    (tmp_path / "ingest.py").write_text(code)
    (tmp_path / "fit.py").write_text("print('chatter of train')\n")
    subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True, timeout=120
    )
    return tmp_path


def test_a_line_a_stage_and_all_else_in_logs(project: Path) -> None:
    shown = io.StringIO()
    reproduce(Screen(2, shown))
    lines = shown.getvalue().splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["1/2", "ingest", "Copy", "every"],
        ["2/2", "train", "Fit", "something"],
    ]
    assert all(line.endswith(" s") for line in lines)
    assert "chatter of ingest" in (project / "results/logs/ingest.log").read_text()
    log = (project / "results/logs/train.log").read_text()
    assert "chatter of train" in log
    assert "chatter of ingest" not in log

    again = io.StringIO()
    reproduce(Screen(2, again))
    assert [line.split()[-1] for line in again.getvalue().splitlines()] == ["unchanged"] * 2

    (project / "fit.py").write_text("import sys; print('no convergence'); sys.exit(3)\n")
    third = io.StringIO()
    with pytest.raises(StageFailedError, match=r"train failed; .* results/logs/train\.log:") as e:
        reproduce(Screen(2, third))
    assert "no convergence" in str(e.value)
    assert [line.split()[-1] for line in third.getvalue().splitlines()] == ["unchanged", "failed"]


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_a_terminal_shows_the_progress_bar_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import sys, time; from tqdm import tqdm\n"
        "for _ in tqdm(range(3), 'epochs', disable=None, mininterval=0): time.sleep(0.01)\n"
        "print('wrote model.keras')"
    )
    shown = Terminal()
    screen = Screen(1, shown)
    run_step(screen, "train", "Fit something", [sys.executable, "-c", code])
    text = shown.getvalue()
    assert "epochs:  67%" in text
    assert "wrote model.keras" not in text
    assert text.rstrip().endswith(" s")
    log = (tmp_path / "results/logs/train.log").read_text()
    assert log.splitlines()[-1].endswith(" wrote model.keras")


@pytest.mark.parametrize("columns", [None, 60])
def test_output_arrives_whole_and_a_failure_is_told(columns: int | None) -> None:
    code = "import sys; print('ä' * 40_000); sys.stdout.write('no end of line'); sys.exit(4)"
    pieces: list[str] = []
    output = output_of([sys.executable, "-X", "utf8", "-c", code], columns)
    with pytest.raises(subprocess.CalledProcessError) as error:
        pieces.extend(text for text, _ in output)
    assert error.value.returncode == 4
    assert pieces == ["ä" * 40_000, "no end of line"]


def test_a_bar_that_is_wider_than_the_terminal_is_cut() -> None:
    shown = Terminal()
    screen = Screen(1, shown)
    screen.begin("train", "Fit something")
    screen.show("x" * 500)
    longest = max(len(part) for part in shown.getvalue().replace("\x1b", "\n").split("\n"))
    assert longest < 500


RUN = (
    "import sys; from training import pipeline; "
    "pipeline.inputs_changed = lambda *_: False; sys.exit(pipeline.main([]))"
)
WAITS = "import os, time; open('stage', 'w').write(str(os.getpid())); time.sleep(600)\n"


def start_run(project: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=project, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def runs(process_id: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stages_end_with_the_run(project: Path, name: str) -> None:
    (project / "fit.py").write_text(WAITS)
    run = start_run(project)
    stage = int(until(lambda: (project / "stage").is_file() and (project / "stage").read_text()))
    run.send_signal(getattr(signal, name))
    output, _ = run.communicate(timeout=90)
    assert run.returncode == 130, output
    assert "interrupted: finished stages are kept" in output
    assert not runs(stage)


def test_stages_end_when_their_output_cannot_be_written(project: Path) -> None:
    (project / "fit.py").write_text(WAITS)
    (project / "results").mkdir()
    (project / "results" / "logs").write_text("a file where a folder is needed")
    output, _ = start_run(project).communicate(timeout=90)
    assert "results/logs" in output
    assert not (project / "stage").is_file() or not runs(int((project / "stage").read_text()))


def test_a_second_run_waits_also_for_the_stages_of_a_killed_one(project: Path) -> None:
    (project / "fit.py").write_text(WAITS)
    first = start_run(project)
    stage = int(until(lambda: (project / "stage").is_file() and (project / "stage").read_text()))
    first.kill()
    first.communicate(timeout=90)
    assert runs(stage)
    (project / "fit.py").write_text("print('quick')\n")
    second = start_run(project)
    assert second.stdout
    assert second.stdout.readline().startswith("waiting for another run in ")
    os.kill(stage, signal.SIGKILL)
    output, _ = second.communicate(timeout=90)
    assert second.returncode == 0, output
    assert "train" in output
