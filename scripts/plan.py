"""Show which cells of the configured study exist, which would run, and why; with --write, prepare make to run them.

make's variables arrive in the environment: KABLATE_OUT, KABLATE_SEEDS, KABLATE_TIME, KABLATE_UNTIL, KABLATE_MAX_SEEDS,
KABLATE_JOBS (OUT=, SEEDS=, TIME=, UNTIL=, MAX_SEEDS=, JOBS= on make's command line), RETRY, and the budgets
GPT2_MAX_TIME, GPT2_MAX_ITERS, GPT2_MAX_TOKENS.
"""

import argparse
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lib import design, failures, generations, process
from lib.cells import Cell, Status, left_out_contrasts, unheard_settings
from lib.config import announce, refuse_study
from lib.errors import UserError, reported
from lib.paths import ROOT, shown
from lib.plan import Options, Plan
from lib.tables import table


def options_from_environment(steps: Sequence[str] = (), tune: bool = False) -> Options:
    """What make's command line added, as make hands it on. A learning-rate sweep has no looks. UserError for STUDY=, which
    would go unheard."""
    get = os.environ.get
    refuse_study()
    return Options(get("KABLATE_OUT", ""), get("KABLATE_SEEDS", ""), get("KABLATE_TIME", ""),
                   get("RETRY", "") not in ("", "0", "n"), tuple(steps), "" if tune else get("KABLATE_UNTIL", ""),
                   get("KABLATE_MAX_SEEDS", ""), get("KABLATE_LOOK", ""), get("KABLATE_JOBS", ""), tune)


def cell_folder(name: str) -> Path:
    """The folder of a cell that is named by its path, or by its name in the configured study's results."""
    if (ROOT / name / ".config").is_file():
        return ROOT / name
    folder = Plan(options_from_environment()).out / name
    if not (folder / ".config").is_file():
        raise UserError(f"there is no cell {name}.", "give a cell's folder, or its name in the study's results.")
    return folder


def warnings(plan: Plan) -> list[str]:
    """What cannot act inside its budget, a sentence each, with the steps it holds for; settings that no cell hears, and
    contrasts that are left out."""
    said: dict[str, list[str]] = {}
    for cell, _, _ in plan.rows():
        for sentence in pkgutil.resolve_name(cell.resolved.config.WARNINGS)(cell.resolved.config):
            steps = said.setdefault(sentence, [])
            steps += [] if cell.step in steps else [cell.step]
    return [*(f"{' '.join(steps)}: {sentence}" for sentence, steps in said.items()),
            *unheard_settings(plan.study, plan.cells), *left_out_contrasts(plan.study)]


def check_data(plan: Plan) -> None:
    """Missing or damaged data is one error now, not one failed cell after the other."""
    from lib.data import open_corpus
    from lib.data.files import repo_path
    from lib.data.shards import verify_prepared
    from lib.data.sources import PREPARED

    wanted = {}
    for cell, _, runs in plan.rows():
        config = cell.resolved.config
        if runs:
            wanted[config.DATASET, config.GPT2_BLOCK_SIZE] = config
    for config in wanted.values():
        open_corpus(config)
    for folder in {repo_path(c.DATA_DIR) / c.DATASET for c in wanted.values() if c.DATASET in PREPARED}:
        verify_prepared(folder)  # once per make: a cell has only looked at sizes


def find_micro_batch(plan: Plan) -> Plan:
    """The plan once BATCH_SIZE_AUTO has looked at the GPU, in a process that may import torch; it does so before the first cell
    alone."""
    if not plan.micro_batch or plan.micro_batch.settled or not any(runs for _, _, runs in plan.rows()):
        return plan
    done = subprocess.run([sys.executable, "-m", "scripts.batch_size"], stdout=sys.stderr,
                          env={**os.environ, process.LAUNCHER_VARIABLE: str(os.getpid())})
    if done.returncode:
        sys.exit(done.returncode)
    return Plan(plan.options)


def because(plan: Plan, cell: Cell, status: Status) -> str:
    """Why a cell is in its state, and what make could do about it."""
    return "; ".join(filter(None, (status.why, failures.advice(status.state, status.why,
                                                               generations.there(plan.out / cell.name)))))


def described(plan: Plan) -> str:
    """The design in force, with the hash it is on record with."""
    last = plan.history[-1]
    return f"plan {last['hash']}: {design.sentence(last['plan'])}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="only these steps, and those they start from")
    parser.add_argument("--write", action="store_true", help="write OUT/cells.mk and print its path")
    parser.add_argument("--reasons", action="store_true", help="with --write: say for each cell why it runs or not")
    parser.add_argument("--tune", action="store_true", help="plan the learning-rate sweep of make tune-lr instead")
    args = parser.parse_args()
    plan = Plan(options_from_environment(args.steps, args.tune))
    announce(plan.study)
    if args.write:
        check_data(plan)
        plan = find_micro_batch(plan)
        path = plan.write()  # before the rows: it looks again at what it archives
    reasons = args.reasons or not args.write  # which look at the disk once more
    rows = [[cell.name, status.state, "run" if runs else "keep", because(plan, cell, status) if reasons else ""]
            for cell, status, runs in plan.rows()]
    if not args.write:
        print(table(["cell", "state", "make will", "because"], rows), end="")
        print(f"{len(rows)} cells in {shown(plan.out)}, {sum(r[2] == 'run' for r in rows)} to run")
        print(described(plan))
        if plan.micro_batch:
            print(plan.micro_batch.sentence)
        for sentence in warnings(plan):
            print(f"note: {sentence}")
        return
    if args.reasons:
        print(table(["cell", "state", "now", "because"], rows), end="", file=sys.stderr)
    running = [r for r in rows if r[2] == "run"]
    if plan.undecided:
        end = "" if running else f", and {len(plan.asked)} seeds are the most (MAX_SEEDS=) or a cell has failed"
        print(f"{plan.study.name}: undecided so far: {', '.join(plan.undecided)}{end}", file=sys.stderr)
    if running:
        side_by_side = f", {plan.jobs} side by side" if plan.jobs > 1 and len(running) > 1 else ""
        print(f"{plan.study.name}: {len(running)} of {len(rows)} cells to run in {shown(plan.out)}{side_by_side}\n"
              f"{described(plan)}", file=sys.stderr)
        if plan.micro_batch and plan.micro_batch.settled:  # otherwise it was said by what found it
            print(plan.micro_batch.sentence, file=sys.stderr)
        for sentence in warnings(plan):
            print(f"note: {sentence}", file=sys.stderr)
    else:
        print(f"{plan.study.name}: nothing to run, {len(rows)} cells are in {shown(plan.out)}", file=sys.stderr)
    print(path)


if __name__ == "__main__":
    with reported():
        main()
