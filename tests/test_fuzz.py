"""Whatever is read from outside gives a result or two sentences: no traceback, and no value that is silently dropped.

KABLATE_FUZZ=10000 asks for at least so many cases in all, other ones each time; make test takes a few, always the same. A case
is one input, however many readers it is given to.
"""

import contextlib
import copy
import functools
import json
import math
import os
import re
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from lib import batch_size, config, results
from lib.cells import expand, parse_seeds
from lib.config import Study, load, parse_step
from lib.data import open_corpus
from lib.data.files import HEADER_BYTES
from lib.errors import UserError, one_line
from lib.kconfig import BUDGET, Schema, read_layer
from lib.launch import read_plan
from lib.plan import Options, Plan
from lib.report import charts, files, index, markdown, page
from lib.report.content import content, failures
from scripts.frontier import read_decode
from scripts.plan import options_from_environment, warnings
from scripts.report import draw_again
from tests.harness import MEASURED, TINY, finish

CASES = int(os.environ.get("KABLATE_FUZZ", "0"))
SCHEMA = Schema()
PROMPTED, SYMBOLS = sorted(SCHEMA.prompted), sorted(SCHEMA.symbols)
SHARES: dict[str, float] = {}  # of all cases; together more than 1, since hypothesis may stop a test before its share is over
COUNTED: dict[str, int] = {}


@pytest.fixture(autouse=True, scope="module")
def counted():
    yield
    if CASES:
        print(f"\n{sum(COUNTED.values())} cases: " + ", ".join(f"{name} {number}" for name, number in COUNTED.items()))


@pytest.fixture(autouse=True, scope="module")
def read_once():
    """What every case would read anew: the Kconfig files, and the page's template."""
    environment = page.environment()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "Schema", lambda: SCHEMA)
        patch.setattr(page, "environment", lambda: environment)
        yield


def cases(share: float, shrinks: bool = True):
    """A test that takes this share of all cases, and counts them; one that reads a whole study would take minutes to shrink."""
    def decorate(test):
        name = test.__name__.removeprefix("test_").replace("_", " ")
        SHARES[name] = share

        @functools.wraps(test)
        def counting(*args, **options):
            test(*args, **options)
            COUNTED[name] = COUNTED.get(name, 0) + 1

        return settings(phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrinks else [])],
                        max_examples=max(1, math.ceil(CASES * share)) if CASES else 25, derandomize=not CASES, deadline=None,
                        report_multiple_bugs=False, suppress_health_check=list(HealthCheck))(counting)
    return decorate


def test_the_cases_are_as_many_as_are_asked_for():
    assert sum(SHARES.values()) >= 1.05 and len(SHARES) == 12
    ran = dict(COUNTED)

    @given(st.integers(0, 10 ** 9))
    @cases(0)
    def judged_twice(number):
        with judged():
            raise UserError("one sentence.", "something to do.")
        with judged():
            pass

    judged_twice()
    try:
        assert {name: number for name, number in COUNTED.items() if ran.get(name) != number} == {
            "judged twice": 1 if CASES else 25}, "a case is counted once"
    finally:
        SHARES.pop("judged twice"), COUNTED.pop("judged twice")


@contextlib.contextmanager
def judged():
    """A UserError is a result if it is one sentence and something to do; anything else is a defect."""
    try:
        yield
    except UserError as error:
        for text in (error.what, error.run):
            assert text.strip() and one_line(text).isprintable(), "a person can read it"
        assert len(one_line(error.what)) < 2000


# Configuration

NASTY = st.sampled_from(["0", "-1", "1_0", "nan", "1e999", "1/48", "y", "n", "m", "", '"', "\\", "\n", "1e-9999999", "$(rm)",
                         "`id`", "; id", "V0 V1", "9" * 50, "-0.0", "../..", "\x1b[2J", "\u202e", "0x10", " 5", "5 "])
TEXT = st.text(st.characters(), max_size=60)
VALUES = st.one_of(TEXT, NASTY, st.integers().map(str), st.floats().map(str))
LINES = st.one_of(st.builds("CONFIG_{}={}".format, st.sampled_from(SYMBOLS), VALUES),
                  st.builds('CONFIG_{}="{}"'.format, st.sampled_from(SYMBOLS), VALUES),
                  st.builds("# CONFIG_{} is not set".format, st.sampled_from(SYMBOLS)),
                  st.sampled_from([f"CONFIG_{line}" for line in TINY]), TEXT)


def written(path, text: str):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@given(st.lists(LINES, max_size=6).map("\n".join))
@cases(0.25)
def test_the_text_of_a_configuration(tmp_path_factory, text):
    path = written(tmp_path_factory.getbasetemp() / "fuzz.config", text)
    with judged():
        found = Study(config=path)
        expand(found, [1])
        SCHEMA.reset()
        SCHEMA.apply(found.base, verify=False)
        for a in read_layer(path):
            assert SCHEMA.symbols[a.name].str_value == a.value, "an assigned value was dropped"


SYMBOL_VALUE = st.tuples(st.sampled_from(PROMPTED), VALUES)


@given(st.lists(LINES, max_size=4).map("\n".join), st.lists(SYMBOL_VALUE, max_size=3), st.one_of(st.just(""), TEXT))
@cases(0.15)
def test_a_steps_fragment_and_its_overrides(tmp_path_factory, text, inline, tail):
    path = written(tmp_path_factory.getbasetemp() / "X.config", text)
    spec = "X" + ("@" + ",".join(f"{n}={v}" for n, v in inline) + tail if inline or tail else "")
    with pytest.MonkeyPatch.context() as patch, judged():
        patch.setattr(config, "step_path", lambda name, folder: path)
        resolved = TINY_STUDY.resolve(spec)
        held = {name: SCHEMA.symbols[name].str_value for name in SCHEMA.symbols}
        given_in = {a.name: a.value for a in (*read_layer(path), *parse_step(spec)[1])}
        assert {name: held[name] for name in given_in} == given_in, "an assigned value was dropped"
        assert all(resolved.provenance.get(name, [value])[0] == value for name, value in given_in.items())


TINY_STUDY = Study("gpt2-ra-ablation+tiny", schema=SCHEMA)


# The environment, and what stands on make's command line

WORDS = st.one_of(NASTY, st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300),
                  st.just("a" * 4096), st.integers(-2, 10 ** 12).map(str),
                  st.lists(st.integers(0, 9), max_size=4).map(lambda seeds: " ".join(map(str, seeds))))
VARIABLES = [*BUDGET, "KABLATE_OUT", "KABLATE_SEEDS", "KABLATE_TIME", "KABLATE_UNTIL", "KABLATE_MAX_SEEDS", "KABLATE_JOBS",
             "KABLATE_LOOK", "RETRY"]


@given(st.dictionaries(st.sampled_from(VARIABLES), WORDS, max_size=3), st.booleans())
@example({"KABLATE_SEEDS": "²"}, False)
@example({"KABLATE_JOBS": "9" * 5000}, False)
@example({"KABLATE_LOOK": "9" * 5000}, False)
@example({"KABLATE_UNTIL": "decided", "KABLATE_MAX_SEEDS": "9" * 5000}, False)
@example({"KABLATE_OUT": "a" * 300}, False)
@example({"KABLATE_OUT": "a/" * 3000}, False)
@cases(0.2)
def test_the_environment_and_the_command_line(tmp_path_factory, variables, tune):
    folder = tmp_path_factory.getbasetemp()
    path = written(folder / "env.config", "\n".join(f"CONFIG_{a}" for a in (*TINY, f'OUTPUT_DIR="{folder}/none"')))
    with pytest.MonkeyPatch.context() as patch, judged():
        patch.setenv("KCONFIG_CONFIG", str(path))
        for name, value in variables.items():
            patch.setenv(name, value)
        plan = Plan(options_from_environment(["V0"] if tune else ()))
        assert plan.rows() is not None and plan.jobs >= 1 and warnings(plan) is not None
        cell = plan.cells[0].resolved.config
        budget = {name: value.strip() for name, value in variables.items() if name in BUDGET and value.strip()}
        if variables.get("KABLATE_TIME"):
            budget = {"GPT2_MAX_TIME": variables["KABLATE_TIME"]}
        for name, value in budget.items():
            assert str(getattr(cell, name)) == value, "a budget was dropped"
        if variables.get("KABLATE_SEEDS") and not variables.get("KABLATE_UNTIL"):
            assert plan.asked == parse_seeds(variables["KABLATE_SEEDS"], 1337), "seeds were dropped"
        if variables.get("KABLATE_OUT"):
            assert str(plan.out).endswith(variables["KABLATE_OUT"].strip("/").removeprefix("../..")), "OUT was dropped"


@given(WORDS, WORDS)
@cases(0.05)
def test_the_port_and_the_seed_of_tools(port, seed):
    from scripts import browse, randconfig

    with judged():
        assert str(browse.wanted_port(port)) == (port or "8000").lstrip("0")
    with pytest.MonkeyPatch.context() as patch, judged():
        patch.setenv("KCONFIG_SEED", seed)
        patch.setattr(randconfig, "randconfig", lambda name, given: None)
        patch.setattr("sys.argv", ["randconfig"])
        randconfig.main()


# Data

IDS = st.lists(st.integers(0, 255), min_size=200, max_size=300).map(lambda ids: np.array(ids, "<u2").tobytes())
HEADERS = st.tuples(st.one_of(st.just(20240520), st.integers(-2 ** 31, 2 ** 31 - 1)), st.integers(-1, 3),
                    st.one_of(st.integers(0, 400), st.integers(-2 ** 31, 2 ** 31 - 1))).map(
                        lambda h: np.array(h, "<i4").tobytes().ljust(HEADER_BYTES, b"\0"))
NPY = st.sampled_from([b"\x93NUMPY\x09\x00v\x00", b"PK\x03\x04", *(
    b"\x93NUMPY\x01\x00v\x00"
    + f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({size},), }}".encode().ljust(117) + b"\n"
    for kind, size in (("<u2", 250), ("|O", 250), ("<u2", 99999999999), ("<u2", -1), ("<i4", 100)))])
SHARDS = st.one_of(st.binary(max_size=2500), IDS, st.builds(bytes.__add__, HEADERS, IDS), st.builds(bytes.__add__, NPY, IDS),
                   st.builds(lambda b, cut: b[:cut], st.builds(bytes.__add__, HEADERS, IDS), st.integers(0, 1700)))


def mended(folder, name, content: bytes):
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / name).write_bytes(content)


@given(SHARDS, SHARDS, st.sampled_from([".bin", ".npy"]))
@cases(0.1, shrinks=False)
def test_the_shards_of_a_local_data_set(tmp_path_factory, train, val, suffix):
    folder = tmp_path_factory.getbasetemp() / "shards"
    mended(folder, f"train{suffix}", train)
    (folder / f"val{suffix}").write_bytes(val)
    cfg = LOCAL.replace(DATA_LOCAL_DIR=str(folder))
    with judged():
        corpus = open_corpus(cfg)
        for tokens in (corpus.train, corpus.val):
            assert len(tokens) > cfg.GPT2_BLOCK_SIZE and tokens.windows([0], 4).max() < corpus.vocab_size
        assert len(corpus.record()["train_hash"]) == 64


LOCAL = load("gpt2-ra-ablation+tiny").replace(DATASET="local", TOKENIZER="gpt2", GPT2_BLOCK_SIZE=64)

JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-10 ** 30, 10 ** 30), st.integers(0, 400),
                              st.floats(allow_nan=False), TEXT,
                              st.sampled_from(["train", "val", "gpt2", "../x", "/etc/passwd", "<script>", "train.bin"])),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
                    max_leaves=6)


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        yield from places(value[key], (*path, key))


@st.composite
def changed(draw, good):
    """A JSON value with one to three places replaced, removed or added; or its text, cut or with a byte flipped."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            value = draw(st.one_of(JSON, st.just(value)))
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "replace":
            parent[path[-1]] = draw(JSON)
        elif how == "remove":
            parent.pop(path[-1])
        elif isinstance(parent, dict):
            parent[draw(TEXT)] = draw(JSON)
    data = json.dumps(value).encode("utf-8", "surrogatepass")
    how = draw(st.sampled_from(["whole", "whole", "whole", "cut", "flip"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        return data[:at]
    return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1:] if how == "flip" else data


CORPUS = {"name": "shakespeare", "tokenizer": "gpt2", "source": "here", "train_limit": 0, "exhausted": True, "documents": 2,
          "shards": [{"split": "train", "file": "train_000000.bin", "tokens": 300, "sha256": "0" * 64},
                     {"split": "val", "file": "val_000000.bin", "tokens": 300, "sha256": "0" * 64}]}


@given(changed(CORPUS))
@cases(0.05)
def test_the_index_of_a_prepared_data_set(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "prepared/shakespeare"
    folder.parent.mkdir(exist_ok=True)
    mended(folder, "corpus.json", data)
    (folder.parent / "x").write_bytes(bytes(600))
    for name in ("train_000000.bin", "val_000000.bin"):
        (folder / name).write_bytes(bytes(600))
    cfg = LOCAL.replace(DATASET="shakespeare", DATA_DIR=str(folder.parent), DATA_PREPARE_TOKENS=0, DATA_SOURCE="")
    with judged():
        corpus = open_corpus(cfg)
        assert len(corpus.train) % 300 == 0 and corpus.train.windows([0], 3).max() == 0
    with judged():
        from lib.data.prepare import _finished

        _finished(folder, cfg)


# What cells leave on disk

@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """A study of two steps and two seeds whose cells are done, and one of them to damage."""
    folder = tmp_path_factory.mktemp("records")
    path = folder / "dot.config"
    path.write_text("".join(f"CONFIG_{a}\n" for a in (*TINY, 'ABLATION_STEPS="V0 V1"', 'SEEDS="1 2"', "SEED=1",
                                                      f'OUTPUT_DIR="{folder}/out"')))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCONFIG_CONFIG", str(path))
        plan = Plan(Options())
        plan.write()
        finish(plan.out, *plan.cells)
        for one in plan.cells:
            (plan.out / one.name / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
        yield plan.out / plan.cells[3].name


ROW = {"iteration": 4, "tokens": 99, "train_seconds": 1.5, "val_loss": 3.1, "unified_ra_w_rec/layer0": 0.1}
RECORD = dict.fromkeys(results.KEYS) | MEASURED | {
    "format": 1, "state": "done", "study": "custom", "step": "V1", "optimizer": "adamwspam", "seed": 2,
    "compression": {"val_loss_before": 3.0, "val_loss_pca": 3.2, "val_loss": 3.1,
                    "layers": [{"error": 0.1, "error_pca": None}]}}


def planned(cell) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCONFIG_CONFIG", str(cell.parent.parent / "dot.config"))
        return Plan(Options(retry=True))


def reported(cell, name, data: bytes) -> None:
    """Everything that reads a study, after one of its files was changed; the file is put back."""
    path = cell / name
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        plan = planned(cell)
        assert len(plan.rows()) == 4
        found = content(plan)
        failures(plan)
        json.dumps(found, allow_nan=False)
        markdown.render(found)
        files.spreadsheet(found)
        page.render(found, {})
        charts.charts(found)
    finally:
        path.write_bytes(before)


@given(st.data())
@cases(0.08, shrinks=False)
def test_the_record_of_a_cell(cell, data):
    good = json.loads((cell / "metrics.json").read_text()) | {"compression": RECORD["compression"]}
    with judged():
        reported(cell, "metrics.json", data.draw(changed(good)))


@given(st.data())
@cases(0.04, shrinks=False)
def test_the_provenance_and_the_rows_of_a_cell(cell, data):
    from gpt2.train_ra_mla import read_provenance

    name = data.draw(st.sampled_from(["provenance.json", "metrics.jsonl", "../plan/design.json"]))
    good = json.loads((cell / name).read_text())
    changed_to = data.draw(changed(good))
    with judged():
        reported(cell, name, changed_to + b"\n")
    with judged():
        before = (cell / name).read_bytes()
        (cell / name).write_bytes(changed_to)
        try:
            kept = read_provenance(cell)
            assert isinstance(kept["identity"]["hash"], str)
        finally:
            (cell / name).write_bytes(before)


@given(st.data())
@cases(0.04)
def test_the_plan_of_a_cell(cell, data):
    """A plan file that is not the one that was written, to the byte, is refused; nobody runs it."""
    path = data.draw(st.sampled_from(sorted((cell.parent / "plan").glob("*[0-9a-f].json"))))
    good = path.read_bytes()
    damaged = data.draw(st.one_of(changed(json.loads(good)), st.integers(0, len(good)).map(lambda at: good[:at])))
    path.write_bytes(damaged)
    try:
        with judged():
            assert read_plan(path, 1, cell, None).name == cell.name and damaged == good, "a changed plan was taken"
    finally:
        path.write_bytes(good)


@given(st.data())
@cases(0.03)
def test_the_batch_size_that_was_found(tmp_path_factory, data):
    """A record that does not hold for the study counts as none, and is found anew."""
    folder = tmp_path_factory.getbasetemp() / "found"
    folder.mkdir(exist_ok=True)
    study = Study(config=written(folder / "dot.config", "".join(f"CONFIG_{a}\n" for a in (
        *TINY[:3], "BATCH_SIZE_AUTO=y", "BATCH_SIZE=8", "GPT2_GRADIENT_ACCUMULATION=6", 'ABLATION_STEPS="V0"'))))
    gpu = {"type": "cuda", "name": "a GPU", "memory_bytes": 2 ** 30, "torch": "2"}
    path = folder / batch_size.NAME
    path.unlink(missing_ok=True)
    good, _ = batch_size.find(study, folder, gpu, 0.9, lambda program, micro_batch: 2 ** 20 if micro_batch < 20 else None)
    path.write_bytes(data.draw(changed(good)))
    with judged():
        batch_size.settle(study, folder)
        cell = study.resolve("V0").config
        assert cell.BATCH_SIZE * cell.GPT2_GRADIENT_ACCUMULATION == 48, "the global batch was changed"
    with judged():
        record, _ = batch_size.find(study, folder, gpu, 0.9, lambda program, micro_batch: 2 ** 20)
        assert record["micro_batch"] * record["accumulation"] == 48 and record.keys() >= good.keys()


@given(st.data())
@cases(0.04, shrinks=False)
def test_reports_and_benchmarks_that_a_tool_is_given(cell, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "given"
    folder.mkdir(exist_ok=True)
    good = content(planned(cell)) if not GOOD else GOOD[0]
    GOOD[:] = [good]
    study = folder / "study"
    study.mkdir(exist_ok=True)
    (study / "report.json").write_bytes(data.draw(changed(good)))
    with judged():
        index.render(index.collect(folder))
    with judged(), contextlib.redirect_stdout(None):
        draw_again(study)
    decode = {"format": 1, "batches": [1], "baseline": "V0", "dtype": "float32", "environment": {"device": "x", "torch": "2"},
              "rows": [{"step": "V0", "context": 128, "batch": 1, "error": None, "cache_bytes": 4096}]}
    (folder / "decode.json").write_bytes(data.draw(changed(decode)))
    with judged():
        read_decode(folder / "decode.json")


GOOD: list = []


@given(st.text(string.printable, max_size=80) | TEXT)
@cases(0.02)
def test_an_error_is_two_lines_that_steer_no_terminal(text):
    with judged():
        assert one_line(text).isprintable() and re.fullmatch(".*", one_line(text))
