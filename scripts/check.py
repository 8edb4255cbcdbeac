"""Prove every architecture of the study on the CPU: sizes, start, causality, decoding, gradients, state.

STUDY=name checks another study, ALL=1 every step there is, FULL=1 at real depth. Leaves .config and results alone.
"""

import argparse
import os
import sys
import time

from lib.cells import baseline
from lib.config import DEFAULT_STUDY, Study, parse_step
from lib.errors import reported
from lib.steps import step_files, step_header, step_path
from lib.tables import table


def check_steps(study: Study, steps: list[str], full: bool = False) -> int:
    """Check `steps` against the study's baseline, print a table, and return 1 if a law is broken."""
    from gpt2.laws import SMALL, Subject, broken_laws

    first = baseline(study)
    resolved = {step: study.resolve(step).config for step in dict.fromkeys([first, *steps])}
    failures, rows, reference = [], [], None
    for step, cfg in resolved.items():
        begun = time.monotonic()
        depth = {**SMALL, "GPT2_N_LAYER": cfg.GPT2_N_LAYER} if full else SMALL
        path = step_path(parse_step(step)[0], cfg.STEPS_DIR)
        try:
            subject = Subject(step, cfg, step_header(path, "Equals"), reference, dict(depth))
            broken = broken_laws(subject)
            parameters = sum(p.numel() for p in subject.full.parameters())
            memory = subject.full.new_cache(1, dtype=subject_dtype()).nbytes()
        except Exception as error:  # a model that cannot be built is a broken step, not the end of the check
            subject, broken, parameters, memory = None, [f"build: {type(error).__name__}: {error}"], 0, 0
        if reference is None and subject:
            reference = subject
        failures += [f"{step}: {b}" for b in broken]
        more = parameters - rows[0][1] if rows else 0
        rows.append([step, parameters, f"{more:+d}" if rows else "", f"{memory / 2 ** 20:.1f}", "ok" if not broken else
                     broken[0].split(":")[0], f"{time.monotonic() - begun:.1f}"])
    shown = [[step, f"{parameters:,}", *rest] for step, parameters, *rest in rows]
    print(table(["step", "parameters", f"to {first}", "KV cache, MiB", "laws", "seconds"], shown, "lrrrlr"), end="")
    for failure in failures:
        print(f"BROKEN {failure}")
    one = resolved[first]
    print(f"{len(rows) - len({f.split(':')[0] for f in failures})} of {len(rows)} steps obey the laws; sizes at "
          f"{one.GPT2_N_LAYER} layers x {one.GPT2_N_EMBD}, context {one.GPT2_BLOCK_SIZE}, cache of one sequence in 2 bytes")
    return 1 if failures else 0


def subject_dtype():
    import torch

    return torch.bfloat16


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.check", description=__doc__)
    parser.add_argument("steps", nargs="*", help="only these steps (default: the study's)")
    args = parser.parse_args()
    get = os.environ.get
    study = Study(get("STUDY") or None)
    if study.is_fallback:
        print(f"no .config: checking the study {DEFAULT_STUDY}", file=sys.stderr)
    steps = args.steps or (list(step_files()) if get("ALL", "") not in ("", "0") else study.config.ABLATION_STEPS.split())
    return check_steps(study, steps, get("FULL", "") not in ("", "0"))


if __name__ == "__main__":
    with reported():
        sys.exit(main())
