"""Figures: numbers of committed artifacts, and whether they are what a claim says.

A reference names a figure by the file and a path of keys:

    docs/results/gpt2-x-ablation/report.json: steps.V1.comparison.difference * 100
    docs/results/bench-steps/h100-walk.json: rows[step=W1].time_min .. rows[step=W1].time_max

' * ', ' / ', ' - ' and ' + ' calculate, strictly from left to right, with further paths or numbers; ' .. ' between two makes a
range. An item of a list is picked by its keys (`rows[arm=V1,mode=eager]`, exactly one must fit), by its `name` or its
index.

What a claim says is '<= x', '>= x', '< x', '> x' or 'x .. y' (ends included). The word is computed: HOLDS if all figures are
so, DOES NOT HOLD if all are not, each with its whole range on one side, and else UNDECIDED.

UserError, in the name of `where`, if anything in a reference or a saying cannot be used.
"""

import json
import math
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.paths import ROOT

RESULTS = "docs/results/"
NUMBER = r"[+\-−±]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
REFERENCE = re.compile(rf"({RESULTS}[^\s:]+\.json):\s*(\S.*)")
PLAIN = r"-?\d+(?:\.\d+)?"
SAYING = re.compile(rf"(?P<sign>[<>]=?)\s*(?P<limit>{PLAIN})|(?P<low>{PLAIN})\s*\.\.\s*(?P<high>{PLAIN})")
OPERATORS = {"*": operator.mul, "/": operator.truediv, "-": operator.sub, "+": operator.add}
WORDS = {
    "HOLDS": "all figures of a committed measurement are as claimed",
    "DOES NOT HOLD": "no figure of a committed measurement is as claimed",
    "UNDECIDED": "figures of a committed measurement, or the ends of their ranges, lie on both sides of what is claimed",
}


@dataclass(frozen=True)
class Figure:
    """One number, or the smaller and the larger end of a range; `device` is what it was measured on, where the file says it."""

    values: tuple[float, ...]
    file: str
    device: str | None = None

    def __str__(self) -> str:
        return " .. ".join(f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}" for value in self.values)


@dataclass(frozen=True)
class Saying:
    """What a claim says of each figure: between two ends, each of which belongs to it or not."""

    text: str
    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def side(self, value: float) -> int:
        """-1 below what is claimed, 1 above, 0 as claimed."""
        if value < self.low or self.open and value == self.low:
            return -1
        return int(value > self.high or self.open and value == self.high)

    def fits(self, figure: Figure) -> bool | None:
        """Whether the figure is as claimed; None if its range reaches from one side to another."""
        sides = {self.side(value) for value in figure.values}
        return None if len(sides) > 1 else sides == {0}

    def word(self, figures: list[Figure]) -> str:
        """One of WORDS."""
        found = {self.fits(figure) for figure in figures}
        return "HOLDS" if found == {True} else "DOES NOT HOLD" if found == {False} else "UNDECIDED"


def saying(text: str, where: str) -> Saying:
    """What `says` says."""
    match = SAYING.fullmatch(text.strip())
    if not match:
        raise UserError(f"{where}: '{text}' says nothing of a figure.", "write '<= x', '>= x', '< x', '> x' or 'x .. y'.")
    if match["sign"]:
        end = "high" if match["sign"][0] == "<" else "low"
        return Saying(text.strip(), open=match["sign"] in "<>", **{end: float(match["limit"])})
    low, high = float(match["low"]), float(match["high"])
    if low > high:
        raise UserError(f"{where}: nothing lies in '{text}'.", "write the smaller end first.")
    return Saying(text.strip(), low, high)


def figure_at(reference: str, where: str, root: Path = ROOT) -> Figure:
    """The figure that a reference names in the tree at `root`."""
    match = REFERENCE.fullmatch(reference)
    ends = re.split(r"\s\.\.\s", match[2].strip()) if match else []
    if not match or not 1 <= len(ends) <= 2 or ".." in match[1].split("/"):
        raise UserError(f"{where}: '{reference}' is no reference.", f"write {RESULTS}STUDY/report.json: PATH.OF.KEYS.")
    content = report_at(match[1], where, root)
    values = tuple(sorted(_calculated(content, end, f"{where}: {match[1]}") for end in ends))
    environment = content.get("environment")
    device = environment.get("device") if isinstance(environment, dict) else None
    return Figure(values, match[1], device if isinstance(device, str) else None)


def _calculated(content: dict, expression: str, where: str) -> float:
    value = 0.0
    parts = re.split(r"\s([*/+-])\s", f"0 + {expression}")
    for sign, part in zip(parts[1::2], parts[2::2], strict=True):
        try:
            operand = numeric(part) if re.fullmatch(NUMBER, part) else value_at(content, part)
        except LookupError as error:
            raise UserError(f"{where} has {error}.", "name more of its keys, until one is left.") from None
        if operand is None or sign == "/" and operand == 0:
            raise UserError(f"{where} has no number to use at '{part}'.", "name the path of one of its numbers.")
        value = OPERATORS[sign](value, operand)
    return value


def numeric(printed: str) -> float:
    return float(re.sub(r"[,±]", "", printed).replace("−", "-"))


def report_at(name: str, where: str, root: Path = ROOT) -> dict:
    """The content of a committed JSON file below docs/results/; UserError, in the name of `where`, if it cannot be read."""
    try:
        content = json.loads((root / name).read_text(encoding="utf-8"), parse_constant=_no_number)
        if not isinstance(content, dict):
            raise ValueError("it is no table")
        return content
    except FileNotFoundError:
        raise UserError(f"{where}: the artifact {name} is missing.",
                        "commit the study's report, or stop naming it.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: the artifact {name} cannot be read: {error}.",
                        "make report, and commit what it writes.") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def value_at(content: Any, path: str) -> float | None:
    """The number at a path of keys, 'steps.V1.comparison.difference' or 'rows[step=V1,batch=64].time'; None if there is none.

    An item of a list is found by the keys in brackets, else by its `name`, else by its index. A key, a name or a value in
    brackets may itself hold dots, commas and the like: the longest fits first. LookupError if several items fit the brackets.
    """
    if not path:
        number = isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content)
        return content if number else None
    if isinstance(content, list):
        if path.startswith("["):
            return _value_of_item(content, path)
        named = {item["name"]: item for item in content if isinstance(item, dict) and "name" in item}
        content = {str(i): item for i, item in enumerate(content)} | named
    if not isinstance(content, dict):
        return None
    for key in sorted(content, key=len, reverse=True):
        if path == key or path.startswith((f"{key}.", f"{key}[")):
            value = value_at(content[key], path[len(key):].removeprefix("."))
            if value is not None:
                return value
    return None


def _value_of_item(items: list, path: str) -> float | None:
    """The number in the one item that fits the brackets at the beginning of the path."""
    fitting = [(item, rest) for item in items if isinstance(item, dict) and (rest := _behind(item, path[1:])) is not None]
    if len(fitting) > 1:
        raise LookupError(f"{len(fitting)} items at '{path.removesuffix(fitting[0][1])}'")
    return value_at(fitting[0][0], fitting[0][1].removeprefix(".")) if fitting else None


def _behind(item: dict, text: str) -> str | None:
    """What follows 'key=value,key=value]' if the item has these keys and values, else None."""
    for key, value in item.items():
        given = f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        if text.startswith(f"{given}]") and text[len(given) + 1:][:1] in ("", ".", "["):
            return text[len(given) + 1:]
        if text.startswith(f"{given},") and (rest := _behind(item, text[len(given) + 1:])) is not None:
            return rest
    return None
