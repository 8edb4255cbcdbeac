"""Evaluate finished cells on tasks of lm-eval, and keep every item's score.

    make lm-eval TASKS=arc_easy,hellaswag,winogrande LIMIT=200     every finished cell of the configured study
    make lm-eval CELL=test_V0_adamwspam_none TASKS=gpt2/tasks      one cell, by its name or its folder; the task that is shipped

A task is a name of the lm_eval package, a YAML file, or a folder of such files. Nothing is downloaded unless HF_HUB_OFFLINE=0
is set. Each cell gets lm_eval.json (scores, their standard errors, and what they are of) and lm_eval_<task>.jsonl (a line an
item). What is there of the same model, task and items is kept; RETRY=1 evaluates it again. make report compares steps with the
baseline, item by item (lib/report/downstream.py).
"""

import argparse
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lib import atomic, lm_eval_tasks, results
from lib.config import Study
from lib.errors import UserError, reported
from lib.paths import shown
from lib.plan import Plan
from lib.report import downstream
from lib.tables import plural, table
from scripts.plan import cell_folder, options_from_environment

if TYPE_CHECKING:
    from gpt2.lm_eval_model import CellLM


def words(text: str) -> list[str]:
    """Names between commas or spaces, each once."""
    return list(dict.fromkeys(re.split(r"[,\s]+", text.strip()))) if text.strip() else []


def finished(names: list[str]) -> list[tuple[Path, dict]]:
    """(folder, record) of the cells to evaluate: those named, or all finished ones of the configured study."""
    if names:
        found = [(folder, results.read(folder)) for folder in map(cell_folder, names)]
        for folder, record in found:
            if record is None or record["state"] != "done":
                raise UserError(f"{shown(folder)} is not finished.", "run it with make.")
        return found
    plan = Plan(options_from_environment())
    found = [(plan.out / cell.name, status.record) for cell, status in plan.found(plan.common) if status.state == "done"]
    there = [one for one in found if (one[0] / "model.pt").is_file()]
    if not there:
        raise UserError(f"study {plan.study.name} has no finished cell with its model in {shown(plan.out)}.",
                        "run it with make first, with SAVE_MODEL=y.")
    for folder, _ in found:
        if not (folder / "model.pt").is_file():
            print(f"{folder.name}: left out: its model is not there", flush=True)
    return there


def model_of(folder: Path, record: dict, rows: int) -> tuple["CellLM", dict]:
    """(lm_eval's LM of a cell, what to record of the machine it runs on)."""
    import torch

    from gpt2 import trained
    from gpt2.lm_eval_model import CellLM
    from gpt2.sample import TOKENIZERS
    from lib import runtime

    cfg = Study(config=folder / ".config").config
    tokenizer = TOKENIZERS[cfg.TOKENIZER]()
    device = runtime.setup(cfg)
    model = trained.load(folder, cfg, record["identity"]["hash"]).to(device).eval().bake()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else runtime.processor()
    return (CellLM(model, tokenizer, lambda: runtime.autocast(cfg, device), rows),
            {"precision": runtime.precision(cfg, device), "device": machine, "torch": torch.__version__})


def digest(path: Path) -> str:
    """sha256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}.",
                        "run the cell with SAVE_MODEL=y.") from None


def write(path: Path, text: str) -> None:
    try:
        atomic.write_text(path, text)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written: {error.strerror or error}.", "make its folder writable.") from None


def evaluate(folder: Path, record: dict, tasks: dict, digests: dict, limit: int | None, rows: int, again: bool) -> dict:
    """What lm_eval.json of a cell then says of these tasks. Written after each task, its items first, so that what stands in
    lm_eval.json has its items beside it."""
    found = downstream.read(folder, record)
    weights = digest(folder / "model.pt")
    if found.get("weights") != weights:
        found = downstream.basis(record) | {"weights": weights, "tasks": {}}
    model = machine = None
    for name, task in tasks.items():
        held = found["tasks"].get(name)
        if held and held["hash"] == digests[name] and not again and name in downstream.kept(folder, record):
            print(f"{folder.name}: {name}: kept", flush=True)
            continue
        if model is None:
            model, machine = model_of(folder, record, rows)
        begun = time.perf_counter()
        metrics, items = lm_eval_tasks.evaluate(task, name, model, limit)
        lines = "".join(json.dumps(item, allow_nan=False) + "\n" for item in items)
        if found["tasks"].pop(name, None):  # its items are about to be others
            write(folder / downstream.NAME, json.dumps(found, indent=1, allow_nan=False) + "\n")
        write(folder / downstream.samples_name(name), lines)
        found["tasks"][name] = {"hash": digests[name], "version": task.VERSION, "limit": limit, "items": len(items),
                                "fewshot": task.get_config("num_fewshot"), "metrics": metrics,
                                "chance": downstream.chance({(number,): item for number, item in enumerate(items)}), **machine}
        write(folder / downstream.NAME, json.dumps(found, indent=1, allow_nan=False) + "\n")
        print(f"{folder.name}: {name}: {plural(len(items), 'item')}, {time.perf_counter() - begun:.1f} s", flush=True)
    return found


def page(evaluated: list[tuple[Path, dict]], names: list[str]) -> str:
    """The scores, as a table."""
    rows = []
    for folder, found in evaluated:
        for name in names:
            task = found["tasks"][name]
            for metric, one in task["metrics"].items():
                if one["value"] is not None:
                    rows.append([folder.name, name, metric, f"{one['value']:.4f}",
                                 "-" if one["stderr"] is None else f"{one['stderr']:.4f}",
                                 f"{task['chance']:.4f}" if task["chance"] and metric.startswith("acc") else "-",
                                 task["items"]])
    return table(["cell", "task", "metric", "score", "standard error", "chance", "items"], rows, "lllrrrr")


def main(arguments: list[str] | None = None) -> None:
    get = os.environ.get
    parser = argparse.ArgumentParser(prog="python -m scripts.lm_eval", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=get("TASKS", ""), metavar="NAMES", help="with commas (default: TASKS)")
    parser.add_argument("--cell", default=get("CELL", ""), metavar="CELLS",
                        help="with commas (default: CELL, or all finished cells of the study)")
    parser.add_argument("--limit", default=get("LIMIT", ""), metavar="N",
                        help="only the first N items (default: LIMIT, or all)")
    parser.add_argument("--rows", type=int, default=32, metavar="N",
                        help="continuations side by side, a matter of memory (default: %(default)s)")
    args = parser.parse_args(arguments)
    asked = words(args.tasks)
    if not asked:
        raise UserError("no tasks were given.",
                        "make lm-eval TASKS=arc_easy,hellaswag, or TASKS=gpt2/tasks for what is shipped.")
    if args.limit and not re.fullmatch(r"[1-9][0-9]{0,8}", args.limit):
        raise UserError(f"LIMIT={args.limit} is no number of items.", "give a whole number, or leave it out for all.")
    if args.rows < 1:
        raise UserError(f"--rows {args.rows} is below 1.", "leave it out for the default.")
    limit, again = int(args.limit) if args.limit else None, get("RETRY", "") not in ("", "0", "n")
    cells = finished(words(args.cell))
    tasks = lm_eval_tasks.load(asked)
    digests = {name: lm_eval_tasks.digest(task, limit) for name, task in tasks.items()}
    evaluated = [(folder, evaluate(folder, record, tasks, digests, limit, args.rows, again)) for folder, record in cells]
    print(f"\n{page(evaluated, list(tasks))}\nmake report compares the steps with the baseline, item by item")


if __name__ == "__main__":
    with reported():
        main()
