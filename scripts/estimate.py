"""Say what the configured study takes on 1, 4 and 8 GPUs: hours, GPU-hours and tokens, and the seeds that its margin needs.

Speeds are those of the study's finished cells (tokens a second, seconds outside the budget). While there is none, a probe
trains 20 steps of the baseline on random tokens, through the training loop and in a process of its own; with --each it does so
with every step of the study that trains. Nothing is written.

"side by side" gives each cell one GPU; "together" gives every cell all of them, at the efficiency of --efficiency, a share of
linear speed that is assumed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

BEGUN = time.perf_counter()  # a cell's start counts, imports too

from lib import estimate, own_process, process  # noqa: E402
from lib.cells import FINISHED, Cell, baseline, expand  # noqa: E402
from lib.config import Study, announce  # noqa: E402
from lib.errors import UserError, reported  # noqa: E402
from lib.estimate import Outlook, Speed  # noqa: E402
from lib.plan import Plan  # noqa: E402
from lib.tables import count, duration, plural, table  # noqa: E402
from scripts.plan import options_from_environment  # noqa: E402

if TYPE_CHECKING:
    from lib.config import Config

STEPS = 20  # of a probe
EVAL_SAMPLES = 5  # batches of its evaluation, of which a cell's are multiples
LONGEST_PROBE = 120.0  # seconds of its training, after which fewer steps have to do
EFFICIENCY = 0.9


class StopsInTime:
    """Asks the loop to stop when a probe has trained for long enough."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.steps = 0

    training = property(lambda self: self.since is not None)

    @training.setter  # type: ignore[no-redef]  # the setter only
    def training(self, _: Any) -> None:
        self.since = time.perf_counter()

    @property
    def asked(self) -> bool:
        self.steps += 1  # asked before each
        return self.steps > 2 and time.perf_counter() - self.since > LONGEST_PROBE


def probe(cfg: "Config", folder: Path) -> dict:
    """What a few steps of `cfg` in `folder` show: tokens a second, and seconds outside the budget of a whole cell (its start,
    its compiling and its evaluations, but no checkpoint)."""
    from lib import loop, runtime
    from lib.schedule import Budget, tokens_per_iteration
    from scripts.batch_size import rehearse

    small = cfg.replace(GPT2_MAX_TIME=0, GPT2_MAX_TOKENS=0, GPT2_MAX_ITERS=STEPS, CHECKPOINT_INTERVAL=0,
                        GPT2_EVAL_SAMPLES=min(EVAL_SAMPLES, cfg.GPT2_EVAL_SAMPLES), GPT2_EVAL_INTERVAL=10 ** 9,
                        GPT2_LOG_INTERVAL=10 ** 6)
    progress, where = loop.Progress(), runtime.setup(cfg)
    try:
        rehearse(small, where, folder, progress, StopsInTime(), BEGUN)
    except (loop.Interrupted, loop.Diverged):
        pass  # how fast it was is known
    clocks = progress.clocks
    rate = progress.iteration * tokens_per_iteration(cfg) / clocks["train"]
    batch = clocks["eval"] / small.GPT2_EVAL_SAMPLES
    budget = Budget.from_config(cfg)
    iterations = budget.iterations if budget.seconds is None else budget.seconds * rate / tokens_per_iteration(cfg)
    evaluations = 1 + (iterations - 1) // cfg.GPT2_EVAL_INTERVAL
    return {"tokens_per_second": rate, "steps": progress.iteration, "device": runtime.environment(cfg, where)["device"],
            "outside": clocks["other"] + clocks["compile"] + batch * cfg.GPT2_EVAL_SAMPLES * evaluations}


def probed(cell: Cell) -> tuple[Speed, str]:
    """The probe in a process of its own, on a GPU that no cell has: the speed, and the device that it is of."""
    print(f"probing {cell.step} {cell.optimizer}: {STEPS} steps on random tokens", file=sys.stderr, flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".config").write_text(cell.resolved.text)
        found = own_process.run(cell.resolved.config, folder, f"the probe of {cell.step}", "scripts.estimate", "--probe",
                                str(folder / ".config"))
    print(f"  {found['steps']} steps, {count(found['tokens_per_second'])} tokens/s "
          f"({duration(time.monotonic() - begun)} in all)", file=sys.stderr, flush=True)
    return Speed(found["tokens_per_second"], found["outside"], False, 1), found["device"]


def speeds_of(plan: Plan, cells: list[Cell], each: bool, efficiency: float) -> tuple[dict, str]:
    """The speed of every arm, and a sentence on where they come from."""
    found = estimate.measured(plan, cells, efficiency)
    if any(speed.tokens_per_second for speed in found.values()):
        known, states = sum(speed.cells for speed in found.values()), [plan.status[cell.name] for cell in cells]
        devices = " and ".join(sorted({str((one.record["environment"] or {}).get("device")) for one in states
                                       if one.state == "done"}))
        return estimate.completed(found, cells), f"speeds are those of {plural(known, 'finished cell')} on {devices}"
    first = {estimate.arm(cell): cell for cell in reversed(cells) if estimate.trains(cell)}
    if not first:
        raise UserError(f"no step of study {plan.study.name} trains, so there is nothing to estimate.",
                        "add a step that does to ABLATION_STEPS in make menuconfig.")
    chosen = list(first.values())[::-1] if each else [next((c for c in first.values() if c.step == baseline(plan.study)),
                                                          next(iter(first.values())))]
    for cell in chosen:
        found[estimate.arm(cell)], device = probed(cell)
    of = "every step" if each else chosen[0].step
    return estimate.completed(found, cells), f"there is no finished cell yet: speeds are those of a probe of {of} on {device}"


def described(plan: Plan, args: Any) -> str:
    """The estimate as text."""
    every = [cell for cell, _, _ in plan.rows() if plan.wants(cell)]
    speeds, source = speeds_of(plan, every, args.each, args.efficiency)
    left = [cell for cell in every if plan.status[cell.name].state not in FINISHED]
    device, per_device = ("machine" if estimate.on_cpu(plan) else "GPU"), estimate.lanes(plan)
    crowded = per_device if any(speed.beside for speed in speeds.values()) else 1
    lines = [f"{plan.study.name}: {plural(len(every), 'cell')}, {len(every) - len(left)} of them finished; {source}"]
    cost = {}
    for cell in every:
        cost.setdefault(estimate.arm(cell), estimate.work(cell, speeds[estimate.arm(cell)]))
    rows = [[" ".join(name), "-" if (rate := speeds[name].tokens_per_second) is None else count(rate),
             duration(speeds[name].outside), duration(one.seconds), count(one.tokens),
             plural(speeds[name].cells, "cell") if speeds[name].cells else "the others"] for name, one in cost.items()]
    lines.append(table(["arm", f"tokens/s on one {device}", "outside the budget", "a cell", "tokens", "as in"], rows,
                       "lrrrrl"))
    rows = []
    for number in args.gpus:
        options = [("one after the other" if number * crowded == 1 else f"side by side, {number * crowded} cells at once",
                    lambda cells, n=number: estimate.side_by_side(cells, speeds, n, crowded))]
        if number > 1 and device == "GPU":
            options.append((f"together, assumed at {100 * args.efficiency:g} % of linear speed",
                            lambda cells, n=number: estimate.together(cells, speeds, n, args.efficiency)))
        rows += [row(number, how, take(every), take(left)) for how, take in options]
    lines.append(table([f"{device}s", "cells", "hours", f"{device}-hours", "tokens", "hours still to go"], rows, "rlrrrr"))
    if per_device > crowded:
        lines.append(f"{per_device} cells may share a {device} here, which none of those measured did: that is not counted.")
    lines.append(_seeds(plan, every, speeds, args.gpus, device, crowded))
    return "\n".join(line.removesuffix("\n") for line in lines)


def row(number: int, how: str, whole: Outlook, rest: Outlook) -> list[str]:
    return [str(number), how, f"{whole.hours:.2f}", f"{whole.device_hours:.2f}", count(whole.tokens), f"{rest.hours:.2f}"]


def _seeds(plan: Plan, every: list[Cell], speeds: dict, numbers: list[int], device: str, crowded: int) -> str:
    """What the margin needs, as far as finished seeds tell the noise."""
    from lib.stats import MOST_SEEDS  # with scipy

    margin = plan.study.config.MARGIN
    if not margin:
        return "There is no margin (MARGIN=0), so no number of seeds follows from it."
    found = estimate.seeds_for_margin(plan)
    if found is None:
        return (f"Seeds for the margin of {margin:g} nats: not known before two seeds of the baseline and of another step "
                "have finished.")
    known = (f"{found.arm} differs from the baseline with a standard deviation of {found.sd:.4f} nats over "
             f"{plural(found.known, 'seed')}")
    if found.needed is None:
        return f"Seeds for the margin of {margin:g} nats: more than {MOST_SEEDS}, for {known}."
    cells = expand(plan.study, range(found.needed), list(dict.fromkeys(cell.step for cell in every)))
    hours = ", ".join(f"{estimate.side_by_side(cells, speeds, n, crowded).hours:.1f} h on {n}" for n in numbers)
    return (f"Seeds for the margin of {margin:g} nats: about {found.needed}, for {known} (80 % power at the level of this "
            f"plan's {plural(plan.comparisons(), 'comparison')}). That is {plural(len(cells), 'cell')}, side by side {hours} "
            f"{device}s.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.estimate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="only these steps, and those they start from")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="numbers of GPUs (default: 1 4 8)")
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, metavar="SHARE",
                        help="of linear speed, where a cell runs on several GPUs together (default: %(default)s)")
    parser.add_argument("--each", action="store_true", default=os.environ.get("ALL", "") not in ("", "0", "n"),
                        help="probe every step that trains, not only the baseline (ALL=1)")
    parser.add_argument("--probe", type=Path, metavar="CONFIG", help="only print what a probe of a configuration shows")
    args = parser.parse_args()
    if args.probe:
        process.die_with_launcher()
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(probe(Study(config=args.probe).config, Path(folder))))
        return
    if not 0 < args.efficiency <= 1:
        raise UserError(f"--efficiency {args.efficiency:g} is no share of linear speed.", "give one above 0 and up to 1.")
    if wrong := [number for number in args.gpus if not 1 <= number <= 100_000]:
        raise UserError(f"--gpus {wrong[0]} is no number of GPUs.", "give numbers from 1 up, e.g. --gpus 1 4 8.")
    plan = Plan(options_from_environment(args.steps))
    announce(plan.study)
    print(described(plan, args))


if __name__ == "__main__":
    with reported():
        main()
