"""What a module's docstring says it computes."""

import pytest

from lib.formulas import formula_of
from tests.harness import ROOT


def test_indented_paragraphs_and_named_equations_are_formulas(tmp_path, monkeypatch):
    (tmp_path / "some_mechanism.py").write_text('''"""A mechanism: one thing
and another.

Of which, per head,

    a = b
      + c

words = no formula, and

With a lead:
    d = e

Restart (V2): out = (1 - a) x, a = 0.5. It is computed otherwise.

What is not true of it: everything.
"""
raise RuntimeError("it is read, not imported")
''')
    monkeypatch.syspath_prepend(tmp_path)
    found = formula_of("some_mechanism")
    assert found.title == "A mechanism: one thing and another." and found.where.endswith("some_mechanism.py")
    assert found.paragraphs == ("a = b\n  + c", "d = e", "Restart (V2): out = (1 - a) x, a = 0.5.")
    with pytest.raises(ModuleNotFoundError):
        formula_of("no_such_mechanism")


def test_every_attention_and_mlp_says_what_it_computes():
    for path in [p for folder in ("attention", "mlp") for p in (ROOT / f"gpt2/{folder}").glob("*.py") if p.stem != "__init__"]:
        found = formula_of(f"gpt2.{path.parent.name}.{path.stem}")
        assert found.title and " = " in " ".join((found.title, *found.paragraphs)) or found.paragraphs, path
        assert "not true" not in " ".join(found.paragraphs)
