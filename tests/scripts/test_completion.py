"""scripts/completion.bash in real shells: goals, steps, studies with fragments, variables."""

import shutil
import subprocess

import pytest

from lib.config import defconfig_names
from lib.steps import step_files
from tests.harness import ROOT, copy_tree, run
from tests.terminal import Terminal

SHELLS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
TYPED = {"make mrp": "make mrproper", "make STEP=MLAK": "make STEP=MLAKV", "make defc": "make defconfig-",
         "make defconfig-gpt2-controls+tin": "make defconfig-gpt2-controls+tiny", "make KCONFIG_": "make KCONFIG_SEED=",
         "make FILE=pyproj": "make FILE=pyproject.toml"}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_what_is_typed(shell):
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell} here")
    with Terminal(*SHELLS[shell], cwd=ROOT, PS1="$ ", HISTFILE="", KABLATE="yes") as terminal:
        terminal.until("$")
        terminal.type(". scripts/completion.bash; echo loa''ded\n", "loaded\n")
        for typed, completed in TYPED.items():
            terminal.type(typed + "\t", completed)
            terminal.type("\x15echo do''ne\n", "done\n")  # the line is thrown away
            terminal.type("clear\n")


def test_the_names_are_all_there_and_no_more():
    said = run("scripts.listing", "goals", "steps", "--plain").stdout.split()
    assert set(said) >= {"show", "menuconfig", "list-steps", "bench-steps", *step_files()} and "defconfig-%" not in said
    assert set(run("scripts.listing", "defconfigs", "--plain").stdout.split()) == set(defconfig_names())
    assert "tiny" in run("scripts.listing", "fragments", "--plain").stdout.split()
    variables = run("scripts.listing", "variables", "--plain").stdout.split()
    assert {"STEP", "SEEDS", "OUT", "TIME", "RETRY", "GPT2_MAX_TIME", "STUDY", "PYTHON"} <= set(variables)
    assert run("scripts.listing", "variables").returncode == 2


def test_the_name_of_a_file_executes_nothing(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "gpt2/steps/V1$(touch pwned)`touch pwned`.config").write_text("# Help: none\n")
    script = (". scripts/completion.bash; compopt() { :; }; COMP_LINE='make V1$'; COMP_POINT=8; _kablate_make make 'V1$' make; "
              "printf '%s\\n' \"${COMPREPLY[@]}\"")
    done = subprocess.run(["bash", "-c", script], cwd=tree, capture_output=True, text=True)
    assert done.stdout == "V1$(touch pwned)`touch pwned`\n", done.stderr
    assert not list(tree.rglob("pwned"))


def test_elsewhere_files_are_completed(tmp_path):
    (tmp_path / "prog.c").touch()
    script = (f". {ROOT}/scripts/completion.bash; _kablate_before=; COMP_LINE='make pr'; COMP_POINT=7; "
              "_kablate_make make pr make; printf '%s\\n' \"${COMPREPLY[@]}\"")
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True).stdout == "prog.c\n"
