"""Whether torch.compile makes whole programs of every step: graph breaks, programs, recompilations.

Every program there is (steps that differ only in training, such as the learning rate, are one) is compiled as a cell compiles
it, as a whole model and as regions (COMPILE_REGIONS), in float32 and under bfloat16 autocast, and used: training passes with
penalties and backward, then evaluation. It need not be fast for that, so the compiler's last stage is left out (aot_eager;
--backend inductor has it), and on a CPU autocast is entered as on a GPU, though cells do not. Counted are

- breaks: places where Python goes on outside a program, or else by how many programs a pass calls more or fewer than one (and
  one a block), for a function may be left uncompiled without a word. The compiler goes on as in a cell, so all are counted;
  none is what fullgraph=True asks for.
- anew: programs made by what ran before: a second training pass, training after evaluation and the reverse.
- whole, blocks: programs of a training pass + those that the switch to evaluation adds, over all layers (and one for what
  follows the blocks); `layers` says which layers share one. Regions are of --layers layers, so that what only the first,
  the last or a half of them has is told from what every layer has for itself.

A mechanism that follows the budget is led through a whole one, moment by moment, with skip gates closing on the way, those of
half of the layers first. Where it says that its program changed it is compiled anew, as the loop does, and counted again
(`phases`); a training pass at every other moment may compile nothing, for that would be on the budget. A step passes if no
count of breaks or anew is above 0 and a whole model is one program. Exit status 1 if a step does not.

The steps are the study's baseline, those of gpt2/steps and the overrides that studies list (V1@RA_GATES_FIXED=y); any of them
fits into any study. Rows are printed, and --out is written, as they are known. --show prints such files again.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import torch

from gpt2.model import GPT
from gpt2.skip import gates
from lib import atomic, runtime
from lib.batch_size import SAME_MEMORY
from lib.cells import baseline
from lib.config import Study, defconfig_layers, defconfig_names, parse_step
from lib.errors import UserError, reported
from lib.loop import compile_model
from lib.mechanisms import Mechanisms, Moment
from lib.steps import step_files, step_path
from lib.tables import table, table_head, table_row
from scripts import benching
from scripts.benching import SAME_PROGRAM, shown

if TYPE_CHECKING:
    from lib.config import Config

FORMAT = 1
FORMS = ("whole", "blocks")
PRECISIONS = ("float32", "bfloat16")
BATCH = 2
MOMENTS = 20  # of a budget
OPTIMIZER = re.compile(r"(OPTIMIZER|ADAM|SINKGD|SPAM)(_|$)|GRAD_CLIP$")  # works on what programs leave behind
HEADER = ["step", "phases", "breaks", "anew", "whole", "blocks", "layers", "seconds", "note"]
RIGHT = "lrrrrrlrl"


class Watch:
    """A backend that hands graphs on to another, and keeps which of them were called, in order, numbered as they were made."""

    def __init__(self, backend: str):
        self.compile, self.made, self.called = torch._dynamo.lookup_backend(backend), 0, []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        program, number = self.compile(graph, inputs), self.made
        self.made += 1

        def call(*arguments: Any) -> Any:
            self.called.append(number)
            return program(*arguments)

        return call


class Traced:
    """A model that is compiled in one form and precision, and what its passes make and call."""

    def __init__(self, cfg: "Config", device: torch.device, form: str, precision: str, watch: Watch):
        self.device, self.form, self.precision, self.watch = device, form, precision, watch
        self.called: list[int] = []  # by the last forward pass
        self.model = GPT(cfg).to(device)
        self.mechanisms = Mechanisms(self.model)
        compile_model(cfg.replace(COMPILE_REGIONS=form == "blocks"), self.model)
        tokens = torch.randint(cfg.VOCAB_SIZE, (BATCH, cfg.GPT2_BLOCK_SIZE + 1), generator=torch.Generator().manual_seed(0))
        self.x, self.y = tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)

    def run(self, training: bool) -> int:
        """One pass, with its backward pass in training; how many programs were made for it."""
        before = self.watch.made
        self.watch.called.clear()
        self.model.train(training)
        with torch.set_grad_enabled(training):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                _, loss = self.model(self.x, self.y)
            self.called = list(self.watch.called)  # a backward pass may call some again
            if training:
                (loss + self.mechanisms.penalty()).backward()
                self.model.zero_grad(set_to_none=True)
        return self.watch.made - before

    def phase(self, progress: float) -> dict:
        """Compile what the model is now, and count."""
        torch.compiler.reset()
        counters, utils = torch._dynamo.utils.counters, torch._dynamo.utils
        counters.clear()
        utils.clear_compilation_metrics()
        programs = self.run(training=True)
        called = self.called
        whys = [metric.recompile_reason for metric in utils.get_compilation_metrics() if metric.recompile_reason]
        anew = self.run(training=True)
        evaluation = self.run(training=False)
        expected = len(self.model.transformer.h) + 1 if self.form == "blocks" else 1
        beside = max(abs(len(calls) - expected) for calls in (called, self.called))
        anew += self.run(training=True) + self.run(training=False)
        reasons = [first_line(why) for why in counters["graph_break"]]
        return {"progress": progress, "programs": programs, "evaluation": evaluation, "anew": anew,
                "breaks": max(sum(counters["graph_break"].values()), beside), "reasons": reasons,
                "called": [number - min(called) for number in called],
                "differ": list(dict.fromkeys(map(guard, whys)))}

    def phases(self) -> list[dict]:
        """The phases of a budget; what was compiled between them is the `anew` of the one that was there."""
        found = [self.phase(0.0)]
        if not any(hasattr(module, "advance") for module in self.model.modules()):
            return found
        closing = list(gates(self.model.transformer.h).values())
        first_loss, loss = 5.0, torch.tensor(4.0, device=self.device)
        for number in range(MOMENTS):
            progress = number / MOMENTS
            if number == MOMENTS // 4:
                close(closing[:len(closing) // 2])  # layers are then unlike each other
            elif len(found) > 1:
                close(closing)
            # More steps than any mechanism counts; an evaluation half-way, after which the loss is low.
            moment = Moment(number * 10 ** 6, progress, loss, first_loss, 1.0 if progress >= 0.5 else None)
            if self.mechanisms.advance(moment):
                found.append(self.phase(progress))
            else:
                found[-1]["anew"] += self.run(training=True)
        return found


@torch.no_grad()
def close(closing: list) -> None:
    for gate in closing:
        gate.logit.fill_(-1.0)


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:150]


def guard(why: str) -> str:
    """What two programs differ in, of the compiler's reason: 'self.attn.fixed == True'."""
    said = re.split(r"\s{2,}#|\n", why.partition(": ")[2])[0].strip()
    return re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", said)[:150]


def trace(cfg: "Config", form: str, precision: str, backend: str, layers: int) -> dict:
    """What came of one program in one form and precision."""
    begun = time.monotonic()
    found = {"form": form, "precision": precision, "phases": [], "error": None}
    if form == "blocks":
        cfg = cfg.replace(GPT2_N_LAYER=layers)
    watch, device = Watch(backend), runtime.setup(cfg)
    try:
        with torch.compiler.set_stance("default", force_backend=watch):
            found["phases"] = Traced(cfg, device, form, precision, watch).phases()
    except Exception as error:  # a step that does not compile is a row
        found["error"] = benching.failure(error)
    torch.compiler.reset()
    benching.release(device)
    return found | {"seconds": time.monotonic() - begun}


def traces(cfg: "Config", backend: str, layers: int) -> list[dict]:
    """One program in all forms and precisions."""
    return [trace(cfg, form, precision, backend, layers) for form in FORMS for precision in PRECISIONS]


def end_with_parent() -> None:
    """In a process of a pool, which otherwise would wait for work for good after its parent was killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def broken(row: dict) -> str | None:
    """Why a step does not pass; None if it does."""
    if row["error"]:
        return row["error"]
    for run in row["runs"]:
        where = f"{run['form']}, {run['precision']}"
        if run["error"]:
            return f"{where}: {run['error']}"
        for phase in run["phases"]:
            if phase["breaks"]:
                return f"{where}: {(phase['reasons'] or ['a part is left uncompiled'])[0]}"
            if phase["anew"]:
                return f"{where}: compiled anew"
            if run["form"] == "whole" and (phase["programs"], phase["evaluation"]) != (1, 1):
                return f"{where}: {phase['programs']} + {phase['evaluation']} programs"
    return None


def pattern(phase: dict) -> str:
    """A letter a layer, the same for layers that share a program."""
    return "".join(ascii_uppercase[number % 26] for number in phase["called"][:-1])


def line(row: dict) -> list[str]:
    """A row for people: the most of anything over precisions and phases."""
    if row["as"]:
        return [row["step"], *[""] * 7, f"as {row['as']}"]
    phases = {form: [p for run in row["runs"] if run["form"] == form for p in run["phases"]] for form in FORMS}
    if not all(phases.values()):
        return [row["step"], *[""] * 7, broken(row)]
    both = phases["whole"] + phases["blocks"]

    def programs(form: str) -> str:
        return " + ".join(str(max(phase[kind] for phase in phases[form])) for kind in ("programs", "evaluation"))

    differ = "; ".join(dict.fromkeys(why for phase in phases["blocks"] for why in phase["differ"]))
    note = broken(row) or (f"differ by {differ}" if differ else "")
    return [row["step"], str(max(len(run["phases"]) for run in row["runs"])), str(max(p["breaks"] for p in both)),
            str(max(p["anew"] for p in both)), programs("whole"), programs("blocks"),
            " ".join(dict.fromkeys(map(pattern, phases["blocks"]))), f"{sum(run['seconds'] for run in row['runs']):.0f}", note]


def summary(rows: list[dict]) -> str:
    """What a table comes to, in two sentences."""
    own = [row for row in rows if row["runs"]]
    bad = [row["step"] for row in rows if broken(row)]
    shared = sum(all(len(set(phase["called"][:-1])) <= 1 for run in row["runs"] if run["form"] == "blocks"
                     for phase in run["phases"]) for row in own)
    verdict = f"{' '.join(bad)} do not compile into whole programs." if bad else "All compile without graph breaks."
    return f"{len(rows)} steps, {len(own)} programs. {verdict} In {shared} of them all layers share one program at every time."


def show(path: Path) -> str:
    """What a file written by --out holds, as Markdown."""
    record = json.loads(path.read_text())
    where = record["environment"]
    return (f"### {path.stem}\n\n{where['device']}, torch {where['torch']}, {record['backend']}; {record['study']}"
            f"{', ' * bool(record['set'])}{' '.join(record['set'])}, regions of {record['layers']} layers. "
            f"{summary(record['rows'])}\n\n" + table(HEADER, [line(row) for row in record["rows"]], RIGHT))


def all_steps(first: str) -> list[str]:
    """`first`, every step there is, and every override of one that a study lists."""
    listed = [a.value.split() for name in defconfig_names() for layer in defconfig_layers(name) for a in layer
              if a.name == "ABLATION_STEPS"]
    return list(dict.fromkeys([first, *step_files(), *(step for steps in listed for step in steps if "@" in step)]))


def program(cfg: "Config") -> tuple:
    """What two steps that are one program agree in."""
    left_out = {*SAME_PROGRAM, *SAME_MEMORY}
    return tuple((name, value) for name, value in cfg.as_json().items() if name not in left_out and not OPTIMIZER.match(name))


def matrix(study: Study, steps: list[str], settings: list[str], backend: str, layers: int, jobs: int, out: Path | None) -> bool:
    """Trace `steps`; print a row for each, and keep them in `out`. Whether all pass."""
    cfg = study.resolve(baseline(study)).config
    environment = benching.environment(cfg, runtime.setup(cfg), True)
    record = {"format": FORMAT, "study": study.name, "set": settings, "backend": backend, "layers": layers,
              "environment": environment, "rows": []}
    rows, first = {}, {}  # first: program -> (the first step that is it, its configuration)
    for step in steps:
        rows[step] = {"step": step, "as": None, "error": None, "runs": []}
        try:
            own = study.resolve(step).config
        except UserError as error:
            rows[step]["error"] = error.what
            continue
        of = first.setdefault(program(own), (step, own))[0]
        rows[step]["as"] = of if of != step else None
    widths = [max(map(len, ["step", *steps])), 6, 6, 4, 5, 6, 6, 7, 4]
    print(table_head(HEADER, widths, RIGHT), end="", flush=True)
    say = benching.narrator()
    with ExitStack() as stack:
        if jobs > 1:  # fresh processes, for a compiler's threads do not survive a fork
            pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), end_with_parent)
            stack.callback(pool.shutdown, cancel_futures=True)
            calls = {step: pool.submit(traces, own, backend, layers).result for step, own in first.values()}
        else:
            calls = {step: partial(traces, own, backend, layers) for step, own in first.values()}
        for number, (step, row) in enumerate(rows.items(), 1):
            if step in calls:
                say(f"{number} of {len(rows)}: {step}")
                row["runs"] = calls[step]()
            record["rows"].append(row)
            print(table_row(line(row), widths, RIGHT), end="", flush=True)
            if out:
                atomic.write_json(out, record)
    print(f"\n{summary(record['rows'])}")
    return not any(map(broken, record["rows"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.compile_matrix", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="V1 or V1@RA_R=8 (default: every step there is)")
    parser.add_argument("--study", default=os.environ.get("STUDY") or "gpt2-ra-ablation+tiny",
                        help="whose sizes (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="SYMBOL=VALUE", help="symbols of all steps: GPT2_DROPOUT=0.1")
    parser.add_argument("--backend", choices=["eager", "aot_eager", "inductor"], default="aot_eager",
                        help="how far programs are compiled: to the graph of the forward pass, of the backward pass too, or to "
                             "the end (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of a model that is compiled as regions (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=os.environ.get("FILE") or None, metavar="FILE.json",
                        help="keep the rows there")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE.json", help="compile nothing, print what these hold")
    args = parser.parse_args(arguments)
    if args.show:
        print(shown(show, args.show), end="")
        return 0
    benching.check_options(args, ("layers", "jobs"), args.out)
    study = Study(args.study, overrides=benching.assignments(args.set, "--set"))
    for step in args.steps:  # a slip of the pen ends it at once; a step that does not fit this study is a row
        step_path(parse_step(step)[0], study.config.STEPS_DIR)
    steps = list(dict.fromkeys(args.steps or all_steps(baseline(study))))
    return 0 if matrix(study, steps, args.set, args.backend, args.layers, args.jobs, args.out) else 1


if __name__ == "__main__":
    with reported():
        sys.exit(main())
