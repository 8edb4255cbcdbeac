"""Colour and redrawn lines only where they can be shown."""

import ast
import io
import re
import sys

import pytest

from lib.launch import Display
from lib.terminal import coloured, emphasised, redraws
from tests.harness import ROOT, run
from tests.terminal import Terminal


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, variables, expected", [
    (Screen(), {}, (True, True)), (Screen(), {"NO_COLOR": "1"}, (True, False)), (Screen(), {"NO_COLOR": ""}, (True, True)),
    (Screen(), {"TERM": "dumb"}, (False, False)), (io.StringIO(), {}, (False, False))])
def test_what_a_stream_can_show(monkeypatch, stream, variables, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    assert (redraws(stream), coloured(stream)) == expected
    assert emphasised("Title", stream) == ("\x1b[1mTitle\x1b[0m" if expected[1] else "Title")


@pytest.mark.parametrize("term, live", [("xterm", True), ("dumb", False)])
def test_a_live_line_needs_a_terminal_that_can_draw_it(monkeypatch, tmp_path, term, live):
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("TERM", term)
    assert Display(tmp_path, "t", "1/2").live == live


def test_make_help_is_coloured_on_a_terminal_only():
    """The same words everywhere."""
    words = (sys.executable, "-S", "-m", "scripts.listing", "goals")
    plain = run("scripts.listing", "goals").stdout
    assert "\x1b" not in plain and "\nRun a study\n" in plain
    for variables, expected in (({"term": "xterm"}, True), ({"term": "xterm", "NO_COLOR": "1"}, False),
                                ({"term": "dumb"}, False)):
        with Terminal(*words, cwd=ROOT, **variables) as terminal:
            assert terminal.end() == 0
            said = terminal.said.decode().replace("\r\n", "\n")
        assert ("\x1b[1mRun a study\x1b[0m" in said) == ("\x1b" in said) == expected
        assert re.sub(r"\x1b\[\d+m", "", said) == plain


def test_escape_sequences_are_written_in_two_places():
    """What decides whether there may be any is in both."""
    writers = set()
    for folder in ("lib", "gpt2", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            if any(isinstance(value, str) and "\x1b" in value for value in constants):
                writers.add(path.relative_to(ROOT).as_posix())
    assert writers == {"lib/terminal.py", "lib/launch.py"}
