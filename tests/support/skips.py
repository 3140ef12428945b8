"""A pytest plugin: no test is skipped in silence.

It sorts the skips of a run by .ci/programs.toml and prints them. With CI=true a skip that the file
does not allow here makes the run fail. SKIPS_LOG names a file to which each skip's entry is added.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.support import programs

CI = os.environ.get("CI", "").lower() in ("true", "1")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the process that counts
        config.pluginmanager.register(Skips(), "skips")


class Skips:
    """Counts the skips of a run, those of whole modules too."""

    def __init__(self) -> None:
        self._entries = programs.read()
        self._counts: Counter[str] = Counter()
        self._unexpected: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._count(report)

    def _count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = str(report.longrepr)
        if isinstance(report.longrepr, (tuple, list)):  # file, line, reason
            reason = report.longrepr[2]
        reason = reason.removeprefix("Skipped: ")
        entry = programs.entry_of(reason, self._entries)
        self._counts[entry.name if entry else programs.NOWHERE] += 1
        if entry is None or not entry.may_be_missing_here():
            self._unexpected.append(f"{report.nodeid}: {reason}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if CI and self._unexpected and session.exitstatus in (
            pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED
        ):  # fmt: skip
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if log := os.environ.get("SKIPS_LOG"):
            with Path(log).open("a") as file:
                file.writelines(f"{name}\n" for name in self._counts.elements())

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._counts:
            return
        terminalreporter.section("skipped, by .ci/programs.toml")
        for name, count in sorted(self._counts.items()):
            terminalreporter.line(f"{count:4}  {name}")
        if self._unexpected:
            verdict = "with CI=true the run fails" if CI else "they would fail a run with CI=true"
            terminalreporter.section(f"unexpected skips: {verdict}", red=True)
            for line in self._unexpected:
                terminalreporter.line(line)
