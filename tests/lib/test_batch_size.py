"""BATCH_SIZE_AUTO on made-up devices: one micro-batch for all arms, found once, and never changed under a running study."""

import json

import pytest

from lib import batch_size
from lib.cells import expand
from lib.config import Study
from lib.launch import prepare
from lib.plan import Options, Plan
from tests.harness import TINY, finish, refusal

MIB = 2 ** 20
GPU = {"type": "cuda", "name": "a GPU", "memory_bytes": 1000 * MIB, "torch": "2.13.0"}
CPU = {"type": "cpu", "name": "a CPU", "memory_bytes": None, "torch": "2.13.0"}
SHARE = 0.92
NEEDS = {"V0": (100, 10), "V2": (100, 30), "V3": (100, 20)}  # MiB of a step: fixed, and for each sequence


class Device:
    """The memory of a made-up GPU: what was tried on it, and what a step needs there."""

    def __init__(self, needs=NEEDS, memory=GPU["memory_bytes"]):
        self.needs, self.memory, self.tried = needs, memory, []

    def __call__(self, program, micro_batch):
        name = program.arms[0].split()[0].partition("@")[0]
        self.tried.append((name, micro_batch))
        fixed, each = self.needs[name]
        peak = (fixed + each * micro_batch) * MIB
        return peak if peak <= SHARE * self.memory else None


@pytest.fixture
def study(dotconfig, tmp_path):
    """A study of a global batch of 48 sequences, 8 at once."""
    def configure(steps="V0 V2 V3", *assignments, auto=True):
        dotconfig(*TINY[:3], "SEED=1", "BATCH_SIZE=8", "GPT2_GRADIENT_ACCUMULATION=6", f'ABLATION_STEPS="{steps}"', 'SEEDS="2"',
                  f'OUTPUT_DIR="{tmp_path}/out"', *(["BATCH_SIZE_AUTO=y"] if auto else []), *assignments)
        return tmp_path / "out"
    return configure


def find(out, device=None, **options):
    return batch_size.find(Study(), out, GPU, SHARE, device or Device(), **options)


def splits(plan):
    return {(c.resolved.config.BATCH_SIZE, c.resolved.config.GPT2_GRADIENT_ACCUMULATION, c.resolved.config.BATCH_DRAWN)
            for c in plan.cells}


# Finding

@pytest.mark.parametrize("each, micro_batch", [(10, 48), (17, 48), (18, 24), (34, 24), (35, 16), (52, 12), (103, 6), (820, 1)])
def test_the_hungriest_step_decides_and_the_micro_batch_divides_the_global_batch(study, each, micro_batch):
    device = Device(NEEDS | {"V2": (100, each), "V3": (100, 9)})
    record, new = find(study(), device)
    assert new and record["micro_batch"] == micro_batch and record["micro_batch"] * record["accumulation"] == 48
    assert {size for _, size in device.tried} <= {48, 24, 16, 12, 8, 6, 4, 3, 2, 1}
    assert record["because"] == ("the whole global batch fits in 92 % of a GPU" if micro_batch == 48 else
                                 "all that fits in 92 % of a GPU for V2 adamwspam")


def test_what_was_measured_is_on_record(study):
    out = study()
    record, _ = find(out)
    assert record["peak_bytes"] == {
        "V0 adamwspam": {"48": 580 * MIB}, "V3 adamwspam": {"24": 580 * MIB},
        "V2 adamwspam": {"48": None, "6": 280 * MIB, "12": 460 * MIB, "16": 580 * MIB, "24": 820 * MIB}}
    assert record["device"] == GPU and record["share"] == SHARE and record == json.loads((out / "batch_size.json").read_text())


def test_each_program_is_tried_once_at_what_fits_the_others(study):
    """A/A control and planted harm are the baseline's program; a step that is only evaluated trains nothing."""
    device = Device({"V0": (100, 10), "V19": (100, 10)})
    find(study("V0 A0 P0 V0@LEARNING_RATE_MULT=3 V19 C1"), device)
    assert device.tried == [("V0", 48), ("V19", 48)]


def test_optimizers_are_programs_of_their_own(study):
    out = study("V0", 'OPTIMIZERS="adamw sinkgd"')
    assert [p.arms for p in batch_size.programs(Study())] == [("V0 adamw",), ("V0 sinkgd",)]
    def probe(program, size):
        return None if program.arms == ("V0 sinkgd",) and size > 4 else MIB
    record, _ = batch_size.find(Study(), out, GPU, SHARE, probe)
    assert record["micro_batch"] == 4
    assert splits(Plan(Options())) == {(4, 12, 8)}, "all arms have the hungriest's"


def test_where_nothing_fits_one_sentence_says_what_to_do(study):
    out = study()
    what, todo = refusal(find, out, Device(NEEDS | {"V3": (1000, 1)}))
    assert what == "not even one sequence fits: V3 adamwspam does not train in the memory of a GPU (1.0 GiB)."
    assert todo == "set GPT2_RECOMPUTE=y or a smaller GPT2_BLOCK_SIZE in make menuconfig, then make."
    assert not (out / "batch_size.json").exists()


def test_on_a_cpu_nothing_is_tried(study):
    out = study()
    record, _ = batch_size.find(Study(), out, CPU, SHARE, None)
    assert (record["micro_batch"], record["accumulation"], record["peak_bytes"]) == (8, 6, {})
    plan = Plan(Options())
    assert splits(plan) == {(8, 6, 0)}
    assert plan.micro_batch.sentence.endswith(": 8 sequences at once, 6 times a step, on a CPU there is nothing to find")
    study("V0", "DEVICE_CPU=y")
    assert Plan(Options()).micro_batch.settled, "known without a look at the machine"


# What cells get

def test_cells_hold_what_was_found_and_where_it_came_from(study):
    out = study()
    find(out)
    plan = Plan(Options())
    assert splits(plan) == {(24, 2, 8)}
    one = plan.cells[0].resolved
    assert "CONFIG_BATCH_SIZE=24\n" in one.text and "# CONFIG_BATCH_SIZE_AUTO is not set\n" in one.text
    assert one.provenance["BATCH_SIZE"] == ["24", f"{out}/batch_size.json: all that fits in 92 % of a GPU for V2 adamwspam"]
    assert one.identity["set"]["BATCH_SIZE"] == "24" and one.identity["default"]["BATCH_SIZE_AUTO"] == "n"
    study(auto=False)
    assert splits(Plan(Options())) == {(8, 6, 0)}


def test_where_it_came_from_is_said_of_a_default_too(study):
    out = study()
    find(out, Device(NEEDS | {"V2": (100, 100)}))
    one = Plan(Options()).cells[0].resolved
    assert (one.config.BATCH_SIZE, one.config.BATCH_DRAWN) == (8, 0) and one.provenance["BATCH_SIZE"][1].startswith(str(out))


def test_a_micro_batch_by_hand_is_the_same_cell(study):
    """Identity holds what a cell runs with, not how it was found."""
    out = study()
    find(out)
    finish(out, *Plan(Options()).cells)
    study("V0 V2 V3", auto=False)
    path = out.parent / "dot.config"
    path.write_text(path.read_text().replace("BATCH_SIZE=8", "BATCH_SIZE=24").replace("ACCUMULATION=6", "ACCUMULATION=2")
                    + "CONFIG_BATCH_DRAWN=8\n")
    assert {s.state for _, s, _ in Plan(Options()).rows()} == {"done"}


@pytest.mark.parametrize("inline", ["BATCH_SIZE=4", "GPT2_GRADIENT_ACCUMULATION=4", "BATCH_DRAWN=4"])
def test_a_step_cannot_have_a_split_of_its_own(study, inline):
    study(f"V0 V2@{inline}")
    name = inline.partition("=")[0]
    assert refusal(Plan, Options()) == (
        f"step V2@{inline}: BATCH_SIZE_AUTO finds {name} for all steps alike, a step cannot set it.",
        "leave it out of the step, or set BATCH_SIZE_AUTO=n in make menuconfig.")
    study(f"V0 V2@{inline}", auto=False)
    Plan(Options())


def test_a_step_cannot_ask_for_it(study):
    study("V0 V2@BATCH_SIZE_AUTO=y", auto=False)
    what, _ = refusal(Plan, Options())
    assert what == "step V2@BATCH_SIZE_AUTO=y: BATCH_SIZE_AUTO belongs to the study, a step cannot set it."


# What is kept

def test_what_is_kept_is_used_again(study):
    out = study()
    first, _ = find(out)
    assert find(out, Device({})) == (first, False), "nothing is tried"
    assert find(out, Device(NEEDS | {"V2": (100, 20)}), anew=True)[0]["micro_batch"] == 24


@pytest.mark.parametrize("steps, assignments", [
    ("V0 V3", ()), ("V0 V2 V3@RA_R=8", ()), ("V0 V2 V3", ("GPT2_BLOCK_SIZE=64",)), ("V0 V2 V3", ("GPT2_RECOMPUTE=y",)),
    ("V0 V2 V3", ("GPT2_COMPILE=n",))])
def test_other_steps_or_sizes_make_it_stale(study, steps, assignments):
    out = study()
    find(out, Device(NEEDS | {"V2": (100, 100)}))
    study(steps, *assignments)
    plan = Plan(Options())
    assert splits(plan) == {(8, 6, 0)} and "until make finds it" in plan.micro_batch.sentence
    device = Device({"V0": (1, 1), "V2": (1, 1), "V3": (1, 1)})
    assert find(out, device)[1] and splits(Plan(Options())) == {(48, 1, 8)}


@pytest.mark.parametrize("other", [{"name": "another GPU"}, {"memory_bytes": 1}, {"torch": "2.14.0"}])
def test_another_device_makes_it_stale(study, other):
    out = study()
    find(out)
    record, new = batch_size.find(Study(), out, GPU | other, SHARE, Device(NEEDS | {"V2": (1, 1), "V3": (1, 1)}))
    assert new and record["micro_batch"] == 48
    assert batch_size.find(Study(), out, GPU | other, SHARE / 2, Device())[1], "two cells side by side have half of it each"


def test_what_does_not_change_memory_leaves_it(study):
    out = study()
    find(out)
    study("V0 V2 V3 A0", 'LEARNING_RATE="0.1"', "GPT2_EVAL_SAMPLES=3", 'WEIGHT_DECAY="0"', "GPT2_WARMUP_STEPS=5")
    assert not find(out, Device({}))[1]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "micro_batch": 0}'])
def test_a_damaged_file_is_none(study, text):
    out = study()
    find(out)
    (out / "batch_size.json").write_text(text)
    assert not Plan(Options()).micro_batch.settled and splits(Plan(Options())) == {(8, 6, 0)}
    assert find(out)[1]


# A study that has begun

def test_a_study_that_has_begun_keeps_its_micro_batch(study):
    """Whatever became of the file, the machine and the list of steps."""
    out = study()
    find(out)
    finish(out, Plan(Options()).cells[0])
    (out / "batch_size.json").unlink()
    for steps in ("V0 V2 V3", "V3 V0 V1"):
        study(steps)
        plan = Plan(Options())
        assert splits(plan) == {(24, 2, 8)} and plan.micro_batch.settled
        assert {s.state for _, s, _ in plan.rows()} == {"done", "planned"}
    assert plan.cells[0].resolved.provenance["BATCH_SIZE"][1] == f"{out}/test_V0_adamwspam_none, a cell that had begun"


def test_a_study_that_ran_without_it_goes_on_as_it_is(study):
    out = study(auto=False)
    finish(out, *Plan(Options()).cells[:2])
    study()
    batch_size.find(Study(), out, GPU, SHARE, Device())
    assert splits(Plan(Options())) == {(8, 6, 0)}


def test_a_cell_to_resume_counts_and_a_failed_one_does_not(study):
    out = study()
    find(out)
    cell = Plan(Options()).cells[1]
    prepare(out / cell.name, cell)
    (out / "batch_size.json").unlink()
    assert not Plan(Options()).micro_batch.settled, "it ended before its first checkpoint"
    (out / cell.name / "checkpoint.pt").touch()
    assert splits(Plan(Options())) == {(24, 2, 8)}
    (out / cell.name / "checkpoint.pt").unlink()
    finish(out, cell, state="failed", reason="out of memory")
    assert not Plan(Options()).micro_batch.settled


@pytest.mark.parametrize("assignments", [("GPT2_BLOCK_SIZE=64",), ("GPT2_GRADIENT_ACCUMULATION=12",), ("BATCH_DRAWN=4",)])
def test_cells_of_an_edited_study_decide_nothing(study, assignments):
    out = study()
    find(out)
    finish(out, *Plan(Options()).cells)
    study()
    path = out.parent / "dot.config"
    path.write_text("".join(line for line in path.read_text().splitlines(True)
                            if line.partition("=")[0] not in {f"CONFIG_{a.partition('=')[0]}" for a in assignments})
                    + "".join(f"CONFIG_{a}\n" for a in assignments))
    plan = Plan(Options())
    assert not plan.micro_batch.settled and {s.state for _, s, _ in plan.rows()} == {"stale"}


def test_later_seeds_and_children_have_it_too(study):
    out = study("V0 V19 C1@EVALUATE_ONLY=n")
    batch_size.find(Study(), out, GPU, SHARE, lambda program, size: MIB if size <= 16 else None)
    plan = Plan(Options(seeds="3"))
    assert {c.seed for c in plan.cells} == {1, 2, 3} and splits(plan) == {(16, 3, 8)}
    child = next(c for c in plan.cells if c.parent)
    assert child.resolved.identity["set"]["PARENT.BATCH_SIZE"] == "16"
    finish(out, child)
    (out / "batch_size.json").unlink()
    assert Plan(Options()).micro_batch.settled


def test_the_sweep_has_it_too(study):
    out = study("V0 V3")
    find(out, Device(NEEDS | {"V3": (100, 10)}))
    plan = Plan(Options(tune=True))
    assert {c.resolved.config.BATCH_SIZE for c in plan.sweep.cells} == {48} and splits(plan) == {(48, 1, 8)}
    finish(out, *plan.sweep.cells)
    (out / "batch_size.json").unlink()
    assert Plan(Options()).micro_batch.settled


def test_a_study_without_it_is_not_touched(study):
    study(auto=False)
    plan = Plan(Options())
    assert plan.micro_batch is None and plan.study.found == [] and len(expand(plan.study)) == 6


@pytest.mark.parametrize("broken", [None, [], {}, "x", float("inf")])
def test_an_identity_without_a_batch_size_is_that_of_another_cell(study, broken):
    study()
    identity = {"set": {"BATCH_SIZE": broken, "GPT2_GRADIENT_ACCUMULATION": "1"}, "default": {}}
    assert not batch_size._same_but_for_split(Study(), identity, identity)
