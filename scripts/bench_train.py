"""Training speed of the baseline, of any steps, and of a peer with nanoGPT's interface, in one process on the same batches.

Blocks of training steps are measured in turns (A B C A B C ... A): medians over rounds, with the smallest and the largest.
`time` is the ratio to the first arm, the study's baseline: of each block to the mean of the two of the first beside it. A step
is the training loop's: a batch through pinned memory, forward, penalties, backward, clipping, optimizer.step. All arms have
dropout 0 and the study's AdamW, clipping, biases and padded vocabulary. They train on the data set of --data or, without it, on
random tokens; batch i is the same for every arm.

MFU: see scripts/benching/mfu.py. Memory is one model's: on a GPU the most that the allocator held in its blocks, on a CPU
counted as by make bench-steps. `compile` is seconds from the first step until the warm-up is over. On a GPU the profiler then
tells the time of kernels by class (scripts/benching/kernels.py).

--losses N also trains every arm N steps from its start under the study's schedule, on real data (--data, or the study's own):
the mean training loss of the last tenth of the steps, and the loss on a fixed validation set. Arms whose parameters have the
baseline's names and shapes start from its numbers, a peer too. --seeds K does so from K starts, whose standard deviation is
shown.

Rows are printed, and --out is written, batch by batch. --show prints such files again.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from lib import atomic, runtime
from lib.cells import baseline
from lib.config import Study, parse_step
from lib.data import EvalSet, open_corpus
from lib.errors import UserError, reported
from lib.kconfig import Assignment
from lib.loop import lift_compile_limits
from lib.steps import step_path
from lib.tables import plural, table, table_head, table_row
from scripts import benching
from scripts.benching import kernels, mfu
from scripts.benching.contenders import Arm, Trained, arms_of, batches_of, losses_of
from scripts.benching.peer import Peer

FORMAT = 1
HEADER = ["arm", "batch", "ms a step", "min .. max", "time", "min .. max", "tokens/s", "MFU", "memory, MiB", "memory",
          "compile, s", "train loss", "val loss", "note"]
RIGHT = "lrrrrrrrrrrrrl"
EVAL_BATCH = 8  # windows at a time; how many there are in all follows from the study
EMPTY = dict.fromkeys([f"{name}{end}" for name in ("seconds", "time") for end in ("", "_min", "_max")] + [
    "tokens_per_second", "flops_per_token", "mfu", "parameters", "memory_bytes", "memory", "compile_seconds", "losses",
    "train_loss", "val_loss", "train_loss_std", "val_loss_std", "kernels", "remark", "error"])


def timed(arms: list[Arm], device: torch.device, seed: int, batches: Callable, batch: int, rounds: int, iterations: int,
          compiled: bool,
          profiled: int, peak: float | None, say: Any) -> list[dict]:
    """A row an arm, without losses."""
    rows, running = {arm.name: {"arm": arm.name, "batch": batch} | EMPTY for arm in arms}, {}
    for arm in arms:
        say(f"batch {batch}: {arm.name}" + (", compiling" if compiled else ""))
        try:
            running[arm.name], rows[arm.name]["compile_seconds"] = benching.started(
                lambda a=arm: Trained(a, device, seed, batches, compiled), device)
        except UserError:  # a peer that cannot be built
            raise
        except Exception as error:  # an arm that does not run is a row
            rows[arm.name]["error"] = benching.failure(error, batch)
            benching.release(device)
    try:
        measure(running, rows, arms[0].name, batch, rounds, iterations, profiled, peak)
    except torch.OutOfMemoryError as error:  # each fits alone, but not beside the others
        for name in running:
            rows[name] |= EMPTY | {"error": benching.failure(error, batch)}
    return list(rows.values())


def measure(running: dict[str, Trained], rows: dict[str, dict], first: str, batch: int, rounds: int, iterations: int,
            profiled: int, peak: float | None) -> None:
    """Fill in the numbers of the arms that run."""
    if not running:
        return
    blocks = benching.in_turns([lambda t=t: t.watched(iterations) for t in running.values()], rounds)
    for (name, training), own in zip(running.items(), blocks, strict=True):
        row = rows[name]
        row |= benching.spread("seconds", own)
        if first in running:
            row |= benching.spread("time", [1.0] if name == first else benching.ratios(own, blocks[0]))
        speed = batch * training.cfg.GPT2_BLOCK_SIZE / row["seconds"]
        flops = mfu.flops_per_token(training.model, training.cfg.GPT2_N_LAYER, training.cfg.GPT2_N_EMBD,
                                    training.cfg.GPT2_BLOCK_SIZE)
        row |= {"tokens_per_second": speed, "flops_per_token": flops, "mfu": flops * speed / peak if peak else None,
                "remark": training.remark, "parameters": sum(p.numel() for p in training.model.parameters()),
                "memory_bytes": training.memory_bytes()}
        if rows[first]["memory_bytes"]:
            row["memory"] = row["memory_bytes"] / rows[first]["memory_bytes"]
    for name, training in running.items() if profiled else ():
        try:
            rows[name]["kernels"] = kernels.profile(training.device, training.step, profiled)
        except Exception as error:  # the times are known, and not every machine lets a user profile
            rows[name]["remark"] = f"no kernel times: {benching.failure(error, batch)}"


def add_losses(row: dict, losses: list[dict]) -> None:
    row["losses"] = losses
    for name in ("train_loss", "val_loss"):
        values = [one[name] for one in losses]
        row |= {name: mean(values), f"{name}_std": stdev(values) if len(values) > 1 else None}


def line(row: dict) -> list[str]:
    """A row for people."""
    def number(name: str, form: str, factor: float = 1) -> str:
        return "" if row[name] is None else format(factor * row[name], form)

    def between(name: str, form: str, factor: float = 1) -> str:
        ends = number(f"{name}_min", form, factor), number(f"{name}_max", form, factor)
        return " .. ".join(ends) if ends[0] else ""

    def loss(name: str) -> str:
        return number(name, ".4f") + (f" ± {row[name + '_std']:.4f}" if row[f"{name}_std"] is not None else "")

    return [row["arm"], str(row["batch"]), number("seconds", ".1f", 1e3), between("seconds", ".1f", 1e3), number("time", ".3f"),
            between("time", ".3f"), number("tokens_per_second", ",.0f"), number("mfu", ".3f"),
            number("memory_bytes", ".1f", 2 ** -20), number("memory", ".3f"), number("compile_seconds", ".1f"),
            loss("train_loss"), loss("val_loss"), row["error"] or row["remark"] or ""]


def show(path: Path) -> str:
    """What a file written by --out holds, as Markdown."""
    record = json.loads(path.read_text())
    where = record["environment"]
    how = "the whole model compiled" if where["compile"] else "eager"
    losses = (f"; losses after {record['losses']} steps, of {record['eval_tokens']:,} validation tokens, from "
              f"{plural(len(record['seeds']), 'start')}") if record["losses"] else ""
    text = (f"### {path.stem}\n\n{where['device']}, torch {where['torch']}, {where['precision']}, {how}; {record['study']}, "
            f"{record['block_size']} tokens a sequence, {record['data']}; {record['rounds']} rounds of {record['iterations']} "
            f"steps; relative to {record['baseline']}{losses}.\n\n")
    return text + table(HEADER, [line(row) for row in record["rows"]], RIGHT) + kernel_table(record["rows"])


def kernel_table(rows: list[dict]) -> str:
    """Kernel times of the rows that have them, after an empty line; nothing if none has."""
    found = {f"{row['arm']}, {row['batch']}": row["kernels"] for row in rows if row["kernels"]}
    return f"\n{kernels.by_class(found)}" if found else ""


def bench(study: Study, steps: list[str], peer: Peer | None, sizes: list[int], corpus: Any, options: Any) -> None:
    """Measure the baseline, `steps` and the peer at each batch size; print rows, and keep them in options.out."""
    steps = list(dict.fromkeys([baseline(study), *steps]))
    for step in steps:  # one that does not fit the study ends it at once
        study.resolve(step)
    cfg = study.resolve(steps[0]).config
    device = runtime.setup(cfg)
    gpu = device.type == "cuda"
    compiled = gpu if options.compile is None else options.compile
    if compiled:
        lift_compile_limits()
    arms, seeds = arms_of(study, steps, peer), [cfg.SEED + i for i in range(options.seeds)]
    corpus = corpus or (open_corpus(cfg) if options.losses else None)
    eval_set = EvalSet(corpus.val, max(1, cfg.GPT2_EVAL_SAMPLES * cfg.BATCH_SIZE // EVAL_BATCH), EVAL_BATCH,
                       cfg.GPT2_BLOCK_SIZE, cfg.VOCAB_SIZE) if options.losses else None
    say, environment = benching.narrator(), benching.environment(cfg, device, compiled)
    peak = mfu.peak_flops(environment["device"], environment["precision"])
    record = {"format": FORMAT, "study": study.name, "baseline": steps[0], "peer": peer and peer.record(),
              "settings": [f"{a.name}={a.value}" for a in study.overrides if a.name != "DATA_LOCAL_DIR"],
              "block_size": cfg.GPT2_BLOCK_SIZE, "batches": sizes, "rounds": options.rounds, "iterations": options.iterations,
              "data": corpus.name if corpus else "random tokens",
              "train_hash": corpus and corpus.train.fingerprint(), "losses": options.losses, "seeds": seeds,
              "eval_tokens": eval_set and eval_set.n_tokens, "eval_hash": eval_set and eval_set.hash,
              "peak_flops": peak, "environment": environment, "rows": []}
    say(f"{environment['device']}, torch {torch.__version__}, {'compiled' if compiled else 'eager'}")
    widths = [max(len(arm.name) for arm in arms), 5, 9, 16, 6, 16, 10, 5, 11, 6, 10, 15, 15, 4]
    print(table_head(HEADER, widths, RIGHT), end="", flush=True)
    for size in sizes:
        def batches(seed: int, size: Any = size) -> Callable:
            return batches_of(corpus, cfg.VOCAB_SIZE, seed, size, cfg.GPT2_BLOCK_SIZE)

        rows = timed(arms, device, cfg.SEED, batches(cfg.SEED), size, options.rounds, options.iterations, compiled,
                     options.profile if gpu else 0, peak, say)
        benching.release(device)
        for arm, row in zip(arms, rows, strict=True):
            if options.losses and not row["error"]:
                say(f"batch {size}: {arm.name}, {options.losses} steps from {plural(len(seeds), 'start')}")
                try:
                    add_losses(row, losses_of(arm, device, seeds, batches, options.losses, compiled, eval_set))
                except Exception as error:  # its times are known
                    row["error"] = benching.failure(error, size)
                benching.release(device)
            print(table_row(line(row), widths, RIGHT), end="", flush=True)
        record["rows"] += rows
        if options.out:
            atomic.write_json(options.out, record)
    print(kernel_table(record["rows"]), end="", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="V1 or V1@RA_R=8, beside the baseline (default: the baseline alone)")
    parser.add_argument("--peer", type=Path, default=os.environ.get("PEER") or None, metavar="model.py",
                        help="a model with nanoGPT's interface, trained beside ours")
    parser.add_argument("--study", default=os.environ.get("STUDY"),
                        help="whose sizes and baseline (default: gpt2-ra-ablation, +h100 on a GPU and +tiny without one)")
    parser.add_argument("--set", nargs="+", default=[], metavar="SYMBOL=VALUE", help="symbols of all arms: MODEL_CUSTOM=y "
                        "GPT2_N_LAYER=6")
    parser.add_argument("--batch", type=int, nargs="+", metavar="SEQUENCES",
                        help="sequences of a step (default: the study's BATCH_SIZE)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="train.bin and val.bin to train on, GPT-2 BPE")
    parser.add_argument("--losses", type=int, metavar="STEPS", help="also compare the losses after so many steps")
    parser.add_argument("--seeds", type=int, default=1, help="starts of which losses are the mean (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="compile the whole model, as cells do (default: on a GPU)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each arm (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=5, help="training steps of a block (default: %(default)s)")
    parser.add_argument("--profile", type=int, default=3, metavar="STEPS",
                        help="steps whose kernels are counted, on a GPU; 0 for none (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=os.environ.get("FILE") or None, metavar="FILE.json",
                        help="keep the rows there")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE.json", help="measure nothing, print what these hold")
    args = parser.parse_args(arguments)
    if args.show:
        print(benching.shown(show, args.show), end="")
        return
    benching.check_options(args, ("batch", "rounds", "iterations", "losses", "seeds"), args.out)
    settings = benching.assignments(args.set, "--set")
    if args.data:
        settings += [Assignment("DATA_LOCAL", "y", "--data"), Assignment("DATA_LOCAL_DIR", str(args.data.resolve()), "--data")]
    equal = [Assignment("GPT2_DROPOUT", "0.0", "scripts/bench_train.py"),
             Assignment("OPTIMIZER_ADAMW", "y", "scripts/bench_train.py")]
    study = Study(args.study or ("gpt2-ra-ablation" + ("+h100" if torch.cuda.is_available() else "+tiny")),
                  overrides=[*settings, *equal])
    for step in args.steps:  # a slip of the pen ends it at once
        step_path(parse_step(step)[0], study.config.STEPS_DIR)
    cfg = study.resolve(baseline(study)).config
    corpus = open_corpus(cfg) if args.data else None
    peer = Peer(args.peer) if args.peer else None
    bench(study, args.steps, peer, list(dict.fromkeys(args.batch or [cfg.BATCH_SIZE])), corpus, args)


if __name__ == "__main__":
    with reported():
        main()
