"""The ledger of claims and the guard of figures; and, below, short proofs of claims that arithmetic or algebra settles."""

import copy
import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.unified_ra import UnifiedRAttention
from gpt2.layers import init_weights
from gpt2.mlp.reciprocal import ReciprocalMLP
from gpt2.model import GPT
from lib import claims
from lib.cells import expand
from lib.config import Study, load
from scripts.claims import constant, figures, rounds_to, unbacked
from tests.harness import ROOT, refusal, run

torch.set_num_threads(1)  # tests run side by side


# The ledger of the tree

def test_the_page_is_up_to_date_and_every_figure_is_backed():
    assert (ROOT / claims.PAGE).read_text() == claims.render(claims.read()), "make claims"
    assert unbacked(claims.read()) == []


def test_every_claim_has_a_test_a_verdict_is_never_typed_and_all_documents_are_there():
    ledger = claims.read()  # which raises for a proof that names no test
    assert len(ledger.claims) >= 60 and len(ledger.documents) == 5
    assert all(claim.claim.endswith(".") and claim.test.endswith(".") for claim in ledger.claims)
    page = claims.render(ledger)
    assert all(f"`{claim.id}`" in page for claim in ledger.claims)
    assert sum(page.count(f"| `{claim.id}`") for claim in ledger.claims) == len(ledger.claims)


def test_the_command(tree):
    module = run("scripts.claims", "--check")
    assert (module.returncode, module.stderr) == (0, "") and module.stdout.startswith("docs/claims.md: ")
    for code, page in ((1, "stale"), (0, None)):
        if page:
            (tree / claims.PAGE).write_text(page)
        done = call(tree, "--check")
        assert done.returncode == code
        if code:
            assert done.stderr == ("error: docs/claims.md is not what docs/claims.toml and the artifacts give.\n"
                                   "  try: make claims, and commit what it writes.\n")
            assert call(tree).stdout == "docs/claims.md: 2 claims: 1 holds by proof, 0 does not hold, 0 measured, 1 untested\n"
    (tree / claims.NAME).write_text("nonsense")
    done = call(tree, "--check")
    assert done.returncode == 2 and done.stderr.startswith("error: docs/claims.toml cannot be read: ")


def call(tree, *arguments):
    """python -m scripts.claims with another tree as the project's root."""
    code = "import sys, runpy; from pathlib import Path; import lib.paths; lib.paths.ROOT = Path(sys.argv.pop(1)); " \
           "runpy.run_module('scripts.claims', run_name='__main__', alter_sys=True)"
    return subprocess.run([sys.executable, "-c", code, str(tree), *arguments], cwd=ROOT, capture_output=True, text=True)


# A ledger of two claims, and what can be wrong with it

PROVED = {"id": "one", "document": ["a.md", "b.md"], "claim": "It is 3 % faster.", "kind": "quantitative", "test": "A test.",
          "proof": "tests/test_x.py::test_that", "holds": True}
WAITING = {"id": "two", "document": "b.md", "claim": "It has 2 parts.", "kind": "structural", "test": "A study.",
           "study": "gpt2-x-ablation", "note": "a reason"}
REPORT = {"baseline": "V0", "steps": [
    {"name": "V0", "comparison": None},
    {"name": "V1", "speed": 12_800.0, "memory": 2 ** 30, "comparison": {
        "word": "WORSE", "sentence": "V1 vs V0: +0.0213 nats: WORSE.", "difference": 0.0213, "half": -0.5}},
    {"name": "V1@GPT2_DROPOUT=0.5", "comparison": {"word": "BETTER", "sentence": "s", "difference": -0.25}}]}
FIGURE = "docs/results/gpt2-x-ablation/report.json: "
FIGURES = {"figures": [f"{FIGURE}steps.V1.speed / 12000", f"{FIGURE}steps.V1.speed / 10000 .. steps.V1.speed / 8000"],
           "says": ">= 1.1"}
ARTIFACT = {"artifact": "docs/results/gpt2-x-ablation", "step": "V1", "against": "V0"}


def written(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {written(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(written, value)) + "]" if isinstance(value, list) else json.dumps(value)


@pytest.fixture
def ledger(tmp_path):
    """ledger(*claims, constants={}, **others): a tree at tmp_path with this ledger."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_x.py").write_text("def test_that():\n    pass\n\ndef helper():\n    pass\n")
    (tmp_path / "tests/test_torn.py").write_text("def test_that(:\n")
    for folder in ("defconfigs/fragments", "docs/results/gpt2-x-ablation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "defconfigs/gpt2-x-ablation").write_text("")
    (tmp_path / "docs/results/gpt2-x-ablation/report.json").write_text(json.dumps(REPORT))
    (tmp_path / "docs/results/bench-x").mkdir()
    (tmp_path / "docs/results/bench-x/h100.json").write_text(
        '{"environment": {"device": "One GPU"}, "rows": [{"arm": "V1", "time": 1.25}, {"arm": "V2", "time": 2}]}')
    (tmp_path / "README.md").write_text("# Nothing\n")

    def write(*entries, constants=(), **others):
        content = {"documents": {"a.md": "A", "b.md": "B"}, "planned": [], "claim": list(entries),
                   "constant": [{"text": text, "reason": "a setting"} for text in constants]} | others
        (tmp_path / claims.NAME).write_text("".join(f"{key} = {written(value)}\n" for key, value in content.items()
                                                    if value is not None))
        return tmp_path
    return write


@pytest.fixture
def tree(ledger):
    root = ledger(PROVED, WAITING)
    (root / claims.PAGE).write_text(claims.render(claims.read(root)))
    return root


def test_states_are_computed(ledger):
    entries = [PROVED, PROVED | {"id": "false", "holds": False}, WAITING, WAITING | {"id": "seen"} | ARTIFACT]
    read = claims.read(ledger(*entries))
    assert [c.state for c in read.claims] == [claims.HOLDS, claims.FAILS, claims.UNTESTED, claims.MEASURED]
    page = claims.render(read)
    for shown in ("| holds by proof (`test_that`)", "| does not hold (`test_that`)", "| untested (gpt2-x-ablation)",
                  "| measured: WORSE (docs/results/gpt2-x-ablation)", "- `seen`: V1 vs V0: +0.0213 nats: WORSE.",
                  "- `two`: a reason", "| measured: WORSE |      1 | ", "Also claimed here: `one`, `false`."):
        assert shown in page, page
    assert page.count("| `one`") == 1


def test_a_contrast_measures_a_claim_too(ledger):
    root = ledger(PROVED, WAITING | ARTIFACT | {"step": "V3", "against": "V1"})
    report = root / "docs/results/gpt2-x-ablation/report.json"
    assert refusal(claims.read, root)[0].endswith("compares with V0, not with V1.")
    contrast = {"step": "V3", "reference": "V1", "comparison": {"word": "BETTER", "sentence": "V3 vs V1: -0.1 nats: BETTER."}}
    report.write_text(json.dumps(REPORT | {"contrasts": [contrast]}))
    claim = claims.read(root).claims[1]
    assert (claim.state, claim.word, claim.sentence) == (claims.MEASURED, "BETTER", "V3 vs V1: -0.1 nats: BETTER.")


@pytest.mark.parametrize("other, word", [("BETTER", "BETTER"), ("INCONCLUSIVE", "BETTER, INCONCLUSIVE")])
def test_a_claim_may_be_of_several_references(ledger, other, word):
    """Each has its own word, and all of them are shown."""
    root = ledger(PROVED, WAITING | ARTIFACT | {"step": "V3", "against": ["V1", "V2"]})
    contrasts = [{"step": "V3", "reference": name, "comparison": {"word": word, "sentence": f"V3 vs {name}."}}
                 for name, word in (("V1", "BETTER"), ("V2", other))]
    (root / "docs/results/gpt2-x-ablation/report.json").write_text(json.dumps(REPORT | {"contrasts": contrasts}))
    claim = claims.read(root).claims[1]
    assert (claim.word, claim.sentence) == (word, "V3 vs V1. V3 vs V2.")
    (root / "docs/results/gpt2-x-ablation/report.json").write_text(json.dumps(REPORT | {"contrasts": contrasts[:1]}))
    assert refusal(claims.read, root)[0].endswith("compares with V0, not with V2.")


def test_a_claim_is_measured_as_long_as_its_artifact_is_there(ledger):
    root = ledger(PROVED, WAITING | ARTIFACT)
    assert claims.read(root).claims[1].word == "WORSE"
    report = root / "docs/results/gpt2-x-ablation/report.json"
    changed = copy.deepcopy(REPORT)
    changed["steps"][1]["comparison"]["word"] = "INCONCLUSIVE"
    report.write_text(json.dumps(changed))
    assert "measured: INCONCLUSIVE (docs" in claims.render(claims.read(root))
    report.unlink()
    assert refusal(claims.read, root) == (
        "docs/claims.toml: claim two: the artifact docs/results/gpt2-x-ablation/report.json is missing.",
        "commit the study's report, or stop naming it.")
    claims.read(ledger(PROVED, WAITING))
    for text, what in (('{"baseline": NaN}', " cannot be read: NaN is no number of JSON."),
                       ("[]", " cannot be read: it is no table."),
                       ('{"baseline": "V0", "steps": [{"name": "V1", "comparison": {"word": "WORSE"}}]}',
                        " has no comparison of the step V1.")):
        report.write_text(text)
        assert refusal(claims.read, ledger(PROVED, WAITING | ARTIFACT))[0].endswith(f"report.json{what}")


def test_a_claim_is_measured_by_figures(ledger):
    """The word follows the figures, whatever anybody types; a benchmark's device is told."""
    def read(**changed):
        (_, claim) = claims.read(root := ledger(PROVED, WAITING | FIGURES | changed)).claims
        return claim.word, claim.sentence, claims.render(claims.read(root))

    word, sentence, page = read()
    assert (word, sentence) == ("UNDECIDED", "claimed >= 1.1, measured 1.067, 1.28 .. 1.6: UNDECIDED.")
    for shown in ("| measured: UNDECIDED (docs/results/gpt2-x-ablation/report.json)", f"- `two`: {sentence}",
                  "- `two`: a reason", "| measured: UNDECIDED |      1 | figures of a committed measurement, or the ends of "):
        assert shown in page, page
    assert [read(says=says)[0] for says in ("> 1", "1.1 .. 1.2", "<= 1.5")] == ["HOLDS", "DOES NOT HOLD", "UNDECIDED"]
    report = ledger() / "docs/results/gpt2-x-ablation/report.json"
    report.write_text(report.read_text().replace("12800", "14000"))
    assert read()[0] == "HOLDS"
    bench = {"study": "bench-x", "planned": ["bench-x"], "figures": "docs/results/bench-x/h100.json: rows[arm=V1].time"}
    claim = claims.read(ledger(PROVED, WAITING | FIGURES | but(bench, "planned"), planned=["bench-x"])).claims[1]
    assert (claim.state, claim.artifact, claim.sentence) == (
        claims.MEASURED, "docs/results/bench-x/h100.json", "claimed >= 1.1, measured 1.25 (One GPU): HOLDS.")


def but(entry, *without, **changed):
    return {key: value for key, value in (entry | changed).items() if key not in without}


@pytest.mark.parametrize("entry, what, todo", [
    (but(WAITING, stduy="x"), " has the unknown key 'stduy'.", "did you mean 'study'?"),
    (but(WAITING, "kind"), " has no 'kind'.", "add 'kind'."),
    (but(WAITING, claim=""), ": 'claim' is ''.", "write a line of text."),
    (but(WAITING, claim=3), ": 'claim' is 3.", "write a line of text."),
    (but(PROVED, id="two", holds="yes"), ": 'holds' is 'yes'.", "write true or false."),
    (but(PROVED, id="two", proof=[]), ": 'proof' is [].", "write a line of text or a list of such."),
    (but(WAITING, document=["a.md", 3]), ": 'document' is ['a.md', 3].", "write a line of text or a list of such."),
    (but(WAITING, id="one"), " is there twice.", "give each claim an id of its own."),
    (but(WAITING, id="Two_x"), ": the id is no slug.", "write it in small letters, digits and single hyphens."),
    (but(WAITING, kind="big"), " is of the kind 'big'.", "write structural or quantitative."),
    (but(WAITING, document="c.md"), " is of the document 'c.md', which [documents] does not list.", "write one of a.md, b.md."),
    (but(WAITING, "study"), " names neither a proof nor a study.",
     "name the tests that settle it or the study that will measure it."),
    (but(PROVED, id="two", study="gpt2-x-ablation"), " names both a proof and a study.",
     "name the tests that settle it or the study that will measure it."),
    (but(PROVED, "holds", id="two"), " does not say what its proof shows.", "add holds = true or holds = false."),
    (but(WAITING, holds=True), " says 'holds' without a proof.", "take it out: a study's verdict is read from its report."),
    (but(PROVED, id="two", proof="tests/test_y.py::test_that"), " is proved in 'tests/test_y.py', which is no file of tests.",
     "write 'tests/FILE.py::test_name'."),
    (but(PROVED, id="two", proof="tests/../x.py::test_that"), " is proved in 'tests/../x.py', which is no file of tests.",
     "write 'tests/FILE.py::test_name'."),
    (but(PROVED, id="two", proof=["tests/test_x.py::test_that", "tests/test_x.py::test_thot"]),
     " is proved by 'test_thot', which is no test in tests/test_x.py.", "did you mean test_that?"),
    (but(PROVED, id="two", proof="tests/test_x.py::helper"), " is proved by 'helper', which is no test in tests/test_x.py.",
     "name a test that is there."),
    (but(PROVED, id="two", proof="tests/test_torn.py::test_that"), " is proved in 'tests/test_torn.py', which is no Python.",
     "mend that file."),
    (but(PROVED, id="two", step="V1"), " names a proof and parts of an artifact.", "take out step."),
    (but(PROVED | FIGURES, id="two"), " names a proof and parts of an artifact.", "take out figures, says."),
    (but(WAITING | FIGURES, figures=f"{FIGURE}steps.V1.comparison.difference"),
     f": '{FIGURE}steps.V1.comparison.difference' is of a difference of losses, and figures have no error rate.",
     "give artifact, step, against instead."),
    (but(WAITING | FIGURES, "says"), " has figures only.", "give figures, says together, or none of them."),
    (but(WAITING, says="<= 1"), " has says only.", "give figures, says together, or none of them."),
    (but(WAITING | FIGURES, figures=[]), ": 'figures' is [].", "write a line of text or a list of such."),
    (but(WAITING | ARTIFACT | FIGURES), " names parts of a report's comparison and figures.",
     "take out artifact, step, against, or figures and says."),
    (but(WAITING, step="V1", says="<= 1"), " names parts of a report's comparison and figures.",
     "take out artifact, step, against, or figures and says."),
    (but(WAITING | FIGURES, says="some"), ": 'some' says nothing of a figure.",
     "write '<= x', '>= x', '< x', '> x' or 'x .. y'."),
    (but(WAITING | FIGURES, figures="steps.V1.speed"), ": 'steps.V1.speed' is no reference.",
     "write docs/results/STUDY/report.json: PATH.OF.KEYS."),
    (but(WAITING | FIGURES, figures=f"{FIGURE}steps.V1.size"),
     ": docs/results/gpt2-x-ablation/report.json has no number to use at 'steps.V1.size'.",
     "name the path of one of its numbers."),
    (but(WAITING | FIGURES, figures="docs/results/bench-x/h100.json: rows[arm=V1].time"),
     ": the figures of docs/results/bench-x/h100.json are not of the study gpt2-x-ablation.",
     "write figures of docs/results/gpt2-x-ablation, or the study that they are of."),
    (but(WAITING, study="gpt2-y-ablation"), " waits for 'gpt2-y-ablation', which is neither a defconfig nor in 'planned'.",
     "did you mean gpt2-x-ablation?"),
    (but(WAITING, study="bench"), " waits for 'bench', which is neither a defconfig nor in 'planned'.", "add it to 'planned'."),
    (but(WAITING, step="V1"), " has step only.", "give artifact, step, against together, or none of them."),
    (but(WAITING | ARTIFACT, artifact="docs/results/other"), ": the artifact 'docs/results/other' is not of the study "
     "gpt2-x-ablation.", "write docs/results/gpt2-x-ablation, or the study's name and its fragments."),
    (but(WAITING | ARTIFACT, artifact="docs/results/gpt2-x-ablation+tiny"),
     ": the artifact docs/results/gpt2-x-ablation+tiny/report.json is missing.",
     "commit the study's report, or stop naming it."),
    (but(WAITING | ARTIFACT, against="V1"), ": docs/results/gpt2-x-ablation/report.json compares with V0, not with V1.",
     'write against = "V0", if that is what was claimed.'),
    (but(WAITING | ARTIFACT, step="V7"), ": docs/results/gpt2-x-ablation/report.json has no comparison of the step V7.",
     "name a step that it compares."),
    (but(WAITING | ARTIFACT, step="V0"), ": docs/results/gpt2-x-ablation/report.json has no comparison of the step V0.",
     "name a step that it compares."),
])
def test_an_entry_that_is_not_right_is_refused(ledger, entry, what, todo):
    assert refusal(claims.read, ledger(PROVED, entry)) == (f"docs/claims.toml: claim {entry['id']}{what}", todo)


@pytest.mark.parametrize("others, what, todo", [
    ({"planed": []}, "docs/claims.toml has the unknown key 'planed'.", "did you mean 'planned'?"),
    ({"planned": None}, "docs/claims.toml has no 'planned'.", "add 'planned'."),
    ({"planned": ["gpt2-z"]}, "docs/claims.toml: no claim waits for the planned study gpt2-z.", "take it out of 'planned'."),
    ({"planned": [3]}, "docs/claims.toml: 'planned' is [3].", "write a list of lines of text."),
    ({"constant": [3]}, "docs/claims.toml: 'constant' is [3].", "write a list of tables."),
    ({"documents": {"a.md": "A", "b.md": "B", "c.md": "C"}}, "docs/claims.toml: no claim is of c.md.",
     "add its claims, or take it out of [documents]."),
    ({"constants": ["5 %", "5 %"]}, "docs/claims.toml: constant '5 %' is there twice.", "keep one of the two."),
    ({"constant": [{"text": "5 %"}]}, "docs/claims.toml: constant '5 %' has no 'reason'.", "add 'reason'."),
])
def test_the_rest_of_the_ledger_is_checked_too(ledger, others, what, todo):
    assert refusal(claims.read, ledger(PROVED, WAITING, **others)) == (what, todo)


# The guard of figures

@pytest.mark.parametrize("text, expected", [
    ("It gains 0.0021 nats, 2.17 % and 12,800 tokens/s.", ["0.0021 nats", "2.17 %", "12,800 tokens/s"]),
    ("It is 1.5x faster, 3 times slower, 2 x as large or 12-fold.", ["1.5x faster", "3 times slower", "2 x as", "12-fold"]),
    ("in 20 s, 5 minutes, 33ms, 36 MiB, 1.5 GiB; 124M; -0.01 nats", ["20 s", "5 minutes", "33ms", "36 MiB", "1.5 GiB", "124M",
                                                                    "-0.01 nats"]),
    ("**2.17** % or **3 %**", ["2.17 %", "3 %"]),
    ("two hours of training, twelve\nminutes", ["two hours", "twelve minutes"]),
    ("8-16 ms, 36 / 6 / 3 MiB, 0.5 ± 0.1 nats", ["8-16 ms", "36 / 6 / 3 MiB", "0.5 ± 0.1 nats"]),
    ("a loss of 3.21, perplexity 24.8, a loss of 3.2 ± 0.1 nats", ["of 3.21", "24.8", "of 3.2 ± 0.1 nats"]),
    ("a line that ends with 30\nseconds", ["30 seconds"]),
    ("| step | val loss | R |\n|---|--:|---|\n| V1 | 3.21 | 4 |\n| V2 | 3.5 ± 0.1 | 8 |\n\n| a | b |\n|--|--|\n| 1 | 2 |",
     ["3.21", "3.5 ± 0.1"]),
    ("GPT-2 in Python 3.11, R=4 of 64 channels, 8 x 8 accumulation, V0's, arXiv 2501.06842, step 3, 1/48", []),
    ("no seconds, several times slower, a second call", []),
])
def test_what_looks_measured(text, expected):
    assert [figure.text for figure in figures(text)] == expected


def test_numbers_of_a_figure():
    assert [f.numbers for f in figures("36 / 6 / 3 MiB; -0.5 ± 0.1 nats; 8-16 ms; two hours; a loss of 3.21")] == [
        ("36", "6", "3"), ("-0.5", "0.1"), ("8", "16"), ("2",), ("3.21",)]


@pytest.mark.parametrize("value, printed, fits", [
    (0.0213, "0.02", True), (0.0213, "0.021", True), (0.0213, "0.022", False), (0.0213, "+0.02", True),
    (0.0213, "-0.02", False),
    (-0.0213, "0.02", True), (-0.0213, "−0.02", True), (12_812.3, "12,812", True), (12_812.3, "12,813", False),
    (2.5e-5, "2.5e-5", True), (2.56e-5, "2.5e-5", False), (2.5, "2", True), (2.51, "2", False),
])
def test_rounding(value, printed, fits):
    assert rounds_to(value, printed) == fits


def guard(root, text, page="README.md"):
    (root / page).write_text(text)
    return unbacked(claims.read(root), root)


REF = "docs/results/gpt2-x-ablation/report.json: "


@pytest.mark.parametrize("text", [
    f"It is 0.021 nats <!-- {REF}steps.V1.comparison.difference --> worse.",
    f"| step | loss |\n|---|---|\n| V1 | +0.0213 <!-- {REF}steps.V1.comparison.difference --> |\n",
    f"12.8 k tokens/s <!-- {REF}steps.V1.speed / 1000 -->, 1 GiB <!-- {REF}steps.V1.memory / 1073741824 -->",
    f"2 % <!-- {REF}steps.V1.comparison.difference * 100 -->, 0.00 % <!-- {REF}steps.V1.speed / steps.V1.memory * 100 -->",
    f"0.25 nats <!-- {REF}steps.V1@GPT2_DROPOUT=0.5.comparison.difference -->",
    "1.25 times as long <!-- docs/results/bench-x/h100.json: rows[arm=V1].time -->",
    "1.25 to 2 ms <!-- docs/results/bench-x/h100.json: rows[arm=V1].time .. rows[arm=V2].time -->",
    "75 % <!-- docs/results/bench-x/h100.json: rows[arm=V2].time - rows[arm=V1].time * 100 -->",
    f"0.02 to 0.5 nats <!-- {REF}steps.V1.comparison.difference; {REF}steps.1.comparison.half -->",
    "They claim 3 % <!-- claims: one --> <!-- an ordinary comment -->",
    "```\n5 % and 3 nats\n```\nand `5 %` and <!-- 5 % --> nothing, and `a\nwrapped 5 % code`",
])
def test_figures_with_evidence_pass(ledger, text):
    assert guard(ledger(PROVED, WAITING), text) == []


@pytest.mark.parametrize("text, what, todo", [
    ("# A\n\nIt is\n2.17 % faster.", "README.md:4: the figure '2.17 %' has no artifact behind it.",
     "write <!-- docs/results/STUDY/report.json: steps.STEP.comparison.difference --> behind it in the same line, "
     "<!-- claims: ID --> for a figure of a source document, or a [[constant]] in docs/claims.toml for a setting."),
    (f"3 % faster, 0.02 nats <!-- {REF}steps.V1.comparison.difference -->",
     "README.md:1: the figure '3 %' has no artifact behind it.", None),
    (f"0.03 nats <!-- {REF}steps.V1.comparison.difference -->",
     f"README.md:1: 0.03 in '0.03 nats' is not what {REF}steps.V1.comparison.difference gives, which is 0.0213.",
     "print the artifact's number, or scale it behind the path (' * 100', ' / 1048576')."),
    (f"0.02 ± 0.01 nats <!-- {REF}steps.V1.comparison.difference -->",
     f"README.md:1: 0.01 in '0.02 ± 0.01 nats' is not what {REF}steps.V1.comparison.difference gives, which is 0.0213.", None),
    (f"0.02 nats <!-- {REF}steps.V9.comparison.difference -->", "README.md:1: docs/results/gpt2-x-ablation/report.json has no "
     "number to use at 'steps.V9.comparison.difference'.", "name the path of one of its numbers."),
    (f"0.02 nats <!-- {REF}steps.V1.comparison.word -->", "README.md:1: docs/results/gpt2-x-ablation/report.json has no "
     "number to use at 'steps.V1.comparison.word'.", None),
    ("0.02 nats <!-- docs/results/none/report.json: a.b -->",
     "README.md:1: the artifact docs/results/none/report.json is missing.", "commit the study's report, or stop naming it."),
    ("0.02 nats <!-- docs/results/x -->", "README.md:1: 'docs/results/x' is no reference.",
     "write docs/results/STUDY/report.json: PATH.OF.KEYS."),
    ("0.02 nats <!-- claims: nine -->", "README.md:1: there is no claim 'nine'.", "name a claim of docs/claims.toml."),
    ("4 % <!-- claims: one -->", "README.md:1: 4 in '4 %' is not what claims: one gives, which is 3.", None),
    ("nothing\nat all <!-- claims: one -->", "README.md:2: the reference 'claims: one' stands behind no figure.",
     "put it behind the figure it is for, in the same line, or take it out."),
])
def test_a_figure_without_evidence_is_named_with_its_line(ledger, text, what, todo):
    (found,) = guard(ledger(PROVED, WAITING), text)
    assert found[0] == what and todo in (None, found[1])


def test_every_page_is_guarded_but_the_evidence_and_the_ledgers_own(ledger):
    root = ledger(PROVED, WAITING)
    (root / "docs/sub").mkdir()
    for page in ("docs/a.md", "docs/sub/b.md", "docs/claims.md", "docs/results/gpt2-x-ablation/report.md"):
        (root / page).write_text("5 %")
    assert [what.split(":")[0] for what, _ in unbacked(claims.read(root), root)] == ["docs/a.md", "docs/sub/b.md"]


def test_constants(ledger):
    root = ledger(PROVED, WAITING, constants=["5 % error rate", "two hours of training"])
    assert guard(root, "at a 5 % error\nrate, two hours of\ntraining") == []
    assert [what for what, _ in guard(root, "at a 15 % error rate, two hours of training")] == [
        "README.md:1: the figure '15 %' has no artifact behind it.",
        "docs/claims.toml: the constant '5 % error rate' is in no page."]
    root = ledger(PROVED, WAITING, constants=["nothing measured"])
    assert guard(root, "nothing measured") == [("docs/claims.toml: the constant 'nothing measured' does not look measured.",
                                                "take it out: it needs no entry.")]
    assert not constant("5 %").search("0.5 %") and not constant("124M").search("124MB")


# Proofs: identities of attention

def heads(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(q, k, v, causal=True, scale=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def test_the_transpose_of_the_scores_is_the_scores_with_roles_exchanged():
    q, k = heads(2, 7, 16).unbind()
    torch.testing.assert_close((q @ k.T).T, k @ q.T)


def test_exchanging_query_and_key_is_exchanging_their_weights():
    """SDPA(k, q, v) of a layer is SDPA(q, k, v) of the layer whose W_q and W_k changed places: the same class of functions."""
    torch.manual_seed(0)
    layer, renamed = CausalSelfAttention(64, 4).double(), CausalSelfAttention(64, 4).double()
    init_weights(layer, 0)
    torch.nn.init.normal_(layer.c_attn.bias)
    renamed.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for p in (renamed.c_attn.weight, renamed.c_attn.bias):
            q, k, v = p.clone().split(64)
            p.copy_(torch.cat([k, q, v]))
    x = heads(2, 9, 64)
    q, k, v = (t.view(2, 9, 4, 16).transpose(1, 2) for t in layer.c_attn(x).split(64, 2))
    reciprocal = layer.c_proj(attend(k, q, v).transpose(1, 2).reshape(2, 9, 64))
    torch.testing.assert_close(renamed.eval()(x), reciprocal)


def test_with_roles_exchanged_nothing_flows_backward_either():
    """Under the causal mask row t of SDPA(k, q, v) still does not see a later token, and is not the column of attention."""
    q, k, v = heads(3, 1, 2, 8, 16)
    later = torch.arange(8) > 4
    changed = [torch.where(later[:, None], t + 1.0, t) for t in (q, k, v)]
    torch.testing.assert_close(attend(changed[1], changed[0], changed[2])[..., :5, :], attend(k, q, v)[..., :5, :])
    given_by_j_to_i = (q @ k.mT / 4).softmax(-1).mT  # how much token j attends to token i
    assert ((k @ q.mT / 4).softmax(-1) - given_by_j_to_i).abs().max() > 0.1


def test_one_softmax_is_not_the_mixture_of_two():
    """sdpa(Qf, Kf, V) against w_std sdpa(Q, K, V) + w_rec sdpa(K, Q, V), with all channels and with the R = 4 folded ones."""
    q, k, v = heads(3, 1, 1, 8, 64)
    w_std, w_rec = 60 / 64, 4 / 64
    mixture = w_std * attend(q, k, v) + w_rec * attend(k, q, v)
    one_softmax_all_channels = attend(torch.cat([w_std ** 0.5 * q, w_rec ** 0.5 * k], -1),
                                      torch.cat([w_std ** 0.5 * k, w_rec ** 0.5 * q], -1), v, scale=1 / 8)
    scale = torch.cat([torch.full((60,), w_std ** 0.5), torch.full((4,), w_rec ** 0.5)])
    folded = attend(torch.cat([q[..., :60], k[..., 60:]], -1) * scale, torch.cat([k[..., :60], q[..., 60:]], -1) * scale, v)
    assert (one_softmax_all_channels - mixture).abs().max() > 0.01 and (folded - mixture).abs().max() > 0.01


def test_is_causal_with_a_prefix_masks_the_wrong_keys():
    """Four new tokens behind a cache of five: is_causal aligns the mask with the first key."""
    q, k, v = heads(3, 1, 2, 9, 16)
    expected = attend(q, k, v)[..., 5:, :]
    mask = torch.ones(4, 9, dtype=torch.bool).tril(5)
    torch.testing.assert_close(F.scaled_dot_product_attention(q[..., 5:, :], k, v, attn_mask=mask), expected)
    assert (attend(q[..., 5:, :], k, v) - expected).abs().max() > 0.1


def transport(p, cost, tau, sign):
    """<p, C> + sign tau H(p)."""
    return (p * cost).sum(-1) - sign * tau * (p * p.clamp(min=1e-300).log()).sum(-1)


def test_attention_minimises_cost_minus_entropy_at_tau_sqrt_d():
    q, keys = heads(64, seed=1), heads(9, 64, seed=2)
    tau, cost = 8.0, -(keys @ q)
    p = (-cost / tau).softmax(-1)
    torch.testing.assert_close(attend(q[None], keys, torch.eye(9).double(), causal=False)[0], p)
    others = torch.cat([torch.distributions.Dirichlet(torch.ones(9).double()).sample((2000,)), torch.eye(9).double(),
                        (0.99 * p + 0.01 / 9)[None]])
    assert (transport(others, cost, tau, -1) > transport(p, cost, tau, -1)).all()
    vertex = torch.eye(9).double()[cost.argmin()]
    assert transport(vertex, cost, tau, +1) < transport(p, cost, tau, +1), "with + tau H(p) the minimum is a hard choice"
    assert ((-cost * 8.0).softmax(-1) - p).abs().max() > 0.1, "tau = 1 / sqrt(d) is another distribution"


def test_the_hessian_of_log_sum_exp_is_the_fisher_matrix():
    scores, tau = heads(7, seed=3), 8.0
    p = (scores / tau).softmax(-1)
    fisher = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(torch.autograd.functional.hessian(lambda s: torch.logsumexp(s / tau, -1), scores),
                               fisher / tau ** 2)
    torch.testing.assert_close(torch.autograd.functional.hessian(lambda s: tau * torch.logsumexp(s / tau, -1), scores),
                               fisher / tau)


# Proofs: gates

def test_the_geometric_start():
    """w = share of the channels: 60/64 and 4/64, 3008/3072 and 64/3072, 1920/3072 and 1152/3072, doubled for R = 8."""
    expected = {4: (0.9375, 0.0625), 8: (0.875, 0.125)}
    for R, weights in expected.items():
        stats = UnifiedRAttention(64, 1, R=R).get_gate_stats()
        assert (stats["w_std_mean"], stats["w_rec_mean"]) == pytest.approx(weights)
    for R_ff, weights in {64: (0.9792, 0.0208), 1152: (0.625, 0.375)}.items():
        mlp = ReciprocalMLP(8, 3072, R_ff)
        assert (mlp.w_std.item(), mlp.w_rec.item()) == pytest.approx(weights, abs=5e-5)
        assert mlp.w_std.item() + mlp.w_rec.item() == pytest.approx(1)


def test_ratios_of_the_geometric_start():
    """R : D_std is 1/15 and 1/47; 1/16 and 1/48 are the shares of the whole. 0.1 is 60 % and 380 % above them."""
    ra, rmlp = Fraction(4, 64), Fraction(64, 3072)
    assert (Fraction(4, 60), Fraction(64, 3008)) == (Fraction(1, 15), Fraction(1, 47))
    assert (ra, rmlp) == (Fraction(1, 16), Fraction(1, 48))
    assert (Fraction("0.1") / ra, Fraction("0.1") / rmlp) == (Fraction("1.6"), Fraction("4.8"))


def test_weights_that_sum_to_one_do_not_keep_the_scale_of_the_scores():
    """Independent unit channels: the scores' variance is (60 w_std^2 + 4 w_rec^2) / 64, which is 1 at w = 1 for both."""
    q, k = heads(2, 20_000, 64, seed=4).unbind()
    for w_std, w_rec, variance in ((0.9375, 0.0625, 0.824), (0.9, 0.1, 0.760), (1.0, 1.0, 1.0)):
        w = torch.cat([torch.full((60,), w_std), torch.full((4,), w_rec)]).double()
        assert (60 * w_std ** 2 + 4 * w_rec ** 2) / 64 == pytest.approx(variance, abs=1e-3)
        assert ((w * q * k).sum(-1) / 8).var().item() == pytest.approx(variance, rel=0.05)


def test_a_gate_has_no_value_of_its_own():
    """w_rec four times as large with rows half as long on both sides is the same function: its value identifies nothing."""
    one = UnifiedRAttention(64, 4, R=4).eval()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.gate_rec.mul_(2)
        for p in (other.c_attn.weight, other.c_attn.bias):
            p.view(3, 4, 16, -1)[:2, :, 12:] /= 2
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one(x), other(x))
    torch.testing.assert_close(other.w_rec, 4 * one.w_rec)


def test_a_baked_gate_is_not_learned():
    ra = UnifiedRAttention(64, 4, R=4)
    ra(torch.randn(2, 9, 64)).square().sum().backward()
    assert (ra.gate_std.grad != 0).all() and (ra.gate_rec.grad != 0).all(), "applied at run time it learns"
    ra.zero_grad()
    ra.bake()(torch.randn(2, 9, 64)).square().sum().backward()
    assert ra.gate_std.grad is None and ra.gate_rec.grad is None


def test_a_hard_gate_gets_no_gradient():
    """The documents' skip gate, sigmoid(l) > 0.5 with zeros for a path that is off: l gets no gradient, on or off."""
    assert torch.sigmoid(torch.tensor(2.0)).item() == pytest.approx(0.88, abs=5e-3), "their start is on"
    for start in (2.0, -2.0):
        logit, weight = torch.nn.Parameter(torch.tensor(start)), torch.nn.Parameter(torch.ones(3, 3))
        x = torch.ones(2, 3)
        h = x @ weight if torch.sigmoid(logit) > 0.5 else torch.zeros(2, 3)
        (h.square().sum() + x.sum() * weight.sum()).backward()
        assert logit.grad is None


def test_a_direction_that_is_not_computed_gets_no_gradient():
    """The straight-through decision learns only if both directions are computed and mixed."""
    q, k, v = heads(3, 1, 1, 6, 8)

    def decide(logit):
        p = torch.sigmoid(logit)
        return (p > 0.5).double() - p.detach() + p

    one, both = (torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64)) for _ in range(2))
    used = decide(one)
    picked = attend(k, q, v) if used > 0.5 else attend(q, k, v)
    assert not picked.requires_grad
    used = decide(both)
    (used * attend(k, q, v) + (1 - used) * attend(q, k, v)).square().sum().backward()
    assert both.grad != 0


# Proofs: what is computed, and how much

class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


def products(call) -> int:
    with Products() as mode:
        call()
    return mode.count


def split_mlp(std=True, rec=True):
    """Matrix products of the documents' R-MLP with attention injection: (forward, backward)."""
    torch.manual_seed(0)
    up_std, up_rec, down = (torch.nn.Linear(*size, bias=False) for size in ((8, 20), (8, 12), (32, 8)))
    x, injected = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    out = []

    def forward():
        h = [F.gelu(up(t)) if on else torch.zeros(5, up.out_features)
             for up, t, on in ((up_std, x, std), (up_rec, x + 0.5 * injected, rec))]
        out.append(down(torch.cat(h, -1)))

    return products(forward), products(lambda: out[0].sum().backward())


def test_matrix_products_of_the_split_mlp():
    """9 and not 7: the down projection has two products in the backward pass, too. A path that is off saves 3 of them."""
    assert split_mlp() == (3, 6)
    assert split_mlp(std=False) == split_mlp(rec=False) == (2, 4)
    forward, backward = split_mlp(std=False, rec=False)
    assert forward == 1 and backward == 1, "both off: the down projection's own weight gradient, of zeros, is left"


def test_injection_costs_the_same_flops_in_one_product_more():
    x, width, low = torch.randn(5, 8), 32, 12
    counts = []
    for sizes in ((width,), (width - low, low)):
        with FlopCounterMode(display=False) as mode:
            for size in sizes:
                F.linear(x, torch.zeros(size, 8))
        counts.append(mode.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flops_of_ra_and_of_the_folded_mlp_are_the_baselines():
    """Forward and backward, matrix products and attention; work on the weights alone (gates) is elementwise."""
    counts = {}
    for step in ("V0", "V1", "V3"):
        model = GPT(load("gpt2-ra-ablation+tiny", step, {"GPT2_BLOCK_SIZE": 32}))
        x = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as mode:
            model(x, x)[1].backward()
        counts[step] = mode.get_total_flops()
    assert counts["V0"] == counts["V1"] == counts["V3"] > 0


class Storages(TorchDispatchMode):
    """Collects the new storages at least as large as the activations."""

    def __init__(self, at_least):
        super().__init__()
        self.at_least, self.kept = at_least, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.numel() >= self.at_least:
                self.kept[t.untyped_storage().data_ptr()] = t  # kept alive, so that no address is used twice
        return out


@torch.no_grad()
def test_a_forward_pass_allocates_three_activations():
    """The projection [Qf | Kf | V], the attended values, and the output; the baseline has the same three."""
    x = torch.randn(8, 64, 64)
    for layer in (CausalSelfAttention(64, 4), UnifiedRAttention(64, 4, R=4)):
        with Storages(x.numel()) as mode:
            layer.eval()(x)
        assert len(mode.kept.keys() - {x.untyped_storage().data_ptr()}) == 3


@torch.no_grad()
def test_the_parity_error_depends_on_how_flat_attention_is():
    """w_rec = 0 drops 4 of 64 channels: at GPT-2's start the error is below the documents' 0.1, with larger weights not."""
    errors = []
    for larger in (1.0, 2.0):
        plain = CausalSelfAttention(768, 12, bias=False).eval()
        init_weights(plain, 0)
        plain.c_attn.weight.mul_(larger)
        ra = UnifiedRAttention(768, 12, R=4, bias=False).eval()
        ra.from_pretrained_qkv(*plain.c_attn.weight.split(768))
        ra.c_proj.load_state_dict(plain.c_proj.state_dict())
        ra.gate_std.fill_(1.0)
        ra.gate_rec.fill_(0.0)
        x = torch.randn(1, 512, 768, generator=torch.Generator().manual_seed(0))
        errors.append(((plain(x) - ra(x)).norm() / plain(x).norm()).item())
    assert 0.05 < errors[0] < 0.1 < errors[1]


def test_slowdowns_of_the_older_versions_do_not_follow_from_their_times():
    """2000, 2230 and 1960 ms, called +66, +85 and +48 %: not of 1555 ms, nor of any one baseline."""
    times, said = (2000, 2230, 1960), (0.66, 0.85, 0.48)
    assert [round(100 * (t / 1555 - 1)) for t in times] == [29, 43, 26]
    baselines = [t / (1 + s) for t, s in zip(times, said, strict=True)]
    assert max(baselines) > 1.09 * min(baselines)


def test_hours_of_the_documents_study():
    study = Study("gpt2-ra-ablation")
    seconds = [cell.resolved.config.GPT2_MAX_TIME for cell in expand(study)]
    assert len(seconds) == 7 and sum(seconds) == 14 * 3600 and 7 * 28_800 == 56 * 3600


# Proofs: caches

def test_sizes_of_the_latent_caches():
    """12 layers, 1024 tokens, 2 bytes: K and V of 12 heads of 64, a latent of 256, and one of 128."""
    cfg = load("gpt2-ra-ablation", "V0")
    tokens = cfg.GPT2_N_LAYER * cfg.GPT2_BLOCK_SIZE * 2 / 2 ** 20
    full, latent, spliced = tokens * 2 * cfg.GPT2_N_EMBD, tokens * 256, tokens * 128
    assert (full, latent, spliced) == (36, 6, 3) and (full / latent, full / spliced) == (6, 12)
    assert [round(100 * (1 - x / full), 1) for x in (latent, spliced)] == [83.3, 91.7] and spliced / latent == 0.5


PRUNED = {64: (25_024, 62, 31), 32: (12_512, 81, 40), 16: (6_256, 90, 45), 8: (3_128, 95, 48)}


def test_pruning_values_shrinks_the_values():
    for width, (kept, values, _) in PRUNED.items():
        assert 391 * width == kept and round(100 * (1 - kept / (1024 * 64))) == values


def test_pruning_values_shrinks_the_whole_cache_by_half_of_that():
    """K is kept in full. Index and importance of the kept slots are not even counted here."""
    for kept, _, whole in PRUNED.values():
        assert round(100 * (1 - (1024 * 64 + kept) / (2 * 1024 * 64))) == whole


def test_a_projection_to_fewer_dimensions_has_no_inverse():
    """Monotone per-channel warp (invertible), then PCA to 32 of 64: two different vectors have one code."""
    V = heads(500, 64) @ heads(64, 64, seed=1)
    warped = V.sinh().asinh() + V.tanh()  # strictly monotone
    basis = torch.linalg.svd(warped - warped.mean(0), full_matrices=True)[2]
    kept, dropped = basis[:32], basis[32:]
    other = warped[0] + 5 * dropped[0]
    torch.testing.assert_close(kept @ warped[0], kept @ other)
    restored = (warped - warped.mean(0)) @ kept.T @ kept + warped.mean(0)
    assert (restored - warped).norm() / warped.norm() > 0.05
    assert math.isclose((basis @ other - basis @ warped[0]).norm().item(), 5, rel_tol=1e-6), "all 64 dimensions tell them apart"
