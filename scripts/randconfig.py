"""Write .config with random values, like the kernel's randconfig: whatever the menu offers must be refused there or work.

STUDY=name (also with fragments) says what stays as it is: everything that study sets. KCONFIG_SEED=number makes the same
configuration again. --prove N draws until N are not refused, builds, checks and trains two steps of those, and writes none.
"""

import argparse
import contextlib
import io
import math
import os
import random
import sys
import tempfile
import traceback
from fractions import Fraction
from pathlib import Path
from typing import Any

from lib.cells import baseline, expand, steps_of
from lib.config import DEFAULT_STUDY, Study, defconfig_layers
from lib.errors import UserError, reported
from lib.kconfig import BUDGET, OUTSIDE, Assignment, Schema, in_menu, read_layer
from lib.paths import shown
from lib.steps import step_files
from scripts.kconfig import assignment, config_path, disk_named, write_config

TRIES = 1000
# Those of a step or of the machine.
KEPT = ("SEED", "INIT_FROM_STEP", "INIT_FROM_HF", "EVALUATE_ONLY", "BATCH_SIZE_AUTO", *BUDGET)
# What a proof may spend: sizes of a laptop's laptop, and two iterations.
SMALL = {"GPT2_BLOCK_SIZE": "32", "BATCH_SIZE": "2", "GPT2_GRADIENT_ACCUMULATION": "1", "BATCH_DRAWN": "0",
         "GPT2_EVAL_SAMPLES": "1", "GPT2_MAX_ITERS": "2", "KVSPLICE_SAMPLES": "512", "KVSPLICE_MAX_BATCHES": "2",
         "KVSPLICE_EPOCHS": "1"}
SHAPES = [(1, 1, 16), (1, 2, 48), (2, 3, 48), (3, 2, 40), (2, 4, 64), (1, 5, 35)]  # layers, heads, width


def draw(schema: Schema, rng: random.Random, fixed: list[Assignment], where_visible: dict[str, str]) -> list[Assignment]:
    """Random assignments on top of `fixed`, which stay; `where_visible` are values instead of drawn ones."""
    schema.reset()
    schema.apply(fixed)
    kept, layer, chosen = {a.name for a in fixed}, [], set()
    for node in schema.kconf.node_iter(unique_syms=True):
        symbol = node.item
        name = getattr(symbol, "name", None)
        if name not in schema.prompted or name in kept or name in KEPT or name in chosen:
            continue
        if not symbol.visibility or in_menu(symbol, OUTSIDE):
            continue
        if symbol.choice:
            members = [s.name for s in symbol.choice.syms if s.visibility]
            chosen |= {s.name for s in symbol.choice.syms}
            if kept & chosen & {s.name for s in symbol.choice.syms}:
                continue
            name, value = rng.choice(members), "y"
        elif name in where_visible:
            value = where_visible[name]
        elif name == "GPT2_MIN_LR":  # drawn by itself it would be above the peak in every second configuration
            value = repr(float(schema.symbols["LEARNING_RATE"].str_value) * rng.choice([0.0, 0.1, 1.0]))
        else:
            value = _value(schema.kinds[name], symbol, rng)
        if value != schema.symbols[name].str_value:
            layer.append(Assignment(name, value, "randconfig"))
            schema.symbols[name].set_value(value)
    return layer


def _value(kind: str, symbol: Any, rng: random.Random) -> str:
    """A value of a symbol's kind inside its range: often the default, sometimes an end of the range."""
    default = symbol.str_value
    if kind == "bool":
        return rng.choice("yn")
    if kind == "str" or rng.random() < 0.4:
        return default
    low, high = (Fraction(bound.str_value) for bound in symbol.ranges[0][:2])
    if kind == "ratio":
        return rng.choice([f"{rng.randint(1, 7)}/8", f"1/{2 ** rng.randint(1, 7)}", str(rng.randint(1, 64)), default])
    if rng.random() < 0.1:
        return str(low) if kind == "int" else f"{float(low):g}"
    near = float(default) * 2 ** rng.uniform(-4, 4) if float(default) else rng.uniform(0, 2)
    near = min(max(float(f"{near:.4g}"), float(low)), float(high))
    return str(round(near)) if kind == "int" else repr(near)


def draw_steps(rng: random.Random, folder: str) -> list[str]:
    """Up to three steps, with those whose models they start from before them."""
    known = step_files(folder)
    found: list[str] = []

    def add(step: str) -> None:
        for a in read_layer(known[step]):
            if a.name == "INIT_FROM_STEP" and a.value in known:
                add(a.value)
        found.append(step)

    for step in rng.sample(list(known), rng.randint(1, 3)):
        add(step)
    return list(dict.fromkeys(found))


def drawn(schema: Schema, seed: str, fixed: list[Assignment], where_visible: dict[str, str] | None = None) -> str:
    """The text of one random study, which may not hold."""
    rng = random.Random(seed)
    layer = fixed + draw(schema, rng, fixed, where_visible or {})
    folder = schema.symbols["STEPS_DIR"].str_value
    layer = [a for a in layer if a.name not in ("STUDY", "ABLATION_STEPS", "BASELINE", "CONTROL_STEPS")]
    layer += [Assignment("STUDY", f"random-{seed}", ""), Assignment("ABLATION_STEPS", " ".join(draw_steps(rng, folder)), "")]
    return "".join(assignment(a.name, a.value, schema.kinds[a.name]) + "\n" for a in layer)


def study_of(text: str, schema: Schema) -> Study:
    """The study of a .config's text; UserError if it or one of its cells is refused."""
    with tempfile.NamedTemporaryFile("w", suffix=".config") as file:
        file.write(text)
        file.flush()
        study = Study(config=Path(file.name), schema=schema)
    baseline(study)
    expand(study, [])
    return study


def fixed_by(name: str) -> list[Assignment]:
    """What a study says, its fragments included."""
    return list({a.name: a for layer in defconfig_layers(name) for a in layer}.values())


def randconfig(name: str, seed: str) -> None:
    """Write .config: the first draw that holds."""
    schema, fixed = Schema(), fixed_by(name)
    for number in range(TRIES):
        text = drawn(schema, seed if not number else f"{seed}.{number}", fixed)
        try:
            study = study_of(text, schema)
        except UserError:
            continue
        with disk_named():
            write_config(study.text())
        print(f"{shown(config_path())} is random now, with what {name} sets: steps {' '.join(steps_of(study))}\n"
              f"KCONFIG_SEED={seed} make randconfig makes it again ({number} draws were refused before it)")
        return
    raise UserError(f"none of {TRIES} random configurations holds with what {name} sets.", "make randconfig STUDY=another.")


# Proof

def prove(count: int, seed: str) -> int:
    """Draw studies of tiny size until `count` were taken; each that is must build, obey the short laws and train."""
    schema, rng, refused, broken, cells, held = Schema(), random.Random(seed), {}, 0, 0, 0
    while held < count and len(refused) < TRIES + 20 * count:
        name = f"{seed}.{held + len(refused)}"
        text = drawn(schema, name, _sizes(rng), SMALL)
        try:
            study = study_of(text, schema)
        except UserError as error:
            refused[name] = error.what
            print(f"{name}: refused: {' '.join(error.what.split())}", flush=True)
            continue
        held += 1
        try:
            cells += _proved(study)
        except Exception as error:  # what a person would see as a traceback is what this looks for
            broken += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{shown(last.filename)}:{last.lineno}"
            print(f"{name}: BROKEN: {type(error).__name__}: {error} ({where})\n{text}", flush=True)
    drawn_in_all = held + len(refused)
    print(f"{drawn_in_all} random configurations: {len(refused)} refused ({100 * len(refused) / drawn_in_all:.0f} %), "
          f"{held - broken} checked and trained ({cells} cells), {broken} broken")
    return 1 if broken or held < count else 0


def _sizes(rng: random.Random) -> list[Assignment]:
    """The fragment tiny with a shape of its own at times."""
    layers, heads, width = rng.choice(SHAPES)
    fixed = {a.name: a.value for a in fixed_by(DEFAULT_STUDY) if a.name not in SMALL and a.name not in ("SEEDS", "STUDY")}
    if rng.random() < 0.7:
        del fixed["MODEL_TINY"]
        fixed |= {"MODEL_CUSTOM": "y", "GPT2_N_LAYER": str(layers), "GPT2_N_HEAD": str(heads), "GPT2_N_EMBD": str(width)}
    fixed |= {name: SMALL[name] for name in ("GPT2_MAX_ITERS", "GPT2_BLOCK_SIZE")}
    return [Assignment(name, value, "randconfig") for name, value in fixed.items()]


class Broken(Exception):
    """A configuration was taken and did not work."""


def _proved(study: Study) -> int:
    """Check and train every cell of a study; returns how many. Broken if one does not work."""
    from gpt2 import train_ra_mla
    from gpt2.laws import Subject, causality, decoding
    from lib import results
    from lib.launch import prepare

    cells = expand(study, [study.config.SEED])
    with tempfile.TemporaryDirectory(prefix="randconfig-") as out:
        for cell in sorted(cells, key=lambda cell: cell.parent is not None):
            subject = Subject(cell.step, cell.resolved.config, depth={"STREAMS": 0})
            for law in (causality, decoding):
                if sentence := law(subject):
                    raise Broken(f"{cell.step}: {law.__name__}: {sentence}")
            folder, said = Path(out) / cell.name, io.StringIO()
            prepare(folder, cell)
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    train_ra_mla.run_cell(folder)
            except UserError as error:  # it came through the configuration, so this is too late
                raise Broken(f"{cell.step} was refused only by its training: {error.what}") from None
            record = results.read(folder)
            if not record or record["state"] not in ("done", "diverged"):
                raise Broken(f"{cell.step} left {record and (record['state'], record['reason'])}: {said.getvalue()[-300:]}")
            if record["state"] == "done" and not math.isfinite(record["val_loss"]):
                raise Broken(f"{cell.step} is done with a loss of {record['val_loss']}")
    return len(cells)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.randconfig", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prove", type=int, metavar="N", help="draw until N hold, check and train those, and write no .config")
    args = parser.parse_args()
    seed = os.environ.get("KCONFIG_SEED") or str(random.SystemRandom().randrange(10 ** 6))
    if not (seed.isascii() and seed.isdecimal() and len(seed) <= 18):
        raise UserError(f"KCONFIG_SEED={seed} is no seed.", "give a whole number, e.g. KCONFIG_SEED=1 make randconfig.")
    if args.prove is not None:
        if not 1 <= args.prove <= 10 ** 6:
            raise UserError(f"--prove {args.prove} is no number of configurations.", "give one from 1 on.")
        return prove(args.prove, seed)
    randconfig(os.environ.get("STUDY") or DEFAULT_STUDY, seed)
    return 0


if __name__ == "__main__":
    with reported():
        sys.exit(main())
