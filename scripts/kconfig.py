"""The configuration goals of the Makefile: defconfig, savedefconfig, and kconfiglib's own tools on .config.

$KCONFIG_CONFIG names another file than .config; NAME another study for savedefconfig to write.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kconfiglib

from lib import atomic
from lib.cells import steps_of
from lib.config import Study, defconfig_names
from lib.errors import UserError, reported
from lib.kconfig import SET, UNSET, Schema, full_text, read_layer, read_whole
from lib.paths import ROOT, shown
from lib.terminal import coloured, redraws


def config_path() -> Path:
    return Path(os.environ.get("KCONFIG_CONFIG") or ROOT / ".config")


def defconfig(name: str) -> None:
    """Write .config from a study and fragments."""
    study = Study(name)
    write_config(study.text())
    steps = " ".join(steps_of(study))
    print(f"{shown(config_path())} is now {name}: steps {steps}")


@contextmanager
def disk_named(place: str = "") -> Iterator[None]:
    """What the disk refuses, as a sentence on `place` (default: .config)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place or shown(config_path())} cannot be read or written: {error.strerror}.",
                        "check its folder and permissions ($KCONFIG_CONFIG names another .config).") from None


def write_config(text: str, path: Path | None = None) -> None:
    """Write .config (or another `path`), whole or not at all; the old one is kept beside it as .old."""
    path = (path or config_path()).resolve()  # a link stays a link
    if path.exists():
        atomic.write_bytes(path.with_name(path.name + ".old"), path.read_bytes())
    atomic.write_text(path, text)


def savedefconfig(name: str) -> None:
    """Write .config in minimal form to defconfigs/NAME, keeping the comments and the order of what is there."""
    if not config_path().exists():
        raise UserError(f"there is no {shown(config_path())}.", "make defconfig-NAME (see make list-defconfigs).")
    study = Study()
    name = name or study.name
    if "+" in name:
        raise UserError(f"{name} is a study merged with fragments, which has no file of its own.",
                        "make savedefconfig NAME=study-name.")
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise UserError(f"'{name}' is no name for a study.", "use letters, digits, dots, dashes and underscores.")
    wanted = {a.name: a.value for a in study.base if a.name != "STUDY"}
    path = defconfig_names().get(name, ROOT / "defconfigs" / name)
    lines = path.read_text().splitlines() if path.exists() else [f"# {name}"]
    kept, kinds = [], study.schema.kinds
    for line in lines:
        match = SET.fullmatch(line.strip()) or UNSET.fullmatch(line.strip())
        if not match:
            kept.append(line)
        elif match.group(1) in wanted:
            symbol = match.group(1)
            kept.append(assignment(symbol, wanted.pop(symbol), kinds[symbol]))
    kept += [assignment(symbol, value, kinds[symbol]) for symbol, value in wanted.items()]
    atomic.write_text(path, "\n".join(kept) + "\n")
    print(f"{shown(path)} holds the study now")


def assignment(symbol: str, value: str, kind: str) -> str:
    """One line in .config form."""
    if kind == "bool":
        return f"CONFIG_{symbol}=y" if value == "y" else f"# CONFIG_{symbol} is not set"
    if kind == "int":
        return f"CONFIG_{symbol}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'CONFIG_{symbol}="{escaped}"'


class Whole(kconfiglib.Kconfig):
    """What kconfiglib's tools write through it is whole or not there: its own way is to empty the file and then fill it."""

    def write_config(self, filename: Any = None, header: Any = None, save_old: Any = True, verbose: Any = None) -> str:
        path, text = Path(filename or config_path()), full_text(self)
        if path.exists() and path.read_bytes() == text.encode():
            return f"No change to configuration in '{path}'"
        write_config(text, path)
        return f"Configuration saved to '{path}'"

    def write_min_config(self, filename: Any, header: Any = None) -> str:
        with atomic.replacing(filename) as temporary:
            super().write_min_config(str(temporary), header)
        return f"Minimal configuration saved to '{filename}'"


def tool(name: str) -> None:
    """One of kconfiglib's tools, on a parse that keeps quiet about ranges on strings (that is how floats are declared)."""
    schema = Schema(parse=Whole)
    kconf = schema.kconf
    os.environ["KCONFIG_CONFIG"] = str(config_path())
    if config_path().exists():
        read_whole(config_path())  # kconfiglib would complete what was cut short with defaults
    if name in ("menuconfig", "nconfig"):
        menu(kconf)
    elif name == "oldconfig":
        kconf.load_config()
        name_dropped(schema)
        ask_for_new(kconf)
        print(kconf.write_config())
    elif name == "olddefconfig":
        print(kconf.load_config())
        name_dropped(schema)
        print(kconf.write_config())
    else:
        kconf.load_config()
        for symbol in kconf.unique_defined_syms:
            if symbol.visibility and symbol.user_value is None and (not symbol.choice or symbol.choice.user_selection is None):
                print(f"{symbol.name}={symbol.str_value}")


def menu(kconf: Any) -> None:
    """kconfiglib's menu, which needs a terminal that can be drawn on; without colours under NO_COLOR."""
    by_hand = f"edit {shown(config_path())} by hand and make olddefconfig."
    if not (sys.stdin.isatty() and redraws(sys.stdout)):
        raise UserError("the menu needs a terminal, and this is a pipe, a file, or TERM=dumb.", by_hand)
    import curses

    import menuconfig

    if not coloured(sys.stdout):
        os.environ["MENUCONFIG_STYLE"] = "monochrome"
    try:
        menuconfig.menuconfig(kconf)
    except curses.error as error:
        raise UserError(f"the menu cannot be drawn on a terminal of TERM={os.environ.get('TERM', '')}: {error}.",
                        f"give TERM=xterm, or {by_hand}") from None


def name_dropped(schema: Schema) -> None:
    """Say which lines of .config do not hold any more: kconfiglib drops them without a word."""
    for a in read_layer(config_path()) if config_path().exists() else ():
        if a.name not in schema.symbols:
            print(f"{a.where}: {a.name} is no symbol any more and is dropped", file=sys.stderr)
        elif schema.symbols[a.name].str_value != a.value:
            stands = schema.symbols[a.name].str_value or "nothing"
            print(f"{a.where}: {a.name}={a.value} does not hold, it is now {stands}", file=sys.stderr)


def ask_for_new(kconf: Any) -> None:
    """Ask for every new symbol, again as long as an answer makes others visible."""
    import oldconfig

    oldconfig.conf_changed = True
    try:
        while oldconfig.conf_changed:
            oldconfig.conf_changed = False
            for node in kconf.node_iter():
                oldconfig.oldconfig(node)
    except EOFError:
        raise UserError("the input ended before every new symbol had a value.",
                        "make olddefconfig, which asks nothing.") from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.kconfig", description=__doc__)
    parser.add_argument("goal", choices=["defconfig", "savedefconfig", "menuconfig", "nconfig", "oldconfig", "olddefconfig",
                                         "listnewconfig"])
    parser.add_argument("study", nargs="?", help="for defconfig: the study, also with fragments: study+tiny")
    args = parser.parse_args()
    if args.goal == "defconfig" and not args.study:
        parser.error("defconfig needs the name of a study")
    with disk_named("defconfigs" if args.goal == "savedefconfig" else ""):
        if args.goal == "defconfig":
            defconfig(args.study)
        elif args.goal == "savedefconfig":
            savedefconfig(os.environ.get("NAME", ""))
        else:
            tool(args.goal)


if __name__ == "__main__":
    with reported():
        main()
