"""What several GPUs gain for one step: training steps of the same sequences on one GPU and on all, in one run.

A step of the study is shared by --ranks processes, one a GPU, as GPUS_PER_STEP does it: --batch sequences each, reduced
gradients, and the message by which ranks agree. Beside it stands the same step on one GPU, which takes its --ranks
micro-batches one after the other, as cells of one GPU do (CUDA_GRAPHS); every GPU does so at the same time, so that none is
cooler than it would be. Both are measured in turns (A B A B ... A) with the device idle at the ends; the slowest rank counts.
`speed` is tokens/s of all ranks over those of one, `efficiency` the same over their number.

The rows differ in what is reduced in one go: buckets of gradients of so many MiB (--buckets), and with torch's static graph.
`reduction` is the time of the kernels that exchange gradients, on a GPU; how much of it the backward pass hides is in the
speed.

Rows are printed, and --out is written, as they are known. --show prints such files again. On a CPU it only shows that it runs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt2.model import GPT
from lib import agent, atomic, gradients, optimizers, ranks, runtime
from lib.cells import baseline
from lib.config import Study, parse_step
from lib.errors import UserError, reported
from lib.loop import COMPILE_WARMUP_STEPS, lift_compile_limits
from lib.mechanisms import Mechanisms
from lib.steps import step_path
from lib.tables import table, table_head, table_row
from scripts import benching
from scripts.benching import kernels

if TYPE_CHECKING:
    from lib.config import Config

FORMAT = 1
PROFILED = 3  # steps whose kernels are counted
HEADER = ["step", "bucket, MiB", "one, ms", "all, ms", "speed", "min .. max", "efficiency", "reduction, ms", "kernels, ms"]
RIGHT = "lrrrrrrrr"


class Tried(ranks.Group):
    """The ranks with another way to reduce."""

    bucket_mib, static = ranks.BUCKET_MIB, False

    def options(self) -> dict:
        return super().options() | {"bucket_cap_mb": self.bucket_mib, "static_graph": self.static}


class Shared:
    """A model that is trained alone and together, one after the other, on the same batches."""

    def __init__(self, cfg: "Config", device: torch.device, group: Tried, compiled: str):
        self.cfg, self.device, self.group = cfg, device, group
        self.model = GPT(cfg).to(device).train()
        if compiled == "whole":
            self.model.compile(dynamic=False)
        elif compiled == "blocks":
            self.model.compile_regions()
        self.optimizer, self.mechanisms = optimizers.build(self.model, cfg), Mechanisms(self.model)
        made = torch.Generator().manual_seed(group.rank)
        tokens = torch.randint(cfg.VOCAB_SIZE, (cfg.BATCH_SIZE, cfg.GPT2_BLOCK_SIZE + 1), generator=made)
        self.x, self.y = tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)

    def block(self, steps: int, gradient: Any, group: ranks.Alone, parts: int) -> float:
        """Seconds of a step."""
        runtime.synchronize(self.device)
        self.group.wait()
        begun = time.perf_counter()
        for _ in range(steps):
            group.agree(0.0, False, False)
            loss = sum(gradient(self.x, self.y, micro) for micro in range(parts))
            group.mean(loss)
            gradients.clip(self.model, self.optimizer, self.cfg.GRAD_CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        runtime.synchronize(self.device)
        return self.slowest((time.perf_counter() - begun) / steps)

    def slowest(self, seconds: float) -> float:
        return self.group.largest(round(seconds * 1e9)) / 1e9


def arrangements(buckets: list[int]) -> list[tuple[int, bool]]:
    """(MiB of a bucket, static graph or not) of every row."""
    return [*((size, False) for size in buckets), (buckets[0], True)]


def measure(cfg: "Config", device: torch.device, group: Tried, compiled: str, buckets: list[int], rounds: int,
            iterations: int) -> Iterator[dict]:
    """A row for each arrangement, as it is known."""
    shared = Shared(cfg, device, group, compiled)
    parts = group.size
    plain = gradients.Gradient(cfg, shared.model, shared.mechanisms, device, parts)
    shared.block(COMPILE_WARMUP_STEPS, plain, ranks.ALONE, parts)
    del plain
    alone = gradients.of(cfg, shared.model, shared.mechanisms, device)
    shared.block(1, alone, ranks.ALONE, parts)
    for group.bucket_mib, group.static in arrangements(buckets):
        together = gradients.of(cfg, shared.model, shared.mechanisms, device, group)
        shared.block(COMPILE_WARMUP_STEPS, together, group, 1)
        one, every = benching.in_turns([lambda: shared.block(iterations, alone, ranks.ALONE, parts),
                                        lambda g=together: shared.block(iterations, g, group, 1)], rounds)
        speeds = [1 / ratio for ratio in benching.ratios(every, one)]
        row = {"bucket_mib": group.bucket_mib, "static": group.static,
               **benching.spread("one_seconds", one), **benching.spread("seconds", every),
               **benching.spread("speed", speeds), "kernels": None}
        if device.type == "cuda":
            row["kernels"] = kernels.profile(device, lambda g=together: shared.block(1, g, group, 1), PROFILED)
        yield row
        del together  # and its hooks, before the next one's
        group.release()


def line(row: dict, size: int) -> list[str]:
    """A row for people."""
    found = row["kernels"]
    return [row["step"], f"{row['bucket_mib']}{', static' if row['static'] else ''}", f"{1e3 * row['one_seconds']:.1f}",
            f"{1e3 * row['seconds']:.1f}", f"{row['speed']:.3f}", f"{row['speed_min']:.3f} .. {row['speed_max']:.3f}",
            f"{row['speed'] / size:.3f}", f"{found['classes'][kernels.REDUCTION]['ms']:.2f}" if found else "",
            f"{found['ms']:.2f}" if found else ""]


def show(path: Path) -> str:
    """What a file written by --out holds, as Markdown."""
    record = json.loads(path.read_text())
    where = record["environment"]
    compiled = {"whole": "the whole model compiled", "blocks": "blocks compiled", "no": "eager"}[record["compiled"]]
    return (f"### {path.stem}\n\n{record['ranks']} x {where['device']}, torch {where['torch']}, {where['precision']}, "
            f"{compiled}; {record['study']}, {record['ranks']} x {record['batch']} x {record['block_size']} tokens a step; "
            f"{record['rounds']} rounds of {record['iterations']} steps.\n\n"
            + table(HEADER, [line(row, record["ranks"]) for row in record["rows"]], RIGHT))


def bench(study: Study, steps: list[str], options: Any, size: int) -> None:
    """In each of `size` ranks: measure `steps`; the first prints rows, and keeps them in options.out."""
    def configured(step: str) -> "Config":
        cfg = study.resolve(step).config
        return cfg.replace(BATCH_SIZE=options.batch or cfg.BATCH_SIZE, GPT2_GRADIENT_ACCUMULATION=size, BATCH_DRAWN=0)

    first = configured(steps[0])
    device = runtime.setup(first)
    group = Tried(device)
    if group.size != size:
        raise UserError(f"{group.size} ranks were started where {size} are wanted.", "leave out RANK and WORLD_SIZE.")
    compiled = options.compile or ("whole" if device.type == "cuda" else "no")
    if compiled != "no":
        lift_compile_limits()
    record = {"format": FORMAT, "study": study.name, "ranks": size, "batch": first.BATCH_SIZE,
              "block_size": first.GPT2_BLOCK_SIZE, "compiled": compiled, "rounds": options.rounds,
              "iterations": options.iterations, "environment": benching.environment(first, device, compiled != "no"),
              "rows": []}
    widths = [max(map(len, ["step", *steps])), 11, 7, 7, 5, 14, 10, 13, 11]
    if group.first:
        print(table_head(HEADER, widths, RIGHT), end="", flush=True)
    for step in steps:
        for row in measure(configured(step), device, group, compiled, options.buckets, options.rounds, options.iterations):
            record["rows"].append({"step": step} | row)
            if group.first:
                print(table_row(line(record["rows"][-1], size), widths, RIGHT), end="", flush=True)
                if options.out:
                    atomic.write_json(options.out, record)
        benching.release(device)
    group.leave()


def main(arguments: list[str] | None = None) -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_ranks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="V1 or V1@RA_R=8 (default: the study's baseline)")
    parser.add_argument("--study", default=os.environ.get("STUDY") or "gpt2-ra-ablation" + ("+h100" if gpus else "+tiny"),
                        help="whose sizes and baseline (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=gpus or 2, help="processes, one a GPU (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="sequences of a rank (default: the study's BATCH_SIZE)")
    parser.add_argument("--buckets", type=int, nargs="+", default=[ranks.BUCKET_MIB, 100, 1000], metavar="MIB",
                        help="sizes to try (default: %(default)s)")
    parser.add_argument("--compile", choices=["whole", "blocks", "no"],
                        help="as make bench-steps (default: whole on a GPU, no on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=5, help="training steps of a block (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=os.environ.get("FILE") or None, metavar="FILE.json",
                        help="keep the rows there")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE.json", help="measure nothing, print what these hold")
    args = parser.parse_args(arguments)
    if args.show:
        print(benching.shown(show, args.show), end="")
        return
    benching.check_options(args, ("ranks", "batch", "buckets", "rounds", "iterations"), args.out)
    if args.ranks < 2:
        raise UserError("one rank shares its step with nobody.", "give --ranks 2 or more, on as many GPUs.")
    if 0 < gpus < args.ranks:
        raise UserError(f"--ranks {args.ranks} needs as many GPUs, and {gpus} are seen.", f"give --ranks {gpus}.")
    study = Study(args.study)
    steps = args.steps or [baseline(study)]
    for step in steps:  # a slip of the pen ends it at once
        step_path(parse_step(step)[0], study.config.STEPS_DIR)
        study.resolve(step)
    if os.environ.get(ranks.RANK):
        bench(study, steps, args, args.ranks)
        return
    words = sys.argv[1:] if arguments is None else arguments
    sys.exit(agent.run([sys.executable, "-m", "scripts.bench_ranks", *words], args.ranks))


if __name__ == "__main__":
    with reported():
        main()
