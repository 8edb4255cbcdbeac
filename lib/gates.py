"""Validity gates: what must be equal, or reached, before two arms are compared at all.

A gate that fails is a sentence that names the field and who differs; a comparison with a failed gate is INVALID and gets
no number. Two kinds of equality: what defines the experiment must be equal in every cell of both arms; what belongs to the
machine must be equal within each block (a seed's two cells), because pairing removes what a block has in common. So cells
run on several machines make one study, as long as each seed stays on one. Under a time budget the machine decides how much
is trained and counts as part of the experiment, and so does whether a cell had its device alone.
"""

from typing import Any

from lib.kconfig import BUDGET

LEAK = 1e-4  # of the largest logit: what outputs of a causal model may move by with later tokens, in float32


def experiment(record: dict) -> dict:
    """Facts that must be equal in all cells of a comparison."""
    data, configuration = record["data"] or {}, record["configuration"] or {}
    get = configuration.get
    sizes = [get(name) for name in ("BATCH_SIZE", "GPT2_GRADIENT_ACCUMULATION")]
    world = (record["environment"] or {}).get("world_size") or 1
    counted = all(type(number) is int for number in (*sizes, world))
    digest = (record["environment"] or {}).get("start_hash")  # of a child: what its parent began with
    # A folder's name says little of what was in it.
    start = f"the weights {str(digest)[:12]}" if digest or get("INIT_FROM_HF") else "drawn"
    if get("INIT_FROM_STEP") and not get("EVALUATE_ONLY"):
        start = f"the trained {get('INIT_FROM_STEP')}" + (f" of {str(digest)[:12]}" if digest else "")
    return {
        "training data": data.get("train_hash"), "evaluation data": data.get("eval_hash"),
        "tokenizer": data.get("tokenizer"),
        "global batch": sizes[0] * sizes[1] * world if counted else None,
        "sequence length": get("GPT2_BLOCK_SIZE"),
        "start": start,
        "budget": " ".join(f"{name}={get(name)}" for name in BUDGET if get(name)) or None,
    }


def machine(record: dict) -> dict:
    """Facts that must be equal within a block."""
    environment = record["environment"] or {}
    names = {"device": "device", "precision": "precision", "compile": "compile flag", "world_size": "world size",
             "torch": "torch", "threads": "CPU threads"}
    return {shown: environment.get(name) for name, shown in names.items()}


def sources(record: dict) -> dict:
    """Hash of each source file that made the numbers. Files only one cell knows are new modules, which change nothing."""
    return (record["environment"] or {}).get("sources") or {}


def own_failures(name: str, record: dict) -> list[str]:
    """What makes one cell unfit for any comparison; `name` is "V1 seed 1338"."""
    if record["state"] == "diverged":
        return [f"non-finite loss: {name} diverged ({record['reason']})"]
    found = []
    if record["inactive"]:
        found.append(f"mechanism never active: {name}: {record['inactive']}")
    if (leak := record["future_leak"]) is not None and leak > LEAK:
        found.append(f"it looks into the future: {name}: outputs moved with tokens after them, by {leak:.2g} of the largest "
                     "logit")
    progress = record["budget_progress"]
    if progress is None or progress < 1:
        reached = "is not recorded" if progress is None else f"ended at {100 * progress:.0f} %"
        found.append(f"schedule did not reach its end: that of {name} {reached}")
    return found


def broken(arm: dict[int, dict], reference: dict[int, dict], names: tuple[str, str], paired: bool) -> list[str]:
    """Sentences on why the arm must not be compared with the reference; both are {seed: record of a finished cell}.

    `paired` says that the comparison is within blocks; without it machine and sources must be equal throughout.
    """
    cells = [(f"{name} seed {seed}", seed, record) for name, records in zip(names, (arm, reference), strict=True)
             for seed, record in sorted(records.items())]
    found = [sentence for name, _, record in cells for sentence in own_failures(name, record)]
    cells = [cell for cell in cells if cell[2]["state"] == "done"]
    if not cells:
        return found
    found += _different(cells, experiment)
    timed = any((record["configuration"] or {}).get("GPT2_MAX_TIME") for _, _, record in cells)
    blocks = {seed: [c for c in cells if c[1] == seed] for seed in arm.keys() & reference.keys()}
    for block in [blocks[seed] for seed in sorted(blocks)] if paired and not timed else [cells]:
        found += _different(block, machine)
        found += _different_sources(block)
    found += _different_sharing(cells) if timed else []
    for name, records in zip(names, (arm, reference), strict=True):
        found += _same_numbers(name, records)
    return list(dict.fromkeys(found))


def _different_sharing(cells: Any) -> list[str]:
    """Under a time budget: a cell beside another one has trained less for it, which is no property of its arm. Where all had
    company that is noise, which the report says; where some had, it is a difference. A record of before this was looked at
    says nothing."""
    known = {shared: name for name, _, record in reversed(cells) if (shared := record.get("shared_device")) is not None}
    if len(known) < 2:
        return []
    return [f"sharing of the device differs: {known[True]} ran beside another cell, {known[False]} alone"]


def _different(cells: Any, facts: Any) -> list[str]:
    """One sentence a fact that is not equal in all of these cells."""
    found = []
    if not cells:
        return found
    known = [(name, facts(record)) for name, _, record in cells]
    first, expected = known[0]
    for field in expected:
        for name, values in known:
            if values[field] is None:
                found.append(f"{field} is not recorded: {name}")
            elif expected[field] is not None and values[field] != expected[field]:
                found.append(f"{field} differs: {name} has {_short(values[field])}, {first} {_short(expected[field])}")
            else:
                continue
            break
    return found


def _different_sources(cells: Any) -> list[str]:
    if not cells:
        return []
    first, _, record = cells[0]
    known = sources(record)
    for name, _, other in cells[1:]:
        theirs = sources(other)
        if not known or not theirs:
            return [f"source is not recorded: {name if known else first}"]
        changed = sorted(path for path in known.keys() & theirs.keys() if known[path] != theirs[path])
        if changed:
            return [f"source differs: {name} ran another {changed[0]} than {first}"
                    + (f" (and {len(changed) - 1} more files)" if len(changed) > 1 else "")]
    return []


def _same_numbers(name: str, records: dict[int, dict]) -> list[str]:
    """Two seeds with the same losses to the last bit are one run counted twice, or a seed that nothing uses."""
    seen: dict = {}
    for seed, record in sorted(records.items()):
        if record["state"] != "done":
            continue
        key = (record["val_loss"], record["train_loss"])
        if key in seen:
            return [f"seeds not independent: {name} has the same losses under seeds {seen[key]} and {seed}"]
        seen[key] = seed
    return []


def _short(value: Any) -> str:
    return f"'{value[:12] if isinstance(value, str) and len(value) > 40 else value}'"
