"""make randconfig: the same seed gives the same valid study, and what the configuration takes builds, obeys and trains."""

import random

import pytest

from lib.config import Study
from lib.errors import UserError
from lib.kconfig import Schema
from scripts import randconfig
from tests.harness import refusal, run, run_here

SCHEMA = Schema()
FIXED = randconfig.fixed_by("gpt2-ra-ablation+tiny")


def test_a_random_study_is_written_and_holds(dotconfig, monkeypatch):
    path = dotconfig("MODEL_TINY=y")
    monkeypatch.setenv("KCONFIG_SEED", "7")
    done = run_here("-m", "scripts.randconfig")
    assert done.returncode == 0 and "KCONFIG_SEED=7 make randconfig makes it again" in done.stdout
    assert path.with_name("dot.config.old").read_text() == "CONFIG_MODEL_TINY=y\n"
    study, first = Study(config=path, schema=SCHEMA), path.read_text()
    assert study.name.startswith("random-7") and study.config.DATASET == "pystdlib" and study.config.ABLATION_STEPS
    run_here("-m", "scripts.randconfig")
    assert path.read_text() == first, "the same seed, the same study"


def test_a_place_that_cannot_be_written_is_two_lines(tmp_path):
    (tmp_path / "file").touch()
    done = run("scripts.randconfig", KCONFIG_CONFIG=tmp_path / "file/x", KCONFIG_SEED="7")
    assert done.returncode == 2 and done.stderr == (
        f"error: {tmp_path}/file/x cannot be read or written: Not a directory.\n"
        "  try: check its folder and permissions ($KCONFIG_CONFIG names another .config).\n")


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", "1" * 19, "\u0661"])
def test_a_seed_that_is_none(monkeypatch, seed):
    monkeypatch.setenv("KCONFIG_SEED", seed)
    monkeypatch.setattr("sys.argv", ["randconfig"])
    assert refusal(randconfig.main)[0] == f"KCONFIG_SEED={seed} is no seed."


def test_draws_reach_every_mechanism_and_keep_what_the_study_sets():
    """Of 100 draws; each value was taken, or the whole is refused with a sentence."""
    seen, refused = {}, 0
    for number in range(100):
        text = randconfig.drawn(SCHEMA, str(number), FIXED)
        for line in text.splitlines():
            name, _, value = line.removeprefix("# ").removeprefix("CONFIG_").removesuffix(" is not set").partition("=")
            seen.setdefault(name, set()).add(value)
        try:
            study = randconfig.study_of(text, SCHEMA)
        except UserError as error:
            refused += 1
            assert error.what and error.run
            continue
        assert study.config.MODEL_TINY and study.config.GPT2_MAX_ITERS == 250 and study.config.BATCH_SIZE == 8
    choices = {s.name for s in SCHEMA.kconf.unique_defined_syms
               if s.choice and s.name.startswith(("ATTENTION_", "MLP_", "COUPL"))}
    assert choices <= seen.keys() | {"ATTENTION_SDPA", "MLP_GELU", "COUPLING_NONE"}, "the defaults are not written"
    assert {"KVSPLICE_K", "RMLP_R_FF", "SKIP_START", "WALK_BETA", "MLA_KVSPLICE_D"} <= seen.keys()
    assert 0 < refused < 67


def test_steps_bring_those_they_start_from():
    for number in range(40):
        steps = randconfig.draw_steps(random.Random(number), "gpt2/steps")
        children = [steps.index(step) for step in ("C1", "C2", "C3") if step in steps]
        assert not children or steps.index("V19") < min(children)


def test_what_is_taken_works(capsys):
    """Sixty times as many on demand: KCONFIG_SEED=1 python -m scripts.randconfig --prove 200."""
    assert randconfig.prove(3, "5") == 0
    assert "3 checked and trained" in capsys.readouterr().out


def test_what_does_not_work_is_told_with_its_configuration(monkeypatch, capsys):
    def breaks(study):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(randconfig, "_proved", breaks)
    assert randconfig.prove(1, "5") == 1
    said = capsys.readouterr().out
    assert "BROKEN: ZeroDivisionError: a defect" in said and 'CONFIG_STUDY="random-5.' in said and "1 broken" in said
