"""Every command of the README and of docs/ runs, or would: make goals exist, scripts take their arguments."""

import html
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from lib.config import Study, defconfig_layers, load
from lib.kconfig import Schema
from tests.harness import copy_tree, run, run_here

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
                                             *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = sorted({line for page in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", page, re.S)
                   for line in block.splitlines()})


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"([A-Z0-9_]+=\S+ )?make\b", c)])
def test_make_commands(command, tmp_path):
    """make -n: the goals exist and their recipes expand."""
    words = shlex.split(command)
    variables = dict(w.split("=", 1) for w in words[:words.index("make")])
    done = subprocess.run(["make", "-n", f"PYTHON={sys.executable}", *words[words.index("make") + 1:]], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | variables | {"KCONFIG_CONFIG": str(tmp_path / "none")})
    assert done.returncode == 0 and sys.executable in done.stdout, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_python_commands(command, tmp_path, monkeypatch):
    words = [sys.executable, *shlex.split(command)[1:]]
    if "--out" in words:
        words += ["--dry-run"]  # the arguments are read and the step is built, but not trained
    if words[1] == "gpt2/train_ra_mla.py":  # as a process: tests/gpt2/test_train_ra_mla.py
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("KCONFIG_CONFIG", str(tmp_path / "none"))
        done = run_here(*words[1:])
        assert done.returncode == 0, done.stdout + done.stderr
        return
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, env=os.environ | {
        "KCONFIG_CONFIG": str(tmp_path / "none"), "PYTEST_ADDOPTS": "--collect-only -n 0 -p no:cacheprovider"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_commands_are_tested():
    assert len(COMMANDS) > 15
    assert all(re.match(r"([A-Z0-9_]+=\S+ )?make\b|python ", c) for c in COMMANDS)


def test_goals_named_in_the_text_exist():
    goals = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    goals |= {"menuconfig", "savedefconfig"}
    for path, page in PAGES.items():
        for goal in re.findall(r"`make ([a-z][a-z-]*)", page):
            assert goal in goals, f"{path}: {goal}"


ALL_PAGES = sorted({*PAGES, *(ROOT / "docs").rglob("*.md"), ROOT / "test_matrix_results/README.md"})
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1[ ]*$", re.M | re.S)


def anchors(path: Path) -> set[str]:
    """What a forge and the site call a page's headings: lower case, no punctuation, hyphens for spaces, -1 for a second."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?)\s*$", FENCED.sub("", path.read_text()), re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, times in found.items() for n in range(times + 1)}


def test_every_link_and_anchor_of_every_page_leads_somewhere():
    wrong = []
    for path in ALL_PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", FENCED.sub("", path.read_text()))):
            if link.startswith("https://"):
                continue
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{path.relative_to(ROOT)}: {link}")
    assert wrong == [] and len(ALL_PAGES) > 30


def test_every_study_named_in_a_command_exists():
    named = {name for page in PAGES.values() for name in re.findall(r"\b(?:make defconfig-|STUDY=)(gpt2-[\w+-]*\w)", page)}
    assert len(named) > 8
    for name in named:
        defconfig_layers(name)


class Links(HTMLParser):
    """What a page of the site links to or loads, and the anchors that it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given["id"]} if given.get("id") else set()
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("img", "script", "source", "iframe") and given.get("src"):
            self.loads.append(given["src"])
        elif tag == "link" and given.get("rel") not in ("index", "search", "next", "prev"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("site")
    done = run("scripts.docs", "--out", out)
    assert done.returncode == 0 and done.stdout.strip() == str(out / "index.html"), done.stderr
    return out


def test_the_site_holds_every_page_and_leads_nowhere_else(site):
    """Warnings are errors in it. What a browser loads is in the site, so that it works without a network."""
    pages = {page: Links(page) for page in site.rglob("*.html")}
    missing = [path for path in ALL_PAGES if path.parent.name != "test_matrix_results"
               and site / path.relative_to(ROOT).with_suffix(".html") not in pages]
    assert missing == []
    wrong = []
    for page, found in pages.items():
        wrong += [f"{page}: loads {load}" for load in found.loads
                  if not (page.parent / unquote(load.partition("?")[0])).is_file()]
        for link in found.links:
            file, _, anchor = unquote(link).partition("#")
            if file.startswith(("https://", "http://")):
                continue
            target = (page.parent / file).resolve() if file else page
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                wrong.append(f"{page}: {link}")
    assert wrong == []
    assert not any("http" in load for found in pages.values() for load in found.loads)
    assert not re.search(r"@import|url\(['\"]?https?:", "".join(css.read_text() for css in site.rglob("*.css")))


def test_the_site_lists_every_symbol_with_its_default(site):
    schema = Schema()
    page = (site / "docs/symbols.html").read_text()
    assert set(re.findall(r"<h3>([A-Z0-9_]+)<a", page)) == schema.prompted
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "Reciprocal channels per head (R). whole number; from 1 to 4096; default 4; depends on ATTENTION_UNIFIED_RA." in text
    assert "not part of a cell's identity" in text


def test_the_site_lists_the_formulas_of_every_mechanism(site):
    page = (site / "docs/formulas.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "Qf = [Q_std | K_low],  Kf = [K_std | Q_low]" in text and "y = W_down [w_std h_std | w_rec M h_low]" in text
    mechanisms = {path.relative_to(ROOT).as_posix() for kind in ("attention", "mlp")
                  for path in (ROOT / "gpt2" / kind).glob("*.py") if path.name not in ("__init__.py", "pruning_op.py")}
    assert mechanisms <= set(re.findall(r"<h2>(\S+?)<a", page))


def test_faults_of_a_page_end_the_build_and_are_named(tmp_path):
    pytest.importorskip("furo")
    tree = copy_tree(tmp_path / "tree")
    (tree / "docs").mkdir()
    (tree / "docs/conf.py").write_text((ROOT / "docs/conf.py").read_text())
    (tree / "docs/index.md").write_text("# A page\n\n[gone](nowhere.md)\n\n[another](#no-such-heading)\n")
    for _ in range(2):  # a second time too, though nothing was changed
        done = run("scripts.docs", tree=tree)
        assert done.returncode == 2 and all(word in done.stderr for word in ("index.md:3", "index.md:5", "error: ", "try: "))
    assert not (tree / "_site/index.html").exists()


def test_the_step_of_the_readme_is_valid(tmp_path):
    from lib.config import Study
    from lib.kconfig import read_layer

    text = re.search(r"```\n(# Help: .*?)```", README, re.S).group(1)
    (tmp_path / "X.config").write_text(text)
    layer = read_layer(tmp_path / "X.config")
    assert Study("gpt2-ra-ablation").resolve("V0", overrides=layer).config.RA_R == 16


def test_the_table_of_function_classes_is_true():
    from lib.classes import function_classes
    from lib.config import load

    rows = re.findall(r"^\| (V\d) \|.*\| ([^|]+) \|$", README, re.M)
    steps = [f"V{i}" for i in range(7)]
    known = function_classes({step: load("gpt2-ra-ablation", step) for step in steps})
    assert rows == [(step, str(known[step])) for step in steps]


def test_committed_results_are_small_and_of_few_forms():
    """Pages are drawn again from report.json, and cells come back from what make pack made; weights stay where they were."""
    files = [p for p in (ROOT / "docs/results").rglob("*") if p.is_file() and p.name != "report.html"]
    assert sum(p.stat().st_size for p in files) < 8e6
    assert {p.suffix for p in files if p.name != "cells.tar.xz"} <= {".md", ".csv", ".json", ".png"}
    tools = ("bench-", "compile-", "slurm", "start", "torture")  # whose tables are no study's
    for folder in {p.parent for p in files if not p.parent.name.startswith(tools)}:
        assert {"report.md", "report.csv", "report.json"} <= {p.name for p in folder.iterdir()}, folder


def test_sources_that_the_page_of_results_names_are_those_that_ran():
    named = re.findall(r"\b[0-9a-f]{16}\b", PAGES[ROOT / "docs/results.md"])
    reports = (ROOT / "docs/results").glob("gpt2-*/report.json")
    ran = {json.loads(path.read_text())["environment"]["source_hash"] for path in reports}
    assert named and set(named) <= ran


def test_verdicts_and_seeds_in_tables_are_those_of_the_reports_beside_them():
    """In every table with a column `verdict`: of a row that refers to a difference it is that report's word, of others none."""
    words, checked = {"BETTER", "WORSE", "NEGLIGIBLE", "EQUIVALENT", "INCONCLUSIVE", "INCOMPLETE", "INVALID"}, 0
    for page in PAGES.values():
        rows = page.splitlines()
        for at in [at for at, row in enumerate(rows[1:]) if re.fullmatch(r"\|(---\|)+", row) and "| verdict |" in rows[at]]:
            names = rows[at].strip("| ").split(" | ")
            for row in itertools.takewhile(lambda row: row.startswith("|"), rows[at + 2:]):
                reference = r"<!-- (docs/results/\S+): ([a-z]+)(\S[^:]*?)\.comparison\.difference"
                said = dict(zip(names, row.strip("| ").split(" | "), strict=True))
                if not (found := re.search(reference, row)):
                    assert not words & set(re.findall(r"\w+", said["verdict"])), row
                    continue
                file, kind, key = found.groups()
                name = key.removeprefix(".").removeprefix("[name=").removesuffix("]")
                compared, = (one["comparison"] for one in json.loads((ROOT / file).read_text())[kind] if one["name"] == name)
                assert (said["verdict"], said.get("seeds", str(compared["n"]))) == (compared["word"], str(compared["n"])), row
                checked += 1
    assert checked >= 20


def block(page: str, kind: str, beginning: str) -> str:
    """The one fenced block of a page of docs/ that begins so."""
    (found,) = (text for text in re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)
                if text.startswith(beginning))
    return found


def test_the_configuration_is_had_in_python_as_its_page_says():
    exec(block("configuration.md", "python", "from lib.config"), {})


def test_what_nanogpt_sets_has_a_symbol():
    rows = re.findall(r"^\| (.+) \| (.+) \| .*\|$", (ROOT / "docs/migrating.md").read_text().split("**Data.**")[0], re.M)[2:]
    named = {name for _, here in rows for name in re.findall(r"`([A-Z0-9_]+)`", here)}
    assert len(rows) > 20 and named <= Schema().prompted


def test_nanogpts_settings_are_a_study(tmp_path):
    path = tmp_path / "my-study"
    path.write_text(block("migrating.md", "", "# nanoGPT's train_gpt2.py"))
    study = Study(config=path)
    assert [a.where for a in study.base if "my-study" not in a.where] == [], "a line that is a default is no setting"
    cfg = study.resolve("V0").config
    sequences = cfg.BATCH_SIZE * cfg.GPT2_GRADIENT_ACCUMULATION
    assert (sequences * cfg.GPT2_BLOCK_SIZE, cfg.GPT2_BIAS, cfg.GPT2_MAX_TIME, cfg.LEARNING_RATE) == (491520, False, 0, 6e-4)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_comes_and_goes_as_its_page_says(tmp_path, monkeypatch, prefix):
    import torch

    from gpt2.model import GPT

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": False}
    model = GPT(load("gpt2-ra-ablation", "V0", {"MODEL_CUSTOM": True, "GPT2_N_LAYER": 2, "GPT2_N_HEAD": 2, "GPT2_N_EMBD": 32,
                                                "GPT2_BLOCK_SIZE": 16, "GPT2_BIAS": False, "SEED": 7}))
    held = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    held |= {f"{prefix}transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    torch.save({"model": held, "model_args": {**sizes, "vocab_size": 50304, "dropout": 0.0}, "iter_num": 3}, "out/ckpt.pt")
    exec(block("migrating.md", "python", "import torch"), {})
    back = torch.load("out/back.pt", weights_only=True)["model"]
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
