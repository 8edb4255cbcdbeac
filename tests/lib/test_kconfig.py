"""The schema: what a layer of assignments may say, and that what it says is what then holds."""

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.config import Study
from lib.errors import UserError
from lib.kconfig import Assignment, Schema, canonical, read_layer
from tests.harness import ROOT, refusal

SCHEMA = Schema()
PROMPTED = sorted(SCHEMA.prompted)


def apply(*layers):
    """Apply layers like "RA_R=8 ATTENTION_UNIFIED_RA=y" to the defaults, each from a file named file1, file2, ..."""
    SCHEMA.reset()
    for number, layer in enumerate(layers, 1):
        SCHEMA.apply([Assignment(*part.split("=", 1), f"file{number}:{i}") for i, part in enumerate(layer.split(" "), 1)])
    return SCHEMA.values()


def value_of(name, *layers):
    return apply(*layers)[name]


def test_a_file_that_was_written_whole_is_refused_wherever_it_is_cut(tmp_path):
    path, text = tmp_path / "cut.config", Study("gpt2-ra-ablation", schema=SCHEMA).text()
    lines = text.splitlines(keepends=True)
    for at in {0, 1, len(lines[0]) - 1, len(text) - 2, *itertools.accumulate(map(len, lines[:-1]))}:
        path.write_text(text[:at])
        what, run = refusal(read_layer, path)
        assert what == f"{path} is {'cut short' if at else 'empty'}: its end is missing." and f"{path}.old" in run
    for added in ("", "CONFIG_ODD=1\n", "\n# mine\n"):
        path.write_text(text + added)
        assert len(read_layer(path)) > 100, "what is added by hand does not matter"
    path.write_text("".join(line for line in lines if "CONFIG" in line)[:2000].rpartition("\n")[0])
    assert read_layer(path), "what is written by hand needs no marks"
    path.write_text("# Written by kablate; edit it with make menuconfig.\nCONFIG_SEED=5\n")
    assert read_layer(path), "nor does what was written before there were any"


@pytest.mark.parametrize("content, expected", [
    ("CONFIG_A=y\n\n# comment\n  CONFIG_B=3  \n# CONFIG_C is not set\n", [("A", "y", 1), ("B", "3", 4), ("C", "n", 5)]),
    ('CONFIG_S="a \\"b\\" \\\\ c"\r\n', [("S", 'a "b" \\ c', 1)]),
    ('CONFIG_S=""\nCONFIG_T="# CONFIG_U is not set"', [("S", "", 1), ("T", "# CONFIG_U is not set", 2)]),
    ("# CONFIG_GPT2_MAX_ITERS=10400\n", []),
    ("\n", []),
])
def test_a_layer_is_its_assignments_with_their_lines(tmp_path, content, expected):
    path = tmp_path / "layer"
    path.write_bytes(content.encode())
    assert read_layer(path) == [Assignment(name, value, f"{path}:{line}") for name, value, line in expected]


@pytest.mark.parametrize("content, what, run", [
    ("CONFIG_A=y\nCONFIG_B\n", ":2: 'CONFIG_B' is no assignment.", "write CONFIG_NAME=value, or make it a comment."),
    ("RA_R=8\n", ":1: 'RA_R=8' is no assignment.", "write CONFIG_NAME=value, or make it a comment."),
    ("CONFIG_A = y\n", ":1: 'CONFIG_A = y' is no assignment.", "write CONFIG_NAME=value, or make it a comment."),
    ('CONFIG_A="x\n', ':1: malformed string "x.', "close its quotes."),
    ('CONFIG_A="x"y"\n', ':1: malformed string "x"y".', "close its quotes."),
    ('CONFIG_A="x\\"\n', ':1: malformed string "x\\".', "close its quotes."),
    ("CONFIG_A=1\n#\nCONFIG_A=1\n", ":3: A is set a second time (first in line 1).", "keep one of the two."),
    ("# CONFIG_A is not set\nCONFIG_A=y\n", ":2: A is set a second time (first in line 1).", "keep one of the two."),
])
def test_anything_else_names_the_file_and_line(tmp_path, content, what, run):
    path = tmp_path / "layer"
    path.write_text(content)
    assert refusal(read_layer, path) == (f"{path}{what}", run)


@pytest.mark.parametrize("make, reason", [
    (lambda path: None, "No such file or directory"),
    (lambda path: path.mkdir(), "Is a directory"),
    (lambda path: path.write_bytes(b"CONFIG_STUDY=\"\xff\"\n"), "codec can't decode byte 0xff"),
])
def test_a_layer_that_cannot_be_read(tmp_path, make, reason):
    make(tmp_path / "layer")
    what, run = refusal(read_layer, tmp_path / "layer")
    assert what.startswith(f"{tmp_path}/layer cannot be read: ") and reason in what
    assert run == "check the path and the file's permissions."


def test_paths_inside_the_project_are_shown_from_its_root():
    assert read_layer(ROOT / "gpt2/steps/V0.config")[0].where == "gpt2/steps/V0.config:2"


def test_kinds_follow_from_type_range_and_default():
    expected = {"GPT2_BIAS": "bool", "BATCH_SIZE": "int", "LEARNING_RATE": "float", "RMLP_R_FF": "ratio", "STUDY": "str",
                "SEEDS": "str", "DEVICE_CPU": "bool"}
    assert {name: SCHEMA.kinds[name] for name in expected} == expected


@pytest.mark.parametrize("name, values, wanted", [
    ("BATCH_SIZE", ["1_0", "+5", "07", "1.0", "1e3", "0x10", "", " 8", "8 ", "٣", "--1", "-0", "9" * 5000], "a whole number"),
    ("LEARNING_RATE", ["nan", "inf", "-inf", "1e999", "1_0.0", "0x1p3", "", "1,5", "1e-99999999", "0." + "1" * 5000, "1 e3"],
     "a number"),
    ("RMLP_R_FF", ["0", "1.5", "-1/48", "1/0", "3/2", "0.0", "0/48", "1e-2", "", "1.0", "48/48", "1/" + "9" * 5000],
     "a ratio like 1/48 or a whole number >= 1"),
    ("GPT2_BIAS", ["Y", "N", "m", "1", "true", "", "yes"], "y or n"),
    ("STUDY", ["a\nb", "a\rb", "a\x00b", "a\x1b[2J", "a\u2028b", "\udcff"], "one line of printable text"),
])
def test_ill_typed_values_are_refused_by_name_and_line(name, values, wanted):
    for value in values:
        layer = [Assignment("MLP_RECIPROCAL", "y", "file:1"), Assignment(name, value, "file:2")]
        SCHEMA.reset()
        assert refusal(SCHEMA.apply, layer) == (f"file:2: {name}={value} is not {wanted}.", f"give {name} {wanted}.")


@pytest.mark.parametrize("name, text, value", [
    ("LEARNING_RATE", "6e-4", 0.0006), ("LEARNING_RATE", "+.5", 0.5), ("LEARNING_RATE", "0.", 0.0), ("MARGIN", "1E-2", 0.01),
    ("BATCH_SIZE", "64", 64), ("GPT2_BIAS", "n", False), ("STUDY", 'a "b" \\ ü', 'a "b" \\ ü'), ("STUDY", "", ""),
])
def test_well_typed_values_arrive_as_their_type(name, text, value):
    SCHEMA.reset()
    SCHEMA.apply([Assignment(name, text, "here")])
    found = SCHEMA.values()[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, size", [("1/48", "1/48"), ("0.25", "1/4"), ("64", "64"), ("2/4", "1/2"), ("1", "1")])
def test_ratios_are_exact(text, size):
    assert str(value_of("RMLP_R_FF", f"MLP_RECIPROCAL=y RMLP_R_FF={text}")) == size


@pytest.mark.parametrize("assignment, bounds", [
    ("BATCH_SIZE=0", "1..65536"), ("BATCH_SIZE=65537", "1..65536"), ("SEED=2147483648", "0..2147483647"),
    ("GPT2_MAX_TIME=-1", "0..31536000"), ("GPT2_DROPOUT=1", "0.0..0.99"), ("GPT2_DROPOUT=-0.1", "0.0..0.99"),
    ("LEARNING_RATE=100.0001", "0.0..100.0"), ("ADAM_BETA1=0.99990001", "0.0..0.9999"),
])
def test_values_outside_their_range(assignment, bounds):
    name = assignment.split("=")[0]
    assert refusal(apply, assignment) == (f"file1:1: {assignment} is outside its range {bounds}.",
                                          f"give {name} a value within it.")


@pytest.mark.parametrize("assignment", ["BATCH_SIZE=1", "BATCH_SIZE=65536", "GPT2_DROPOUT=0", "GPT2_DROPOUT=0.99"])
def test_the_ends_of_a_range_belong_to_it(assignment):
    apply(assignment)


@pytest.mark.parametrize("name, hint", [
    ("RA_RR", "did you mean RA_R?"), ("ra_r", "did you mean RA_R?"), ("LEARNINGRATE", "did you mean LEARNING_RATE?"),
    ("GPT2_MAX_TIMES", "did you mean GPT2_MAX_TIME?"), ("XYZZY", "search for it with / in make menuconfig."),
])
def test_an_unknown_symbol_comes_with_a_near_miss(name, hint):
    assert refusal(apply, f"GPT2_BIAS=y {name}=8") == (f"file1:2: unknown symbol {name}.", hint)


@pytest.mark.parametrize("layers, what, run", [
    (["RA_R=8"], "file1:1: RA_R=8 did not take, because it depends on ATTENTION_UNIFIED_RA.",
     "set ATTENTION_UNIFIED_RA as well, or leave RA_R out."),
    (["ATTENTION_UNIFIED_RA=y", "ATTENTION_SDPA=y RA_R=8"],
     "file2:2: RA_R=8 did not take, because it depends on ATTENTION_UNIFIED_RA.",
     "set ATTENTION_UNIFIED_RA as well, or leave RA_R out."),
    (["OPTIMIZER_SINKGD=y SINKGD_TAU=0.5"],
     "file1:2: SINKGD_TAU=0.5 did not take, because it depends on OPTIMIZER_SINKGD && SINKGD_L1.",
     "set OPTIMIZER_SINKGD && SINKGD_L1 as well, or leave SINKGD_TAU out."),
    (["GPT2_N_LAYER=3"], "file1:1: GPT2_N_LAYER=3 did not take, because it depends on MODEL_CUSTOM.",
     "set MODEL_CUSTOM as well, or leave GPT2_N_LAYER out."),
    (["TRACKER_PROJECT=mine"], "file1:1: TRACKER_PROJECT=mine did not take, because it depends on !TRACKER_NONE.",
     "set !TRACKER_NONE as well, or leave TRACKER_PROJECT out."),
    (["ATTENTION_ROUTER=y KV_PRUNING_V=y"],  # it depends on PRUNABLE, which nobody can set
     "file1:2: KV_PRUNING_V=y did not take, because it depends on (ATTENTION_SDPA || ATTENTION_UNIFIED_RA).",
     "set (ATTENTION_SDPA || ATTENTION_UNIFIED_RA) as well, or leave KV_PRUNING_V out."),
    (["MODEL_TINY=y MODEL_GPT2_XL=y"],
     "file1:1: MODEL_TINY=y did not take, because the choice 'Model size' stands at MODEL_GPT2_XL.",
     "set exactly one member of the choice to y."),
    (["ATTENTION_SDPA=n"], "file1:1: ATTENTION_SDPA=n did not take, because the choice 'Attention' stands at ATTENTION_SDPA.",
     "set exactly one member of the choice to y."),
    (["OPTIMIZER=adamw"], "file1:1: OPTIMIZER has no prompt, it follows from other symbols and cannot be set.",
     "set the symbols it follows from (make menuconfig shows them)."),
    (["RA_R=8 RA_R=9 ATTENTION_UNIFIED_RA=y"], "file1:1: RA_R=8 did not take, it stands at 9.",
     "look the symbol up in make menuconfig."),
])
def test_an_assignment_that_did_not_take_says_why(layers, what, run):
    assert refusal(apply, *layers) == (what, run)


def test_a_losing_member_that_is_said_to_lose_is_no_error():
    assert value_of("ATTENTION_UNIFIED_RA", "ATTENTION_SDPA=n ATTENTION_UNIFIED_RA=y")


def test_what_a_later_layer_hides_is_none_or_false():
    values = apply("ATTENTION_UNIFIED_RA=y RA_R=8 RA_SELF_RESTART=y", "ATTENTION_SDPA=y")
    assert values["RA_R"] is None and values["RA_SELF_RESTART"] is False


BUDGETS = ("GPT2_MAX_TIME", "GPT2_MAX_ITERS", "GPT2_MAX_TOKENS")


@pytest.mark.parametrize("layers, expected", [
    (["GPT2_BIAS=y"], (7200, 0, 0)),
    (["GPT2_MAX_ITERS=250"], (0, 250, 0)),
    (["GPT2_MAX_TOKENS=99"], (0, 0, 99)),
    (["GPT2_MAX_ITERS=250", "GPT2_MAX_TIME=60"], (60, 0, 0)),
    (["GPT2_MAX_TIME=60", "GPT2_MAX_ITERS=250"], (0, 250, 0)),
    (["GPT2_MAX_TIME=60", "GPT2_MAX_TOKENS=99", "GPT2_MAX_ITERS=5"], (0, 5, 0)),
    (["GPT2_MAX_ITERS=250", "GPT2_MAX_ITERS=0 GPT2_MAX_TOKENS=99"], (0, 0, 99)),
    (["GPT2_MAX_ITERS=250", "GPT2_MAX_TIME=0"], (0, 250, 0)),  # says what holds
    (["GPT2_MAX_ITERS=250 GPT2_MAX_TIME=60"], (60, 250, 0)),  # refused later, by the study
    (["GPT2_MAX_TIME=0"], (0, 0, 0)),
])
def test_a_layer_with_one_budget_clears_the_others(layers, expected):
    values = apply(*layers)
    assert tuple(values[name] for name in BUDGETS) == expected


def test_minimal_form_and_full_text_give_the_configuration_again(tmp_path):
    before = apply("MODEL_TINY=y ATTENTION_UNIFIED_RA=y RA_R=8 GPT2_MAX_ITERS=5 STUDY=ü\\\" GPT2_COMPILE=n DEVICE_CPU=y")
    minimal, text = SCHEMA.minimal(), SCHEMA.text()
    assert minimal == {"MODEL_TINY": "y", "ATTENTION_UNIFIED_RA": "y", "RA_R": "8", "GPT2_MAX_ITERS": "5", "STUDY": 'ü\\"',
                       "GPT2_COMPILE": "n", "DEVICE_CPU": "y"}
    SCHEMA.reset()
    SCHEMA.apply([Assignment(n, v, "") for n, v in minimal.items()])
    assert SCHEMA.values() == before
    (tmp_path / "full").write_text(text, encoding="utf-8")
    full = read_layer(tmp_path / "full")
    SCHEMA.reset()
    SCHEMA.apply([a for a in full if a.name in SCHEMA.prompted])
    SCHEMA.verify_derived([a for a in full if a.name not in SCHEMA.prompted])
    assert SCHEMA.values() == before


def test_the_identity_is_every_prompted_symbol_outside_the_first_menu_and_the_last():
    text = (ROOT / "lib/Kconfig").read_text()
    outside = (ROOT / "Kconfig").read_text() + text[text.index('menu "Bookkeeping'):]
    bookkeeping = set(re.findall(r"^config (\w+)", outside, re.M))
    assert {"STUDY", "MARGIN", "SEEDS", "TRACKER_PROJECT", "OUTPUT_DIR", "GPT2_LOG_INTERVAL", "DATA_DIR"} <= bookkeeping
    assert SCHEMA.prompted - SCHEMA.identity == bookkeeping & SCHEMA.prompted
    assert {"SEED", "CPU_THREADS", "INIT_FROM_STEP", "BATCH_SIZE", "RA_R", "GPT2_MAX_TIME"} <= SCHEMA.identity


@pytest.mark.parametrize("broken, reason", [
    ("config A\n\tbool \"a\"\n\tdepends on NOWHERE\n\tselect B\n\nconfig B\n\tint \"b\"\n", "B"),
    ("config A\n\tint \"a\"\n\trange 1 x\n", "A"),
])
def test_kconfig_files_that_do_not_hold_together(tmp_path, broken, reason):
    (tmp_path / "Kconfig").write_text(broken)
    what, run = refusal(Schema, tmp_path / "Kconfig")
    assert what.startswith("the Kconfig files do not hold together: ") and reason in what
    assert run == "mend the Kconfig file it names."


@pytest.mark.parametrize("kind, texts, expected", [
    ("float", ["0.0006", "6e-4", "+.0006", "6.0E-04"], "0.0006"), ("float", ["0", "-0.0", "0.0"], "0.0"),
    ("ratio", ["1/4", "0.25", "2/8"], "1/4"), ("int", ["5"], "5"), ("str", ["6e-4"], "6e-4"), ("float", [""], ""),
])
def test_equal_numbers_have_one_spelling(kind, texts, expected):
    assert {canonical(kind, text) for text in texts} == {expected}


def test_the_schema_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("srctree", str(tmp_path))
    assert Schema().symbols.keys() == SCHEMA.symbols.keys()


NASTY = st.sampled_from(["0", "-1", "1_0", "nan", "1e999", "1/48", "y", "n", "m", "", '"', "\\", "\n", "1e-9999999", "$(rm)"])
VALUES = st.one_of(st.text(st.characters(), max_size=60), NASTY, st.integers().map(str), st.floats().map(str))


@given(st.lists(st.tuples(st.sampled_from(PROMPTED), VALUES), max_size=5))
@example([("STUDY", "\udcff")])
@example([("STUDY", "a\x0bb\u2029")])
@settings(max_examples=150)
def test_any_value_takes_or_is_refused(pairs):
    layer = [Assignment(name, value, "here") for name, value in pairs]
    SCHEMA.reset()
    try:
        SCHEMA.apply(layer)
    except UserError as error:
        assert error.what.startswith("here: ") and error.run
        return
    assert [SCHEMA.symbols[a.name].str_value for a in layer] == [a.value for a in layer]
    before, minimal = SCHEMA.values(), SCHEMA.minimal()
    SCHEMA.reset()
    SCHEMA.apply([Assignment(n, v, "") for n, v in minimal.items()], verify=False)
    assert SCHEMA.values() == before, "what is written down is what held"


LINES = st.one_of(st.builds("CONFIG_{}={}".format, st.sampled_from(PROMPTED), VALUES),
                  st.builds('CONFIG_{}="{}"'.format, st.sampled_from(PROMPTED), VALUES),
                  st.builds("# CONFIG_{} is not set".format, st.sampled_from(PROMPTED)), st.text(max_size=20))


@given(st.lists(LINES, max_size=5).map("\n".join))
@settings(max_examples=150)
def test_any_file_is_a_layer_or_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.config"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        layer = read_layer(path)
    except UserError as error:
        assert str(path) in error.what
        return
    assert len({a.name for a in layer}) == len(layer)
