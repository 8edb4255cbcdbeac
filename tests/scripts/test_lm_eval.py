"""make lm-eval: items' scores as computed by hand, kept beside the cell, not computed twice, and in the report."""

import json
import os
import re
import sys

import pytest
import torch

pytest.importorskip("lm_eval")
from gpt2 import sample, trained  # noqa: E402
from gpt2.model import GPT  # noqa: E402
from lib import checkpoint, lm_eval_tasks  # noqa: E402
from lib.cells import expand  # noqa: E402
from lib.config import Study  # noqa: E402
from lib.plan import Options, Plan  # noqa: E402
from lib.report import downstream, markdown, page  # noqa: E402
from lib.report.content import content  # noqa: E402
from scripts import lm_eval  # noqa: E402
from tests.harness import ROOT, finish, refusal  # noqa: E402

CONFIG = ("MODEL_TINY=y", "DATA_PYSTDLIB=y", "GPT2_BLOCK_SIZE=32", "GPT2_MAX_ITERS=4", "DEVICE_CPU=y", "CPU_THREADS=1",
          'STUDY="mine"', 'ABLATION_STEPS="V0 MLA0"', 'SEEDS="1 2"')
ITEMS = [json.loads(line) for line in (ROOT / "gpt2/tasks/python_syntax.jsonl").read_text().splitlines()]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No cache but one of its own, no network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "TQDM_DISABLE",
                 "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.setenv(name, "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def study(dotconfig, tmp_path, offline):
    """A study of two steps and two seeds whose cells are finished; their folders."""
    dotconfig(*CONFIG, f'OUTPUT_DIR="{tmp_path}/out"')
    cells = expand(Study())
    for number, cell in enumerate(cells):
        finish(tmp_path / "out", cell, val_loss=3 + number / 100, train_loss=3 + number / 90)
        save(tmp_path / "out" / cell.name, cell, 2)
    return [tmp_path / "out" / cell.name for cell in cells]


def test_nothing_is_asked_of_a_network(monkeypatch):
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
    for given, expected in ((None, ["1", "1", "1", "0"]), ("0", ["0", "0", "0", "0"])):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv("HF_HUB_OFFLINE", given)
        lm_eval_tasks.stay_offline()
        assert [os.environ[name] for name in names] == expected


def save(folder, cell, scale):
    model = GPT(cell.resolved.with_seed(cell.seed).config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    identity = json.loads((folder / "metrics.json").read_text())["identity"]["hash"]
    checkpoint.save(folder / "model.pt", identity=identity, model=model.state_dict())


def run(capsys, *arguments):
    lm_eval.main(list(arguments))
    return capsys.readouterr().out


@torch.no_grad()
def by_hand(folder):
    """Log-likelihoods of all choices of the shipped task: each token by one full forward pass."""
    model = trained.load(folder, Study(config=folder / ".config").config).eval()
    found = []
    for item in ITEMS:
        found.append([])
        context = item["context"].rstrip()  # lm_eval counts the spaces before a choice as the choice's
        for choice in item["choices"]:
            whole = (item["context"] + choice).encode()
            ids, scored = whole[-33:], len(whole) - len(context)
            log_p = torch.log_softmax(model(torch.tensor([list(ids[:-1])]))[0][0].double(), -1)
            found[-1].append(sum(log_p[i - 1, ids[i]].item() for i in range(len(ids) - scored, len(ids))))
    return found


def test_a_study_evaluated_twice_and_reported(study, capsys, monkeypatch):
    out = run(capsys, "--tasks", "gpt2/tasks")
    assert out.count("12 items") == 4 and "0.2500" in out  # chance
    for folder in study:
        record = json.loads((folder / "lm_eval.json").read_text())["tasks"]["python_syntax"]
        items = [json.loads(line) for line in (folder / "lm_eval_python_syntax.jsonl").read_text().splitlines()]
        hand = by_hand(folder)
        for item, expected, asked in zip(items, hand, ITEMS, strict=True):
            assert item["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
            best = max(range(4), key=lambda i: expected[i])
            normed = max(range(4), key=lambda i: expected[i] / len(asked["choices"][i]))
            assert (item["acc"], item["acc_norm"], item["target"]) == (best == asked["answer"], normed == asked["answer"],
                                                                       asked["answer"])
        assert record["metrics"]["acc"]["value"] == pytest.approx(sum(item["acc"] for item in items) / 12)
        assert (record["items"], record["limit"], record["chance"], record["precision"]) == (12, None, 0.25, "float32")

    # the report: the same items, paired
    found = content(Plan(Options()))
    row = next(row for row in found["downstream"] if (row["name"], row["metric"]) == ("MLA0", "acc"))
    kept = [downstream.items(folder, "python_syntax") for folder in study]
    accs = {folder.name: [item["acc"] for item in one.values()] for folder, one in zip(study, kept, strict=True)}
    cells = {(cell.step, cell.seed): accs[cell.name] for cell in expand(Study())}
    d = [[a - b for a, b in zip(cells["MLA0", seed], cells["V0", seed], strict=True)] for seed in (1, 2)]
    assert row["comparison"] == downstream.paired(d) | {"seeds": [1, 2], "items": 12}
    assert "## Downstream tasks" in markdown.render(found)
    assert 'id="downstream-tasks"' in page.render(found, {})

    # again: nothing is computed, until something has changed
    monkeypatch.setattr(lm_eval, "model_of", None)
    before = {folder: (folder / "lm_eval.json").read_bytes() for folder in study}
    assert run(capsys, "--tasks", "gpt2/tasks/python_syntax.yaml").count("kept") == 4
    assert before == {folder: (folder / "lm_eval.json").read_bytes() for folder in study}


def test_what_has_changed_is_evaluated_again_and_one_cell_alone(study, capsys, monkeypatch):
    cell = expand(Study())[0]
    first = study[0]
    out = run(capsys, "--tasks", "gpt2/tasks", "--cell", first.name, "--limit", "5")
    assert "5 items" in out and not (study[1] / "lm_eval.json").exists()
    assert len(downstream.items(first, "python_syntax")) == 5
    assert "6 items" in run(capsys, "--tasks", "gpt2/tasks", "--cell", str(first), "--limit", "6")
    assert "kept" in run(capsys, "--tasks", "gpt2/tasks", "--cell", first.name, "--limit", "6")
    monkeypatch.setenv("RETRY", "1")
    assert "kept" not in run(capsys, "--tasks", "gpt2/tasks", "--cell", first.name, "--limit", "6")
    monkeypatch.delenv("RETRY")
    was = json.loads((first / "lm_eval.json").read_text())
    save(first, cell, 3)
    assert "kept" not in run(capsys, "--tasks", "gpt2/tasks", "--cell", first.name, "--limit", "6")
    assert json.loads((first / "lm_eval.json").read_text())["weights"] != was["weights"]
    (first / "lm_eval_python_syntax.jsonl").unlink()
    assert "kept" not in run(capsys, "--tasks", "gpt2/tasks", "--cell", first.name, "--limit", "6")


def test_bad_input(study, tmp_path, monkeypatch):
    def refused(*arguments):
        return refusal(lm_eval.main, list(arguments))

    assert refused()[0] == "no tasks were given."
    assert refused("--tasks", "a", "--limit", "0.5")[0] == "LIMIT=0.5 is no number of items."
    assert refused("--tasks", "a", "--cell", "nowhere")[0] == "there is no cell nowhere."
    (tmp_path / "empty").mkdir()
    assert refused("--tasks", str(tmp_path / "empty"))[0] == f"there is no task in {tmp_path}/empty."
    path = tmp_path / "empty/gone.yaml"
    path.write_text((ROOT / "gpt2/tasks/python_syntax.yaml").read_text())  # its data is not beside it
    assert refused("--tasks", str(path))[0].startswith(f"{path} cannot be loaded: FileNotFoundError: ")
    (study[0] / "metrics.json").unlink()
    assert refused("--tasks", "gpt2/tasks", "--cell", study[0].name)[0] == f"{study[0]} is not finished."
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert refused("--tasks", "gpt2/tasks")[0].startswith("lm-eval needs lm_eval")


def test_a_task_whose_data_is_not_here_is_one_sentence(offline, monkeypatch):
    """arc_easy of the package itself, without its index, which takes seconds to read."""
    from pathlib import Path

    import lm_eval as package
    from lm_eval.tasks import TaskManager

    folder = Path(package.__file__).parent / "tasks/arc"
    what, run = refusal(lm_eval_tasks._loaded, TaskManager(include_path=str(folder), include_defaults=False), "arc_easy", None)
    assert what.startswith("the data of task arc_easy cannot be had: ") and "HF_HUB_OFFLINE=0 make lm-eval" in run


class Longest:
    """A model that finds long answers likely."""

    rank, world_size = 0, 1

    def loglikelihood(self, requests):
        self.asked = [request.args for request in requests]
        return [(float(len(continuation)), False) for _, continuation in self.asked]


def test_the_task_of_the_manual_reads_the_data_beside_it(tmp_path, offline, monkeypatch):
    """Whatever the working directory is; what was asked has another hash when an item, or the number of items, is another."""
    text = re.search(r"```\n(task: .*?)```", (ROOT / "docs/lm-eval.md").read_text(), re.S).group(1)
    (tmp_path / "arc.yaml").write_text(text)
    items = [{"question": f"Which {i}?", "choices": {"text": ["no", "yes sir", "a"], "label": list("ABC")}, "answerKey": key}
             for i, key in enumerate("BA")]

    def loaded():
        (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        return lm_eval_tasks.load([str(tmp_path)])["arc_easy_local"]

    monkeypatch.chdir("/")
    task, model = loaded(), Longest()
    metrics, found = lm_eval_tasks.evaluate(task, "arc_easy_local", model, None)
    assert model.asked[:2] == [("Question: Which 0?\nAnswer:", " no"), ("Question: Which 0?\nAnswer:", " yes sir")]
    assert [item["acc"] for item in found] == [1, 0] and metrics["acc"]["value"] == 0.5
    assert [item["log_likelihoods"] for item in found] == [[3, 8, 2]] * 2 and found[1]["target"] == 0
    hashes = [lm_eval_tasks.digest(task, None), lm_eval_tasks.digest(task, 1)]
    assert hashes[0] == lm_eval_tasks.digest(loaded(), None)
    items[1]["question"] += "?"
    changed = loaded()
    assert lm_eval_tasks.digest(changed, 1) == hashes[1] and len({*hashes, lm_eval_tasks.digest(changed, None)}) == 3


def test_a_task_with_code_has_the_same_hash_wherever_it_lies_until_its_code_changes(tmp_path, offline):
    def digest(folder, code):
        (tmp_path / folder).mkdir()
        for name in ("python_syntax.yaml", "python_syntax.jsonl"):
            text = (ROOT / "gpt2/tasks" / name).read_text()
            text = text.replace("task: python_syntax", "task: mine\nprocess_docs: !function code.some\nfewshot_config:\n"
                                "  sampler: first_n\n  process_docs: !function code.some")
            (tmp_path / folder / name).write_text(text)
        (tmp_path / folder / "code.py").write_text(f"def some(docs):\n    return {code}\n")
        (task,) = lm_eval_tasks.load([str(tmp_path / folder)]).values()
        return lm_eval_tasks.digest(task, None), len(task.eval_docs)

    one, again, other = digest("a", "docs"), digest("b", "docs"), digest("c", "docs  # the same items")
    assert one == again and one[1] == other[1] == 12 and one != other


def test_the_shipped_task_fits_its_own_rules():
    assert len(ITEMS) == 12 and sample.Bytes().ids("a")
    assert all(len(item["choices"]) == 4 == len(set(item["choices"])) and 0 <= item["answer"] < 4 for item in ITEMS)
    assert {item["answer"] for item in ITEMS} == {0, 1, 2, 3}
