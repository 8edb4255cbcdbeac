"""Build the manual as a site, from README.md, docs/, the Kconfig files and the docstrings of mechanisms; print where its first
page is.

Warnings are errors: a link or an anchor that leads nowhere, a page that no list of contents holds. Nothing is fetched.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

import kconfiglib

from lib import atomic
from lib.errors import UserError, reported
from lib.formulas import formula_of
from lib.kconfig import Schema
from lib.paths import ROOT, shown

SITE = ROOT / "_site"
SYMBOLS_HERE = "<!-- the symbols -->"  # the place in docs/symbols.md
FORMULAS_HERE = "<!-- the formulas -->"  # the place in docs/formulas.md
MODULES = ("gpt2/attention", "gpt2/mlp", "gpt2")  # folders of modules that state what they compute
KINDS = {"bool": "y or n", "int": "whole number", "float": "number", "ratio": "ratio, or whole number >= 1", "str": "text"}
FIRST_PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=docs/index.html">
<title>kablate</title>
<a href="docs/index.html">The manual</a>
"""


def symbols() -> str:
    """Every symbol with a prompt as Markdown: menus as sections, symbols as headings in the menu's order."""
    schema = Schema()
    lines: list[str] = []

    def walk(node: kconfiglib.MenuNode | None) -> None:
        while node:
            item = node.item
            if item == kconfiglib.MENU and node.prompt:
                lines.extend([f"## {node.prompt[0]}", ""])
            elif isinstance(item, kconfiglib.Choice) and node.prompt:
                first = next((default.name for default, _ in item.defaults), item.syms[0].name)
                members = ", ".join(f"`{member.name}`" for member in item.syms)
                lines.extend([f"**{node.prompt[0]}**: one of {members}; by default `{first}`. {sentence(node.help)}", ""])
            elif isinstance(item, kconfiglib.Symbol) and node.prompt:
                lines.extend([f"### {item.name}", "", f"{node.prompt[0]}. *{'; '.join(facts(schema, item))}.*", "",
                              sentence(node.help), ""])
            walk(node.list)
            node = node.next

    walk(schema.kconf.top_node.list)
    return "\n".join(lines)


def facts(schema: Schema, symbol: kconfiglib.Symbol) -> list[str]:
    """What may stand for a symbol, what stands there by default, and what it depends on."""
    found = [KINDS[schema.kinds[symbol.name]]]
    for low, high, _ in symbol.ranges:
        found.append(f"from {low.str_value} to {high.str_value}")
    if symbol.choice is None:
        for default, condition in (pair for node in symbol.nodes for pair in node.orig_defaults):
            value = kconfiglib.expr_str(default).strip('"')
            when = "" if condition is schema.kconf.y else f" if `{kconfiglib.expr_str(condition)}`"
            found.append(f"default {f'`{value}`' if value else 'empty'}{when}")
    if symbol.direct_dep is not schema.kconf.y and symbol.choice is None:
        found.append(f"depends on `{kconfiglib.expr_str(symbol.direct_dep)}`")
    if symbol.name not in schema.identity:
        found.append("not part of a cell's identity")
    return found


def sentence(text: str | None) -> str:
    """A help text on one line, with what Markdown would take for markup left as it is."""
    line = " ".join((text or "").split())
    return "".join(f"\\{c}" if c in "*_<>[]`|~$" else c for c in line)


def formulas() -> str:
    """Title and formulas of every module that states some as Markdown, a section each."""
    lines: list[str] = []
    for path in (path for folder in MODULES for path in sorted((ROOT / folder).glob("*.py"))):
        found = formula_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if any(" = " in text for text in (found.title, *found.paragraphs)):  # not what shows a command
            lines.extend([f"## {found.where}", "", sentence(found.title), ""])
            for formula in found.paragraphs:
                lines.extend(["```text", formula, "```", ""])
    return "\n".join(lines)


def build(out: Path = SITE) -> Path:
    """Build the site into `out` and return its first page. UserError with Sphinx's warnings if there are any."""
    try:
        from sphinx.cmd.build import build_main
    except ModuleNotFoundError as error:
        raise UserError(f"the manual needs {error.name}, which is not installed.",
                        "pip install sphinx myst-parser furo, or make setup.") from None
    said = io.StringIO()
    # All pages every time: Sphinx says nothing again of a page that it has read before, faults included.
    arguments = ["--builder", "html", "--conf-dir", str(ROOT / "docs"), "--doctree-dir", str(out / ".doctrees"), "--quiet",
                 "--fresh-env", "--write-all", "--fail-on-warning", str(ROOT), str(out)]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        failed = build_main(arguments)
    if failed:
        print(said.getvalue().strip(), file=sys.stderr)
        raise UserError("the manual has faults, named above.", "mend the page that each line begins with.")
    first = out / "index.html"
    atomic.write_text(first, FIRST_PAGE)
    return first


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.docs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SITE, metavar="FOLDER", help="where to build (default: %(default)s)")
    print(shown(build(parser.parse_args().out)))


if __name__ == "__main__":
    with reported():
        main()
