"""make menuconfig and nconfig on a terminal: search, help with dependencies, change, save, quit; and where there is none."""

import re
import sys

import pytest

from lib.config import Study
from tests.harness import ROOT, run
from tests.terminal import Terminal

COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:[349][0-7]|[34]8)(?:;\d+)*m")


def menu(goal="menuconfig", **options):
    return Terminal(sys.executable, "-m", "scripts.kconfig", goal, cwd=ROOT, **options)


@pytest.mark.parametrize("goal", ["menuconfig", "nconfig"])
def test_a_symbol_is_found_explained_changed_and_saved(dotconfig, goal):
    path = dotconfig("GPT2_MAX_ITERS=7", "ATTENTION_UNIFIED_RA=y", "RA_R=4")
    with menu(goal) as terminal:
        top = terminal.until("Model  --->", "Bookkeeping (changes no number)  --->", "[/] Jump to symbol")
        menus = ["Study (which cells", "Model  --->", "Attention mechanism", "Budget", "Bookkeeping"]
        assert sorted(menus, key=top.index) == menus
        terminal.type("/", "Type text to narrow the search")
        found = terminal.type("ra_r$", 'RA_R(=4) "Reciprocal channels per head (R)"')
        assert "RA_TIED" not in found, "the search narrows"
        terminal.type("\r", "Attention mechanism", "(4) Reciprocal channels per head (R)")
        said = terminal.type("?", "Symbol information", "Direct dependencies", "Help:", "ATTENTION_UNIFIED_RA(=y)")
        help_text = said.split("Help:")[1].split("Direct dependencies")[0].strip()
        assert help_text and "gpt2/Kconfig:" in said
        terminal.type("q", "(4) Reciprocal channels per head (R)", "[S] Save")
        terminal.type("\r", "(int)")
        terminal.type("\x7f8\r", "(8) Reciprocal channels per head (R)")
        terminal.type("s", "Filename to save configuration to")
        terminal.type("\r", "Success")  # the path below it may be wider than the screen
        assert Study().resolve().config.RA_R == 8, "saved while the menu is still open"
        terminal.type("\rq")  # out of the message, out of the menu: nothing is left to ask
        assert terminal.end() == 0
    config = Study().config
    assert (config.RA_R, config.GPT2_MAX_ITERS, config.ATTENTION_UNIFIED_RA) == (8, 7, True)
    assert path.with_name(path.name + ".old").read_text().startswith("CONFIG_GPT2_MAX_ITERS=7\n")


def test_quitting_without_saving_changes_nothing(dotconfig):
    path = dotconfig("GPT2_MAX_ITERS=7")
    before = path.read_bytes()
    with menu() as terminal:
        terminal.until("Model  --->")
        terminal.type("j\r", "[*] Biases in linear layers and layer norms")
        terminal.type("jjjj ", "[ ] Biases in linear layers and layer norms")
        terminal.type("q", "Save configuration?")
        terminal.type("n")
        assert terminal.end() == 0
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_choice_shows_what_it_brings(dotconfig):
    """What depends on an unchosen member appears when it is chosen, and not before."""
    dotconfig("GPT2_MAX_ITERS=7")
    with menu() as terminal:
        terminal.until("MLP mechanism  --->")
        assert "Reciprocal hidden" not in terminal.type("jjj\r", "MLP (GELU MLP (GPT-2))  --->")
        terminal.type("\r", "reciprocal MLP")
        terminal.type("j\r", "(1/48) Reciprocal hidden features (R_ff)", "[ ] Mixer on the reciprocal features")


@pytest.mark.parametrize("no_color, coloured", [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_takes_the_colours_out_of_the_menu(dotconfig, no_color, coloured):
    dotconfig("GPT2_MAX_ITERS=7")
    with menu(term="xterm-256color", **no_color) as terminal:
        while b"Quit (prompts" not in terminal.said:  # what it draws on is no VT52
            assert terminal.read(15)
        terminal.type("qn")
        assert terminal.end() == 0
        assert bool(COLOUR.search(terminal.said)) == coloured


def test_where_no_menu_can_be_drawn_it_says_what_to_do_instead(dotconfig):
    path = dotconfig("GPT2_MAX_ITERS=7")
    by_hand = f"edit {path} by hand and make olddefconfig.\n"
    refused = f"error: the menu needs a terminal, and this is a pipe, a file, or TERM=dumb.\n  try: {by_hand}"
    done = run("scripts.kconfig", "menuconfig", text="")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", refused)
    with menu(term="dumb") as terminal:
        assert terminal.end() == 2 and terminal.said.decode().replace("\r\n", "\n") == refused
    with menu(term="a-terminal-of-nobody") as terminal:
        assert terminal.end() == 2 and b"the menu cannot be drawn on a terminal of TERM=a-terminal-of-nobody" in terminal.said
        assert b"Traceback" not in terminal.said
    assert path.read_text() == "CONFIG_GPT2_MAX_ITERS=7\n"
