from __future__ import annotations

import pytest

from chestct.errors import ScanDecodeError
from training.common.cli import command_parser, run_command


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), OSError(28, "wrong"), ScanDecodeError("wrong")]
)
def test_a_mistake_is_one_line_and_exit_code_1(error, capsys):
    assert run_command(raising(error)) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert "wrong" in said[0]


def test_control_c_says_what_is_left(capsys):
    assert run_command(raising(KeyboardInterrupt()), interrupted="run it again") == 130
    assert capsys.readouterr().err == "run it again\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


def test_further_mistakes_can_be_named(capsys):
    assert run_command(raising(ZeroDivisionError("no")), errors=(ZeroDivisionError,)) == 1
    assert capsys.readouterr().err == "error: no\n"


def test_exit_code_is_that_of_the_work():
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 1) == 1


def test_parser_shows_the_default_config(capsys):
    parser = command_parser("room.module", "Does it.", "configs/it.yaml")
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "python -m room.module" in shown
    assert "configs/it.yaml" in shown
