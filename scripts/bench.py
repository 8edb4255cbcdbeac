"""Benchmarks of the harness itself. Quote medians: machines are noisy.

check: wall seconds of `make check` on a study, whole process, several runs; --out FILE keeps them as JSON.
stats: simulated studies: coverage of intervals, false wins of a study, and what UNTIL=decided costs and saves.
overhead: seconds that the finished cells of the configured study spent outside their training budget, from metrics.json.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from lib import atomic
from lib.errors import UserError, reported
from lib.paths import ROOT
from lib.tables import table


def check(study: str, runs: int, out: Path | None = None) -> None:
    """Time `make check`, print a table, and write it to `out`."""
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
    if out:
        import torch

        from lib import runtime
        from lib.cells import baseline, steps_of
        from lib.config import Study

        resolved = Study(study)
        environment = runtime.environment(resolved.resolve(baseline(resolved)).config, torch.device("cpu"))
        kept = ("device", "device_type", "threads", "torch", "python", "source_hash")
        atomic.write_json(out, {"format": 1, "study": study, "steps": len(steps_of(resolved)), "runs": runs,
                                "seconds": median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds),
                                "environment": {key: environment[key] for key in kept}})


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
            start = status.record["start_seconds"]
            rows.append([cell.name, "" if start is None else f"{start:.1f}", *(f"{s:.1f}" for s in spent), f"{totals[-1]:.1f}"])
    if not rows:
        raise UserError(f"study {plan.study.name} has no finished cell.", "run it with make first.")
    print(table(["cell", "to the first step, s", "training", *kinds[1:], "outside the budget"], rows, "lrrrrrrr"), end="")
    print(f"median outside the budget: {median(totals):.1f} s (other: start, imports, data, logging)")


def statistics(runs: int) -> None:
    """Simulated studies; `runs` scales their number (5: some two minutes)."""
    import numpy as np

    from lib import simulation as s

    rng, many = np.random.default_rng(1), 4000 * runs
    print("95 % paired t intervals that hold the true difference (nominal 95 %)")
    print(table(["seeds", "studies", "coverage"], [[n, many, f"{100 * s.coverage(n, many, rng):.2f} %"] for n in (3, 5, 10)],
                "rrr"))
    print("studies of 6 steps that all equal the baseline")
    wrong, naive = s.false_wins(6, 3, many, rng)
    unlimited = s.unlimited_looks(6, 200, 400 * runs, rng)
    rows: list[list] = [["best of single runs", many, naive], ["Holm's paired t, 3 seeds", many, wrong],
            ["anytime-valid, a look after each of 200 seeds", 400 * runs, unlimited]]
    print(table(["rule", "studies", "with a false claim"], [[rule, n, f"{100 * p:.1f} %"] for rule, n, p in rows], "lrr"))
    few = 60 * runs
    print(f"UNTIL=decided with MAX_SEEDS=16 against a fixed 16 seeds: 6 steps, noise of a difference "
          f"{s.NOISE * 2 ** 0.5:.3f} nats")
    rows = []
    for effects, margin in (([0.0] * 6, 0.01), ([0.0] * 6, 0.05), ([0.03] * 6, 0.01), ([0.05] * 6, 0.01), ([0.1] * 6, 0.01),
                            ([0.0] * 3 + [0.05] * 3, 0.05)):
        until = s.until_decided(effects, few, rng, margin)
        rows.append([" ".join(f"{e:g}" for e in effects), f"{margin:g}", f"{until['seeds']:.1f}", f"{16 - until['seeds']:.1f}",
                     f"{100 * until['decided']:.0f} %", f"{100 * until['false']:.1f} %",
                     f"{100 * s.fixed_power(effects, 16, few, rng):.0f} %"])
    print(table(["true differences, nats", "margin", "seeds used", "saved", "steps decided", "with a false claim",
                 "found by a fixed 16"], rows, "lrrrrrr"), end="")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "overhead", "stats"])
    parser.add_argument("--study", default=os.environ.get("STUDY") or "gpt2-ra-ablation", help="for check")
    parser.add_argument("--runs", type=int, default=5, help="for check; scales the simulations of stats")
    parser.add_argument("--out", type=Path, help="for check: write what was measured to this JSON file")
    args = parser.parse_args()
    if args.what == "check":
        check(args.study, args.runs, args.out)
    elif args.what == "stats":
        statistics(args.runs)
    else:
        overhead()


if __name__ == "__main__":
    with reported():
        main()
