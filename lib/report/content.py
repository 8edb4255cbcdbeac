"""The content of a report as one JSON dict: what report.json holds, and all that the other forms of it show.

Everything is read from the cells' folders and the design on record. Missing values are null; losses are in nats. A study
has one family of verdicts for its steps at their common rates and, once a learning-rate sweep is finished, a second one
for its steps at their best rates, and one for its contrasts if it has any; each family holds the error rate of the plan.
"""

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lib import design, stats
from lib.arms import Group, compare, contrasted, group, reference, refuse_copies
from lib.cells import left_out_contrasts
from lib.classes import FunctionClass, function_classes
from lib.report import caches, compression, devices, downstream, mechanisms, positions
from lib.report.views import views
from lib.tables import plural
from lib.verdicts import Comparison

if TYPE_CHECKING:
    from lib.plan import Plan

FORMAT = 1
MEANS = ("val_loss", "val_perplexity", "best_val_loss", "train_loss", "tokens", "train_seconds", "tokens_per_second",
         "parameters", "peak_memory_bytes", "kv_cache_bytes")
UNRESOLVED = ("failed", "diverged", "stale", "interrupted")  # states whose reason a reader must be told


def content(plan: "Plan") -> dict:
    """The report of a plan's study. UserError if two folders hold the same cell."""
    refuse_copies(plan)
    history, sweep = plan.history, _sweep(plan)
    test, later = design.test(history), design.later_seeds(history)
    order = list(dict.fromkeys([*plan.seeds, *(cell.seed for cell in plan.more)]))
    finished = {cell.name: (cell, plan.status[cell.name].record) for cell in [*plan.cells, *plan.more]
                if plan.status[cell.name].state == "done"}
    curves = {name: _evaluations(plan.out / name) for name in finished}
    speeds = devices.factors([(f"{cell.step} {cell.optimizer}", record) for cell, record in finished.values()])
    runs = {name: devices.levelled(curves[name], record, speeds) for name, (_, record) in finished.items()}
    steps, compared, compressed, evaluated, contrasts = [], {}, {}, [], []
    for cells, tuned in ((plan.common, None), (plan.tuned_cells, plan.tuned)):
        if not cells:
            continue
        groups = group(plan.study, plan.found(cells), tuned)
        comparisons = compare(plan.study, groups, order, test, comparisons=0 if tuned else design.comparisons(history))
        classes = function_classes({one.step: one.cells[0][0].resolved.config for one in groups})
        compared |= comparisons
        if tuned is None:
            contrasts = [_contrast(*found, test, runs, classes) for found in
                         contrasted(plan.study, groups, order, test, comparisons=design.contrasts(history))]
        compressed |= {one.name: [status.record for _, status in one.cells if status.state == "done"] for one in groups}
        evaluated += [_evaluated(plan, groups, one, comparisons.get(one.name)) for one in groups]
        steps += [_step(plan, groups, one, comparisons.get(one.name), later, test, curves, runs, classes[one.step])
                  for one in groups]
    common = [(cell, status.record) for cell, status in plan.found(plan.common) if status.state == "done"]
    records = [record for _, record in common]
    base = next(step for step in steps if step["is_baseline"])
    overrides = ", ".join(f"{a.name}={a.value}" for a in plan.study.overrides)
    last = history[-1]
    return {
        "format": FORMAT, "study": plan.study.name, "title": plan.study.name + (f" with {overrides}" if overrides else ""),
        "baseline": base["name"], "margin": plan.study.config.MARGIN,
        "plan": {"hash": last["hash"], "written": last["written"], "test": test, "metric": design.METRIC,
                 "error_rate": design.ERROR_RATE, "seeds": plan.seeds,
                 "comparisons": design.comparisons(history), "contrasts": design.contrasts(history),
                 "later_seeds": [s for s in order if s in later],
                 "max_seeds": len(last["plan"]["seeds"]) if test == "anytime" else None,
                 "sentence": design.sentence(last["plan"]), "on_record": history == plan.recorded},
        "complete": all(cell["state"] in ("done", "diverged") for step in steps for cell in step["cells"]),
        "steps": steps, "contrasts": contrasts, "sweep": sweep,
        "compression": compression.rows(compressed, test),
        "downstream": downstream.rows(evaluated), "noise": _noise(base, steps),
        "environment": _environment(records), "data": records[0]["data"] if records else None,
        "outside_budget": _outside_budget(records),
        "notes": [*_notes(plan, history, steps, compared, sweep or []), *_notes_on_contrasts(plan, history),
                  *(devices.note(speeds) or devices.apart(common, base["step"])), *_resumed(records)],
        "control_failures": [f for s in steps if (f := control_failure(s["name"], s["control"], compared.get(s["name"])))],
    }


def _evaluated(plan: "Plan", groups: list[Group], one: Group, comparison: Comparison | None) -> dict:
    """An arm as lib/report/downstream.py takes it."""
    done = [(cell, status.record) for cell, status in one.cells if status.state == "done"]
    return {"name": one.name, "baseline": reference(plan.study, groups, one).name,
            "invalid": comparison is not None and comparison.word == "INVALID",
            "seeds": {cell.seed: downstream.kept(plan.out / cell.name, record) for cell, record in done}}


def _step(plan: "Plan", groups: list[Group], one: Group, comparison: Comparison | None, later: list[int], test: str,
          evaluations: dict[str, list], runs: dict[str, tuple[list, dict]], function_class: FunctionClass) -> dict:
    base = reference(plan.study, groups, one)
    records = {cell.seed: status.record for cell, status in one.cells if status.state == "done"}
    config = one.cells[0][0].resolved.config.as_json()
    other = base.cells[0][0].resolved.config.as_json()
    states = [status.state for _, status in one.cells]
    curves = {cell.seed: evaluations[cell.name] for cell, _ in one.cells if cell.seed in records}
    return {
        "name": one.name, "step": one.step, "optimizer": one.optimizer, "help": one.help,
        "function_class": {"of": function_class.of, "relation": function_class.relation, "shown": str(function_class),
                           "sentence": function_class.sentence},
        "is_baseline": comparison is None, "control": one.control, "tuned": one.tuned,
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "seeds_done": len(records), "seeds_planned": len(one.cells), "mean": _means(list(records.values())),
        "comparison": comparison and _comparison(one, base, comparison, test, runs),
        "kv_cache": caches.compared(*([s.record for _, s in arm.cells if s.state == "done"] for arm in (one, base))),
        "configuration": config, "differs": {k: [other[k], config[k]] for k in config if config[k] != other[k]},
        "curves": [_curve(seed, rows) for seed, rows in sorted(curves.items())],
        "gates_by_layer": [gate for seed, rows in sorted(curves.items()) for gate in _gates(seed, rows)],
        "statistics": mechanisms.summary([rows for _, rows in sorted(curves.items())]),
        "cells": [{"name": cell.name, "seed": cell.seed, "state": status.state, "why": status.why, "later": cell.seed in later,
                   **{key: status.record[key] if status.record else None
                      for key in ("val_loss", "train_seconds", "tokens_per_second", "peak_memory_bytes", "finished")}}
                  for cell, status in one.cells],
    }


def _means(records: list[dict]) -> dict:
    """Means over finished seeds; null where a seed has none, e.g. a perplexity too large for a float."""
    found: dict[str, Any] = {}
    for key in MEANS:
        known = [r[key] for r in records if r[key] is not None]
        found[key] = fmean(known) if known and len(known) == len(records) else None
    found[positions.KEY] = positions.mean(records)
    found["parameters"] = records[0]["parameters"] if records else None
    found["val_loss_sd"] = stdev(r["val_loss"] for r in records) if len(records) > 1 else None
    return found


def _comparison(one: Group, base: Group, c: Comparison, test: str, runs: dict[str, tuple[list, dict]]) -> dict:
    e = c.estimate
    found = {"word": c.word, "sentence": c.sentence, "method": e and e.method, "n": e and e.n,
             "n_baseline": e and e.n_reference, "difference": e and e.difference, "low": e and e.low, "high": e and e.high,
             "p": e and e.p, "p_holm": c.p_holm, "p_sign_flip": c.p_sign_flip, "sign_flip_floor": c.sign_flip_floor,
             "p_equivalence": c.p_equivalence, "detectable": c.detectable, "seeds_needed": c.seeds_needed,
             "correlation": c.correlation, "by_seed": {str(seed): d for seed, d in c.by_seed.items()}, "gates": c.gates,
             "equal_tokens": None, "equal_seconds": None, "speed": None, "by_position": None}
    if c.by_seed:
        ours, theirs = ({cell.seed: runs[cell.name] for cell, _ in arm.cells if cell.seed in c.by_seed} for arm in (one, base))
        found |= views(ours, theirs, test)
    return found


def _contrast(one: Group, other: Group, c: Comparison, test: str, runs: dict[str, tuple[list, dict]],
              classes: dict[str, FunctionClass]) -> dict:
    ours, theirs = (classes[group.step] for group in (one, other))
    equal = ours.of == theirs.of and "inside" not in (ours.relation, theirs.relation)
    return {"name": f"{one.name} vs {other.name}", "step": one.name, "reference": other.name,
            "function_class": {"relation": "equal", "sentence": FunctionClass(one.step, other.step, "equal").sentence}
            if equal else None, "comparison": _comparison(one, other, c, test, runs)}


def _evaluations(folder: Path) -> list[dict]:
    """The evaluations in a cell's metrics.jsonl, in order; lines that are damaged are left out."""
    found = []
    try:
        with open(folder / "metrics.jsonl") as file:
            for line in file:
                if '"val_loss"' in line:
                    try:
                        row = json.loads(line)
                        if all(isinstance(row[key], int | float) for key in ("val_loss", "tokens", "train_seconds")):
                            found.append(row)
                    except (ValueError, KeyError, TypeError, RecursionError):
                        continue
    except (OSError, UnicodeDecodeError):
        pass  # curves are an extra: the numbers of the report are in metrics.json
    return found


def _curve(seed: int, rows: list[dict]) -> dict:
    return {"seed": seed, "tokens": [row["tokens"] for row in rows], "seconds": [short(row["train_seconds"]) for row in rows],
            "val_loss": [short(row["val_loss"]) for row in rows]}


def _gates(seed: int, rows: list[dict]) -> list[dict]:
    """Evolution of each statistic that modules logged by layer ("unified_ra_w_rec/layer0")."""
    found = []
    for name in sorted({key for row in rows for key in row if "/layer" in key}):
        kept = [row for row in rows if isinstance(row.get(name), int | float)]
        statistic, _, layer = name.partition("/layer")
        if layer.isdecimal():
            found.append({"seed": seed, "name": statistic, "layer": int(layer), "tokens": [row["tokens"] for row in kept],
                          "value": [short(row[name]) for row in kept]})
    return sorted(found, key=lambda gate: (gate["name"], gate["layer"]))


def short(value: float) -> float:
    """To six significant digits: a curve needs no more."""
    return float(f"{value:.6g}")


def _sweep(plan: "Plan") -> list[dict] | None:
    """The learning-rate sweep: final validation loss by step and multiple, the best one, whether that is at an end."""
    if not plan.sweep:
        return None
    best, found = plan.sweep.best() or {}, []
    for (step, optimizer), losses in plan.sweep.losses().items():
        chosen = best.get((step, optimizer))
        found.append({"step": step, "optimizer": optimizer, "best": chosen,
                      "at_end": chosen is not None and chosen in (min(losses), max(losses)),
                      "losses": {f"{m:g}": None if loss is None or math.isinf(loss) else loss for m, loss in losses.items()},
                      "diverged": [f"{m:g}" for m, loss in losses.items() if loss is not None and math.isinf(loss)]})
    return found


def _noise(base: dict, steps: list[dict]) -> dict | None:
    """The spread of the baseline over seeds, and of an A/A control against it if the study has one: the floor below which
    a single run says nothing."""
    sd, n = base["mean"]["val_loss_sd"], base["seeds_done"]
    if sd is None:
        return None
    single = stats.single_run_difference(sd, n)
    text = (f"{base['name']} over {plural(n, 'seed')} has a standard deviation of {sd:.4f} nats: two single runs of one and "
            f"the same model differ by up to {single:.4f} in 95 % of cases")
    found = {"sd": sd, "n": n, "single_run": single, "control": None, "control_sd": None}
    for step in steps:
        by_seed = (step["comparison"] or {}).get("by_seed") or {}
        if step["control"] == "null" and step["tuned"] is None and len(by_seed) > 1:
            found |= {"control": step["name"], "control_sd": stdev(by_seed.values())}
            text += f"; the A/A control {step['name']} differs from it with a standard deviation of {found['control_sd']:.4f}"
            break
    return found | {"sentence": text}


def _environment(records: list[dict]) -> dict | None:
    """That of the first finished cell, with every device that cells ran on."""
    if not records:
        return None
    known = [record["environment"] or {} for record in records]
    return known[0] | {"device": " and ".join(sorted({str(one.get("device")) for one in known}))}


def _outside_budget(records: list[dict]) -> dict | None:
    """Mean seconds of a finished cell by kind of work."""
    kinds = ("train", "other", "compile", "eval", "calibration", "checkpoint")
    return {kind: fmean(r[f"{kind}_seconds"] or 0.0 for r in records) for kind in kinds} if records else None


def _resumed(records: list[dict]) -> list[str]:
    """A note on cells that did not run through: on a GPU, or on another machine, they are not what they would have been."""
    count = sum(1 for record in records if record["resumed"])
    return [f"{count} of {plural(len(records), 'finished cell')} went on from a checkpoint"] if count else []


def _notes(plan: "Plan", history: list[dict], steps: list[dict], compared: dict[str, Comparison],
           sweep: list[dict]) -> list[str]:
    found, later = list(design.changes(history)), design.later_seeds(history)
    if later:
        text = f"seeds {' '.join(map(str, later))} were added after a look at the results"
        if design.test(history) == "fixed":
            text += f" of fewer than {design.FEWEST_SEEDS} seeds, from which no verdict could come"
        elif design.in_force(history)[0]["plan"]["test"] == "fixed":
            text += (", so all verdicts are by the anytime-valid test; what the first look claimed has spent an error rate of "
                     "its own")
        found.append(text)
    if beside := _side_by_side(plan):
        found.append(beside)
    for comparison in compared.values():
        found += [f"{comparison.name} vs {comparison.reference}: {gate}" for gate in comparison.gates[1:]]
    if sweep and all(entry["best"] == 1 for entry in sweep):
        found.append("in the learning-rate sweep every step was best at the common rate")
    for entry in sweep:
        if entry["at_end"]:
            found.append(f"{entry['step']}: the best learning rate, x{entry['best']:g}, is at the end of the sweep: "
                         "widen TUNE_LR")
    if sweep and any(entry["best"] is None for entry in sweep):
        found.append("the learning-rate sweep is not finished, so no step is compared at its best rate")
    found += [f"{step['name']} seed {cell['seed']}: {cell['state']}: {cell['why']}" for step in steps for cell in step["cells"]
              if cell["state"] in UNRESOLVED]
    for cell in plan.sweep.cells if plan.sweep else ():
        if (status := plan.status[cell.name]).state in UNRESOLVED:
            found.append(f"{cell.step} in the learning-rate sweep: {status.state}: {status.why}")
    found += [f"control {step['name']} is to lose against {step['comparison']['sentence'].split(' vs ')[1].split(':')[0]}, "
              "which these seeds do not show" for step in steps
              if step["control"] == "harm" and step["comparison"] and step["comparison"]["word"] == "INCONCLUSIVE"]
    return list(dict.fromkeys(found))


def _notes_on_contrasts(plan: "Plan", history: list[dict]) -> list[str]:
    found = []
    if added := design.added_contrasts(history):
        found.append(f"contrasts that no plan had on record before the first result ({' '.join(added)}) may have been chosen "
                     f"by it, so contrasts are corrected for all {design.contrasts(history)} that there could be")
    return found + left_out_contrasts(plan.study)


def _side_by_side(plan: "Plan") -> str | None:
    """Under a time budget, cells that shared a device have trained what their neighbours left them."""
    timed = [status.record for cell, status in plan.found(plan.common)
             if status.state == "done" and cell.resolved.config.GPT2_MAX_TIME]
    beside = sum(record.get("shared_device") is True for record in timed)
    if not beside:
        return None
    return (f"{beside} of {plural(len(timed), 'cell')} ran beside another one on the same device: what a budget of seconds "
            "trained there depended on the neighbour (CELLS_PER_GPU=1 or JOBS=1 gives each its own)")


def control_failure(name: str, control: str | None, comparison: Comparison | None) -> str | None:
    """Why a declared control shows that the study's instrument is not to be trusted, if it does."""
    expected = {"null": ("no difference from", ("BETTER", "WORSE", "NEGLIGIBLE")),
                "harm": ("a loss against", ("BETTER", "NEGLIGIBLE", "EQUIVALENT")),
                "gain": ("a gain over", ("WORSE",))}.get(control)
    if not expected or comparison is None or comparison.word not in expected[1]:
        return None
    return f"control {name} should show {expected[0]} {comparison.reference}, but: {comparison.sentence}"


def failures(plan: "Plan") -> list[str]:
    """Planned cells, and those of a learning-rate sweep, that ended without a result; the report's notes say why."""
    cells = [cell for cell in plan.cells if plan.wants(cell)] + (plan.sweep.cells if plan.sweep else [])
    return [f"{cell.step} seed {cell.seed} ({state})" for cell in cells
            if (state := plan.status[cell.name].state) in ("failed", "interrupted")]
