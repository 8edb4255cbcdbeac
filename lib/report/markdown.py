"""The report as Markdown: what the terminal shows and report.md holds. Verdicts first, then what they rest on."""

import re
from collections.abc import Set
from typing import Any

from lib.errors import one_line
from lib.report.sections import sections
from lib.tables import count, duration, plural, size, table
from lib.verdicts import NO_NUMBER, signed

VIEWS = {"equal_tokens": "at equal tokens", "equal_seconds": "at equal seconds"}
MARKUP = re.compile(r"<(?=[A-Za-z/!?])|(?<=\])[(\[:]")  # the start of a tag; the middle of a link


def render(content: dict) -> str:
    """The content of lib/report/content.py as Markdown. What a study or a record says is text in it: no tag, link or line of
    its own for who shows it as a page, and nothing that steers a terminal."""
    content = harmless(content)
    common = [s for s in content["steps"] if s["tuned"] is None]
    tuned = [s for s in content["steps"] if s["tuned"] is not None]
    parts = [f"# {content['title']}\n"]
    parts += [f"**CONTROL FAILED: {failure}**\n" for failure in content["control_failures"]]
    waiting = {step["name"] for step in common if set(step["states"]) == {"planned"}}
    parts += [verdict_table(common, _against(common)), sentences(common, waiting)]
    if content.get("contrasts"):
        parts += [contrast_table(content["contrasts"], content["plan"]["contrasts"]), sentences(content["contrasts"], waiting)]
    if tuned:
        verdicts = plural(sum(not s["is_baseline"] for s in tuned), "verdict")
        parts += [f"## At each step's best learning rate\n\nA family of {verdicts} of its own.\n",
                  verdict_table(tuned, _against(tuned)), sentences(tuned)]
    if content["sweep"]:
        parts.append(sweep_table(content["sweep"]))
    parts += [section.markdown() for section in sections(content)]
    parts += ["## Cells\n", step_table(content["steps"]), "\n".join(f"- {line}" for line in facts(content)) + "\n"]
    return "\n".join(part for part in parts if part)


def harmless(value: Any) -> Any:
    """A value of JSON with every text in it as one line that is no markup."""
    if isinstance(value, dict):
        return {harmless(key): harmless(part) for key, part in value.items()}
    if isinstance(value, list):
        return [harmless(part) for part in value]
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(value)) if isinstance(value, str) else value


def _against(steps: list[dict]) -> str:
    """What the differences are to: the baseline by its name, if there is one."""
    names = [step["name"] for step in steps if step["is_baseline"]]
    return names[0] if len(names) == 1 else "the baseline"


def verdict_table(steps: list[dict], first: str) -> str:
    """One row a step: the word, the difference at the end of the budget with its interval, and the other views."""
    rows, views = [], telling_views(steps)
    for step in steps:
        c, mean = step["comparison"], step["mean"]
        known = mean["val_loss"] is not None and (c is None or c["word"] != "INVALID")
        loss = f"{mean['val_loss']:.4f}" if known else "-"
        loss += f" ± {mean['val_loss_sd']:.4f}" if known and mean["val_loss_sd"] is not None else ""
        seeds = f"{step['seeds_done']}/{step['seeds_planned']}"
        rows.append([step["name"], c["word"] if c else "baseline", function_class(step), _interval(c), seeds, loss,
                     *(_view(c, name) for name in views), speed(c)])
    header = ["step", "verdict", "class", f"to {first}, nats (95 %)", "seeds", "final val loss",
              *map(VIEWS.__getitem__, views), "tokens/s"]
    return table(header, rows, "lllrrr" + "r" * len(views) + "r")


def telling_views(steps: list[dict]) -> list[str]:
    """The views that say of any step something else than its difference at the end of the budget: under a budget of tokens, the
    one at equal tokens says the same."""
    known = [c for step in steps if (c := step["comparison"]) and c["word"] not in NO_NUMBER and c["difference"] is not None]
    return [name for name in VIEWS if any(c[name] and signed(c[name]["difference"]) != signed(c["difference"]) for c in known)]


def contrast_table(contrasts: list[dict], family: int) -> str:
    """One row a contrast: the columns of the table of verdicts that are about a difference. `family` is what Holm counts."""
    views = telling_views(contrasts)
    rows = [[one["name"], one["comparison"]["word"], _interval(one["comparison"]),
             *(_view(one["comparison"], name) for name in views), speed(one["comparison"])] for one in contrasts]
    header = ["contrast", "verdict", "difference, nats (95 %)", *map(VIEWS.__getitem__, views), "tokens/s"]
    verdicts = plural(family, "verdict")
    return (f"## Contrasts\n\nSteps against other steps, at their common rates; a family of {verdicts} of its own.\n\n"
            + table(header, rows, "llr" + "r" * len(views) + "r"))


def function_class(step: dict) -> str:
    """The function class of a step, "V0" or "inside V0"; "" in a report that was written before they were in it."""
    return (step.get("function_class") or {}).get("shown", "")


def _interval(c: dict | None) -> str:
    if not c or c["difference"] is None:
        return "-" if c else ""
    return signed(c["difference"]) + (f" ({signed(c['low'])}..{signed(c['high'])})" if c["low"] is not None else "")


def _view(c: dict | None, name: str) -> str:
    if not c or not c[name]:
        return "-" if c else ""
    view = c[name]
    return signed(view["difference"]) + (f" ± {view['high'] - view['difference']:.4f}" if view["high"] is not None else "")


def speed(c: dict | None) -> str:
    """The ratio of tokens/s to the baseline's, with half its interval: 'x0.981 ± 0.004'."""
    if not c or not c["speed"]:
        return "-" if c else ""
    s = c["speed"]
    half = "" if s["high"] is None else f" ± {(s['high'] - s['low']) / 2:.3f}"
    return f"x{s['ratio']:.3f}{half}"


def sentences(steps: list[dict], waiting: Set[str] = frozenset()) -> str:
    """A line for each comparison; one for all that have to do with the steps in `waiting`, of which no cell was begun."""
    lines, later = [], []
    for step in steps:
        if waiting & set(step["name"].split(" vs ")) and step["comparison"]:
            later.append(step["name"])
        elif c := step["comparison"]:
            lines.append(f"- {c['sentence']}")
            if c["p_sign_flip"] is not None and c["word"] in ("BETTER", "WORSE", "NEGLIGIBLE", "INCONCLUSIVE"):
                lines[-1] += f" Sign-flip p {c['p_sign_flip']:.3g} (floor {c['sign_flip_floor']:.3g})" + (
                    f", pairing correlation {c['correlation']:.2f}." if c["correlation"] is not None else ".")
            if (known := step.get("function_class")) and known["relation"] != "own":
                lines[-1] += f" {known['sentence']}."
    lines += [f"- INCOMPLETE, because no cell was begun: {', '.join(later)}."] if later else []
    return "\n".join(lines) + "\n" if lines else ""


def sweep_table(sweep: list[dict]) -> str:
    """The learning-rate sweep: final validation loss at each multiple of the step's rate."""
    multiples = sorted({m for entry in sweep for m in entry["losses"]}, key=float)
    rows = [[f"{e['step']} {e['optimizer']}",
             *("diverged" if m in e["diverged"] else _shown(e["losses"].get(m), "{:.4f}".format) for m in multiples),
             "-" if e["best"] is None else f"x{e['best']:g}"] for e in sweep]
    header = ["step", *(f"x{m}" for m in multiples), "best"]
    return "## Learning-rate sweep\n\n" + table(header, rows, "l" + "r" * (len(header) - 1))


def step_table(steps: list[dict]) -> str:
    """What each arm cost, means over finished seeds, and the states of its cells."""
    rows = []
    for step in steps:
        mean, states = step["mean"], step["states"]
        state = next(iter(states)) if len(states) == 1 else ", ".join(f"{n} {s}" for s, n in states.items())
        rows.append([step["name"], _shown(mean["val_perplexity"], "{:.2f}".format), _shown(mean["tokens"], count),
                     _shown(mean["train_seconds"], duration), _shown(mean["tokens_per_second"], count),
                     _shown(mean["parameters"], "{:,}".format), _shown(mean["kv_cache_bytes"], size),
                     _shown(mean["peak_memory_bytes"], lambda value: f"{value / 2 ** 20:.0f} MiB"), state])
    header = ["step", "perplexity", "tokens", "training", "tokens/s", "parameters", "KV cache", "peak memory", "state"]
    return table(header, rows, "lrrrrrrrl")


def _shown(value: Any, form: Any) -> str:
    return "-" if value is None else form(value)


def facts(content: dict) -> list[str]:
    """What a reader must know besides the tables, a line each."""
    plan, noise, data, machine = (content[key] for key in ("plan", "noise", "data", "environment"))
    spent = content["outside_budget"]
    written = plan["written"][:16].replace("T", " ") if plan["on_record"] else "not on record yet"
    found = [f"plan {plan['hash']} ({written}): {plan['sentence']}",
             f"error rate: at most {100 * plan['error_rate']:g} % for any false BETTER, WORSE or NEGLIGIBLE in a family, "
             + ("however often it is looked at" if plan["test"] == "anytime" else "at the planned number of seeds")]
    found += [noise["sentence"]] if noise else []
    if data:
        found.append(f"data: {data['name']}, {data['tokenizer']} tokens, {count(data['train_tokens'])} for training, "
                     f"evaluation set {data['eval_hash'][:12]}; unigram entropy {data['unigram_entropy']:.3f} nats")
    if machine:
        found.append(f"machine: {machine['device']}, {machine['precision']}, torch {machine['torch']}, compile "
                     f"{'on' if machine['compile'] else 'off'}, {plural(machine['threads'], 'thread')}"
                     + (f", sources {machine['source_hash']}" if machine.get("source_hash") else ""))
    if spent:
        found.append(f"a cell's training {duration(spent['train'])}; outside the budget: start and logging "
                     f"{duration(spent['other'])}, compile {duration(spent['compile'])}, evaluation {duration(spent['eval'])}"
                     + (f", calibration {duration(spent['calibration'])}" if spent.get("calibration") else ""))
    return found + content["notes"]
