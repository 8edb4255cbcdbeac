"""What was fixed before the first cell, and what was changed after: OUT/plan/design.json.

A plan is the seeds, the comparisons, the metric, the margin, the test and its error rate. It is written, with its hash,
before its cells run. Another one is appended when any of that changes, and says how many seeds' results were there by
then: a seed that such a later plan adds was added after a look. If that look could have ended in a verdict, only the
anytime-valid test still keeps its error rate, so it takes over. A plan is never shortened: a seed that was planned stays
planned, and an arm that was taken out, or whose configuration was changed, stays a comparison. Each entry holds a hash
over all before it, so that none can be edited or taken from the middle unnoticed.
"""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from lib import atomic
from lib.errors import UserError
from lib.paths import shown
from lib.tables import plural

ERROR_RATE = 0.05  # of a whole family: the chance of any false win or loss
FEWEST_SEEDS = 3  # fewer give no verdict
METRIC = "final validation loss (nats)"
NAMES = {"fixed": "paired t", "anytime": "anytime-valid paired t"}


def content(baseline: str, arms: dict[str, str], seeds: list[int], margin: float, test: str,
            sweep: str | None = None, contrasts: str = "") -> dict:
    """A plan. `arms` maps the name of each arm to its identity's hash; `seeds` are in the order they are looked at; `sweep`
    is the grid of the learning-rate sweep, if there is one; `contrasts` are pairs of steps, "V3:V1 V4:V3". A plan without such
    pairs is written as it was before there were any, so its hash stays."""
    return {"baseline": baseline, "arms": arms, "seeds": seeds, "metric": METRIC, "margin": margin, "test": test,
            "sweep": sweep, "error_rate": ERROR_RATE} | ({"contrasts": contrasts} if contrasts else {})


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _entry(plan: dict, written: str, seen: int, before: str) -> dict:
    """`hash` is that of the plan alone, the same on every machine; `chain` is over the whole history so far."""
    chain = digest([before, plan, written, seen])
    return {"hash": digest(plan), "written": written, "seen": seen, "plan": plan, "chain": chain}


def read(out: Path) -> list[dict]:
    """The plans of a study in the order they were made; empty if none was written."""
    path, before = out / "plan" / "design.json", ""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, list):
            raise ValueError("it holds no list of plans")
        for entry in found:
            if entry != _entry(entry["plan"], entry["written"], entry["seen"], before) or type(entry["seen"]) is not int:
                raise ValueError("an entry does not have the hash it was written with")
            content(**{key: entry["plan"][key] for key in ("baseline", "arms", "seeds", "margin", "test", "sweep")})
            _pairs(entry["plan"])
            before = entry["chain"]
        return found
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{shown(path)} is not what was written before the first cell: {error}.",
                        "restore it, or give another folder with OUT= and run the study anew.") from None


def following(history: list[dict], plan: dict, seen: int) -> list[dict]:
    """The history with this plan as its last, unless it is that already; `seen` seeds have results by now.

    The anytime test, once chosen and used, stays.
    """
    written, before = datetime.now(UTC).isoformat(timespec="seconds"), history[-1]["chain"] if history else ""
    if seen and test([*history, _entry(plan, written, seen, before)]) == "anytime":
        plan = plan | {"test": "anytime"}
    if history and history[-1]["hash"] == digest(plan):
        return history
    return [*history, _entry(plan, written, seen, before)]


def write(out: Path, history: list[dict]) -> None:
    atomic.write_json(out / "plan" / "design.json", history)


def in_force(history: list[dict]) -> list[dict]:
    """The plans since the last one that was made before any of its results were there."""
    starts = [index for index, entry in enumerate(history) if not entry["seen"]]
    return history[starts[-1] if starts else 0:]


def later_seeds(history: list[dict], seen: int = 1) -> list[int]:
    """Seeds that were added when the results of at least `seen` seeds were there, in the order they were added."""
    known, later = set(), []
    for entry in in_force(history):
        new = [seed for seed in entry["plan"]["seeds"] if seed not in known]
        if entry["seen"] >= seen and known:
            later += new
        known |= set(new)
    return later


def test(history: list[dict]) -> str:
    """The test that keeps its error rate: the planned one, unless seeds were added after a look that could decide."""
    planned = any(e["plan"]["test"] == "anytime" for e in in_force(history))
    return "anytime" if planned or later_seeds(history, FEWEST_SEEDS) else "fixed"


def comparisons(history: list[dict]) -> int:
    """Comparisons of the plans in force together: also those of arms that were taken out or changed since."""
    arms = {arm for entry in in_force(history) for arm in entry["plan"]["arms"].items()
            if not arm[0].startswith(f"{entry['plan']['baseline']} ")}
    return len(arms)


def contrasts(history: list[dict]) -> int:
    """The size of the family of contrasts: those of the plans in force together, counted like comparisons.

    One that was added after a look costs nothing but the looking, unlike an arm, whose cells must run. Whoever adds one may
    have chosen it among all pairs of arms, so all of them count then.
    """
    planned = {pair for entry in in_force(history) for pair in _pairs(entry["plan"])}
    return len(planned | _every_pair(history) if added_contrasts(history) else planned)


def added_contrasts(history: list[dict]) -> list[str]:
    """Contrasts of the last plan, "V3:V1", that were added when there were results."""
    before = {text for entry in in_force(history) if not entry["seen"] for text in entry["plan"].get("contrasts", "").split()}
    return [text for text in history[-1]["plan"].get("contrasts", "").split() if text not in before]


def _every_pair(history: list[dict]) -> set[frozenset]:
    """All pairs of arms in force that a contrast could be of."""
    found = set()
    for plan in (entry["plan"] for entry in in_force(history)):
        steps = list(dict.fromkeys(arm.partition(" ")[0] for arm in plan["arms"]))
        steps = [step for step in steps if step != plan["baseline"]]
        found |= set(_pairs(plan | {"contrasts": " ".join(map(":".join, combinations(steps, 2)))}))
    return found


def partner(optimizer: str, others: Iterable[str]) -> str:
    """The optimizer of the arm that an arm is compared with: the same one, or where steps have their own, the only one."""
    others = list(others)
    return optimizer if optimizer in others else others[0]


def _pairs(plan: dict) -> list[frozenset]:
    """The contrasts of a plan as pairs of arms with their configurations; which of the two is the reference plays no part."""
    arms: dict[str, dict[str, str]] = {}
    for name, identity in plan["arms"].items():
        step, _, optimizer = name.partition(" ")
        arms.setdefault(step, {})[optimizer] = identity
    found = []
    for step, other in (text.split(":") for text in plan.get("contrasts", "").split()):
        for optimizer, identity in arms[step].items():
            with_it = partner(optimizer, arms[other])
            found.append(frozenset({(step, optimizer, identity), (other, with_it, arms[other][with_it])}))
    return found


def changes(history: list[dict]) -> list[str]:
    """What was changed after a look, a sentence each; seeds apart, which the report marks one by one."""
    entries = in_force(history)
    found = []
    if entries and entries[0]["seen"]:
        found.append(f"no plan is known from before the first result: {plural(entries[0]['seen'], 'seed')} had one already")
    keys = ("baseline", "margin", "sweep", "contrasts", *(() if later_seeds(history) else ("test",)))
    for old, new in zip(entries, entries[1:], strict=False):
        when, before, after = new["written"][:16].replace("T", " "), old["plan"], new["plan"]
        for key in keys:
            if before.get(key) != after.get(key) and not (key == "sweep" and before[key] is None):
                what = "list of contrasts" if key == "contrasts" else key
                was, now = (plan.get(key, "none") for plan in (before, after))
                found.append(f"the plan's {what} was changed after a look, {when}: {was} to {now}")
        arms, others = before["arms"], after["arms"]
        for what, names in (("added to the plan", others.keys() - arms.keys()),
                            ("taken from the plan, and still counted,", arms.keys() - others.keys()),
                            ("changed", {name for name in arms.keys() & others.keys() if arms[name] != others[name]})):
            if names:
                found.append(f"{', '.join(sorted(names))} {'was' if len(names) == 1 else 'were'} {what} after a look, {when}")
    return found


def sentence(plan: dict) -> str:
    """The plan in words."""
    against = sum(not arm.startswith(f"{plan['baseline']} ") for arm in plan["arms"])
    seeds = len(plan["seeds"])
    how = (f"after each block of seeds, up to {seeds}" if plan["test"] == "anytime" else f"{plural(seeds, 'paired seed')}")
    pairs = _pairs(plan)
    beside = f" and {plural(len(pairs), 'contrast')}" if pairs else ""
    return (f"{NAMES[plan['test']]} on the {plan['metric']}, {how}, {plural(against, 'comparison')} with {plan['baseline']}"
            f"{beside}, Holm at {100 * plan['error_rate']:g} %{' in each family' if pairs else ''}, "
            f"margin {plan['margin']:g} nats")
