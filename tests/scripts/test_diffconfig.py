"""Differences of two configurations, by study or by file."""

import pytest

from lib.config import Study
from scripts import diffconfig
from tests.harness import refusal, run


@pytest.fixture
def diff(monkeypatch, capsys):
    """diff("study", "study", A="file"): what the command prints."""
    def call(*arguments, **variables):
        monkeypatch.setattr("sys.argv", ["diffconfig", *arguments])
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, str(value))
            diffconfig.main()
        return capsys.readouterr().out
    return call


def test_the_command():
    done = run("scripts.diffconfig", "gpt2-ra-ablation", "gpt2-unified-ra-ablation")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == (
        " ABLATION_STEPS V0 V1 V2 V3 V4 V5 V6 -> V0 V1\n-CONTRASTS V2:V1 V3:V1 V4:V3 V5:V3 V6:V4 V6:V5\n "
        "STUDY gpt2-ra-ablation -> gpt2-unified-ra-ablation\n")
    done = run("scripts.diffconfig", "gpt2-ra-ablation", "gpt2-ra-ablation")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "no difference between gpt2-ra-ablation and gpt2-ra-ablation\n"
    done = run("scripts.diffconfig", "gpt2-ra-ablation", "gpt2-ra-ablatoin")
    assert (done.returncode, done.stdout, done.stderr) == (
        2, "", "error: there is no defconfig 'gpt2-ra-ablatoin'.\n  try: did you mean gpt2-ra-ablation?\n")


def test_symbols_only_on_one_side_and_what_follows_from_a_choice(diff):
    lines = diff("gpt2-ra-ablation", "gpt2-ra-ablation+tiny").splitlines()
    assert {"-MODEL_GPT2 y", "+MODEL_TINY y", " GPT2_N_LAYER 12 -> 2", " GPT2_MAX_TIME 7200 -> 0",
            " LEARNING_RATE 0.0006 -> 0.0015", "-GPT2_COMPILE y", "+DEVICE_CPU y",
            " DATASET finewebedu -> pystdlib"} <= set(lines)
    assert [line[1:] for line in lines] == sorted((line[1:] for line in lines), key=lambda line: line.split()[0])


def test_the_default_is_the_study_of_dotconfig_and_dotconfig(dotconfig, diff):
    path = dotconfig()
    path.write_text(Study("gpt2-ra-ablation+tiny").text().replace("CONFIG_BATCH_SIZE=8", "CONFIG_BATCH_SIZE=3"))
    assert diff() == " BATCH_SIZE 8 -> 3\n"
    assert diff(A="gpt2-ra-ablation+tiny") == " BATCH_SIZE 8 -> 3\n"
    assert diff(A=path, B="gpt2-ra-ablation+tiny") == " BATCH_SIZE 3 -> 8\n"
    assert diff(A=path, B=path) == "" == diff("gpt2-ra-ablation", "gpt2-ra-ablation")


@pytest.mark.parametrize("arguments, lines, what, todo", [
    ([], None, "there is no .config to compare.", "make diffconfig A=study B=study."),
    (["gpt2-ra-ablation", "gpt2-ra-ablatoin"], [], "there is no defconfig 'gpt2-ra-ablatoin'.",
     "did you mean gpt2-ra-ablation?"),
    (["./none", "gpt2-ra-ablation"], [], "there is no configuration none.", "make defconfig-NAME (see make list-defconfigs)."),
    ([], ["BATCH_SIZE=x"], "{path}:1: BATCH_SIZE=x is not a whole number.", "give BATCH_SIZE a whole number."),
    ([], ['STUDY="my-own"'], "there is no defconfig 'my-own'.", "make list-defconfigs."),
])
def test_what_cannot_be_compared(dotconfig, diff, arguments, lines, what, todo):
    path = dotconfig(*(lines or ()))
    if lines is None:
        path.unlink()
    assert refusal(diff, *arguments) == (what.format(path=path), todo)
