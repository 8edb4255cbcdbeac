"""What is given is data: no text, file or name from outside is executed, by Python, by make, by a shell or by a browser."""

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2 import kvsplice, trained
from gpt2.model import GPT
from gpt2.train_ra_mla import load_parent
from lib import checkpoint, results
from lib.cells import expand
from lib.config import Study
from lib.data.files import open_shard
from lib.errors import UserError
from lib.launch import prepare
from lib.plan import Options, Plan
from scripts import browse
from tests.harness import MEASURED, ROOT, TINY, copy_tree, finish, refusal, run

SOURCES = sorted(p for folder in ("gpt2", "lib", "scripts") for p in (ROOT / folder).rglob("*.py"))
CODE = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "yaml", "jsonpickle"}


# The source

def offences(tree: ast.AST) -> list[str]:
    """Calls and imports that run what they are given."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [f"imports {name}" for name in names if name.partition(".")[0] in CODE]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("eval", "exec", "compile", "__import__") or re.match(r"os\.(system|popen|exec|spawn)", name):
            found.append(f"calls {name}")
        if given.get("shell", "False") != "False" or name in ("subprocess.getoutput", "subprocess.getstatusoutput"):
            found.append(f"{name} through a shell")
        if name.startswith("subprocess.") and isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
            found.append(f"{name} of one text")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name.endswith("np.load") and given.get("allow_pickle") != "False":
            found.append("np.load without allow_pickle=False")
        if re.search(r"\.extract(all)?$", name) and given.get("filter") != "'data'":
            found.append(f"{name} without filter='data'")
        if name.endswith("spec_from_file_location"):
            found.append("runs a file")
    return found


def test_no_source_runs_what_it_is_given():
    """make bench-train PEER=/path/model.py runs that file: a program is what it asks for."""
    found = {p.relative_to(ROOT).as_posix(): wrong for p in SOURCES if (wrong := offences(ast.parse(p.read_text())))}
    assert found == {"scripts/benching/peer.py": ["runs a file"]}


@pytest.mark.parametrize("text", [
    "eval(x)", "exec(x)", "import pickle", "from dill import loads", "os.system(x)", "subprocess.run(x, shell=True)",
    "subprocess.run('ls ' + x)", "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x)", "tar.extractall(x)",
    "subprocess.run(f'ls {x}')", "os.popen(x)", "subprocess.Popen(x, shell=yes)"])
def test_such_a_source_would_be_found(text):
    assert offences(ast.parse(text))


def test_classes_are_named_by_symbols_that_nobody_can_set():
    schema = Study("gpt2-ra-ablation+tiny").schema
    named = {name for p in SOURCES for name in re.findall(r"resolve_name\([a-z_.]*\.([A-Z0-9_]+)\)", p.read_text())}
    assert named >= {"RULES", "BLOCK_CLASS", "ATTENTION_CLASS"} and not named & schema.prompted


def test_only_loopback_is_ever_bound():
    assert browse.HOST == "127.0.0.1"
    for path in SOURCES:
        text = path.read_text()
        assert "0.0.0.0" not in text and not re.search(r"HTTPServer\(\((?!HOST,)", text), path
        assert not re.search(r"\.bind\((?!\(\"127\.0\.0\.1\", )", text), path


# Files of tensors

class Payload:
    """Pickled, it touches a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def evil(tmp_path):
    """evil(path): a file that would run code if it were unpickled; `evil.ran` says whether one has."""
    marker = tmp_path / "ran"

    def write(path, **extra):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"format": 1, "model": Payload(marker), "header": {"kind": "kvsplice"}, **extra}, path)
        return path
    write.ran = marker.exists
    return write


def test_the_payload_would_run(tmp_path, evil):
    """Or the tests below would prove nothing."""
    torch.load(evil(tmp_path / "x.pt"), weights_only=False)
    assert evil.ran()


def test_tensors_with_a_payload_are_refused_wherever_they_are_read(tmp_path, evil):
    cfg = Study("gpt2-ra-ablation+tiny").resolve("V0").config.replace(GPT2_N_LAYER=1)
    model, parent = GPT(cfg), tmp_path / "out/test_V0_adamwspam_none"
    evil(parent / "model.pt")
    cell = expand(Study("gpt2-ra-ablation+tiny"), [1337])[0]
    finish(parent.parent, cell)
    readers = [(checkpoint.load, (evil(tmp_path / "checkpoint.pt"),), {}), (trained.load, (parent, cfg), {}),
               (kvsplice.load, (evil(tmp_path / "kvsplice_V0.pt"), model), {"identity": "x"}),
               (kvsplice.verify, (tmp_path / "kvsplice_V0.pt", model), {}),
               (load_parent, (model, parent.parent / "child", {"parent": parent.name}, "V0"), {})]
    for reader, arguments, options in readers:
        what, run_ = refusal(reader, *arguments, **options)
        assert "Traceback" not in what and run_ and not evil.ran(), reader


def test_a_cell_with_a_payload_for_a_checkpoint_executes_nothing(tmp_path, evil, dotconfig):
    dotconfig(*TINY, "GPT2_BLOCK_SIZE=32", "GPT2_EVAL_SAMPLES=1", f'OUTPUT_DIR="{tmp_path}/out"')
    cell = Plan(Options()).cells[0]
    folder = tmp_path / "out" / cell.name
    prepare(folder, cell)
    evil(folder / "checkpoint.pt", identity=cell.provenance()["identity"])
    done = subprocess.run([sys.executable, str(ROOT / "gpt2/train_ra_mla.py"), "--cell", str(folder)], capture_output=True,
                          text=True, env=os.environ, timeout=120)
    assert not evil.ran() and "Traceback" not in done.stderr and "checkpoint.pt" in done.stdout + done.stderr


def test_an_array_with_a_payload_is_no_shard(tmp_path):
    np.save(tmp_path / "train.npy", np.array([Payload(tmp_path / "ran")], object), allow_pickle=True)
    what, _ = refusal(open_shard, tmp_path / "train.npy")
    assert "cannot be read as a .npy array" in what and not (tmp_path / "ran").exists()


# make and the shell

EVIL = ("a $(shell touch pwned)$(touch pwned)`touch pwned`;touch pwned|touch pwned&\n\ttouch pwned\n"
        "# 'b' \"c\" $$HOME ${HOME} \\")
STUB = """#!{python}
import json, os, sys
if "scripts.plan" in sys.argv and "--write" in sys.argv:
    print("cells.mk")
names = {names}
with open("said", "a") as file:
    file.write(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in names}}]) + "\\n")
"""
HANDED_ON = {"OUT": "KABLATE_OUT", "SEEDS": "KABLATE_SEEDS", "TIME": "KABLATE_TIME", "UNTIL": "KABLATE_UNTIL",
             "MAX_SEEDS": "KABLATE_MAX_SEEDS", "JOBS": "KABLATE_JOBS", "LOOK": "KABLATE_LOOK"}
ASIS = ("RETRY", "NAME", "STUDY", "ALL", "FULL", "A", "B", "FILE", "PEER", "PORT", "FROM", "PROMPT", "TOKENS", "KCONFIG_SEED",
        "STEP", "CELL", "TO", "TASKS", "LIMIT", "GPT2_MAX_TIME", "GPT2_MAX_ITERS", "KCONFIG_CONFIG", "WANDB_MODE")


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A tree whose interpreter only says how it was called; stub(goal, VARIABLE=...) -> what make said, and the calls."""
    tree = copy_tree(tmp_path_factory.mktemp("stub") / "tree")
    (tree / "python").write_text(STUB.format(python=sys.executable, names=[*HANDED_ON.values(), *ASIS, "KABLATE_DEFCONFIG"]))
    (tree / "python").chmod(0o755)
    (tree / "cells.mk").write_text("all:\n\t$(Q)$(PYTHON) -m scripts.cell\n\t$(Q)$(MAKE) --no-print-directory plan\n")

    def make(*goals, environment=(), **variables):
        for name in ("said", "pwned"):
            (tree / name).unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "GPT2_", "KABLATE_"))}
        done = subprocess.run(["make", "PYTHON=./python", *goals, *(f"{k}={v}" for k, v in variables.items())], cwd=tree,
                              capture_output=True, text=True, env=clean | dict(environment), timeout=60)
        said = (tree / "said").read_text().splitlines() if (tree / "said").exists() else []
        assert not list(tree.rglob("pwned")), "make has executed what it was given"
        return done, [json.loads(line) for line in said]
    make.tree = tree
    return make


def test_what_stands_on_the_command_line_arrives_as_it_was_and_executes_nothing(stub):
    """Also behind a second and a third make: that of cells.mk, and the one it calls."""
    everything = dict.fromkeys([*HANDED_ON, *ASIS], EVIL)
    for goal in ("cells", "report", "sample", "pack", "check", "savedefconfig", "diffconfig"):
        done, calls = stub(goal, **everything)
        assert done.returncode == 0, done.stderr
        assert len(calls) == (3 if goal == "cells" else 1)
        for _, found in calls:
            for name in everything:
                assert found[HANDED_ON.get(name, name)] == EVIL, name


def test_other_variables_of_the_command_line_and_of_the_environment_execute_nothing(stub):
    for name in ("V", "TUNE", "Q", "STEPS", "STEP_GOALS", "SETUP", "VENV", "TUNING", "reasons", "WHATEVER"):
        stub("plan", **{name: EVIL})
        stub("cells", **{name: EVIL})
        stub("cells", environment={name: EVIL})
    stub("cells", environment=dict.fromkeys([*HANDED_ON, *ASIS, "KABLATE_MAKE_PID", "VENV", "STEPS"], EVIL))


@pytest.mark.parametrize("name", [
    "x';touch pwned;'", "x$(shell touch pwned)", "x`touch pwned`", "x;touch pwned", "x\ntouch pwned", 'x";touch pwned;"',
    "x$(touch pwned)", "x|touch pwned", "x#y", "x y"])
def test_the_name_of_a_study_in_a_goal_is_a_name(stub, name):
    done, calls = stub(f"defconfig-{name}")
    assert done.returncode == 0 and [c[0] for c in calls] == [["-m", "scripts.kconfig", "defconfig", name]]
    stub(name)
    stub("plan", name)


@pytest.mark.parametrize("line, what", [
    ('STUDY="a;touch pwned"', "holds a character that make cannot take"),
    ('STUDY="$(shell touch pwned)"', "holds a character that make cannot take"),
    ('STUDY="a b"', "holds a character that make cannot take"), ('OUTPUT_DIR="`touch pwned`"', "that make cannot take"),
    ('ABLATION_STEPS="V0;touch pwned"', "'V0;touch' is no step"), ('ABLATION_STEPS="V0 $(touch"', "'$(touch' is no step"),
    ('ABLATION_STEPS="V0@STUDY=$(id)"', "STUDY belongs to the study"), ('SEEDS="1;touch pwned"', "neither a count nor"),
    ('BASELINE="`id`"', "is not one of the study's steps"), ('OPTIMIZERS="$(id)"', "unknown symbol OPTIMIZER_$(ID)"),
    ('DATA_LOCAL_DIR="$(touch pwned)"', None), ('TUNE_LR="`touch pwned`"', None), ('CONTROL_STEPS="|id"', "'|id' is no step"),
])
def test_names_in_a_configuration_are_names(dotconfig, tmp_path, line, what):
    dotconfig(*TINY, *(() if line.startswith(("OUTPUT_DIR", "STUDY")) else (f'OUTPUT_DIR="{tmp_path}/out"',)), line)
    done = run("scripts.plan")
    assert "Traceback" not in done.stderr and not Path("pwned").exists()
    if what:
        assert done.returncode == 2 and what in done.stderr and done.stderr.count("\n") == 2


# Pages

TAGS = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`{{7*7}}"


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(name for name, _ in attrs)))


def hostile(value):
    """Every text of a JSON value with tags in it, names of an object too."""
    if isinstance(value, dict):
        return {k: hostile(v) for k, v in value.items()} | {TAGS: TAGS}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return TAGS if isinstance(value, str) else value


def full_of_tags(root: Path, dotconfig, *lines) -> Plan:
    """A study whose cells have ended; whatever text their records may hold is TAGS."""
    dotconfig(*TINY, 'ABLATION_STEPS="V0 V1"', 'SEEDS="1 2 3"', "SEED=1", f'OUTPUT_DIR="{root}/study"', *lines)
    plan = Plan(Options())
    plan.write()
    finish(plan.out, *plan.cells)
    for number, cell in enumerate(plan.cells):
        path = plan.out / cell.name / "metrics.json"
        record = json.loads(path.read_text())
        for key in ("reason", "inactive", "started", "finished", "study"):
            record[key] = TAGS
        for key in ("data", "environment", "configuration"):
            record[key] = hostile(MEASURED[key]) | ({"sources": {TAGS: TAGS}} if key == "environment" else {})
        if number == 5:
            record["state"] = "failed"
        path.write_text(json.dumps(record | {"checksum": results.checksum(record)}))
        (plan.out / cell.name / "metrics.jsonl").write_text(json.dumps(
            {"iteration": 1, "tokens": 9, "train_seconds": 1.0, "val_loss": 3.0, f"{TAGS}/layer0": 0.5, "x": TAGS}) + "\n")
    return plan


def test_a_record_full_of_tags_is_shown_and_never_run(tmp_path, dotconfig):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    from lib.report import charts, index, page
    from lib.report.content import content

    root = tmp_path / "results"
    plan = full_of_tags(root, dotconfig)
    found = content(Plan(Options()))
    assert TAGS in json.dumps(found, ensure_ascii=False).replace('\\"', '"'), "it is in what is shown"
    text = page.render(found, charts.charts(found))
    allowed = page.render(content_without_tags := json.loads(json.dumps(found).replace(json.dumps(TAGS)[1:-1], "x")),
                          charts.charts(content_without_tags))
    found_in, expected = ([e for e in Elements(one).found if e[0] in ("script", "img", "iframe", "object")]
                          for one in (text, allowed))
    assert found_in == expected, "no element that the page does not have anyway"
    assert not any(name.startswith("on") for _, names in Elements(text).found for name in names)
    (plan.out / "report.json").write_text(json.dumps(found | {"title": TAGS, "environment": {"device": TAGS}}))
    shown = index.render(index.collect(root))
    assert {tag for tag, _ in Elements(shown).found}.isdisjoint({"script", "img"}) and "alert(1)" in shown and "49" not in \
        re.sub(r"\d{3,}", "", re.search(r"<tbody>.*", shown, re.S)[0])


NAME = "a; touch pwned $(touch pwned) `touch pwned` | touch pwned <script>alert(1)</script>"


def test_a_report_of_hostile_records_under_a_hostile_name_executes_nothing(tmp_path, dotconfig):
    """make report, and what browse serves of it: report.md as plain text, which holds no tag and no link anyhow."""
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    plan = full_of_tags(tmp_path / "results", dotconfig, f'STUDY="{NAME}"')
    for cell in plan.cells:
        path = plan.out / cell.name / "metrics.json"
        record = json.loads(path.read_text())
        record["data"] |= {"name": f"[x](javascript:alert(1)) {TAGS}\n\n[y]: javascript:alert(2)\n\x1b]0;owned\x07"}
        path.write_text(json.dumps(record | {"checksum": results.checksum(record)}))
    tree = copy_tree(tmp_path / "tree")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "GPT2_", "KABLATE_"))}
    for goals in (["cells"], ["plan"], ["report"]):
        done = subprocess.run(["make", f"PYTHON={sys.executable}", "RETRY=", *goals], cwd=tree, capture_output=True, text=True,
                              env=clean, timeout=120)
        assert "Traceback" not in done.stderr and "alert(1)" in done.stdout + done.stderr, "it is shown"
        assert all(c.isprintable() or c == "\n" for c in done.stdout + done.stderr)
        assert not list(tmp_path.rglob("pwned"))
    text, html = ((plan.out / name).read_text() for name in ("report.md", "report.html"))
    assert NAME.partition("<")[0] in text and "alert(1)" in text and "javascript:alert(1)" in text
    assert not re.search(r"<[A-Za-z/!?]|\]\(|^\[", text, re.M) and text in done.stdout
    assert [e for e in Elements(html).found if any(name.startswith("on") for name in e[1])] == []
    assert len([tag for tag, _ in Elements(html).found if tag == "script"]) == len(
        re.findall("<script", Path("lib/report/page.html.j2").read_text())) and "<script>alert" not in html
    handler = object.__new__(browse.Handler)
    assert handler.guess_type("report.md") == "text/plain; charset=utf-8"


def test_an_error_steers_no_terminal(dotconfig):
    dotconfig(*TINY, 'SEEDS="\x07"')
    done = run("scripts.plan", KABLATE_SEEDS="\x1b]0;owned\x07\x1b[2J\u202e\r")
    assert done.returncode == 2 and done.stderr.count("\n") == 2
    assert all(c.isprintable() or c == "\n" for c in done.stderr)


def test_a_json_file_with_a_deep_nest_or_a_huge_number_is_refused(tmp_path):
    from gpt2.train_ra_mla import read_provenance
    from lib.figures import report_at
    from lib.report.content import _evaluations
    from scripts.frontier import read_decode

    for text in ("[" * 100_000, "9" * 5000, '{"identity": NaN}'):
        (tmp_path / "provenance.json").write_text(text)
        for reader, *given in ((read_provenance, tmp_path), (read_decode, tmp_path / "provenance.json"),
                               (report_at, "provenance.json", "a claim", tmp_path)):
            with pytest.raises(UserError):
                reader(*given)
        row = '{"val_loss": 3.0, "tokens": 9, "train_seconds": 1.0}'
        (tmp_path / "metrics.jsonl").write_text(f'{{"val_loss": {text}\n{row}\n')
        assert _evaluations(tmp_path) == [json.loads(row)], "curves are an extra"
