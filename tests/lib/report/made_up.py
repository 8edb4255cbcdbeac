"""Made-up report contents, of any size and state of repair; the same arguments give the same content."""

import copy
import math
import random

HELP = ["GPT-2 with SDPA, unchanged", "unified reciprocal attention, R=4 of 64 channels a head, gates per head",
        "V1 + one-step self-restart, out = (1-a) attention + a V", "V1 + reciprocal MLP", "V3 + mixer",
        "V3 + per-token gate on the reciprocal features", "V3 + mixer + per-token gate"]
WORDS = ["BETTER", "INCONCLUSIVE", "WORSE", "NEGLIGIBLE", "EQUIVALENT", "INVALID"]
SHIFTS = [-0.034, -0.002, 0.041, -0.006, 0.0005, 0.018]
STATES = [("failed", "CUDA out of memory: tried to allocate 2.00 GiB"), ("diverged", "loss 9.1e+04 at iteration 311"),
          ("interrupted", "stopped at iteration 120 of 500"), ("stale", "LEARNING_RATE was 0.001 and is 0.002"),
          ("planned", "there is nothing on disk")]
GATES = ("unified_ra_w_rec", "unified_ra_w_std")


def content(steps=7, seeds=3, layers=4, evaluations=20, broken=0, later=0, gates=True, configuration=60) -> dict:
    """A study of `steps` steps, baseline included; every `broken`-th cell but the baseline's lacks a result."""
    chance = random.Random(steps * 1000 + seeds)
    numbers = list(range(1337, 1337 + seeds))
    base = {f"SYMBOL_{i:02d}": i * 7 for i in range(configuration)} | {"MLP_GELU": True, "TOKENIZER": "gpt2", "RA_R": None}
    noise = {seed: chance.gauss(0, 0.006) for seed in numbers}
    rows, position, losses = [], 0, {}
    for i in range(steps):
        step = f"V{i}" if i < 7 else f"V{i % 7 or 1}@RA_R={4 + i}"
        shift = SHIFTS[(i - 1) % 6] * (1 + i // 7) if i else 0.0
        speed = 12800 * (1 - 0.02 * i % 0.3)
        cells, curves, found, by_seed = [], [], [], {}
        for seed in numbers:
            position += 1
            state, why = ("done", "its result is on disk")
            if broken and i and position % broken == 0:
                state, why = STATES[position // broken % len(STATES)]
            loss = 2.44 + shift + noise[seed] + chance.gauss(0, 0.002)
            reached = evaluations if state == "done" else evaluations // 2
            if state != "planned":
                curves.append(curve(seed, loss, reached, evaluations, speed, chance))
                found.append(seed)
            if state == "done":
                by_seed[seed] = losses[i, seed] = loss
            done = state == "done"
            cells.append({"name": f"test_{step.replace('@', '+').replace('=', '-')}_adamwspam_none"
                          + (f"_s{seed}" if seed > 1337 else ""), "seed": seed, "state": state, "why": why,
                          "later": seed >= 1337 + seeds - later, "val_loss": loss if done else None,
                          "train_seconds": 20.04 if done else None, "tokens_per_second": speed if done else None,
                          "peak_memory_bytes": 3e8 * (1 + 0.03 * i) if done else None,
                          "finished": f"2026-01-01T00:{position % 60:02d}:00+00:00" if done else None})
        own = {"RA_R": 4 + i, "MLP_GELU": False} if i else {}
        states = {s: sum(c["state"] == s for c in cells) for s in dict.fromkeys(c["state"] for c in cells)}
        rows.append({
            "name": step, "step": step, "optimizer": "adamwspam", "help": HELP[i % 7], "is_baseline": i == 0,
            "control": None, "tuned": None, "states": states, "seeds_done": len(by_seed), "seeds_planned": seeds,
            "mean": mean(list(by_seed.values()), speed, i), "comparison": comparison(step, i, by_seed, losses) if i else None,
            "configuration": base | own, "differs": {k: [base[k], v] for k, v in own.items()}, "curves": curves,
            "gates_by_layer": gate_curves(found, layers, evaluations) if gates and i in (1, 2, 4) else [], "cells": cells})
    complete = all(c["state"] == "done" for row in rows for c in row["cells"])
    return {
        "format": 1, "study": "gpt2-ra-ablation+tiny", "title": "gpt2-ra-ablation+tiny with GPT2_MAX_TIME=60",
        "baseline": "V0", "margin": 0.01, "complete": complete, "steps": rows,
        "plan": {"hash": "3f2a91c04be77d15", "test": "fixed", "metric": "final validation loss (nats)", "error_rate": 0.05,
                 "comparisons": steps - 1, "seeds": numbers[:seeds - later], "later_seeds": numbers[seeds - later:],
                 "max_seeds": None, "sentence": f"Fixed before the first cell: {steps - 1} comparisons with V0 on the final "
                 f"validation loss, {seeds} seeds, paired t intervals with Holm's correction at a family-wise error of 5 %."},
        "noise": {"sd": 0.0013, "n": seeds, "single_run": 0.0036, "sentence": "Two single runs of V0 that differ only in "
                  "their seed differ by less than 0.0036 nats in 95 % of cases."} if seeds > 1 else None,
        "environment": {"device": "AMD EPYC 7B13", "precision": "float32", "torch": "2.13.0", "python": "3.11", "threads": 1,
                        "compile": False, "source_hash": "8c1d55aa90be"},
        "data": {"name": "pystdlib", "tokenizer": "bytes", "train_tokens": 9000000, "eval_hash": "a1b2c3d4e5f6a7b8",
                 "train_hash": "b8a7f6e5d4c3b2a1", "unigram_entropy": 3.18},
        "sweep": None, "outside_budget": {"train": 20.0, "other": 1.2, "compile": 0.0, "eval": 2.1, "checkpoint": 0.3},
        "notes": ["Outside the budget a cell spent 3 s on average: start 1 s, evaluation 2 s."], "control_failures": []}


def curve(seed, loss, reached, evaluations, speed, chance) -> dict:
    share = [(k + 1) / evaluations for k in range(reached)]
    return {"seed": seed, "tokens": [round(256000 * s) for s in share], "seconds": [256000 * s / speed for s in share],
            "val_loss": [loss + 3.2 * math.exp(-5 * s) - 3.2 * math.exp(-5) + chance.gauss(0, 0.004) * (s < 1) for s in share]}


def gate_curves(seeds, layers, evaluations) -> list[dict]:
    share = [(k + 1) / evaluations for k in range(evaluations)]
    return [{"seed": seed, "name": name, "layer": layer, "tokens": [round(256000 * s) for s in share],
             "value": [(0.0625 if g == 0 else 0.94) + (0.02 * layer + 0.001 * (seed - 1337)) * s * (1 - 2 * g) for s in share]}
            for seed in seeds for g, name in enumerate(GATES) for layer in range(layers)]


def mean(losses, speed, i) -> dict:
    keys = ("val_loss", "val_loss_sd", "val_perplexity", "best_val_loss", "train_loss", "tokens", "train_seconds",
            "tokens_per_second", "parameters", "peak_memory_bytes", "kv_cache_bytes")
    if not losses:
        return dict.fromkeys(keys)
    loss = sum(losses) / len(losses)
    sd = math.sqrt(sum((x - loss) ** 2 for x in losses) / (len(losses) - 1)) if len(losses) > 1 else None
    return dict(zip(keys, (loss, sd, math.exp(loss), loss, loss - 0.1, 256000.0, 20.04, speed, 453632 + 96 * i,
                           3e8 * (1 + 0.03 * i), 4096), strict=True))


def comparison(step, i, by_seed, losses) -> dict:
    pairs = {str(seed): loss - losses[0, seed] for seed, loss in by_seed.items() if (0, seed) in losses}
    n = len(pairs)
    empty = dict.fromkeys(("method", "difference", "low", "high", "p", "p_holm", "p_sign_flip", "sign_flip_floor",
                           "p_equivalence", "detectable", "seeds_needed", "correlation", "equal_tokens", "equal_seconds",
                           "speed"))
    if not n:
        return empty | {"word": "INCOMPLETE", "sentence": f"{step} vs V0: no pair of finished cells: INCOMPLETE.", "n": 0,
                        "n_baseline": 3, "by_seed": {}, "gates": []}
    difference = sum(pairs.values()) / n
    sd = math.sqrt(sum((x - difference) ** 2 for x in pairs.values()) / (n - 1)) if n > 1 else None
    half = sd / math.sqrt(n) * {2: 12.7, 3: 4.3, 4: 3.18}.get(n, 2.5) if sd else None
    word = WORDS[(i - 1) % 6] if n > 2 else "UNDERPOWERED"
    low, high = (difference - half, difference + half) if half else (None, None)
    text = f"95 % CI {low:+.4f}..{high:+.4f}, " if half else ""
    seen = {"difference": difference, "low": low, "high": high, "n": n}
    return empty | {
        "word": word, "method": "paired", "n": n, "n_baseline": n, "difference": difference, "low": low, "high": high,
        "sentence": f"{step} vs V0: {difference:+.4f} nats ({text}{n} paired seeds, Holm p .62): {word}; {n} seeds can see "
                    "0.0054; about 21 needed for 0.0021.", "p": 0.21, "p_holm": 0.62, "by_seed": pairs,
        "gates": ["device differs: AMD EPYC 7B13 and NVIDIA H100"] if word == "INVALID" else [],
        "equal_tokens": seen | {"at": 256000.0}, "equal_seconds": (seen | {"at": 19.8}) if i % 3 else None,
        "speed": {"ratio": 1 - 0.02 * i % 0.3, "low": 0.99 - 0.02 * i % 0.3 if n > 1 else None,
                  "high": 1.01 - 0.02 * i % 0.3 if n > 1 else None, "n": n}}


def small() -> dict:
    return content(steps=2, seeds=1, layers=2, evaluations=5)


def normal() -> dict:
    return content(later=1)


def large() -> dict:
    """Partly failed, one step without any result, one with a huge difference, one diverging curve, a control that fails."""
    made = content(steps=16, seeds=8, layers=12, evaluations=60, broken=5, configuration=110)
    lost = made["steps"][9]
    for cell in lost["cells"]:
        cell.update(state="failed", why=STATES[0][1], val_loss=None, finished=None)
    lost.update(states={"failed": 8}, seeds_done=0, mean=mean([], 0, 0), comparison=comparison(lost["name"], 9, {}, {}),
                curves=[], gates_by_layer=[])
    harmed = made["steps"][8]
    harmed["control"] = "harm"
    for key in ("difference", "low", "high"):
        harmed["comparison"][key] += 1.9
    harmed["comparison"]["by_seed"] = {k: v + 1.9 for k, v in harmed["comparison"]["by_seed"].items()}
    lost = made["steps"][11]["curves"][0]["val_loss"]
    lost[10:] = [4 + k for k in range(len(lost) - 10)]
    made["control_failures"] = ["A0 is WORSE, which an A/A control must not be: distrust every verdict of this study."]
    return made


def tuned() -> dict:
    """A study after a learning-rate sweep: a second family of steps, with a baseline of its own."""
    made = content(steps=3)
    again = [copy.deepcopy(step) | {"name": f"{step['name']} (tuned lr x2)", "tuned": 2.0} for step in made["steps"]]
    sweep = [{"step": s["step"], "optimizer": "adamwspam", "best": 2.0, "at_end": i == 1,
              "losses": {"0.5": 2.5, "1": 2.45, "2": 2.4, "10": None}} for i, s in enumerate(again)]
    return made | {"steps": made["steps"] + again, "sweep": sweep}


def empty() -> dict:
    """A study of which nothing has run."""
    made = content(steps=2, seeds=1, gates=False)
    for row in made["steps"]:
        row.update(states={"planned": 1}, seeds_done=0, mean=mean([], 0, 0), curves=[], gates_by_layer=[])
        row["cells"][0].update(state="planned", why=STATES[4][1], val_loss=None, train_seconds=None, tokens_per_second=None,
                               peak_memory_bytes=None, finished=None)
    made["steps"][1]["comparison"] = comparison("V1", 1, {}, {})
    return made | {"complete": False, "outside_budget": None, "environment": None, "data": None, "noise": None, "notes": []}
