"""Time and peak memory of the attention module alone, beside the baseline's: of steps, and of the designs that lost.

The module is projection, attention and output projection on [batch, context, heads * head width] of random numbers, causal,
without dropout. Parameters are float32, and what is computed in float16 and bfloat16 is so by autocast, as in training (float32
on a CPU). `forward` runs without a graph; `forward+backward` ends in gradients of the input and of every parameter.

Every combination of type, mode (eager, compiled) and pass is measured for itself: blocks of several calls, at whose ends the
device is idle, in turns with those of the baseline and of all others (A B C A B C ... A). Medians over rounds with the smallest
and the largest; `time` is the ratio of each block to the mean of the two of the baseline beside it. The baseline's own row is a
second module of it, so it shows the noise. Memory is what one call holds at most beyond parameters and input: the allocator's
on a GPU, on a CPU counted from the tensors that live (null for compiled code). The last table sets the best of each against
the best of the baseline, over types and modes.

Steps are named as everywhere and take their attention from the study; without any, it is those of the study that differ in it.
The designs that lost are in scripts/benching/lost_designs.py. Rows are printed, and --out is written, as they are known. --show
prints such files again.
"""

import argparse
import contextlib
import json
import os
import pkgutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt2.block import Context
from gpt2.decode_costs import peak_bytes
from gpt2.layers import init_weights, residual_std
from lib import atomic, runtime
from lib.cells import baseline, steps_of
from lib.config import Study, parse_step
from lib.errors import UserError, reported
from lib.kconfig import Assignment
from lib.loop import COMPILE_WARMUP_STEPS, lift_compile_limits
from lib.steps import step_path
from lib.tables import table, table_head, table_row
from scripts import benching
from scripts.benching.lost_designs import DESIGNS

if TYPE_CHECKING:
    from lib.config import Config

FORMAT = 1
PASSES = {"forward": False, "forward+backward": True}
HEADER = ["attention", "type", "mode", "pass", "ms", "min .. max", "time", "min .. max", "memory, MiB", "memory", "note"]
RIGHT = "llllrrrrrrl"
BEST_HEADER = ["attention", "pass", "best, ms", "type, mode", "against the best baseline"]
BEST_RIGHT = "llrlr"
# batch, heads, context, head width: those of the source documents' table on a GPU
SIZES = {"cuda": (8, 12, 1024, 64), "cpu": (2, 4, 128, 64)}


class Subject:
    """An attention module on one input, in one type and mode."""

    def __init__(self, module: torch.nn.Module, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype,
                 compiled: bool):
        self.module, self.device, self.dtype = module.to(device).train(), device, dtype
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(shape, generator=generator).to(device).requires_grad_()
        self.gradient = torch.randn(shape, generator=generator).to(device, dtype)
        if compiled:
            module.compile(dynamic=False)

    def call(self, backward: bool) -> torch.Tensor:
        """One pass; what came out."""
        autocast = (contextlib.nullcontext() if self.dtype == torch.float32
                    else torch.autocast(self.device.type, dtype=self.dtype))
        with torch.set_grad_enabled(backward), autocast:
            y = self.module(self.x, None, Context(self.x))
        if backward:
            y.backward(self.gradient)
            self.x.grad = None
            self.module.zero_grad(set_to_none=True)
        return y

    def block(self, calls: int, backward: bool) -> float:
        """Seconds of one call."""
        runtime.synchronize(self.device)
        begun = time.perf_counter()
        for _ in range(calls):
            self.call(backward)
        runtime.synchronize(self.device)
        return (time.perf_counter() - begun) / calls


def built(cfg: "Config") -> torch.nn.Module:
    """The attention of a first block as a configuration has it."""
    return pkgutil.resolve_name(cfg.BLOCK_CLASS)(cfg, 0).attn


def attention_of(cfg: "Config") -> torch.nn.Module:
    """The same with its start."""
    module = built(cfg)
    init_weights(module, cfg.SEED)
    return module


def design(name: str, cfg: "Config", rank: int) -> torch.nn.Module:
    """One of the designs that lost, with its start."""
    module = DESIGNS[name](cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, rank, bias=cfg.GPT2_BIAS, init_seed=None,
                           proj_std=residual_std(cfg.GPT2_N_LAYER))
    init_weights(module, cfg.SEED)
    return module


def kinds_of_attention(study: Study, first: str) -> list[str]:
    """The first step of the study for each kind of attention, `first` before all: kinds differ in class or parameters."""
    found = {}
    for step in [first, *steps_of(study)]:
        with torch.device("meta"):
            module = built(study.resolve(step).config)
        classes = tuple((name, type(part)) for name, part in module.named_modules())
        found.setdefault((classes, tuple((name, p.shape) for name, p in module.named_parameters())), step)
    return list(found.values())


EMPTY = dict.fromkeys([f"{name}{end}" for name in ("seconds", "time") for end in ("", "_min", "_max")] + [
    "memory_bytes", "memory", "error"])


def measure(arms: dict[str, Callable], first: Callable, shape: Any, device: torch.device, dtype: str, compiled: bool,
            rounds: int,
            iterations: int) -> list[dict]:
    """Rows of all arms in one type and mode, pass by pass. `first` builds the baseline that stands between them."""
    def start(build: Any) -> Subject:
        subject = Subject(build(), shape, device, getattr(torch, dtype), compiled)
        for backward in PASSES.values():
            subject.block(COMPILE_WARMUP_STEPS, backward)
        return subject

    mode = "compiled" if compiled else "eager"
    try:
        beside = start(first)
    except Exception as error:
        raise UserError(f"the baseline's attention does not run ({benching.failure(error, shape[0])}).",
                        "give a smaller --batch or --context, or another --dtype.") from None
    subjects, errors = {}, {}
    for name, build in arms.items():
        try:
            subjects[name] = start(build)
        except Exception as error:  # one that does not run is a row
            errors[name] = benching.failure(error, shape[0])
    rows = []
    for which, backward in PASSES.items():
        calls = [lambda s=s, b=backward: s.block(iterations, b) for s in (beside, *subjects.values())]
        blocks = benching.in_turns(calls, rounds)
        found = dict(zip(subjects, blocks[1:], strict=True))
        counted = device.type == "cuda" or not compiled
        base = None
        for name in arms:
            row = {"arm": name, "dtype": dtype, "mode": mode, "pass": which} | EMPTY | {"error": errors.get(name)}
            if name in found:
                row |= benching.spread("seconds", found[name])
                row |= benching.spread("time", benching.ratios(found[name], blocks[0]))
                if counted:
                    row["memory_bytes"] = peak_bytes(device, lambda s=subjects[name], b=backward: s.call(b))
                    base = base or peak_bytes(device, lambda b=backward: beside.call(b))
                    row["memory"] = row["memory_bytes"] / base
            rows.append(row)
    return rows


def line(row: dict) -> list[str]:
    """A row for people."""
    where = [row["arm"], row["dtype"], row["mode"], row["pass"]]
    if row["error"]:
        return [*where, *[""] * 6, row["error"]]
    memory = ["", ""] if row["memory_bytes"] is None else [f"{row['memory_bytes'] / 2 ** 20:.1f}", f"{row['memory']:.3f}"]
    return [*where, f"{1e3 * row['seconds']:.3f}", f"{1e3 * row['seconds_min']:.3f} .. {1e3 * row['seconds_max']:.3f}",
            f"{row['time']:.3f}", f"{row['time_min']:.3f} .. {row['time_max']:.3f}", *memory, ""]


def best_table(rows: list[dict], first: str) -> str:
    """The fastest type and mode of every arm and pass, against the fastest of the arm `first`."""
    found = {}
    for row in rows:
        key = row["arm"], row["pass"]
        if row["seconds"] and (key not in found or row["seconds"] < found[key]["seconds"]):
            found[key] = row
    lines = []
    for (arm, which), row in sorted(found.items(), key=lambda item: list(PASSES).index(item[0][1])):
        base = found.get((first, which))
        lines.append([arm, which, f"{1e3 * row['seconds']:.3f}", f"{row['dtype']}, {row['mode']}",
                      f"{row['seconds'] / base['seconds']:.3f}" if base else ""])
    return "\n" + table(BEST_HEADER, lines, BEST_RIGHT) if lines else ""


def show(path: Path) -> str:
    """What a file written by --out holds, as Markdown."""
    record = json.loads(path.read_text())
    where = record["environment"]
    return (f"### {path.stem}\n\n{where['device']}, torch {where['torch']}; {record['study']}, batch {record['batch']}, "
            f"{record['heads']} heads of {record['head_dim']}, {record['context']} tokens, rank {record['rank']}; "
            f"{record['rounds']} rounds of {record['iterations']} calls; relative to {record['baseline']}.\n\n"
            + table(HEADER, [line(row) for row in record["rows"]], RIGHT) + best_table(record["rows"], record["baseline"]))


def bench(study: Study, steps: list[str], options: Any, dtypes: list[str], modes: list[bool], iterations: int) -> None:
    """Measure `steps`, the baseline before them and the designs after; print rows, and keep them in options.out."""
    first = baseline(study)
    cfg = study.resolve(first).config
    device = runtime.setup(cfg)
    lift_compile_limits()
    steps = list(dict.fromkeys([first, *(steps or kinds_of_attention(study, first))]))
    configured = {step: study.resolve(step).config for step in steps}
    arms = {step: lambda c=own: attention_of(c) for step, own in configured.items()}
    arms |= {name: lambda n=name: design(n, cfg, options.rank) for name in DESIGNS}
    say = benching.narrator()
    record = {"format": FORMAT, "study": study.name, "baseline": first, "batch": options.batch, "heads": options.heads,
              "context": options.context, "head_dim": options.head_dim, "rank": options.rank, "rounds": options.rounds,
              "iterations": iterations, "environment": benching.environment(cfg, device, any(modes)), "rows": []}
    say(f"{record['environment']['device']}, torch {torch.__version__}: batch {options.batch}, {options.heads} heads of "
        f"{options.head_dim}, {options.context} tokens")
    widths = [max(map(len, arms)), 8, 8, 16, 8, 18, 6, 14, 11, 6, 4]
    print(table_head(HEADER, widths, RIGHT), end="", flush=True)
    shape = (options.batch, options.context, options.heads * options.head_dim)
    for dtype in dtypes:
        for compiled in modes:
            say(f"{dtype}, {'compiled' if compiled else 'eager'}")
            rows = measure(arms, arms[first], shape, device, dtype, compiled, options.rounds, iterations)
            benching.release(device)
            print("".join(table_row(line(row), widths, RIGHT) for row in rows), end="", flush=True)
            record["rows"] += rows
            if options.out:
                atomic.write_json(options.out, record)
    print(best_table(record["rows"], first), end="", flush=True)


def main(arguments: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    sizes = SIZES["cuda" if gpu else "cpu"]
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_attention", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="V1 or V1@RA_R=8 (default: those of the study that differ in attention)")
    parser.add_argument("--study", default=os.environ.get("STUDY") or "gpt2-ra-ablation" + ("" if gpu else "+tiny"),
                        help="whose steps and baseline; the sizes are the options below (default: %(default)s)")
    for name, value, what in zip(("batch", "heads", "context", "head-dim"), sizes,
                                 ("sequences", "heads", "tokens of a sequence", "channels of a head"), strict=True):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=4, help="reciprocal channels of those designs (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=["float16", "bfloat16", "float32"],
                        help="(default: float16 bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="only compiled, or only eager (default: both; on a CPU only eager)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each (default: %(default)s)")
    parser.add_argument("--iterations", type=int, help="calls of a block (default: 20; on a CPU 3)")
    parser.add_argument("--out", type=Path, default=os.environ.get("FILE") or None, metavar="FILE.json",
                        help="keep the rows there")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE.json", help="measure nothing, print what these hold")
    args = parser.parse_args(arguments)
    if args.show:
        print(benching.shown(show, args.show), end="")
        return
    benching.check_options(args, ("batch", "heads", "context", "head_dim", "rank", "rounds", "iterations"), args.out)
    shapes = {"MODEL_CUSTOM": "y", "GPT2_N_HEAD": args.heads, "GPT2_N_EMBD": args.heads * args.head_dim,
              "GPT2_BLOCK_SIZE": args.context, "GPT2_DROPOUT": "0.0"}
    study = Study(args.study, overrides=[Assignment(name, str(value), "the options of this bench")
                                         for name, value in shapes.items()])
    for step in args.steps:  # a slip of the pen ends it at once
        step_path(parse_step(step)[0], study.config.STEPS_DIR)
    bench(study, args.steps, args, args.dtype or (["float16", "bfloat16"] if gpu else ["float32"]),
          ([False, True] if gpu else [False]) if args.compile is None else [args.compile],
          args.iterations or (20 if gpu else 3))


if __name__ == "__main__":
    with reported():
        main()
