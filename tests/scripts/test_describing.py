"""make curvature and make routing: from cells on disk to a table; make fim, the third of its kind, has tests of its own."""

import json
import re

import pytest

from lib.cells import expand
from lib.config import Study
from scripts import curvature, describing, routing
from tests.harness import TINY, refusal
from tests.scripts.test_fim import complete

SMALL = (*TINY[:2], *TINY[3:], "GPT2_MAX_ITERS=2", "GPT2_BLOCK_SIZE=24", "BATCH_SIZE=2", "GPT2_EVAL_SAMPLES=3",
         "CPU_THREADS=1", "GPT2_COMPILE=n", 'SEEDS="1337 1338"')


@pytest.fixture
def study(tmp_path, dotconfig, monkeypatch):
    """study(steps): (results folder, its cells), all ended with a model."""
    def build(steps, *symbols):
        dotconfig(*SMALL, *symbols, f'ABLATION_STEPS="{steps}"')
        monkeypatch.setenv("KABLATE_OUT", str(tmp_path))
        cells = expand(Study())
        complete(tmp_path, *cells)
        return tmp_path, cells
    return build


def test_curvature_of_a_study(study, capsys):
    out, cells = study("V0 V14", "LOSS_CHUNKS=4")
    describing.main(curvature.MEASURE, "", ["--rows", "1", "--iterations", "3", "--probes", "2"])
    said = capsys.readouterr().out
    own = json.loads((out / cells[0].name / "curvature.json").read_text())
    assert own["iterations"] == 3 and own["probes"] == 2 and own["metrics"]["curvature/eigmax"] > 0 and own["undefined"] == {}
    pruned = json.loads((out / cells[1].name / "curvature.json").read_text())
    assert set(pruned["metrics"].values()) == {None}
    assert pruned["undefined"] == {"model": "kablate.pruned_attention_backward has no derivative"}
    whole = json.loads((out / "curvature.json").read_text())
    assert [step["name"] for step in whole["steps"]] == ["V0", "V14"]
    assert whole["steps"][0]["metrics"]["eigmax"]["spread"]["max"] >= own["metrics"]["curvature/eigmax"]
    assert "| V0   | eigmax " in said and "not defined: kablate.pruned_attention_backward has no derivative" in said
    assert re.search(r"Each eigmax is within \S+ % of an eigenvalue", said)
    describing.main(curvature.MEASURE, "", ["--rows", "1", "--iterations", "3", "--probes", "2"])
    assert capsys.readouterr().out.count(": kept") == 4
    describing.main(curvature.MEASURE, "", ["--rows", "1", "--iterations", "4", "--probes", "2"])
    assert capsys.readouterr().out.count(": kept") == 0, "another number of iterations makes all stale"


def test_routing_of_a_study(study, capsys):
    out, cells = study("RT0 RT1")
    describing.main(routing.MEASURE, "", ["--rows", "3"])
    said = capsys.readouterr().out
    router = next(cell for cell in cells if cell.step == "RT1")
    own = json.loads((out / router.name / "routing.json").read_text())
    assert len(own["metrics"]) == 2 * 3 and own["positions"] == [1, 23]
    assert -1 <= own["metrics"]["routing/layer1/rho_shift"] <= 1
    whole = json.loads((out / "routing.json").read_text())
    (step,) = whole["steps"]
    assert step["name"] == "RT1" and whole["baseline"] is None and step["metrics"]["p_full"]["comparison"]["n"] == 2
    assert said.count("missing: ") == 1 and "missing: RT0: it has no router" in said and "mean (95 % CI)" in said
    assert not (out / cells[0].name / "routing.json").exists()


def test_a_study_without_a_router_is_refused(study):
    study("V0 V1")
    assert refusal(describing.main, routing.MEASURE, "", []) == (
        f"no cell of study {Study().name} can be measured: it has no router.", "choose a study that has one.")
    assert refusal(describing.main, curvature.MEASURE, "", ["--probes", "0"])[0] == "--probes 0 is below 1."
