"""Fisher metrics of the attention of a study's finished cells, on windows of the validation set their loss was scored on.

Each done cell that has its model gets a fisher.json, unless a current one is there; the study gets fisher.json and fisher.md
beside its report: per step the mean over layers and heads, its range over seeds, and the paired difference to the baseline.
What the metrics are, and what they are not, says gpt2/fisher.py. They describe; no verdict rests on them. Arms of a
learning-rate sweep are left out. make's variables arrive in the environment (OUT=, SEEDS=, ...), as for make report.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpt2 import fisher, trained
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
NAME = "fisher.json"
HEADER = ["step", "metric", "mean", "over seeds", "seeds", "difference (95 % CI)", "Holm p"]


def basis(record: dict, windows: int) -> dict:
    """What a cell's numbers depend on; where fisher.json holds another, it is stale."""
    return {"format": FORMAT, "identity": record["identity"]["hash"], "finished": record["finished"],
            "eval_hash": record["data"]["eval_hash"], "windows_asked": windows}


def read(folder: Path, cfg: "Config") -> dict | None:
    """The fisher.json in `folder`; None if there is none that can be read, or it is not what `measure` gives of a model of
    this configuration: it may have come in somebody's archive (lib/bundle.py)."""
    try:
        found = json.loads((folder / NAME).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    names = {f"fisher/layer{layer}/head{head}/{metric}" for layer in range(cfg.GPT2_N_LAYER) for head in range(cfg.GPT2_N_HEAD)
             for metric in fisher.METRICS}
    try:
        well_formed = (found["metrics"].keys() == names and all(map(is_number, found["metrics"].values()))
                       and all(isinstance(why, str) for why in found["undefined"].values())
                       and len(found["positions"]) == 2
                       and all(type(n) is int for n in [found["windows"], *found["positions"]]))
    except (KeyError, TypeError, AttributeError):
        return None
    return found if well_formed else None


def is_number(value: Any) -> bool:
    """Whether a metric may have this value: None where it is not defined."""
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def write(path: Path, value: dict | str) -> None:
    """JSON, or text as it is."""
    try:
        write: Callable[[Path, Any], None] = atomic.write_text if isinstance(value, str) else atomic.write_json
        write(path, value)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written: {error.strerror or error}.",
                        "make it writable, or copy the folder and give the copy with make fim OUT=folder.") from None


class Windows:
    """Inputs of evaluation windows by configuration; corpora are opened once each."""

    def __init__(self) -> None:
        self.sets: dict[tuple, EvalSet] = {}

    def choose(self, cfg: "Config", eval_hash: str, count: int, name: str) -> torch.Tensor:
        """[count, T] int64, spread evenly over the evaluation set of a cell, or all of it where it has fewer.

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
        inputs = np.concatenate([x for x, _ in found])
        count = min(count, len(inputs))
        return torch.from_numpy(inputs[[i * (len(inputs) - 1) // max(1, count - 1) for i in range(count)]])


def measure(folder: Path, cell: Any, record: dict, windows: Windows, count: int) -> dict:
    """What fisher.json of a cell holds. Forward passes are float32 on the cell's device."""
    cfg = cell.resolved.with_seed(cell.seed).config
    inputs = windows.choose(cfg, record["data"]["eval_hash"], count, cell.name)
    device = runtime.setup(cfg)
    torch.set_float32_matmul_precision("highest")
    model = trained.load(folder, cfg, record["identity"]["hash"]).to(device)
    metrics, undefined = fisher.measure(model, inputs.to(device))
    number, length = inputs.shape
    return basis(record, count) | {
        "step": cell.step, "optimizer": cell.optimizer, "seed": cell.seed, "windows": number,
        "rows": number * (length - 1), "positions": [1, length - 1], "metrics": metrics,
        "undefined": {str(layer): why for layer, why in undefined.items()}}


def measure_all(plan: Plan, count: int) -> tuple[dict, dict]:
    """({cell name: its fisher.json}, {cell name: why it has none}), a line printed for each cell that is measured."""
    found, missing, windows = {}, {}, Windows()
    for cell, status in plan.found(plan.common):
        folder = plan.out / cell.name
        if status.state != "done":
            missing[cell.name] = f"{status.state}: {status.why}"
            continue
        held = read(folder, cell.resolved.config)
        if held is not None and held.items() >= basis(status.record, count).items():
            found[cell.name] = held
            print(f"{cell.name}: kept", flush=True)
            continue
        if not (folder / trained.NAME).exists():
            missing[cell.name] = "its model is not there: SAVE_MODEL was off, or it was unpacked from an archive"
            continue
        begun = time.perf_counter()
        found[cell.name] = measure(folder, cell, status.record, windows, count)
        write(folder / NAME, found[cell.name])
        means = ", ".join(f"{name} {number(mean(found[cell.name], name))}" for name in fisher.METRICS)
        print(f"{cell.name}: {why_undefined(found[cell.name]) or means}, {time.perf_counter() - begun:.1f} s", flush=True)
    return found, missing


def mean(one: dict, metric: str) -> float | None:
    """Over layers and heads; None if one of them has none, because a mean over fewer would be of something else."""
    values = [value for name, value in one["metrics"].items() if name.endswith(f"/{metric}")]
    return None if None in values else fmean(values)


def why_undefined(one: dict) -> str | None:
    """'not defined: <reason> (layers 0, 1)', for the first reason there is."""
    if not one["undefined"]:
        return None
    reason = next(iter(one["undefined"].values()))
    layers = [layer for layer, why in one["undefined"].items() if why == reason]
    return f"not defined: {reason} (layer{'s' * (len(layers) > 1)} {', '.join(layers)})"


def spread(values: list[float]) -> dict:
    """Of one number over seeds."""
    return {"mean": fmean(values), "min": min(values), "max": max(values), "sd": stdev(values) if len(values) > 1 else None}


def content(plan: Plan, found: dict, missing: dict, estimator: Any, holm: Any) -> dict:
    """What the study's fisher.json holds: its steps with their spread over seeds, head by head and on average."""
    groups = group(plan.study, plan.found(plan.common))
    arms = {one.name: {cell.seed: found[cell.name] for cell, _ in one.cells if cell.name in found} for one in groups}
    steps: list[dict] = []
    for one in groups:
        base, mine = reference(plan.study, groups, one), arms[one.name]
        metrics = {}
        for metric in fisher.METRICS:
            by_seed = {seed: mean(numbers, metric) for seed, numbers in sorted(mine.items())}
            known = [value for value in by_seed.values() if value is not None]
            metrics[metric] = {"by_seed": {str(s): v for s, v in by_seed.items()}, "spread": spread(known) if known else None,
                               "comparison": None if base is one else difference(mine, arms[base.name], metric, estimator)}
        heads = {}
        for name in next(iter(mine.values()), {"metrics": ()})["metrics"]:
            known = [numbers["metrics"][name] for numbers in mine.values() if numbers["metrics"][name] is not None]
            heads[name] = spread(known) if known else None
        steps.append({"name": one.name, "step": one.step, "optimizer": one.optimizer, "is_baseline": base is one,
                      "seeds": sorted(mine), "metrics": metrics, "heads": heads,
                      "undefined": list(dict.fromkeys(filter(None, map(why_undefined, mine.values())))),
                      "inactive": sorted({status.record["inactive"] for cell, status in one.cells
                                          if cell.name in found and status.record["inactive"]})})
    compared = [c for step in steps if not step["is_baseline"] for c in (m["comparison"] for m in step["metrics"].values())]
    for comparison, p in zip(compared, holm([c["p"] for c in compared]), strict=True):
        comparison["p_holm"] = p
    return {"format": FORMAT, "study": plan.study.name, "baseline": next(s["name"] for s in steps if s["is_baseline"]),
            "comparisons": len(compared), "rows": sorted({(one["windows"], *one["positions"]) for one in found.values()}),
            "steps": steps, "missing": missing}


def difference(arm: dict, base: dict, metric: str, estimator: Any) -> dict:
    """The paired difference over the seeds that both arms have on the same windows; nulls where there is none."""
    pairs = {seed: (mean(arm[seed], metric), mean(base[seed], metric)) for seed in sorted(arm.keys() & base.keys())
             if arm[seed]["eval_hash"] == base[seed]["eval_hash"]}
    by_seed = {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}
    e = estimator(list(by_seed.values())) if by_seed else None
    return {"by_seed": {str(seed): d for seed, d in by_seed.items()}, "n": len(by_seed), "difference": e and e.difference,
            "low": e and e.low, "high": e and e.high, "p": e and e.p, "p_holm": None}


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def page(found: dict) -> str:
    """The study's table, as Markdown."""
    from lib.verdicts import shown_p, signed

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
    said = [f"Fisher metrics of attention, {found['study']}: means over layers and heads, smallest to largest over seeds, and "
            f"differences to {found['baseline']} paired by seed.\n", table(HEADER, rows, "llrrrlr")]
    said += [f"Rows: positions {first} to {last} of {plural(windows, 'evaluation window')} a cell (position 0 sees one key)."
             for windows, first, last in found["rows"]]
    said.append(f"Intervals are each on its own; Holm's p is over all {found['comparisons']} comparisons. This is the spread "
                "of attention weights, not the curvature of the loss, and no verdict rests on it.")
    said += [f"{step['name']}: its mechanism never acted: {why}" for step in found["steps"] for why in step["inactive"]]
    said += [f"missing: {name}: {why}" for name, why in found["missing"].items()]
    return "\n".join(said) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.fim", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, metavar="N",
                        help="evaluation windows a cell; every position of them but the first is a row (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.rows < 1:
        raise UserError(f"--rows {args.rows} is below 1.", "leave it out for the default.")
    plan = Plan(options_from_environment())
    announce(plan.study)
    try:
        from lib import anytime, stats
    except ImportError as error:
        package = (error.name or "scipy").partition(".")[0]
        raise UserError(f"comparing steps needs {package}, which is not installed.", f"pip install {package}.") from None
    found, missing = measure_all(plan, args.rows)
    if not found:
        raise UserError(f"study {plan.study.name} has no finished cell with its model in {shown(plan.out)}.",
                        "run it with make first, with SAVE_MODEL=y.")
    estimator = anytime.estimate if design.test(plan.history) == "anytime" else stats.paired
    result = content(plan, found, missing, estimator, stats.holm)
    text = page(result)
    write(plan.out / NAME, result)
    write(plan.out / "fisher.md", text)
    print(f"\n{text}\nwritten to {shown(plan.out / 'fisher.md')}, .json")


if __name__ == "__main__":
    with reported():
        main()
