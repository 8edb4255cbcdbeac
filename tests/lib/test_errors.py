"""What a person sees when something is wrong: two lines, or nothing, and never a traceback for what is no defect."""

import pytest

from lib.errors import UserError, reported


def ended(error) -> int:
    with pytest.raises(SystemExit) as raised, reported():
        raise error
    return raised.value.code


def test_bad_input_is_two_lines(capsys):
    assert ended(UserError("this is\nwrong.", "do that.")) == 2
    assert capsys.readouterr().err == "error: this is wrong.\n  try: do that.\n"


def test_what_was_given_neither_steers_a_terminal_nor_fills_it(capsys):
    ended(UserError("\x1b[2J\x07\u202e is wrong.", "x" * 9999))
    what, run = capsys.readouterr().err.splitlines()
    assert what == r"error: \x1b[2J\x07\u202e is wrong." and 1000 < len(run) < 1600 and " ... " in run


def test_ctrl_c_says_nothing(capsys):
    assert ended(KeyboardInterrupt()) == 130 and capsys.readouterr().err == ""


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError
