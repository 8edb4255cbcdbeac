"""The report of a study, from metrics.json files alone: one row a step, states included; a missing cell is a row too.

Differences to the baseline are means over the seeds that both steps have finished. They carry no statistics yet, and the
report says so.
"""

from statistics import fmean, stdev

from lib.cells import Cell, Status, baseline
from lib.tables import count, duration, table


def collect(rows: list[tuple[Cell, Status, bool]]) -> dict[str, list[tuple[Cell, Status]]]:
    """Cells by step (and optimizer, when it is a dimension), in the order of the study."""
    several = len({cell.optimizer for cell, _, _ in rows if cell.step == rows[0][0].step}) > 1
    by_step: dict[str, list] = {}
    for cell, status, _ in rows:
        by_step.setdefault(f"{cell.step} {cell.optimizer}" if several else cell.step, []).append((cell, status))
    return by_step


def finished(cells) -> dict[int, dict]:
    """Records of the done cells by seed."""
    return {cell.seed: status.record for cell, status in cells if status.state == "done"}


def reference_cells(by_step: dict, first: str, optimizer: str):
    """The baseline's cells under the same optimizer, or under its only one when the optimizer is no dimension."""
    baselines = [cells for name, cells in by_step.items() if name.split()[0] == first]
    return next((cells for cells in baselines if cells[0][0].optimizer == optimizer), baselines[0])


def render(plan) -> str:
    """The report of a plan's study as Markdown."""
    by_step = collect(plan.rows())
    first = baseline(plan.study)
    margin = plan.study.config.MARGIN
    lines = []
    for step, cells in by_step.items():
        records = finished(cells)
        reference = finished(reference_cells(by_step, first, cells[0][0].optimizer))
        lines.append(step_row(step, cells, records, reference, margin, step.split()[0] == first))
    header = ["step", "seeds", "final val loss", "perplexity", f"to {first}", "tokens", "tokens/s", "parameters",
              "peak memory", "state"]
    overrides = ", ".join(f"{a.name}={a.value}" for a in plan.study.overrides)
    title = plan.study.name + (f" with {overrides}" if overrides else "")
    text = f"# {title}\n\n" + table(header, lines, "lrrrrrrrrl") + "\n"
    return text + "\n".join(notes(plan, by_step, first, margin)) + "\n"


def step_row(step: str, cells, records: dict, reference: dict, margin: float, is_baseline: bool) -> list[str]:
    """One row of the table; values are means over finished seeds, the loss with its standard deviation."""
    states = [status.state for _, status in cells]
    state = states[0] if len(set(states)) == 1 else ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    if not records:
        return [step, f"0/{len(cells)}", *["-"] * 7, state]
    mean = {}
    for key in ("val_loss", "val_perplexity", "tokens", "tokens_per_second", "peak_memory_bytes"):
        known = [r[key] for r in records.values() if r[key] is not None]  # a perplexity may be too large for a float
        mean[key] = fmean(known) if len(known) == len(records) else None
    loss = f"{mean['val_loss']:.4f}"
    if len(records) > 1:
        loss += f" ± {stdev(r['val_loss'] for r in records.values()):.4f}"
    shared = sorted(records.keys() & reference.keys())
    difference = "" if is_baseline else "-"
    if shared and not is_baseline:
        value = fmean(records[s]["val_loss"] - reference[s]["val_loss"] for s in shared)
        difference = f"({value:+.4f})" if abs(value) < margin else f"{value:+.4f}"
    parameters = next(iter(records.values()))["parameters"]
    return [step, f"{len(records)}/{len(cells)}", loss, _shown(mean["val_perplexity"], "{:.2f}".format), difference,
            _shown(mean["tokens"], count), _shown(mean["tokens_per_second"], count), _shown(parameters, "{:,}".format),
            _shown(mean["peak_memory_bytes"], lambda value: f"{value / 2 ** 20:.0f} MiB"), state]


def _shown(value, form) -> str:
    return "-" if value is None else form(value)


def notes(plan, by_step, first: str, margin: float) -> list[str]:
    """What a reader must know to read the table."""
    records = [r for cells in by_step.values() for r in finished(cells).values()]
    found = [f"Losses are in nats, on the final evaluation. Differences to {first} in parentheses are below the practical "
             f"margin of {margin:g} nats.", ""]
    if max((len(finished(c)) for c in by_step.values()), default=0) < 3:
        found += ["With fewer than 3 seeds no difference here can be told from noise: `make SEEDS=3` adds seeds.", ""]
    if records:
        one, data = records[0], records[0]["data"]
        environment = one["environment"]
        spent = {kind: duration(fmean(r[f"{kind}_seconds"] for r in records)) for kind in ("other", "compile", "eval", "train")}
        found += [f"- data: {data['name']}, {data['tokenizer']} tokens, {count(data['train_tokens'])} for training, evaluation "
                  f"set {data['eval_hash'][:12]}; unigram entropy {data['unigram_entropy']:.3f} nats",
                  f"- machine: {environment['device']}, {environment['precision']}, torch {environment['torch']}, "
                  f"compile {'on' if environment['compile'] else 'off'}, {environment['threads']} threads",
                  f"- outside the budget, mean of a cell: start and logging {spent['other']}, compile {spent['compile']}, "
                  f"evaluation {spent['eval']}; training {spent['train']}"]
    found += [f"- {sentence}" for sentence in not_comparable(by_step)]
    for cells in by_step.values():
        found += [f"- {cell.step} seed {cell.seed}: {status.state}: {status.why}" for cell, status in cells
                  if status.state in ("failed", "diverged", "stale", "interrupted")]
    return found


def not_comparable(by_step) -> list[str]:
    """Finished cells that differ from the first one in something that must be equal for a comparison, a sentence each."""
    def facts(record):
        return {**{f"data {k}": record["data"].get(k) for k in ("name", "tokenizer", "train_hash", "eval_hash")},
                **{k: record["environment"].get(k) for k in ("device", "precision", "compile", "torch", "source_hash")}}

    cells = [(cell, status.record) for group in by_step.values() for cell, status in group if status.state == "done"]
    if not cells:
        return []
    found, (first, record) = [], cells[0]
    expected = facts(record)
    for cell, record in cells[1:]:
        different = [k for k, v in facts(record).items() if v != expected[k]]
        if different:
            found.append(f"{cell.step} seed {cell.seed} is not comparable with {first.step}: different {', '.join(different)}")
    return found


def failures(plan) -> list[str]:
    """Cells that were asked for and ended without a result; the report's notes say why."""
    return [f"{cell.step} seed {cell.seed} ({status.state})" for cell, status, _ in plan.rows()
            if status.state in ("failed", "interrupted") and plan.wants(cell)]
