"""Run the configured study on a Slurm cluster: submit what is missing, say how it stands, or cancel it.

make slurm plans as make does and submits the cells that are missing and neither wait nor run there already, as job arrays, and
the report after them; again, it submits what is missing by then. make slurm-status prints a line a cell, make slurm-cancel
takes the study's jobs out of the queue. Variables are those of make (scripts.plan); docs/cluster.md says more.
"""

import argparse
from typing import Any

from lib import makefile, results
from lib.cells import Cell
from lib.cluster import REPORT, Cluster, Queued
from lib.config import announce
from lib.errors import UserError, reported
from lib.paths import shown
from lib.plan import Plan
from lib.tables import table
from scripts.plan import because, check_data, described, options_from_environment, warnings


def submit(plan: Plan, steps: list[str]) -> None:
    cluster = Cluster(plan.out)
    with cluster.alone():
        queued = cluster.queue()
        refuse_others(plan, queued)
        wanted = [cell for cell, _, runs in plan.rows() if runs]
        if plan.micro_batch and not plan.micro_batch.settled and wanted:
            raise UserError("BATCH_SIZE_AUTO has not found its micro-batch yet, which takes one of the cluster's GPUs.",
                            "python -m scripts.batch_size in an allocation with a GPU (srun), or set BATCH_SIZE_AUTO=n.")
        check_data(plan)
        plan.write()
        wanted = [cell for cell, _, runs in plan.rows() if runs]
        missing = [cell for cell in wanted if not (cell.name in queued and queued[cell.name].live)]
        live = [one.job for name, one in queued.items() if one.live and name != REPORT]
        report = queued.get(REPORT)
        print(f"{plan.study.name}: {len(missing)} of {len(plan.rows())} cells to submit, {len(wanted) - len(missing)} "
              f"are in the queue; {shown(plan.out)}\n{described(plan)}")
        for sentence in warnings(plan):
            print(f"note: {sentence}")
        if not missing and (not live or report and report.live):
            return
        words = makefile.commands(plan, wanted)
        for job, cells in cluster.submit(missing, words, queued, plan.study.config.CLUSTER_JOBS):
            print(f"job {job}: {len(cells)} cells, {cells[0].name}{' ..' if len(cells) > 1 else ''}", flush=True)
            live.append(job)
        if report and report.live:  # it would not wait for what is new
            cluster.cancel([report.job])
        print(f"job {cluster.submit_report(plan.study.config, plan.study.text(), steps, live)}: the report, after them")


def refuse_others(plan: Plan, queued: dict[str, Queued]) -> None:
    """A job of a cell as it was configured before would run beside the new one, or in its place."""
    for cell, _, _ in plan.rows():
        one = queued.get(cell.name)
        if one and one.live and one.identity != cell.resolved.with_seed(cell.seed).identity["hash"]:
            raise UserError(f"job {one.job} ({one.state.lower()}) is {cell.name} under another configuration.",
                            "make slurm-cancel, then make slurm, or put the configuration back.")


def status(plan: Plan) -> None:
    queued = Cluster(plan.out).queue()
    rows = [row(plan, cell, state, queued.get(cell.name)) for cell, state, _ in plan.rows()]
    number = len(rows)
    if one := queued.get(REPORT):
        rows.append([REPORT, one.state.lower(), one.job, one.node, one.reason])
    print(table(["cell", "state", "job", "node", "reason"], rows), end="")
    live = sum(one.live for one in queued.values())
    done = sum(state.state == "done" for _, state, _ in plan.rows())
    print(f"{done} of {number} cells in {shown(plan.out)} are done, {live} jobs are in the queue")


def row(plan: Plan, cell: Cell, state: Any, one: Queued | None) -> list[str]:
    """What Slurm says while it has the cell's job; else what the disk says, with how a job ended that left no result."""
    if one and one.live:
        return [cell.name, one.state.lower(), one.job, one.node, one.reason]
    why = because(plan, cell, state)
    if one and state.state not in results.STATES:
        why = f"job {one.state.lower()}{f' ({one.reason})' if one.reason else ''}; {why}"
    return [cell.name, state.state, one.job if one else "", one.node if one else "", why]


def cancel(plan: Plan) -> None:
    cluster = Cluster(plan.out)
    jobs = [one.job for one in cluster.queue().values() if one.live]
    if jobs:
        cluster.cancel(jobs)
    print(f"{len(jobs)} jobs of {shown(plan.out)} cancelled; make slurm goes on where their cells have saved")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.slurm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["submit", "status", "cancel"])
    parser.add_argument("steps", nargs="*", help="only these steps, and those they start from")
    args = parser.parse_args()
    plan = Plan(options_from_environment(args.steps))
    announce(plan.study)
    if args.what == "submit":
        submit(plan, args.steps)
    else:
        {"status": status, "cancel": cancel}[args.what](plan)


if __name__ == "__main__":
    with reported():
        main()
