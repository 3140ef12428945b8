"""Run the DVC pipeline with one line a stage; what the stages print goes to log files."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO

import yaml

from training.common.cli import run_command
from training.common.config import load_config
from training.data.ingest import choose_overrides, inputs_changed
from training.data.settings import IngestConfig

LOGS = Path("results/logs")
LOCK = Path(".cache/pipeline.lock")
RUNNING = re.compile(r"Running stage '([^']+)':")
UNCHANGED = re.compile(r"Stage '([^']+)' (?:didn't change, skipping|is cached)")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
INDENT = "      "
SHOWN_ON_ERROR = 12  # last lines of the log


class StageFailedError(Exception):
    """A stage ended with an error; the message names its log and holds the end of it."""


class Screen:
    """One line a stage; on a terminal the latest progress bar of the stage stands below it.

    Args:
        total: Number of stages.
        stream: Where the lines go.
    """

    def __init__(self, total: int, stream: IO[str] | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self.is_live = self._stream.isatty()
        self._number = 0
        self._line = ""
        self._began = 0.0
        self._has_bar = False

    @property
    def columns(self) -> int:
        """Characters that a line may have."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return max(columns or 80, 20)

    def say(self, text: str) -> None:
        """A line between those of the stages."""
        self._stream.write(f"{text}\n")

    def begin(self, name: str, what: str) -> None:
        """A stage runs from now on."""
        self._number += 1
        self._line = f"{self._number:2d}/{self._total} {name:10} {what}"[: self.columns - 12]
        self._began = time.monotonic()
        if self.is_live:
            self._stream.write(self._line)
            self._stream.flush()

    def show(self, progress: str) -> None:
        """Replace the progress shown below the stage's line."""
        if self.is_live and progress.strip():
            end = f"\n\x1b[2K{INDENT}{progress.strip()[: self.columns - len(INDENT) - 1]}"
            self._stream.write(f"{end}\x1b[1A\r{self._line}")
            self._stream.flush()
            self._has_bar = True

    def end(self, result: str = "") -> None:
        """The stage is over: write its line with `result`, or with the seconds it took."""
        result = result or f"{time.monotonic() - self._began:.0f} s"
        below = "\n\x1b[2K\x1b[1A" if self._has_bar else ""
        start = "\r\x1b[2K" if self.is_live else ""
        line = f"{self._line:{max(0, min(54, self.columns - 12))}}"
        self._stream.write(f"{below}{start}{line} {result:>9}\n")
        self._stream.flush()
        self._has_bar = False


def output_of(
    command: Sequence[str], columns: int | None
) -> Generator[tuple[str, bool], None, None]:
    """Run `command`; its output in pieces as (text, whether it ended a line).

    With `columns` the command writes to a terminal of that width, so that it shows its progress
    bars, each state of which is a piece that ended no line.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    # The stages' `python` is the one of this environment, whoever called it by its path.
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": bin_first, "DVC_NO_ANALYTICS": "true"}
    if columns is None:
        reader, writer = os.pipe()
    else:
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(reader, "rb", buffering=0) as output:
        try:
            # A group of its own, so that it ends with all that it started; the lock is inherited.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=environment,
                process_group=0, close_fds=False,
            )  # fmt: skip
        finally:
            os.close(writer)
        try:
            yield from _pieces(output)
        except BaseException:
            _end_group(process, output)
            raise
        if code := process.wait():
            raise subprocess.CalledProcessError(code, list(command))


def _end_group(process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
    """Interrupt a command with everything that it started; kill what is left after a minute."""
    threading.Thread(target=lambda: list(_pieces(output)), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=60)
            return


@contextlib.contextmanager
def only_run(screen: Screen) -> Iterator[None]:
    """Wait until no other run works in this checkout, and take SIGTERM and SIGHUP as Ctrl-C.

    The processes of a run inherit the lock: it outlives a run that was killed as long as its
    stages do.

    Raises:
        OSError: The lock file cannot be written.
    """
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            screen.say(f"waiting for another run in {Path.cwd()}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        before = {
            number: signal.signal(number, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _pieces(output: IO[bytes]) -> Iterator[tuple[str, bool]]:
    waiting = b""
    while True:
        try:
            chunk = output.read(1 << 16)
        except OSError:  # a terminal that nobody writes to any more
            chunk = b""
        data = waiting + chunk
        # A carriage return at the end may be half of an end of line.
        held = b"\r" if chunk and data.endswith(b"\r") else b""
        data = data[: len(data) - len(held)].replace(b"\r\n", b"\n")
        *pieces, waiting = re.split(rb"(?<=[\r\n])", data)
        waiting += held
        if not chunk and waiting:
            pieces.append(waiting)
        for piece in pieces:
            text = ESCAPES.sub("", piece.decode(errors="replace"))
            yield text.rstrip("\r\n"), not piece.endswith(b"\r")
        if not chunk:
            return


def stage_descriptions(path: Path = Path("dvc.yaml")) -> dict[str, str]:
    """What each stage of the pipeline does, by its name, in order."""
    stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("desc", "") for name, stage in stages.items()}


def reproduce(screen: Screen) -> None:
    """`dvc repro` on the screen, each stage's output in `results/logs/STAGE.log`.

    DVC watches code, settings and what is in data/. That DATA or OVERRIDES name something else
    than the last time, or that their content is another one, is found here.

    Raises:
        StageFailedError: A stage, or DVC itself, failed.
        ValueError: The source of the scans, or the overrides, cannot be read.
    """
    descriptions = stage_descriptions()
    config = load_config(IngestConfig, Path("configs/ingest.yaml"))
    dvc = [sys.executable, "-m", "dvc", "repro"]
    commands = [dvc]
    if choose_overrides(None, None, os.environ, config) and not os.environ.get("OVERRIDES"):
        screen.say(f"settings of the last run: {config.overrides}; DATA=... takes the full ones")
    if inputs_changed(os.environ, config):
        commands.insert(0, [*dvc, "--force", "--single-item", "ingest"])
    seen: set[str] = set()
    with _Log() as log, contextlib.closing(_outputs(commands, screen)) as pieces:
        running = False
        try:
            for text, is_line in pieces:
                match = UNCHANGED.match(text) or RUNNING.match(text)
                if match and match[1] not in seen:
                    seen.add(match[1])
                    if running:
                        screen.end()
                    running = match.re is RUNNING
                    screen.begin(match[1], descriptions.get(match[1], ""))
                    log.name = match[1]
                    if not running:
                        screen.end("unchanged")
                elif is_line:
                    log.write(text)
                else:
                    screen.show(text)
        except subprocess.CalledProcessError as error:
            if running:
                screen.end("failed")
            raise log.failure() from error
        except KeyboardInterrupt:
            if running:
                screen.end("interrupted")
            raise
        if running:
            screen.end()


def run_step(screen: Screen, name: str, what: str, command: Sequence[str]) -> None:
    """Any other command on the screen, its output in `results/logs/NAME.log`.

    Raises:
        StageFailedError: It failed.
    """
    with _Log(name) as log, contextlib.closing(_outputs([command], screen)) as pieces:
        screen.begin(name, what)
        try:
            for text, is_line in pieces:
                if is_line:
                    log.write(text)
                else:
                    screen.show(text)
        except subprocess.CalledProcessError as error:
            screen.end("failed")
            raise log.failure() from error
        except KeyboardInterrupt:
            screen.end("interrupted")
            raise
        screen.end()


def _outputs(
    commands: Sequence[Sequence[str]], screen: Screen
) -> Generator[tuple[str, bool], None, None]:
    """Output of one command after the other; leaving the loop early ends the one that runs."""
    for command in commands:
        columns = screen.columns - len(INDENT) if screen.is_live else None
        with contextlib.closing(output_of(command, columns)) as pieces:
            yield from pieces


class _Log:
    """The log file of the stage `name`, opened anew when the name changes."""

    def __init__(self, name: str = "dvc") -> None:
        self.name = name
        self._file: IO[str] | None = None
        self._path = Path()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, text: str) -> None:
        path = LOGS / f"{self.name}.log"
        if path != self._path or self._file is None:
            if self._file:
                self._file.close()
            LOGS.mkdir(parents=True, exist_ok=True)
            self._path, self._file = path, path.open("w", encoding="utf-8")
        self._file.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self._file.flush()

    def failure(self) -> StageFailedError:
        if self._path != LOGS / f"{self.name}.log":
            return StageFailedError(f"{self.name} failed and printed nothing")
        lines = self._path.read_text(encoding="utf-8").splitlines()
        end = "\n".join(f"  {line}" for line in lines[-SHOWN_ON_ERROR:])
        return StageFailedError(f"{self.name} failed; all it said is in {self._path}:\n{end}")


def main(argv: list[str] | None = None) -> int:
    """Run every stage of the pipeline whose inputs changed."""
    parser = argparse.ArgumentParser(prog="python -m training pipeline", description=main.__doc__)
    parser.parse_args(argv)

    def work() -> None:
        screen = Screen(len(stage_descriptions()))
        with only_run(screen):
            reproduce(screen)

    return run_command(
        work,
        errors=(StageFailedError,),
        interrupted="interrupted: finished stages are kept; the same command goes on",
    )
