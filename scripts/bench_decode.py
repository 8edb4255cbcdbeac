"""Speed and memory of decoding with a cache, of steps whose caches differ, beside the study's baseline in one run.

Of every step, context and batch: the seconds to the first token of a prompt of the context's length, the tokens of one
sequence times the batch that are decoded in a second, the bytes of the cache that is allocated, and the peak of memory.

First token: the whole prompt goes through the model into an empty cache, only the last position's logits are computed and the
likeliest token is picked; eager. Decoding: one token through the model into the filled cache, and the likeliest token picked.
On a GPU that one step is captured as a CUDA graph and replayed: a step at the *last* position of the context, with a cache that
is full but for it, again and again into the same slot. A cache that evicts does so at the beginning of a block of tokens, so
the step that is timed evicts nothing; --eager times a loop from Python instead (the default on the CPU), over the last tokens
of the context one after the other, evictions and the launches of every kernel with them. --compile compiles the step that is
captured (or its blocks), not the prompt. Weights are random numbers with the gates folded in (bake), bfloat16 on a GPU, float32
on the CPU.

Each measurement is repeated and stands between two of the baseline (A B A B ... A): the median over rounds, with the smallest
and the largest; `speed` is the median ratio of tokens/s to the two baseline blocks beside it. The baseline's own rows are a
second model of the baseline, so they show the noise.

The floor is the least time in which the bytes that a step cannot avoid go through memory: every parameter once (of the
embeddings one row a sequence and one position; the tied head is the whole matrix), each allocated byte of the cache once (all
of it is read, but for the new entry, which is written) over the bandwidth of a large copy on the same device, bytes read plus
bytes written (on a CPU, where a copy also reads what it overwrites, of a large sum if that is more). `of the floor` is that
time over the measured one. A model that fits into the processor's caches (any tiny one) is not bound by it, and a machine that
is shared with others has no constant one; otherwise nothing honest is above 100 %.

Memory on a GPU: the most that was allocated with this model and cache, without the baseline's beside it. On the CPU it is
counted from the tensors that live at once.

A context beyond the study's GPT2_BLOCK_SIZE is measured on a model of that size, whose ratios are taken of it. Without steps
on the command line the first step of every kind of cache is taken, and with --study (STUDY=, for make) the study's own. Rows
are printed, and --out is written, as they are known. --show prints such files again.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

from gpt2.decode_costs import bandwidth_of, floor_share, held_bytes, moved_bytes, peak_bytes
from gpt2.model import GPT, VOCAB_MULTIPLE
from lib import atomic, runtime
from lib.cells import baseline, steps_of
from lib.config import Study, parse_step
from lib.errors import UserError, reported
from lib.kconfig import Assignment
from lib.loop import lift_compile_limits
from lib.mechanisms import Mechanisms, Moment
from lib.steps import step_files, step_path
from lib.tables import table, table_head, table_row
from scripts.benching import check_options, failure, narrator, release, shown, spread

if TYPE_CHECKING:
    from lib.config import Config

FORMAT = 1
HEADER = ["step", "context", "batch", "first token, ms", "tokens/s", "min .. max", "speed", "cache, MiB", "cache",
          "peak, MiB: prompt", "decoding", "of the floor", "note"]
RIGHT = "lrrrrrrrrrrrl"
WARMUP = 3  # steps before a capture, as torch asks for
# A matrix times one vector is then a kernel of its own making, with what stands around it (cuBLAS's are made for more); copies
# that do not depend on each other are one; and GELU or a norm is computed once, not again by every row of the next matrix.
COMPILE_OPTIONS = {"coordinate_descent_tuning": True, "combo_kernels": True, "realize_opcount_threshold": 5}


class Subject:
    """A model with a cache for `batch` sequences of `context` tokens. `tokens` [batch, context] are the same for every one."""

    def __init__(self, model: GPT, batch: int, context: int, steps: int, eager: bool, compiled: str):
        self.model, self.batch, self.context, self.eager = model, batch, context, eager
        self.device = model.transformer.wte.weight.device
        self.next = torch.compile(self.next, dynamic=False, options=COMPILE_OPTIONS) if compiled == "whole" else self.next
        for block in model.transformer.h if compiled == "blocks" else ():
            block.compile(dynamic=False, options=COMPILE_OPTIONS)
        # A graph holds one position; a loop goes over the last ones, and leaves a prompt of one token at least.
        self.steps, self.positions = steps, min(steps, context - 1) if eager else 1
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(model.vocab_size, (batch, context), generator=generator).to(self.device)
        self.token = self.tokens[:, -1:].clone()
        self.cache = self.start = self.graph = None

    def empty(self) -> None:
        self.cache = self.start = self.graph = None  # gone before their successors are allocated
        self.cache = self.model.new_cache(self.batch, self.context)

    def prompt(self) -> float:
        """Seconds to the first token after a prompt of the context's length."""
        self.empty()
        runtime.synchronize(self.device)
        begun = time.perf_counter()
        with uncompiled():
            self.next(self.tokens, self.cache)
        runtime.synchronize(self.device)
        return time.perf_counter() - begun

    def fill(self) -> None:
        """Fill a new cache up to the first position that is decoded."""
        self.empty()
        with uncompiled():
            self.next(self.tokens[:, :self.context - self.positions], self.cache)
        self.start = Rewind(self.cache, contents=self.eager)

    def next(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """The likeliest token after `tokens`, [batch, 1]."""
        return likeliest(self.model(tokens, cache=cache, last=True)[0][:, 0], self.model.vocab_size)

    def step(self) -> None:
        self.token.copy_(self.next(self.token, self.cache))

    def prepare(self) -> None:
        """Compile and warm up; on a GPU capture the step. The cache's position is a Python number, so every replay decodes the
        same one."""
        if self.eager:
            self.block()
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.start.back()
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.start.back()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        self.block()

    def block(self) -> float:
        """Seconds of one decoded token a sequence, the mean over a block of them."""
        if self.eager:
            self.start.back()
        runtime.synchronize(self.device)
        begun = time.perf_counter()
        for _ in range(self.positions if self.eager else self.steps):
            self.step() if self.eager else self.graph.replay()
        runtime.synchronize(self.device)
        return (time.perf_counter() - begun) / (self.positions if self.eager else self.steps)

    def peaks(self) -> tuple[int, int]:
        """Most bytes at once, of parameters, cache and what lives between them: in the prompt, and in decoding a token."""
        own = held_bytes([*self.model.parameters(), *self.model.buffers(), self.tokens, self.token])
        prompt = peak_bytes(self.device, self.prompt)
        self.fill()
        held = held_bytes(t for layer in self.cache.layers for t in layer.tensors())
        with uncompiled():
            decoding = peak_bytes(self.device, lambda: self.next(self.token, self.cache))
        return own + prompt, own + held + decoding


def likeliest(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """logits [batch, a multiple of VOCAB_MULTIPLE] -> the first largest of a row below `vocab_size`, int64 [batch, 1]. In two
    stages: one over all of a row is the work of a single processor of a GPU."""
    logits = logits.masked_fill(torch.arange(logits.size(-1), device=logits.device) >= vocab_size, float("-inf"))
    largest, where = logits.unflatten(-1, (-1, VOCAB_MULTIPLE)).max(-1)
    first = largest.argmax(-1, keepdim=True)
    return first * VOCAB_MULTIPLE + where.gather(-1, first)


def uncompiled() -> Any:
    return torch.compiler.set_stance("force_eager")


class Rewind:
    """The state of a cache, to be put back: the attributes of the cache and of its layers, with `contents` their tensors'
    numbers too, so that what was evicted is there again."""

    def __init__(self, cache: Any, contents: bool):
        self.attributes = [(thing, dict(vars(thing))) for thing in (cache, *cache.layers)]
        self.contents = [(t, t.clone()) for layer in cache.layers for t in layer.tensors()] if contents else []

    def back(self) -> None:
        for thing, values in self.attributes:
            vars(thing).clear()
            vars(thing).update(values)
        for tensor, kept in self.contents:
            tensor.copy_(kept)


def build(cfg: "Config", device: torch.device, dtype: torch.dtype) -> GPT:
    """The model of a configuration as it is for inference: told that its budget has ended, so that what decides has decided,
    and gates folded in."""
    model = GPT(cfg)
    Mechanisms(model).advance(Moment(10 ** 6, 1.0))  # more steps than any mechanism counts
    return model.eval().bake().requires_grad_(False).to(device, dtype)


@torch.no_grad()
def measure(model: GPT, first: GPT, batch: int, context: int, rounds: int, bandwidth: float, options: dict) -> dict:
    """The numbers of a model at one context and batch, beside those of the baseline's model `first`."""
    own, beside = (Subject(one, batch, context, **options) for one in (model, first))
    peaks = own.peaks()
    # Prompts first: they fill the caches anew.
    for subject in (own, beside):
        subject.prompt()
    waits, base_waits = [], [beside.prompt()]
    for _ in range(rounds):
        waits.append(own.prompt())
        base_waits.append(beside.prompt())
    for subject in (own, beside):
        subject.fill()
        subject.prepare()
    times, base_times = [], [beside.block()]
    for _ in range(rounds):
        times.append(own.block())
        base_times.append(beside.block())
    ratios = [mean(pair) / t for t, pair in zip(times, zip(base_times, base_times[1:], strict=False), strict=True)]
    cache = own.cache.nbytes()
    # In a loop the cache is filled from position to position; what an evicting one has not filled yet is counted as filled.
    moved = moved_bytes(model, batch, round(cache * (1 - (own.positions - 1) / (2 * context))))
    return {**spread("first_token_seconds", waits), "baseline_first_token_seconds": median(base_waits),
            **spread("tokens_per_second", [batch / t for t in times]), "baseline_tokens_per_second": batch / median(base_times),
            **spread("speed", ratios), "cache_bytes": cache, "cache": cache / beside.cache.nbytes(),
            "peak_prompt_bytes": peaks[0], "peak_decoding_bytes": peaks[1], "moved_bytes": moved,
            "floor_share": floor_share(moved, bandwidth, median(times)),
            "parameters": sum(p.numel() for p in model.parameters())}


NAMES = ("first_token_seconds", "tokens_per_second", "speed")
EMPTY = dict.fromkeys([f"{name}{end}" for name in NAMES for end in ("", "_min", "_max")] + [
    "baseline_first_token_seconds", "baseline_tokens_per_second", "cache_bytes", "cache", "peak_prompt_bytes",
    "peak_decoding_bytes", "moved_bytes", "floor_share", "parameters", "error"])


def attempt(call: Callable[[], Any], batch: int | None = None) -> tuple[Any, Any]:
    """(what `call` returns, None), or (None, why it failed): a step that does not run is a row."""
    try:
        return call(), None
    except UserError as error:
        return None, error.what
    except Exception as error:
        return None, failure(error, batch)


def line(row: dict) -> list[str]:
    """A row for people."""
    where = [row["step"], str(row["context"]), str(row["batch"] or "")]
    if row["error"]:
        return [*where, *[""] * 9, row["error"]]
    return [*where, f"{1e3 * row['first_token_seconds']:.1f}", f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_min']:,.0f} .. {row['tokens_per_second_max']:,.0f}", f"{row['speed']:.3f}",
            f"{row['cache_bytes'] / 2 ** 20:.2f}", f"{row['cache']:.3f}", f"{row['peak_prompt_bytes'] / 2 ** 20:.1f}",
            f"{row['peak_decoding_bytes'] / 2 ** 20:.1f}", f"{100 * row['floor_share']:.1f} %", ""]


def show(path: Path) -> str:
    """What a file written by --out holds, as Markdown."""
    record = json.loads(path.read_text())
    where, rows = record["environment"], [line(row) for row in record["rows"]]
    how = ("an eager loop of" if record["eager"] else "replays of one captured step:") + f" {record['steps']}"
    compiled = {"whole": ", the step compiled", "blocks": ", its blocks compiled", "no": ""}[record["compiled"]]
    return (f"### {path.stem}\n\n{where['device']}, torch {where['torch']}, {record['dtype']}; {record['study']}, {how} tokens "
            f"a block{compiled}, {record['rounds']} rounds; memory moves {record['bandwidth'] / 1e9:,.1f} GB/s; relative to "
            f"{record['baseline']}.\n\n" + table(HEADER, rows, RIGHT))


def kinds_of_caches(study: Study, first: str) -> list[str]:
    """A step of every kind of cache there is, the one whose fragment sets least, `first` before all: kinds differ in classes,
    shapes or types."""
    found = {}
    files = step_files(study.config.STEPS_DIR)
    for step in [first, *sorted(files, key=lambda step: files[step].read_text().count("\nCONFIG_"))]:
        try:
            with torch.device("meta"):
                cache = GPT(study.resolve(step).config).new_cache(1, dtype=torch.bfloat16)
            kind = tuple((type(layer), *((t.shape, t.dtype) for t in layer.tensors())) for layer in cache.layers)
        except UserError:  # it does not fit this study
            continue
        except Exception:  # it is broken, which its row will say
            kind = step
        found.setdefault(kind, step)
    return list(found.values())


def sized(study: Study, step: str, context: int) -> "Config":
    """The step's configuration, of the study's own block size where the context fits into it."""
    cfg = study.resolve(step).config
    if context <= cfg.GPT2_BLOCK_SIZE:
        return cfg
    return study.resolve(step, overrides=[*study.overrides, Assignment("GPT2_BLOCK_SIZE", str(context), "--context")]).config


def bench(study: Study, steps: list[str], contexts: list[int], batches: list[int], rounds: int, tokens: int | None,
          eager: bool, compiled: str, out: Path | None) -> None:
    """Measure `steps`, and the baseline before them; print a row for each, and keep them in `out`."""
    name = baseline(study)
    cfg = study.resolve(name).config
    device = runtime.setup(cfg)
    gpu = device.type == "cuda"
    eager, dtype = eager or not gpu, torch.bfloat16 if gpu else torch.float32
    if eager and compiled != "no":  # the position is a Python number, so every token of a loop would be compiled anew
        raise UserError("--compile makes a program of one position, and a loop goes over many.",
                        "compile only what is captured: on a GPU, without --eager.")
    contexts = contexts or sorted({*((128, 1024, 4096) if gpu else (min(128, cfg.GPT2_BLOCK_SIZE),)), cfg.GPT2_BLOCK_SIZE})
    batches = batches or ([1, 16, 64] if gpu else [1, 16])
    options = {"steps": tokens or (100 if gpu else 16), "eager": eager, "compiled": compiled}
    steps = list(dict.fromkeys([name, *steps]))
    if compiled != "no":  # a program for every model, context and batch
        lift_compile_limits()
    say = narrator()
    environment = {k: v for k, v in runtime.environment(cfg, device).items() if k != "sources"}
    bandwidth = bandwidth_of(device, 1024 if gpu else 256)
    record = {"format": FORMAT, "study": study.name, "baseline": name, "contexts": contexts, "batches": batches,
              "rounds": rounds, **options, "dtype": str(dtype).removeprefix("torch."), "bandwidth": bandwidth,
              "environment": environment, "rows": []}
    say(f"{environment['device']}, torch {torch.__version__}, {record['dtype']}: memory moves {bandwidth / 1e9:.1f} GB/s")
    widths = [max(map(len, ["step", *steps])), 7, 5, 15, 9, 18, 6, 10, 6, 17, 9, 12, 4]
    print(table_head(HEADER, widths, RIGHT), end="", flush=True)

    def keep(row: dict) -> None:
        record["rows"].append(row)
        print(table_row(line(row), widths, RIGHT), end="", flush=True)
        if out:
            atomic.write_json(out, record)

    known: dict[int, GPT] = {}  # the baseline's model of the block size in hand
    for context in contexts:
        size = max(context, cfg.GPT2_BLOCK_SIZE)
        if size not in known:
            known.clear()
            release(device)
            known[size], failure = attempt(lambda c=context: build(sized(study, name, c), device, dtype))
            if failure:
                raise UserError(f"the baseline {name} does not run at a context of {context} ({failure}).",
                                "leave the context out with --context.")
        for number, step in enumerate(steps, 1):
            say(f"context {context}, {number} of {len(steps)}: {step}")
            model, failure = attempt(lambda s=step, c=context: build(sized(study, s, c), device, dtype))
            for batch in batches if model else [None]:
                row = {"step": step, "context": context, "batch": batch} | EMPTY
                if model:
                    measured, failure = attempt(lambda m=model, b=batch, c=context, s=size: measure(
                        m, known[s], b, c, rounds, bandwidth, options), batch)
                keep(row | (measured if model and measured else {"error": failure}))
                release(device)
            del model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_decode", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="V1 or V1@RA_R=8 (default: the first step of every kind of cache, and with "
                        "--study the study's)")
    parser.add_argument("--study", default=os.environ.get("STUDY"),
                        help="whose sizes and baseline (default: gpt2-ra-ablation on a GPU, gpt2-ra-ablation+tiny without one)")
    parser.add_argument("--context", type=int, nargs="+", default=[], metavar="TOKENS",
                        help="lengths of prompts and caches (default: 128 and the study's; on a GPU 1024 and 4096 too)")
    parser.add_argument("--batch", type=int, nargs="+", default=[], metavar="SEQUENCES",
                        help="sequences decoded at once (default: 1 16; on a GPU 64 too)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens decoded in one of them (default: 16; on a GPU 100)")
    parser.add_argument("--eager", action="store_true", help="on a GPU: a loop from Python instead of a captured step")
    parser.add_argument("--compile", choices=["whole", "blocks", "no"], default="no",
                        help="on a GPU: compile the step before it is captured, or only its blocks, which takes a tenth of the "
                             "time to compile (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=os.environ.get("FILE") or None, metavar="FILE.json",
                        help="keep the rows there")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE.json", help="measure nothing, print what these hold")
    args = parser.parse_args(arguments)
    if args.show:
        print(shown(show, args.show), end="")
        return
    for context in args.context:
        if context < 2:
            raise UserError(f"--context {context} is below 2.", "leave it out for the default.")
    check_options(args, ("batch", "rounds", "tokens"), args.out)
    study = Study(args.study or ("gpt2-ra-ablation" if torch.cuda.is_available() else "gpt2-ra-ablation+tiny"))
    for step in args.steps:  # a slip of the pen ends it at once; a step that does not fit this study is a row
        step_path(parse_step(step)[0], study.config.STEPS_DIR)
    steps = args.steps or [*(steps_of(study) if args.study else []), *kinds_of_caches(study, baseline(study))]
    bench(study, steps, sorted(set(args.context)), sorted(set(args.batch)), args.rounds, args.tokens, args.eager,
          args.compile, args.out)


if __name__ == "__main__":
    with reported():
        main()
