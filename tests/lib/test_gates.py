"""Validity gates: each thing that must be equal or reached is named when it is not."""

import copy

import pytest

from lib import gates
from tests.harness import MEASURED


def record(loss=3.0, **changes):
    """A finished cell's record; changes are by key, or by "part__key" inside data, environment or configuration."""
    found = copy.deepcopy(MEASURED) | {"state": "done", "reason": None, "inactive": None, "val_loss": loss,
                                       "train_loss": loss and loss - 0.1}
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if inner:
            found[part][inner] = value
        else:
            found[part] = value
    return found


def arms(**changes):
    """An arm and a reference of three seeds each; the arm's seed 2 has the changes."""
    reference = {seed: record(3 + seed / 100) for seed in (1, 2, 3)}
    arm = {seed: record(3.1 + seed / 100) for seed in (1, 2, 3)}
    arm[2] = record(3.12, **changes)
    return arm, reference


def broken(arm, reference, paired=True):
    return gates.broken(arm, reference, ("V1", "V0"), paired)


def test_two_starts_from_files_are_told_apart_by_what_was_in_them():
    arm, reference = ({seed: record(3 + seed / 100, configuration__INIT_FROM_HF="/hf", environment__start_hash=digest)
                       for seed in (1, 2, 3)} for digest in ("a" * 64, "b" * 64))
    assert broken(arm, reference) == [
        "start differs: V0 seed 1 has 'the weights bbbbbbbbbbbb', V1 seed 1 'the weights aaaaaaaaaaaa'"]
    assert broken(arm, arm) == []


def test_a_child_began_with_what_its_parent_began_with():
    began = {"environment__start_hash": "a" * 64}
    arm, reference = ({seed: record(3 + seed / 100, **began, **{f"configuration__{name}": value}) for seed in (1, 2, 3)}
                      for name, value in (("INIT_FROM_STEP", "V19"), ("INIT_FROM_HF", "/hf")))
    assert broken(arm, reference) == [
        "start differs: V0 seed 1 has 'the weights aaaaaaaaaaaa', V1 seed 1 'the trained V19 of aaaaaaaaaaaa'"]
    for cell in arm.values():
        cell["configuration"]["EVALUATE_ONLY"] = True
    assert broken(arm, reference) == []


def test_equal_arms_pass():
    assert broken(*arms()) == [] and broken(*arms(), paired=False) == []


@pytest.mark.parametrize("change, value, sentence", [
    ("data__train_hash", "other", "training data differs: V1 seed 2 has 'other', V1 seed 1 'fedcba9876543210'"),
    ("data__eval_hash", "f" * 64, "evaluation data differs: V1 seed 2 has 'ffffffffffff', V1 seed 1 '0123456789abcdef'"),
    ("data__tokenizer", "gpt2", "tokenizer differs: V1 seed 2 has 'gpt2', V1 seed 1 'bytes'"),
    ("configuration__BATCH_SIZE", 4, "global batch differs: V1 seed 2 has '4', V1 seed 1 '8'"),
    ("configuration__GPT2_GRADIENT_ACCUMULATION", 2, "global batch differs: V1 seed 2 has '16', V1 seed 1 '8'"),
    ("configuration__GPT2_BLOCK_SIZE", 64, "sequence length differs: V1 seed 2 has '64', V1 seed 1 '128'"),
    ("configuration__INIT_FROM_STEP", "V19", "start differs: V1 seed 2 has 'the trained V19', V1 seed 1 'drawn'"),
    ("configuration__GPT2_MAX_ITERS", 9, "budget differs: V1 seed 2 has 'GPT2_MAX_ITERS=9', V1 seed 1 'GPT2_MAX_ITERS=250'"),
    ("environment__precision", "bfloat16", "precision differs: V0 seed 2 has 'float32', V1 seed 2 'bfloat16'"),
    ("environment__compile", True, "compile flag differs: V0 seed 2 has 'False', V1 seed 2 'True'"),
    ("environment__device", "H100", "device differs: V0 seed 2 has 'a CPU', V1 seed 2 'H100'"),
    ("environment__device", None, "device is not recorded: V1 seed 2"),
    ("environment__torch", "2.11", "torch differs: V0 seed 2 has '2.13.0', V1 seed 2 '2.11'"),
    ("environment__threads", 2, "CPU threads differs: V0 seed 2 has '1', V1 seed 2 '2'"),
    ("environment__sources", {"lib/loop.py": "x", "gpt2/model.py": "ba9876543210"},
     "source differs: V0 seed 2 ran another lib/loop.py than V1 seed 2"),
    ("environment__sources", {"lib/loop.py": "x", "gpt2/model.py": "y"},
     "source differs: V0 seed 2 ran another gpt2/model.py than V1 seed 2 (and 1 more files)"),
    ("environment__sources", None, "source is not recorded: V1 seed 2"),
    ("budget_progress", 0.97, "schedule did not reach its end: that of V1 seed 2 ended at 97 %"),
    ("budget_progress", None, "schedule did not reach its end: that of V1 seed 2 is not recorded"),
    ("future_leak", 0.25, "it looks into the future: V1 seed 2: outputs moved with tokens after them, by 0.25 of the largest "
     "logit"),
    ("inactive", "h.0: the coupling stayed at 0", "mechanism never active: V1 seed 2: h.0: the coupling stayed at 0"),
])
def test_each_gate_names_its_field_and_who_differs(change, value, sentence):
    assert broken(*arms(**{change: value})) == [sentence]


def test_a_cell_that_only_evaluates_its_parent_has_trained_no_more_than_it():
    evaluated, reference = arms()
    for cell in evaluated.values():
        cell["configuration"] |= {"INIT_FROM_STEP": "V19", "EVALUATE_ONLY": True}
    assert broken(evaluated, reference) == []


def test_the_world_size_counts_twice():
    """It is part of the global batch, and a fact of the machine."""
    found = broken(*arms(environment__world_size=2))
    assert [s.split(" differs")[0] for s in found] == ["global batch", "world size"]


def test_a_diverged_cell_is_a_failed_gate():
    arm, reference = arms()
    arm[3] = record(None, state="diverged", reason="the training loss is nan at iteration 7")
    assert broken(arm, reference) == [
        "non-finite loss: V1 seed 3 diverged (the training loss is nan at iteration 7)"]
    assert broken(reference, arm)[0].startswith("non-finite loss: V0 seed 3")


def moved(seed):
    """Both cells of a seed on another machine."""
    arm, reference = arms()
    for one in (arm, reference):
        one[seed]["environment"] = one[seed]["environment"] | {"device": "another CPU", "torch": "2.12.0"}
    return arm, reference


def test_a_block_may_run_on_another_machine_because_pairing_removes_it():
    assert broken(*moved(2)) == []


def test_without_pairs_or_under_a_time_budget_the_machine_must_be_one():
    found = broken(*moved(2), paired=False)
    assert [s.split(" differs")[0] for s in found] == ["device", "torch"]
    arm, reference = moved(2)
    for one in (*arm.values(), *reference.values()):
        one["configuration"] = one["configuration"] | {"GPT2_MAX_ITERS": 0, "GPT2_MAX_TIME": 60}
    assert broken(arm, reference)[0].startswith("device differs")


def timed(*shared):
    """An arm and a reference under a budget of seconds, whose seeds had company or not."""
    both = arms()
    for one, values in zip(both, shared, strict=True):
        for seed, value in zip((1, 2, 3), values, strict=True):
            one[seed] |= {"shared_device": value}
            one[seed]["configuration"] = one[seed]["configuration"] | {"GPT2_MAX_ITERS": 0, "GPT2_MAX_TIME": 60}
    return both


@pytest.mark.parametrize("arm, reference, expected", [
    ((False, True, True), (False, False, False),
     ["sharing of the device differs: V1 seed 2 ran beside another cell, V1 seed 1 alone"]),
    ((True, True, True), (True, True, False),
     ["sharing of the device differs: V1 seed 1 ran beside another cell, V0 seed 3 alone"]),
    ((True,) * 3, (True,) * 3, []), ((None, True, True), (True, None, True), []), ((False,) * 3, (None,) * 3, [])])
def test_under_a_time_budget_all_share_their_device_or_none(arm, reference, expected):
    assert broken(*timed(arm, reference)) == expected


def test_another_budget_does_not_care_who_ran_beside_a_cell():
    assert broken(*arms(shared_device=True)) == []


def test_a_module_that_only_one_arm_knows_changes_nothing():
    arm, reference = arms()
    for one in arm.values():
        one["environment"] = one["environment"] | {"sources": one["environment"]["sources"] | {"gpt2/attention/new.py": "1"}}
    assert broken(arm, reference) == []


def test_a_seed_that_nothing_uses_is_found():
    arm, reference = arms()
    arm[3] = copy.deepcopy(arm[1])
    assert broken(arm, reference) == ["seeds not independent: V1 has the same losses under seeds 1 and 3"]


def test_what_nobody_recorded_is_not_equal():
    """Or two records without any facts would be compared with each other."""
    bare = record() | {"data": None, "environment": None, "configuration": None}
    found = broken({1: bare}, {1: dict(bare)})
    assert "evaluation data is not recorded: V1 seed 1" in found and "source is not recorded: V1 seed 1" in found
    assert all(sentence.endswith(" is not recorded: V1 seed 1") for sentence in found) and len(found) == 13
