"""What a mechanism's own module says it computes: the first sentence of its docstring, and the formulas in it.

Contract: a formula is a paragraph of the docstring whose lines are indented, or one that begins as a name, a colon and an
equation ("Self-restart: out = ..."). Nothing else is kept anywhere, so what `make show` prints is what stands beside the code.
Files are read, not imported: no torch.
"""

import ast
import importlib.util
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.paths import shown

EQUATION = re.compile(r"[A-Z][^.:]{0,40}: \S+ = ")


@dataclass(frozen=True)
class Formula:
    """`title` is the first paragraph on one line; `paragraphs` are the formulas, each of one or more lines, as written."""

    where: str
    title: str
    paragraphs: tuple[str, ...]


def formula_of(module: str) -> Formula:
    """What a module, by its dotted name, says it computes. ModuleNotFoundError if there is none."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    title, *rest = re.split(r"\n[ \t]*\n", text)
    return Formula(shown(Path(spec.origin)), " ".join(title.split()), tuple(formulas(rest)))


def formulas(paragraphs: Iterable[str]) -> Iterable[str]:
    """Those of a docstring's paragraphs that are formulas: of an equation with words around it the first sentence. A formula
    may follow its first line of text without an empty line between."""
    for paragraph in paragraphs:
        if EQUATION.match(paragraph):
            yield re.split(r"(?<=[^.]\.) (?=[A-Z])", " ".join(paragraph.split()))[0]
        elif indented := [line for line in paragraph.splitlines() if line.startswith("    ")]:
            yield textwrap.dedent("\n".join(indented))
