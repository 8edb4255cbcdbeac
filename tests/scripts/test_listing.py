"""make help, list-defconfigs and list-steps: complete, readable, and possible on a bare machine."""

import subprocess
import sys

import pytest

from lib.config import defconfig_names
from lib.steps import step_files
from tests.harness import ROOT, copy_tree, run


def listing(what, **options):
    done = run("scripts.listing", what, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_study_and_fragment_is_listed_with_its_first_comment():
    text = listing("defconfigs")
    first, second = text.split("Fragments (make defconfig-NAME+FRAGMENT)\n")
    assert first.startswith("Studies (make defconfig-NAME)\n")
    for name, path in defconfig_names().items():
        assert f"  {name:28} {path.read_text().splitlines()[0].removeprefix('# ')}\n" in first
    assert f"  {'tiny':28} Any study on a laptop" in second
    assert {line.split()[0] for line in second.splitlines()} == {p.name for p in (ROOT / "defconfigs/fragments").iterdir()}


def test_every_step_is_listed_with_its_help():
    lines = listing("steps").splitlines()
    assert [line.split()[0] for line in lines] == list(step_files())
    assert "  V0         baseline, GPT-2 with SDPA" in lines


def test_a_new_step_or_study_is_one_new_file(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "gpt2/steps/V10.config").write_text("# Help: the tenth\n# Equals: V0\nCONFIG_ATTENTION_SDPA=y\n")
    (tree / "gpt2/steps/W.config").write_text("CONFIG_ATTENTION_SDPA=y\n")
    (tree / "defconfigs/old").mkdir()
    (tree / "defconfigs/old/older").write_text("# From before.\n")
    (tree / "defconfigs/bare").write_text("CONFIG_SEED=5\n")
    steps = listing("steps", tree=tree).splitlines()
    assert steps[-2:] == ["  V10        the tenth (equals V0)", "  W          "] and "V9" not in steps[-3]
    studies = listing("defconfigs", tree=tree)
    assert f"Older studies\n  {'older':28} From before.\n" in studies and f"  {'bare':28} \n" in studies


def test_goals_are_listed_in_groups():
    text = listing("goals")
    assert text.startswith("\nRun a study\n  run               plan the configured study")
    assert "\n  defconfig-NAME    write .config from a study" in text and "RETRY=1 runs failed cells again." in text


@pytest.mark.parametrize("what", ["goals", "defconfigs", "steps"])
def test_a_bare_python_is_enough(what):
    """-S: without site-packages, as before `make setup`."""
    done = subprocess.run([sys.executable, "-S", "-m", "scripts.listing", what], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == listing(what)
