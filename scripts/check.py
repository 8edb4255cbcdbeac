"""Prove every architecture of the study on the CPU: sizes, start, causality, decoding, gradients, state.

STUDY=name checks another study, STEP="V3@RA_R=8" only these steps, ALL=1 every step there is, FULL=1
at real depth. Leaves .config and results alone.
"""

import argparse
import os
import sys
import time

from lib.cells import baseline, steps_of
from lib.classes import function_classes
from lib.config import Study, announce, parse_step
from lib.errors import UserError, reported
from lib.steps import step_files, step_header, step_path
from lib.tables import table_head, table_row


def check_steps(study: Study, steps: list[str], full: bool = False) -> int:
    """Check `steps` against the study's baseline, print a row for each, and return 1 if a law is broken."""
    from gpt2.laws import SMALL, Subject, broken_laws

    first = baseline(study)
    resolved = {step: study.resolve(step).config for step in dict.fromkeys([first, *steps])}
    classes = function_classes(resolved)
    header = ["step", "class", "parameters", f"to {first}", "KV cache, MiB", "laws", "seconds"]
    widths = [max(map(len, ["step", *resolved])), max(map(len, ["class", *map(str, classes.values())])), 14, 12, 13, 15, 7]
    print(table_head(header, widths, "llrrrlr"), end="", flush=True)
    failures, reference = {}, None
    for step, cfg in resolved.items():
        begun = time.monotonic()
        depth = {**SMALL, "GPT2_N_LAYER": cfg.GPT2_N_LAYER} if full else SMALL
        equals = step_header(step_path(parse_step(step)[0], cfg.STEPS_DIR), "Equals")
        sizes = ["", "", ""]
        try:
            subject = Subject(step, cfg, equals, reference, dict(depth))
            broken = broken_laws(subject)
            reference = reference or subject
            more = subject.parameters - reference.parameters
            sizes = [f"{subject.parameters:,}", f"{more:+,d}" if subject is not reference else "",
                     f"{subject.cache_bytes / 2 ** 20:.1f}"]
        except Exception as error:  # a model that cannot be built is a broken step, not the end of the check
            broken = [f"build: {type(error).__name__}: {error}"]
        if broken:
            failures[step] = broken
        if reference is None:
            raise UserError(f"the baseline {first} cannot be built ({broken[0]}).", "mend it before its variants.")
        verdict = broken[0].split(":")[0] if broken else "ok"
        print(table_row([step, str(classes[step]), *sizes, verdict, f"{time.monotonic() - begun:.1f}"], widths,
                        "llrrrlr"), end="", flush=True)
    for step, broken in failures.items():
        for sentence in broken:
            print(f"BROKEN {step}: {sentence}")
    one = resolved[first]
    print(f"{len(resolved) - len(failures)} of {len(resolved)} steps obey the laws; sizes at {one.GPT2_N_LAYER} layers x "
          f"{one.GPT2_N_EMBD}, context {one.GPT2_BLOCK_SIZE}, cache of one sequence in 2 bytes; laws at "
          f"{one.GPT2_N_LAYER if full else SMALL['GPT2_N_LAYER']} layers, {SMALL['GPT2_BLOCK_SIZE']} tokens, causality also at "
          f"{max(one.GPT2_BLOCK_SIZE, SMALL['GPT2_BLOCK_SIZE'])}")
    for known in classes.values():
        if known.relation == "inside":
            print(known.sentence)
    for of in dict.fromkeys(known.of for known in classes.values()):
        alike = [step for step, known in classes.items() if known.of == of and known.relation == "equal"]
        if alike:
            print(f"of {of}'s function class, so that a difference is optimisation only: {' '.join(alike)}")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.check", description=__doc__)
    parser.add_argument("steps", nargs="*", help="only these steps (default: the study's)")
    args = parser.parse_args()
    get = os.environ.get
    study = Study(get("STUDY") or None)
    announce(study)
    everything = list(step_files()) if get("ALL", "") not in ("", "0") else steps_of(study)
    steps = args.steps or get("STEP", "").split() or everything
    return check_steps(study, steps, get("FULL", "") not in ("", "0"))


if __name__ == "__main__":
    with reported():
        sys.exit(main())
