"""The ledger of claims and the guard of figures."""

import copy
import json
import subprocess
import sys

import pytest

from lib import claims
from scripts.claims import constant, figures, rounds_to, unbacked
from tests.harness import ROOT, refusal, run

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
    (f"an eigenvalue of 0.03, <!-- {REF}steps.V1.comparison.difference --> of 4",
     f"README.md:1: 0.03 in '0.03' is not what {REF}steps.V1.comparison.difference gives, which is 0.0213.", None),
    (f"an eigenvalue of 0.03 <!-- {REF}steps.V1.comparison.difference --> of 4",
     f"README.md:1: 0.03 in '0.03' is not what {REF}steps.V1.comparison.difference gives, which is 0.0213.", None),
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
