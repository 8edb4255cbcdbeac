"""Benchmarks of the harness itself. Quote medians: machines are noisy.

check: wall seconds of `make check` on a study, whole process, several runs.
overhead: seconds that the finished cells of the configured study spent outside their training budget, from metrics.json.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

from lib.errors import UserError, reported
from lib.paths import ROOT
from lib.tables import table


def check(study: str, runs: int) -> None:
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "scripts.check"], cwd=ROOT, env={**os.environ, "STUDY": study},
                              capture_output=True, text=True)
        seconds.append(time.perf_counter() - begun)
        if done.returncode:
            raise UserError(f"make check failed on {study}: {(done.stdout + done.stderr).strip().splitlines()[-1]}",
                            f"make check STUDY={study}.")
    print(table(["make check, s", "runs", "min", "median", "max"],
                [[study, runs, f"{min(seconds):.1f}", f"{median(seconds):.1f}", f"{max(seconds):.1f}"]], "lrrrr"), end="")


def overhead() -> None:
    from lib.plan import Plan
    from scripts.plan import options_from_environment

    kinds = ("train", "other", "compile", "eval", "checkpoint")
    rows, totals = [], []
    plan = Plan(options_from_environment())
    for cell, status, _ in plan.rows():
        if status.state == "done":
            spent = [status.record[f"{kind}_seconds"] for kind in kinds]
            totals.append(sum(spent[1:]))
            rows.append([cell.name, *(f"{s:.1f}" for s in spent), f"{totals[-1]:.1f}"])
    if not rows:
        raise UserError(f"study {plan.study.name} has no finished cell.", "run it with make first.")
    print(table(["cell", "training, s", *kinds[1:], "outside the budget"], rows, "lrrrrrr"), end="")
    print(f"median outside the budget: {median(totals):.1f} s (other: start, imports, data, logging)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "overhead"])
    parser.add_argument("--study", default=os.environ.get("STUDY") or "gpt2-ra-ablation", help="for check")
    parser.add_argument("--runs", type=int, default=5, help="for check")
    args = parser.parse_args()
    if args.what == "check":
        check(args.study, args.runs)
    else:
        overhead()


if __name__ == "__main__":
    with reported():
        main()
