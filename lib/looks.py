"""Which seeds run: those asked for, or under UNTIL=decided one block after the other until every step is decided.

The rule of UNTIL=decided, fixed in the plan before the first cell: after the first seeds (3 at least) and then after each
further seed, every comparison is tested by the anytime-valid test (lib/anytime.py), whose error rate holds for any number
of looks; it ends when all are decided or MAX_SEEDS is reached. What to do next is read from the disk, so the run may be
stopped and continued anywhere.
"""

from itertools import islice
from typing import TYPE_CHECKING

from lib.cells import FINISHED, SEED_LIMIT, parse_seeds, seeds_of, whole
from lib.config import Study
from lib.design import FEWEST_SEEDS
from lib.errors import UserError

if TYPE_CHECKING:
    from lib.plan import Options, Plan

MOST = 1000


def seeds_asked(study: Study, options: "Options") -> list[int]:
    """The seeds that make may run now: SEEDS= or the configured ones, under UNTIL=decided all that may be reached."""
    asked = parse_seeds(options.seeds, study.config.SEED) if options.seeds else seeds_of(study)
    if not options.until:
        return asked
    if options.steps:
        raise UserError("UNTIL=decided decides about whole studies.", "make UNTIL=decided without a step.")
    most = max_seeds(study, options)
    following = (seed for seed in range(study.config.SEED, SEED_LIMIT) if seed not in asked)
    return asked + list(islice(following, max(0, most - len(asked))))


def seeds_planned(asked: list[int], configured: list[int], promised: list[int], anytime: bool, begun: set[int]) -> list[int]:
    """The seeds whose cells a verdict waits for, in the order they are looked at.

    `promised` are those of the plans in force, `begun` those that have a result. SEEDS= that names a part of the configured
    seeds asks for that part of the same plan, e.g. on one of two machines. A plan is not shortened; one that may end at any
    look holds no seed to its promise before it has begun.
    """
    current = configured if set(asked) <= set(configured) else asked
    kept = [seed for seed in promised if seed in begun] if anytime else promised
    return list(dict.fromkeys([*kept, *current]))


def max_seeds(study: Study, options: "Options") -> int:
    """MAX_SEEDS of the command line or of the study."""
    if options.until != "decided":
        raise UserError(f"UNTIL={options.until} is no rule for stopping.", "make UNTIL=decided.")
    text = options.max_seeds or str(study.config.MAX_SEEDS)
    if (number := whole(text)) is None or not FEWEST_SEEDS <= number <= MOST:
        raise UserError(f"MAX_SEEDS={text} is no number of seeds from {FEWEST_SEEDS} to {MOST}.",
                        "give one, e.g. make UNTIL=decided MAX_SEEDS=16.")
    return number


def next_block(plan: "Plan") -> list[int]:
    """The seeds of the first look that is not complete, or at which everything is decided; else all seeds."""
    count = len(parse_seeds(plan.options.seeds, plan.study.config.SEED) if plan.options.seeds else seeds_of(plan.study))
    for look in range(min(max(FEWEST_SEEDS, count), len(plan.asked)), len(plan.asked) + 1):
        seeds = plan.asked[:look]
        if not complete(plan, seeds):
            break
        plan.undecided = undecided(plan, seeds)
        if not plan.undecided:
            break
    return seeds


def complete(plan: "Plan", seeds: list[int]) -> bool:
    """Whether every cell of these seeds is finished."""
    return all(plan.status[cell.name].state in FINISHED for cell in [*plan.common, *plan.tuned_cells] if cell.seed in seeds)


def undecided(plan: "Plan", seeds: list[int]) -> list[str]:
    """Names of the arms that have no verdict after these seeds. An A/A control is none to wait for: that it shows no
    difference can rarely be proved. Nor are contrasts, of which many are between arms that are nearly alike."""
    try:
        from lib.arms import compare, group  # scipy, which a plain plan does without
    except ModuleNotFoundError as error:
        raise UserError(f"UNTIL=decided needs {error.name}, which is not installed.", "pip install scipy.") from None

    found = []
    for cells, tuned in ((plan.common, None), (plan.tuned_cells, plan.tuned)):
        if cells:
            groups = group(plan.study, [(c, plan.status[c.name]) for c in cells if c.seed in seeds], tuned)
            waits = {one.name for one in groups if one.control != "null"}
            compared = compare(plan.study, groups, seeds, "anytime", seeds, 0 if tuned else plan.comparisons())
            found += [name for name, c in compared.items() if name in waits and not c.decided]
    return found
