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
        assert f"  {name:34} {path.read_text().splitlines()[0].removeprefix('# ')}\n" in first
    assert f"  {'tiny':34} Any study on a laptop" in second
    assert {line.split()[0] for line in second.splitlines()} == {p.name for p in (ROOT / "defconfigs/fragments").iterdir()}


def test_every_step_is_listed_with_its_help():
    lines = listing("steps").splitlines()
    end = lines.index("")
    assert [line.split()[0] for line in lines[:end]] == list(step_files())
    assert "  V0         V0         baseline, GPT-2 with SDPA" in lines and lines[end + 1].startswith("The second column is")
    assert "  V4         V0         V3 + mixer on the reciprocal features" in lines
    assert "  V1T        inside V0  V1 with tied K_low and Q_low: a true transposed term" in lines


def test_a_new_step_or_study_is_one_new_file(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "gpt2/steps/Z10.config").write_text("# Help: the tenth\n# Equals: V0\nCONFIG_ATTENTION_SDPA=y\n")
    (tree / "gpt2/steps/Z9.config").write_text("CONFIG_ATTENTION_SDPA=y\n")
    (tree / "gpt2/steps/Z11.config").write_text("CONFIG_NOTHING=y\n")
    (tree / "defconfigs/old/older").write_text("# From before.\n")
    (tree / "defconfigs/bare").write_text("CONFIG_SEED=5\n")
    steps = listing("steps", tree=tree).splitlines()
    assert [line.rstrip() for line in steps[steps.index("") - 3:steps.index("")]] == [
        "  Z9         V0", "  Z10        V0         the tenth (equals V0)", "  Z11"], "also one that does not hold"
    studies = listing("defconfigs", tree=tree)
    assert f"  {'older':34} From before.\n" in studies and f"  {'bare':34} \n" in studies and "Older studies\n" in studies


def test_goals_are_listed_in_groups():
    text = listing("goals")
    assert text.startswith("\nRun a study\n  run               plan the configured study")
    assert "\n  defconfig-NAME    write .config from a study" in text and "RETRY=1 runs failed cells again." in text


@pytest.mark.parametrize("what", ["goals", "defconfigs", "steps"])
def test_a_bare_python_is_enough(what):
    """-S: without site-packages, as before `make setup`; only the function classes are missing."""
    done = subprocess.run([sys.executable, "-S", "-m", "scripts.listing", what], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if what == "steps":
        assert "  V0           baseline, GPT-2 with SDPA\n" in done.stdout and "After make setup this list" in done.stdout
    else:
        assert done.stdout == listing(what)
