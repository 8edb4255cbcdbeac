"""docs/adding-a-mechanism.md, done: its code blocks applied to a copy of the tree, as a reader would, and what that took."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.harness import ROOT, copy_tree

PAGE = (ROOT / "docs/adding-a-mechanism.md").read_text()
MATHEMATICS = {"attend", "forward"}  # the methods that are what the idea is


def edits(part: str) -> list[tuple[str, str, str]]:
    """(file, kind, text) of the blocks of one example: a whole new file, or a diff of the file named last before it."""
    found, file = [], None
    for name, kind, text in re.findall(r"`(gpt2/[\w/]+(?:\.\w+)?)`(?=[^`]*:)|^```(\w*)\n(.*?)^```", part, re.S | re.M):
        if name:
            file = name
        elif kind in ("python", "diff") or text.startswith("# Help:"):
            found.append((file, kind, text))
    return found


EXAMPLES = {title: edits(PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]) for title in ("An attention", "An MLP")}


def apply(tree, file, kind, text) -> None:
    path = tree / file
    if kind != "diff":
        assert not path.exists()
        path.write_text(text)
        return
    lines = text.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] != "+")
    assert path.read_text().count(old) == 1, f"one place for\n{old}"
    path.write_text(path.read_text().replace(old, "".join(line[1:] for line in lines if line[0] != "-")))


@pytest.mark.parametrize("example", EXAMPLES)
def test_it_takes_one_module_one_fragment_and_its_symbols(example):
    """At most 40 lines besides the mathematics and what says what it is."""
    assert sorted({kind for _, kind, _ in EXAMPLES[example]}) == ["", "diff", "python"]
    files = {file: text for file, kind, text in EXAMPLES[example] if kind != "diff"}
    assert {file for file, *_ in EXAMPLES[example]} - files.keys() == {"gpt2/Kconfig"} and len(files) == 2
    (module,) = (ast.parse(text) for file, text in files.items() if file.endswith(".py"))
    (source,) = (text for file, text in files.items() if file.endswith(".py"))
    left_out = {n for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name in MATHEMATICS
                for n in range(node.lineno, node.end_lineno + 1)} | set(range(1, module.body[0].end_lineno + 1))
    code = [line for n, line in enumerate(source.splitlines(), 1) if line.strip() and n not in left_out]
    symbols = [line for _, kind, text in EXAMPLES[example] if kind == "diff" for line in text.splitlines() if line[0] == "+"]
    (step,) = (text.splitlines() for file, text in files.items() if file.endswith(".config"))
    assert len(code) + len([line for line in symbols if line[1:].strip()]) + len(step) <= 40


def table(text) -> list[list[str]]:
    """The rows of make check's table."""
    lines = re.findall(r"^\| [A-Z]\w+ .*\d\.\d \|$", text, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = copy_tree(tmp_path_factory.mktemp("adding") / "tree")
    for example in EXAMPLES.values():
        for edit in example:
            apply(tree, *edit)
    return tree


def make(tree, *words):
    return subprocess.run(["make", f"PYTHON={sys.executable}", *words], cwd=tree, text=True, capture_output=True, timeout=60,
                          env=os.environ | {"KCONFIG_CONFIG": str(tree / "none")})


def test_make_check_proves_what_the_page_adds(tree):
    steps = [re.search(r"steps/(\w+)", file)[1] for example in EXAMPLES.values() for file, *_ in example if "steps/" in file]
    done = make(tree, "check", *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {cells[0]: cells for cells in table(done.stdout)}
    assert rows.keys() == {"V0", *steps} and {cells[5] for cells in rows.values()} == {"ok"}
    assert all(cells[1] == step for step, cells in rows.items()), "a function class of its own"
    assert rows["LS1"][:-1] == next(cells for cells in table(PAGE) if cells[0] == "LS1")[:-1]
    shown = make(tree, "show", steps[0])
    assert shown.returncode == 0 and "scores_t = (1 + s_h ln t)" in shown.stdout, shown.stdout + shown.stderr


def test_the_laws_that_the_page_explains_are_those_there_are():
    laws = re.findall(r"^def (\w+)\(s: Subject\)", (ROOT / "gpt2/laws.py").read_text(), re.M)
    assert re.findall(r"^\| `(\w+)` \|", PAGE.split("says\n")[1].split("**Is it new?**")[0], re.M) == laws


def test_what_the_page_says_to_override_is_there():
    from gpt2.attention.baseline import CausalSelfAttention
    from lib import mechanisms

    table = PAGE.split("## What to override")[1].split("Of the training loop")[0]
    for name in set(re.findall(r"`([a-z_]+)`", table)):
        assert callable(getattr(CausalSelfAttention, name)), name
    for name in re.findall(r"\(`([a-z]+)`\)", PAGE.split("Of the training loop")[1]):
        assert f"`{name}(" in mechanisms.__doc__, name
