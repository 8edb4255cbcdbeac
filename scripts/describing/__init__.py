"""What is measured of the models of finished cells after training, and describes them: the part that all such tools share.

A tool says what it measures by a `Measure` and calls `main`. Each done cell that has its model gets <name>.json, unless a
current one is there; the study gets <name>.json and <name>.md beside its report: per step the mean, its range over seeds, and
the paired difference to the baseline (or, of what a baseline does not have, the mean with its interval). No verdict rests on
them. Arms of a learning-rate sweep are left out. make's variables arrive in the environment (OUT=, SEEDS=, ...), as for
make report. Measuring happens on windows of the validation set that the cell's loss was scored on, in float32 on its device.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpt2 import trained
from lib import atomic, design, runtime
from lib.arms import group, reference
from lib.config import announce
from lib.data import EvalSet, draw_size, evaluation_set, open_corpus
from lib.errors import UserError, reported
from lib.paths import shown
from lib.plan import Plan
from lib.tables import plural, table
from scripts.plan import options_from_environment

if TYPE_CHECKING:
    from lib.config import Config

FORMAT = 1


@dataclass(frozen=True)
class Option:
    """A count that the measuring depends on; a file that was measured with another one is stale."""

    default: int
    help: str


@dataclass(frozen=True)
class Measure:
    """What a tool measures.

    `of(model, inputs, targets, **options)`: ({metric: number or None}, {layer: why it has none}) of a model and windows
    [n, T] int64 on its device. Metrics are named <name>/.../<last part>; the table has the means over those of one last part.
    `names(cfg)`: all metrics of a model of this configuration; empty if it has none of these. `first`: the first position that
    counts. `about(content)`: lines below the table. `beside_baseline` False: compared with 0, for what a baseline lacks.
    """

    goal: str
    name: str
    title: str
    metrics: tuple[str, ...]
    of: Callable[..., tuple[dict, dict]]
    names: Callable[["Config"], set[str]]
    about: Callable[[dict], list[str]]
    absent: str = ""
    first: int = 0
    windows: int = 4
    options: dict[str, Option] = field(default_factory=dict)
    beside_baseline: bool = True

    @property
    def file(self) -> str:
        return f"{self.name}.json"


def basis(record: dict, counts: dict) -> dict:
    """What a cell's numbers depend on; where its file holds another, it is stale. `counts`: windows_asked and the options."""
    return {"format": FORMAT, "identity": record["identity"]["hash"], "finished": record["finished"],
            "eval_hash": record["data"]["eval_hash"], **counts}


def read(what: Measure, folder: Path, cfg: "Config") -> dict | None:
    """The file in `folder`; None if there is none that can be read, or it is not what is measured of a model of this
    configuration: it may have come in somebody's archive (lib/bundle.py)."""
    try:
        found = json.loads((folder / what.file).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    try:
        well_formed = (found["metrics"].keys() == what.names(cfg) and all(map(is_number, found["metrics"].values()))
                       and all(isinstance(why, str) for why in found["undefined"].values())
                       and len(found["positions"]) == 2
                       and all(type(n) is int for n in [found["windows"], *found["positions"]]))
    except (KeyError, TypeError, AttributeError):
        return None
    return found if well_formed else None


def is_number(value: Any) -> bool:
    """Whether a metric may have this value: None where it is not defined."""
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def write(what: Measure, path: Path, value: dict | str) -> None:
    """JSON, or text as it is."""
    try:
        write: Callable[[Path, Any], None] = atomic.write_text if isinstance(value, str) else atomic.write_json
        write(path, value)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written: {error.strerror or error}.",
                        f"make it writable, or copy the folder and give the copy with make {what.goal} OUT=folder.") from None


class Windows:
    """Evaluation windows by configuration; corpora are opened once each."""

    def __init__(self) -> None:
        self.sets: dict[tuple, EvalSet] = {}

    def choose(self, cfg: "Config", eval_hash: str, count: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [count, T] int64, spread evenly over a cell's evaluation set, or all of it where it has fewer.

        UserError if the set is not the one with this hash.
        """
        key = (cfg.DATASET, cfg.TOKENIZER, cfg.DATA_DIR, cfg.DATA_LOCAL_DIR, cfg.GPT2_EVAL_SAMPLES, draw_size(cfg),
               cfg.GPT2_BLOCK_SIZE)
        if key not in self.sets:
            corpus = open_corpus(cfg)
            self.sets[key] = evaluation_set(cfg, corpus)
        found = self.sets[key]
        if found.hash != eval_hash:
            raise UserError(f"the validation set of {cfg.DATASET} is not the one that {name} was evaluated on.",
                            "use the data (for pystdlib: the Python) that the cell was trained with.")
        inputs, targets = (np.concatenate(parts) for parts in zip(*found, strict=True))
        count = min(count, len(inputs))
        chosen = [i * (len(inputs) - 1) // max(1, count - 1) for i in range(count)]
        return torch.from_numpy(inputs[chosen]), torch.from_numpy(targets[chosen])


def measure(what: Measure, folder: Path, cell: Any, record: dict, windows: Windows, counts: dict) -> dict:
    """What the file of a cell holds."""
    cfg = cell.resolved.with_seed(cell.seed).config
    inputs, targets = windows.choose(cfg, record["data"]["eval_hash"], counts["windows_asked"], cell.name)
    device = runtime.setup(cfg)
    torch.set_float32_matmul_precision("highest")
    model = trained.load(folder, cfg, record["identity"]["hash"]).to(device)
    metrics, undefined = what.of(model, inputs.to(device), targets.to(device), **{name: counts[name] for name in what.options})
    number, length = inputs.shape
    return basis(record, counts) | {
        "step": cell.step, "optimizer": cell.optimizer, "seed": cell.seed, "windows": number,
        "rows": number * (length - what.first), "positions": [what.first, length - 1], "metrics": metrics,
        "undefined": {str(layer): why for layer, why in undefined.items()}}


def measure_all(what: Measure, plan: Plan, counts: dict) -> tuple[dict, dict]:
    """({cell name: its file's content}, {cell or step: why it has none}), a line printed for each cell that is measured."""
    found, missing, windows = {}, {}, Windows()
    for cell, status in plan.found(plan.common):
        folder = plan.out / cell.name
        if status.state != "done":
            missing[cell.name] = f"{status.state}: {status.why}"
            continue
        if not what.names(cell.resolved.config):
            missing[cell.step] = what.absent  # once a step: it is so for every seed
            continue
        held = read(what, folder, cell.resolved.config)
        if held is not None and held.items() >= basis(status.record, counts).items():
            found[cell.name] = held
            print(f"{cell.name}: kept", flush=True)
            continue
        if not (folder / trained.NAME).exists():
            missing[cell.name] = "its model is not there: SAVE_MODEL was off, or it was unpacked from an archive"
            continue
        begun = time.perf_counter()
        found[cell.name] = measure(what, folder, cell, status.record, windows, counts)
        write(what, folder / what.file, found[cell.name])
        means = ", ".join(f"{name} {number(mean(found[cell.name], name))}" for name in what.metrics)
        print(f"{cell.name}: {why_undefined(found[cell.name]) or means}, {time.perf_counter() - begun:.1f} s", flush=True)
    return found, missing


def mean(one: dict, metric: str) -> float | None:
    """Over all that have this last part; None if one of them has no value, because a mean over fewer would be of something
    else."""
    values = [value for name, value in one["metrics"].items() if name.endswith(f"/{metric}")]
    return None if None in values else fmean(values)


def why_undefined(one: dict) -> str | None:
    """'not defined: <reason> (layers 0, 1)', for the first reason there is; of a whole model without its layers."""
    if not one["undefined"]:
        return None
    reason = next(iter(one["undefined"].values()))
    layers = [layer for layer, why in one["undefined"].items() if why == reason and layer.isdecimal()]
    return f"not defined: {reason}" + (f" (layer{'s' * (len(layers) > 1)} {', '.join(layers)})" if layers else "")


def spread(values: list[float]) -> dict:
    """Of one number over seeds."""
    return {"mean": fmean(values), "min": min(values), "max": max(values), "sd": stdev(values) if len(values) > 1 else None}


def content(what: Measure, plan: Plan, found: dict, missing: dict, estimator: Any, holm: Any) -> dict:
    """What the study's file holds: its steps with their spread over seeds, each metric by itself and the means."""
    groups = group(plan.study, plan.found(plan.common))
    arms = {one.name: {cell.seed: found[cell.name] for cell, _ in one.cells if cell.name in found} for one in groups}
    steps: list[dict] = []
    for one in groups:
        base, mine = reference(plan.study, groups, one), arms[one.name]
        if not mine and not what.names(one.cells[0][0].resolved.config):
            continue
        metrics = {}
        for metric in what.metrics:
            by_seed = {seed: mean(numbers, metric) for seed, numbers in sorted(mine.items())}
            known = [value for value in by_seed.values() if value is not None]
            comparison = None
            if not what.beside_baseline:
                comparison = estimated({seed: value for seed, value in by_seed.items() if value is not None}, estimator)
            elif base is not one:
                comparison = difference(mine, arms[base.name], metric, estimator)
            metrics[metric] = {"by_seed": {str(s): v for s, v in by_seed.items()}, "spread": spread(known) if known else None,
                               "comparison": comparison}
        heads = {}
        for name in next(iter(mine.values()), {"metrics": ()})["metrics"]:
            known = [numbers["metrics"][name] for numbers in mine.values() if numbers["metrics"][name] is not None]
            heads[name] = spread(known) if known else None
        steps.append({"name": one.name, "step": one.step, "optimizer": one.optimizer, "is_baseline": base is one,
                      "seeds": sorted(mine), "metrics": metrics, "heads": heads,
                      "undefined": list(dict.fromkeys(filter(None, map(why_undefined, mine.values())))),
                      "inactive": sorted({status.record["inactive"] for cell, status in one.cells
                                          if cell.name in found and status.record["inactive"]})})
    compared = [c for step in steps for c in (m["comparison"] for m in step["metrics"].values()) if c is not None]
    for comparison, p in zip(compared, holm([c["p"] for c in compared]), strict=True):
        comparison["p_holm"] = p
    return {"format": FORMAT, "study": plan.study.name,
            "baseline": next((s["name"] for s in steps if s["is_baseline"]), None), "comparisons": len(compared),
            "rows": sorted({(one["windows"], *one["positions"]) for one in found.values()}), "steps": steps, "missing": missing}


def difference(arm: dict, base: dict, metric: str, estimator: Any) -> dict:
    """The paired difference over the seeds that both arms have on the same windows; nulls where there is none."""
    pairs = {seed: (mean(arm[seed], metric), mean(base[seed], metric)) for seed in sorted(arm.keys() & base.keys())
             if arm[seed]["eval_hash"] == base[seed]["eval_hash"]}
    return estimated({seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}, estimator)


def estimated(by_seed: dict[int, float], estimator: Any) -> dict:
    e = estimator(list(by_seed.values())) if by_seed else None
    return {"by_seed": {str(seed): d for seed, d in by_seed.items()}, "n": len(by_seed), "difference": e and e.difference,
            "low": e and e.low, "high": e and e.high, "p": e and e.p, "p_holm": None}


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def signed(value: float) -> str:
    return number(value) if value <= 0 else f"+{number(value)}"


def page(what: Measure, found: dict) -> str:
    """The study's table, as Markdown."""
    from lib.verdicts import shown_p

    rows = []
    for step in found["steps"]:
        if step["undefined"]:
            rows += [[step["name"], "", "", "", len(step["seeds"]), why, ""] for why in step["undefined"]]
            continue
        for metric, one in step["metrics"].items():
            s, c = one["spread"], one["comparison"]
            if s is None:
                rows += [[step["name"], metric, "none", "", len(step["seeds"]), "", ""]] if step["seeds"] else []
                continue
            apart = "" if c is None or c["difference"] is None else signed(c["difference"])
            if apart and c["low"] is not None:
                apart += f" ({signed(c['low'])}..{signed(c['high'])})"
            rows.append([step["name"], metric, number(s["mean"]), f"{number(s['min'])} .. {number(s['max'])}",
                         len(step["seeds"]), apart, "" if c is None or c["p_holm"] is None else shown_p(c["p_holm"])])
    against = f"and differences to {found['baseline']} paired by seed" if what.beside_baseline else "and their mean beside 0"
    header = ["step", "metric", "mean", "over seeds", "seeds", "difference (95 % CI)" if what.beside_baseline else
              "mean (95 % CI)", "Holm p"]
    notes = [*what.about(found), f"Intervals are each on its own; Holm's p is over all {found['comparisons']} comparisons. No "
             "verdict rests on them.",
             *(f"{step['name']}: its mechanism never acted: {why}" for step in found["steps"] for why in step["inactive"]),
             *(f"missing: {name}: {why}" for name, why in found["missing"].items())]
    return (f"# {what.title}, {found['study']}\n\nSmallest to largest over seeds, {against}.\n\n"
            + table(header, rows, "llrrrlr") + "".join(f"\n- {note}" for note in notes) + "\n")


def windows_said(found: dict) -> list[str]:
    """'Positions 1 to 23 of 2 evaluation windows a cell.'"""
    return [f"Positions {first} to {last} of {plural(windows, 'evaluation window')} a cell."
            for windows, first, last in found["rows"]]


def main(what: Measure, description: str, arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m scripts.{what.goal}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"rows": Option(what.windows, "evaluation windows a cell")} | what.options
    for name, option in options.items():
        parser.add_argument(f"--{name}", type=int, default=option.default, metavar="N",
                            help=f"{option.help} (default: %(default)s)")
    counts = vars(parser.parse_args(arguments))
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name} {value} is below 1.", "leave it out for the default.")
    counts["windows_asked"] = counts.pop("rows")
    plan = Plan(options_from_environment())
    announce(plan.study)
    try:
        from lib import anytime, stats
    except ImportError as error:
        package = (error.name or "scipy").partition(".")[0]
        raise UserError(f"comparing steps needs {package}, which is not installed.", f"pip install {package}.") from None
    found, missing = measure_all(what, plan, counts)
    if not found:
        if what.absent and all(why == what.absent for why in missing.values()):
            raise UserError(f"no cell of study {plan.study.name} can be measured: {what.absent}.",
                            "choose a study that has one.")
        raise UserError(f"study {plan.study.name} has no finished cell with its model in {shown(plan.out)}.",
                        "run it with make first, with SAVE_MODEL=y.")
    estimator = anytime.estimate if design.test(plan.history) == "anytime" else stats.paired
    result = content(what, plan, found, missing, estimator, stats.holm)
    text = page(what, result)
    write(what, plan.out / what.file, result)
    write(what, plan.out / f"{what.name}.md", text)
    print(f"\n{text}\nwritten to {shown(plan.out / f'{what.name}.md')}, .json")


def run(what: Measure, description: str | None) -> None:
    """As a program."""
    with reported():
        main(what, description or "")
