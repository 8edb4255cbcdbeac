"""The schema: Kconfig files read by kconfiglib, and layers of assignments applied to them and verified.

A *layer* is a list of assignments that came from one place: a defconfig, a fragment, the inline overrides of a step, the
environment. `Schema.apply` puts a layer on top of what is there and then proves that every assignment took: kconfiglib
itself drops an unknown symbol, an unmet dependency, a value outside its range or a losing choice without a word.

Kinds of symbol: bool, int, str, float (a string whose default is a number within a range) and ratio (the same with a
default like 1/48; an integer >= 1 is an absolute size).
"""

import difflib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import kconfiglib

from lib.errors import UserError
from lib.paths import ROOT, shown

# The menus outside a cell's identity.
OUTSIDE = ("Study (which cells; changes none of them)", "Bookkeeping (changes no number)")
BUDGET = ("GPT2_MAX_TIME", "GPT2_MAX_ITERS", "GPT2_MAX_TOKENS")

SET = re.compile(r"CONFIG_([A-Za-z0-9_]+)=(.*)")
UNSET = re.compile(r"# CONFIG_([A-Za-z0-9_]+) is not set")
INTEGER = re.compile(r"0|-?[1-9][0-9]*")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
RATIO = re.compile(r"[0-9]+(/[1-9][0-9]*)?|[0-9]*\.[0-9]+")
# The first and the last line of what is written in full: a file that has the one must have the other.
END = "# End of the configuration"
HEADER = f"# Written by kablate; edit it with make menuconfig. What is whole ends with '{END}'.\n"
LONGEST_NUMBER = 40  # characters; exact arithmetic on a longer one, or on 1e-99999999, would take forever


@dataclass(frozen=True)
class Assignment:
    """One symbol given one value; `where` names the place for a person: `gpt2/steps/V3.config:3`."""

    name: str
    value: str
    where: str


def read_whole(path: Path) -> str:
    """The text of a .config-style file. One that was cut short is refused: what is left of it would be another study. A file
    written by hand needs no marks, but cannot be empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(path)} cannot be read: {error}.", "check the path and the file's permissions.") from None
    if HEADER.startswith(text) or (text.startswith(HEADER) and END not in text.splitlines()):
        raise UserError(f"{shown(path)} is {'cut short' if text else 'empty'}: its end is missing.",
                        f"restore it (the one before it is {shown(path)}.old), or make defconfig-NAME.")
    return text


def read_layer(path: Path) -> list[Assignment]:
    """Assignments of a .config-style file, each with its line. Anything but assignments and comments is an error."""
    layer, seen = [], {}
    for number, line in enumerate(read_whole(path).splitlines(), 1):
        line, where = line.strip(), f"{shown(path)}:{number}"
        if match := SET.fullmatch(line):
            name, value = match.groups()
            if value.startswith('"'):
                if not re.fullmatch(r'"(\\.|[^"\\])*"', value):
                    raise UserError(f"{where}: malformed string {value}.", "close its quotes.")
                value = kconfiglib.unescape(value[1:-1])
        elif match := UNSET.fullmatch(line):
            name, value = match.group(1), "n"
        elif not line or line.startswith("#"):
            continue
        else:
            raise UserError(f"{where}: '{line}' is no assignment.", "write CONFIG_NAME=value, or make it a comment.")
        if name in seen:
            raise UserError(f"{where}: {name} is set a second time (first in line {seen[name]}).", "keep one of the two.")
        seen[name] = number
        layer.append(Assignment(name, value, where))
    return layer


class Schema:
    """The parsed Kconfig files. One instance serves any number of resolves; it holds one configuration at a time."""

    def __init__(self, kconfig: Path = ROOT / "Kconfig", parse: Callable[..., kconfiglib.Kconfig] = kconfiglib.Kconfig):
        self.kconf = parse(str(kconfig), warn_to_stderr=False)
        # A range on a string is how floats are declared here; kconfiglib keeps it but calls it odd.
        odd = [w for w in self.kconf.warnings if "has ranges, but is not int or hex" not in w]
        if odd:
            raise UserError(f"the Kconfig files do not hold together: {odd[0]}.", "mend the Kconfig file it names.")
        self.kconf.warnings.clear()
        self.symbols = {s.name: s for s in self.kconf.unique_defined_syms}
        self.kinds = {name: _kind(symbol) for name, symbol in self.symbols.items()}
        self.prompted = {name for name, s in self.symbols.items() if any(node.prompt for node in s.nodes)}
        self.identity = {name for name in self.prompted if not in_menu(self.symbols[name], OUTSIDE)}

    def reset(self) -> None:
        self.kconf.unset_values()

    def apply(self, layer: list[Assignment], verify: bool = True) -> None:
        """Apply a layer. With `verify`, every assignment must have taken; otherwise UserError names the reason.

        A layer that gives one budget clears the budgets of the layers below it.
        """
        for a in layer:
            if a.name not in self.symbols:
                self._unknown(a)
            self.check_value(a)
        budgets = [a.name for a in layer if a.name in BUDGET and a.value != "0"]
        if len(budgets) == 1:
            for name in BUDGET:
                self.symbols[name].unset_value()
        for a in layer:
            self.symbols[a.name].set_value(a.value)
        if verify:
            for a in layer:
                self._verify(a)

    def check_value(self, a: Assignment) -> None:
        """Refuse a value that is not of its symbol's kind or lies outside its range."""
        kind, value = self.kinds[a.name], a.value
        if not _well_typed(kind, value):
            wanted = {"bool": "y or n", "int": "a whole number", "float": "a number",
                      "ratio": "a ratio like 1/48 or a whole number >= 1", "str": "one line of printable text"}[kind]
            raise UserError(f"{a.where}: {a.name}={value} is not {wanted}.", f"give {a.name} {wanted}.")
        if kind in ("int", "float", "ratio"):
            for low, high, condition in self.symbols[a.name].ranges:
                low, high = low.str_value, high.str_value
                in_force = kconfiglib.expr_value(condition) or kind != "int"
                if in_force and not Fraction(low) <= Fraction(value) <= Fraction(high):
                    raise UserError(f"{a.where}: {a.name}={value} is outside its range {low}..{high}.",
                                    f"give {a.name} a value within it.")

    def _verify(self, a: Assignment) -> None:
        symbol = self.symbols[a.name]
        if a.name not in self.prompted:
            raise UserError(f"{a.where}: {a.name} has no prompt, it follows from other symbols and cannot be set.",
                            "set the symbols it follows from (make menuconfig shows them).")
        if symbol.str_value == a.value:
            return
        if not symbol.visibility:
            unmet = kconfiglib.expr_str(_visibility_condition(symbol), self._spelled)
            unmet = re.sub(r" && <choice \w+>", "", unmet)  # of its own choice a member need not be told
            raise UserError(f"{a.where}: {a.name}={a.value} did not take, because it depends on {unmet}.",
                            f"set {unmet} as well, or leave {a.name} out.")
        if symbol.choice:
            chosen = symbol.choice.selection
            raise UserError(f"{a.where}: {a.name}={a.value} did not take, because the choice "
                            f"'{symbol.choice.nodes[0].prompt[0]}' stands at {chosen.name if chosen else 'nothing'}.",
                            "set exactly one member of the choice to y.")
        self.check_value(a)  # a range may be in force only with what else was set
        raise UserError(f"{a.where}: {a.name}={a.value} did not take, it stands at {symbol.str_value or 'nothing'}.",
                        "look the symbol up in make menuconfig.")

    def _spelled(self, item: Any) -> str:
        """A symbol in a dependency; of a bool that nobody can set, what it follows from."""
        if self.kinds.get(getattr(item, "name", None)) != "bool" or item.name in self.prompted:
            return kconfiglib.standard_sc_expr_str(item)
        return "(" + " || ".join(kconfiglib.expr_str(condition, self._spelled) for _, condition in item.defaults) + ")"

    def verify_derived(self, layer: list[Assignment]) -> None:
        """Refuse a promptless symbol of a .config whose value is not the one it follows to."""
        for a in layer:
            stands = self.symbols[a.name].str_value
            if stands != a.value:
                raise UserError(f"{a.where}: {a.name}={a.value} cannot be set, it follows from other symbols and stands at "
                                f"{stands}.", "make olddefconfig, which writes it anew.")

    def _unknown(self, a: Assignment) -> None:
        near = difflib.get_close_matches(a.name.upper(), self.prompted, n=1)
        hint = f"did you mean {near[0]}?" if near else "search for it with / in make menuconfig."
        if not near and a.value == "n":  # a switch of another version of the project, which was off
            hint = "make olddefconfig, which drops symbols of a .config that are no more."
        raise UserError(f"{a.where}: unknown symbol {a.name}.", hint)

    def values(self) -> dict:
        """Every symbol's value now, typed; a symbol whose dependency is unmet is None (False for a bool)."""
        return {name: _typed(self.kinds[name], symbol.str_value) for name, symbol in self.symbols.items()}

    def minimal(self) -> dict[str, str]:
        """The assignments that differ from the defaults; loading them alone gives this configuration again."""
        with tempfile.NamedTemporaryFile("w+", suffix=".config") as file:
            self.kconf.write_min_config(file.name, header="# What differs from the defaults.\n")
            return {a.name: a.value for a in read_layer(Path(file.name))}

    def text(self) -> str:
        """The full configuration in .config form."""
        return full_text(self.kconf)


def full_text(kconf: kconfiglib.Kconfig) -> str:
    """What `kconf` holds in .config form, with the marks of a whole file; also where it writes in a way of its own."""
    with tempfile.NamedTemporaryFile("w+", suffix=".config") as file:
        kconfiglib.Kconfig.write_config(kconf, file.name, header=HEADER, save_old=False)
        return Path(file.name).read_text(encoding="utf-8") + f"{END}\n"


def _kind(symbol: kconfiglib.Symbol) -> str:
    if symbol.orig_type == kconfiglib.BOOL:
        return "bool"
    if symbol.orig_type == kconfiglib.INT:
        return "int"
    if symbol.ranges:
        defaults = [d.name for d, _ in symbol.defaults]
        return "ratio" if any("/" in d for d in defaults) else "float"
    return "str"


def in_menu(symbol: kconfiglib.Symbol, prompts: tuple[str, ...]) -> bool:
    """Whether a symbol stands in a menu of one of these prompts."""
    node = symbol.nodes[0]
    while node := node.parent:
        if node.item == kconfiglib.MENU and node.prompt and node.prompt[0] in prompts:
            return True
    return False


def _visibility_condition(symbol: kconfiglib.Symbol) -> Any:
    """The expression that hides a symbol: its dependency, or else the condition of its prompt."""
    if not kconfiglib.expr_value(symbol.direct_dep):
        return symbol.direct_dep
    return symbol.nodes[0].prompt[1]


def _well_typed(kind: str, value: str) -> bool:
    if kind == "bool":
        return value in ("y", "n")
    if kind != "str" and len(value) > LONGEST_NUMBER:
        return False
    if kind == "int":
        return bool(INTEGER.fullmatch(value))
    if kind == "float":
        return bool(NUMBER.fullmatch(value)) and abs(float(value)) < 1e300
    if kind == "ratio":
        if not RATIO.fullmatch(value):
            return False
        ratio = Fraction(value)
        return 0 < ratio < 1 or (ratio >= 1 and value.isdigit())  # not 1.0 or 48/48: they would read as a share
    return value.isprintable()


def _typed(kind: str, text: str) -> Any:
    if kind == "bool":
        return text == "y"
    if text == "" and kind != "str":
        return None
    return {"int": int, "float": float, "ratio": Fraction, "str": str}[kind](text)


def canonical(kind: str, text: str) -> str:
    """One spelling for equal values, so that 6e-4 and 0.0006 are the same learning rate in an identity."""
    if text == "" or kind not in ("float", "ratio"):
        return text
    return repr(float(text) + 0.0) if kind == "float" else str(Fraction(text))  # + 0.0 turns -0.0 into 0.0
