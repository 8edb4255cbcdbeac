"""Time and peak memory of a training step of every step, relative to the study's baseline, in one run.

A training step is forward, penalties, backward, clipping and optimizer.step on one batch of random tokens; evaluation, data
and the host's decisions are none of it. The baseline stays built, and its blocks stand between those of the step that is
measured (A B A B ... A): time is the median over rounds of a B block over the mean of the two A blocks beside it, followed by
the smallest and the largest round. The baseline's own row is a second model of the baseline, so it shows the noise.

Memory on a GPU: the most that was allocated during the step's blocks, less what was allocated before it was built. On the CPU
a process's memory cannot be told apart by step, so there it is counted: bytes of parameters, gradients and optimizer state,
and of what autograd keeps for backward in eager mode, each storage once; what a backward pass computes again is not in it.

A mechanism that follows the budget is measured fully on, as in a model outside the loop, so a direction that is to be learned
computes both. --progress .5 tells it beforehand that half of the budget is over, which is how most of a run is spent.
--closed .5 switches half of the paths with a skip gate off, those of the first layers; `flops` is then what is left of the
FLOPs of the step with every path on, counted as in training.

Steps that differ in nothing but learning rate and streams are measured once. Rows are printed, and --out is written, as they
are known, so a time limit loses none of them; steps can be given by name, in several calls. --show prints such files again.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from gpt2.model import GPT
from gpt2.skip import gates, training_flops
from lib import atomic, optimizers, runtime
from lib.cells import baseline
from lib.config import Study, parse_step
from lib.errors import UserError, reported
from lib.loop import COMPILE_WARMUP_STEPS, lift_compile_limits
from lib.mechanisms import Moment
from lib.steps import step_files, step_path
from lib.tables import table, table_head, table_row
from scripts import benching

if TYPE_CHECKING:
    from lib.config import Config

FORMAT = 1
HEADER = ["step", "ms a step", "time", "min .. max", "memory, MiB", "memory", "note"]
RIGHT = "lrrrrrl"


class Subject(benching.Training):
    """A model in training on one batch, which is the same for every model of these sizes."""

    def __init__(self, cfg: "Config", device: torch.device, batch: int, compiled: str, progress: float | None = None,
                 closed: float = 0.0):
        model = GPT(cfg).to(device).train()
        paths = gates(model.transformer.h)
        self.closed = set(list(paths)[:round(closed * len(paths))])
        for name in self.closed:
            paths[name].switch_off()
        super().__init__(cfg, device, model, optimizers.build(model, cfg), compiled)
        if progress is not None:
            self.mechanisms.advance(Moment(10 ** 6, progress))  # more steps than any mechanism counts
        tokens = torch.randint(cfg.VOCAB_SIZE, (batch, cfg.GPT2_BLOCK_SIZE + 1), generator=torch.Generator().manual_seed(0))
        self.x, self.y = tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)

    def batch(self) -> Any:
        return self.x, self.y


def measure(cfg: "Config", first: Subject, rounds: int, iterations: int, **options: Any) -> dict:
    """The numbers of one step, beside those of the baseline `first`."""
    subject, _ = benching.started(lambda: Subject(cfg, first.device, **options), first.device)
    beside, own = benching.in_turns([lambda: first.block(iterations), lambda: subject.watched(iterations)], rounds)
    return {"seconds": median(own), "baseline_seconds": median(beside),
            **benching.spread("time", benching.ratios(own, beside)), "memory_bytes": subject.memory_bytes(),
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "flops": training_flops(cfg, subject.closed) / training_flops(cfg) if subject.closed else None}


EMPTY = dict.fromkeys(("seconds", "baseline_seconds", "time", "time_min", "time_max", "memory_bytes", "parameters", "memory",
                       "flops"))


def measured(cfg: "Config", first: Subject, **options: Any) -> dict:
    """What `measure` found, or why it found nothing."""
    try:
        try:
            return EMPTY | {"error": None} | measure(cfg, first, **options)
        except KeyError:
            if options["compiled"] != "blocks":
                raise
            # Compiled blocks share a cache, and the guards of another mechanism's may stumble over this one's buffers.
            torch.compiler.reset()
            first.block(COMPILE_WARMUP_STEPS)
            return EMPTY | {"error": None} | measure(cfg, first, **options)
    except Exception as error:  # a step that does not run is a row
        return EMPTY | {"error": benching.failure(error, options["batch"])}


def line(row: dict) -> list[str]:
    """A row for people."""
    if row["error"]:
        return [row["step"], *[""] * 5, row["error"]]
    notes = [f"as {row['as']}" if row["as"] else "", f"flops {row['flops']:.3f}" if row.get("flops") else ""]
    return [row["step"], f"{1e3 * row['seconds']:.1f}", f"{row['time']:.3f}", f"{row['time_min']:.3f} .. {row['time_max']:.3f}",
            f"{row['memory_bytes'] / 2 ** 20:.1f}", f"{row['memory']:.3f}" if row["memory"] else "",
            ", ".join(filter(None, notes))]


def show(path: Path) -> str:
    """What a file written by --out holds, as Markdown."""
    record = json.loads(path.read_text())
    where, rows = record["environment"], [line(row) for row in record["rows"]]
    compiled = {"whole": "the whole model compiled", "blocks": "blocks compiled", "no": "eager"}[record["compiled"]]
    return (f"### {path.stem}\n\n{where['device']}, torch {where['torch']}, {where['precision']}, {compiled}; "
            f"{record['study']}, {record['batch']} x {record['block_size']} tokens a step; {record['rounds']} rounds of "
            f"{record['iterations']} steps; relative to {record['baseline']}.\n\n" + table(HEADER, rows, RIGHT))


def bench(study: Study, steps: list[str], batch: int | None, compiled: str | None, rounds: int, iterations: int,
          progress: float | None, closed: float, out: Path | None) -> None:
    """Measure `steps`, and the baseline before them; print a row for each, and keep them in `out`."""
    name = baseline(study)
    cfg = study.resolve(name).config
    device = runtime.setup(cfg)
    compiled = compiled or ("whole" if device.type == "cuda" else "no")
    options: dict[str, Any] = {"batch": batch or cfg.BATCH_SIZE, "compiled": compiled, "progress": progress, "closed": closed}
    if compiled != "no":
        lift_compile_limits()
    steps = list(dict.fromkeys([name, *steps]))
    say, environment = benching.narrator(), benching.environment(cfg, device, compiled != "no")
    record = {"format": FORMAT, "study": study.name, "baseline": name, "block_size": cfg.GPT2_BLOCK_SIZE, **options,
              "rounds": rounds, "iterations": iterations,
              "environment": environment, "rows": []}
    say(f"{environment['device']}, torch {torch.__version__}, compiled: {compiled}, {options['batch']} x "
        f"{cfg.GPT2_BLOCK_SIZE} tokens: building the baseline {name}")
    try:
        first = Subject(cfg, device, **options)
        first.block(COMPILE_WARMUP_STEPS)
    except Exception as error:
        raise UserError(f"the baseline {name} does not run at a batch of {options['batch']} ({type(error).__name__}: {error}).",
                        "give a smaller --batch, or mend it before its variants.") from None
    widths = [max(map(len, ["step", *steps])), 9, 6, 14, 11, 6, 11]
    print(table_head(HEADER, widths, RIGHT), end="", flush=True)
    known = {}
    for number, step in enumerate(steps, 1):
        row = {"step": step, "as": None}
        try:
            own = study.resolve(step).config
        except UserError as error:
            row |= EMPTY | {"error": error.what}
        else:
            program = tuple((k, v) for k, v in own.as_json().items() if k not in benching.SAME_PROGRAM)
            if program in known:
                row |= known[program] | {"as": known[program]["step"], "step": step}
            else:
                say(f"{number} of {len(steps)}: {step}")
                row |= measured(own, first, rounds=rounds, iterations=iterations, **options)
                benching.release(device)
                base = record["rows"][0] if record["rows"] else row
                if row["memory_bytes"] and base["memory_bytes"]:
                    row["memory"] = row["memory_bytes"] / base["memory_bytes"]
                known[program] = row
        record["rows"].append(row)
        print(table_row(line(row), widths, RIGHT), end="", flush=True)
        if out:
            atomic.write_json(out, record)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_steps", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="V1 or V1@RA_R=8 (default: every step there is)")
    parser.add_argument("--study", default=os.environ.get("STUDY") or "gpt2-ra-ablation+tiny",
                        help="whose sizes and baseline (default: %(default)s; on a GPU gpt2-ra-ablation+h100)")
    parser.add_argument("--batch", type=int, help="sequences of a step (default: the study's BATCH_SIZE)")
    parser.add_argument("--compile", choices=["whole", "blocks", "no"],
                        help="the whole model as cells do (default on a GPU), only its blocks, which takes a fifth of the time "
                             "to compile, or nothing (default on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each step (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=5, help="training steps of a block (default: %(default)s)")
    parser.add_argument("--progress", type=float, help="share of the budget that mechanisms are told of, once")
    parser.add_argument("--closed", type=float, default=0.0, help="share of the paths with a skip gate that are off")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the rows there")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE.json", help="measure nothing, print what these hold")
    args = parser.parse_args(arguments)
    if args.show:
        print(benching.shown(show, args.show), end="")
        return
    benching.check_options(args, ("batch", "rounds", "iterations"), args.out)
    if not 0 <= args.closed <= 1:
        raise UserError(f"--closed {args.closed:g} is no share.", "give a number from 0 to 1.")
    study = Study(args.study)
    for step in args.steps:  # a slip of the pen ends it at once; a step that does not fit this study is a row
        step_path(parse_step(step)[0], study.config.STEPS_DIR)
    bench(study, args.steps or list(step_files(study.config.STEPS_DIR)), args.batch, args.compile, args.rounds, args.iterations,
          args.progress, args.closed, args.out)


if __name__ == "__main__":
    with reported():
        main()
