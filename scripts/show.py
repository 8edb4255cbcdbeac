"""Show one step of the configured study: formula, symbols, sizes, function class, parameters, KV cache, and its laws.

    python -m scripts.show V3          make show V3, or make show STEP=V3
    python -m scripts.show V3@RA_R=8   make show STEP=V3@RA_R=8

Nothing is trained or computed: models are built without memory (torch's meta device). STUDY=name shows the step in another
study. Leaves .config and results alone.
"""

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lib.cells import baseline
from lib.classes import FunctionClass, function_classes
from lib.config import Resolved, Study, announce, parse_step
from lib.errors import UserError, one_line, reported
from lib.formulas import formula_of
from lib.kconfig import Assignment, read_layer
from lib.steps import step_files, step_header, step_path
from lib.tables import plural, size, table
from lib.terminal import emphasised

if TYPE_CHECKING:
    from gpt2.model import GPT
    from lib.config import Config

NAMED_BY = ("_CLASS", "_CONTROLLER")  # symbols without a prompt that hold module:name of what a configuration is made of
WIDTH = 110


def wrapped(text: str, mark: str = "") -> list[str]:
    """Lines of an indented paragraph."""
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {mark}", subsequent_indent=" " * (2 + len(mark)))


def named(cfg: "Config") -> dict[str, str]:
    """{symbol: module} of every symbol that may name a mechanism; "" where this configuration has none."""
    return {name: (value or "").partition(":")[0] for name, value in cfg.as_json().items()
            if name.endswith(NAMED_BY) and not isinstance(value, bool) and name != "FUNCTION_CLASS"}


def built(cfg: "Config") -> "GPT":
    """The step's whole model without its memory."""
    import torch

    from gpt2.model import GPT

    with torch.device("meta"):
        return GPT(cfg)


def mechanisms(study: Study, cfg: "Config", model: "GPT") -> list[str]:
    """Modules that hold a formula of this step: those that its symbols name, then what these are made of. What a symbol names
    in other steps only is not in use here, though its code may be part of the model."""
    symbols = named(cfg)
    elsewhere = {default.name.partition(":")[0] for name in symbols for default, _ in study.schema.symbols[name].defaults}
    of_model = [type(module).__module__ for module in list(model.modules())[1:]]
    wanted = dict.fromkeys([*filter(None, symbols.values()), *(m for m in of_model if m not in elsewhere)])
    mine = [module for module in wanted if module.startswith(("gpt2.", "lib."))]
    # A class without a formula of its own adds nothing to that of what it inherits or joins, unless a symbol names it.
    return [module for module in mine
            if formula_of(module).paragraphs or module in (symbols["ATTENTION_CLASS"], symbols["MLP_CLASS"])]


def formula_lines(modules: list[str]) -> Iterator[str]:
    for module in modules:
        formula = formula_of(module)
        yield from wrapped(f"{formula.title} ({formula.where})")
        for paragraph in formula.paragraphs:
            lines = paragraph.splitlines() if "\n" in paragraph else textwrap.wrap(paragraph, WIDTH)
            yield from (f"    {line}" for line in lines)


def symbol_lines(study: Study, layer: list[Assignment]) -> Iterator[str]:
    """A line for each symbol that the step sets, with its prompt and where it is set."""
    rows = []
    for a in layer:
        prompts = [node.prompt[0] for node in study.schema.symbols[a.name].nodes if node.prompt]
        rows.append((f"{a.name}={a.value}", prompts[0], a.where))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)] if rows else []
    for assignment, prompt, where in rows:
        yield f"  {one_line(assignment):{widths[0]}}  {prompt:{widths[1]}}  {one_line(where)}"


def parts(model: "GPT") -> dict[str, int]:
    """Parameters by part, by the names of the tensors: those of a layer are summed over layers, and a tied one counts once."""
    found: dict[str, int] = {}
    layers = len(model.transformer.h)
    for name, p in model.named_parameters():
        words = name.removeprefix("transformer.").split(".")
        part = f"{layers} x {words[2]}" if words[0] == "h" else words[0]
        found[part] = found.get(part, 0) + p.numel()
    return found


def parameter_table(step: str, first: str, model: "GPT", reference: "GPT") -> str:
    """By part and in all, beside the baseline's, with the difference."""
    mine, other = parts(model), parts(reference)
    mine["in all"], other["in all"] = sum(mine.values()), sum(other.values())
    order = [part for part in dict.fromkeys([*mine, *other]) if part != "in all"] + ["in all"]
    if step == first:
        return table(["part", step], [[part, f"{mine[part]:,}"] for part in order], "lr")
    return table(["part", step, first, "difference"], [
        [part, f"{mine.get(part, 0):,}", f"{other.get(part, 0):,}", f"{mine.get(part, 0) - other.get(part, 0):+,}"]
        for part in order], "lrrr")


def cache_table(models: dict) -> str:
    """Bytes of a cache for one sequence, in a 2-byte type, as allocated for the whole context."""
    import torch

    rows, reference = [], None
    for step, model in reversed(models.items()):  # the baseline comes last
        held = model.new_cache(1, dtype=torch.bfloat16).nbytes()
        reference = reference or held
        a_token = held / model.block_size
        rows.append([step, f"{a_token:,.0f}" if a_token == round(a_token) else f"{a_token:,.1f}", size(held),
                     f"{held / reference:.3f}"])
    return table(["step", "bytes a token", f"at {plural(model.block_size, 'token')}", "relative"], rows[::-1], "lrrr")


def demands(step: str, first: str, equals: str | None, known: FunctionClass) -> Iterator[str]:
    """What `make check` asks of the step: its laws, and what two of them mean for it."""
    from gpt2.laws import LAWS

    if step == first:
        yield "it is what the other steps are compared with"
    elif equals:
        yield f"the parameters and the function of {equals} at the start, as its fragment declares"
    else:
        yield f"parameters or a function at the start that are not {first}'s"
    if known.relation == "equal":
        yield f"trained and collapsed, it is a model of {known.of}'s class in every tensor, and computes the same logits"
    elif known.relation == "inside":
        yield f"trained and collapsed, it is a model of the wider class of {known.of}, and computes the same logits"
    yield f"the laws {', '.join(law.__name__ for law in LAWS)}"


def show(study: Study, step: str) -> None:
    """Print all there is to know of `step` ("V3" or "V3@RA_R=8") before it is trained."""
    name, inline = parse_step(step)
    path = step_path(name, study.config.STEPS_DIR)
    first = baseline(study)
    configurations = {one: study.resolve(one) for one in dict.fromkeys([first, step])}
    resolved: Resolved = configurations[step]
    cfg = resolved.config
    models = {one: built(configurations[one].config) for one in dict.fromkeys([step, first])}
    known = class_of(study, first, step, cfg)

    def section(title: str, lines: Iterable[str]) -> None:
        lines = list(lines)
        if lines:
            print(f"\n{emphasised(title, sys.stdout)}", *lines, sep="\n")

    print(f"{emphasised(step, sys.stdout)}  {step_header(path, 'Help') or ''}\n"
          f"{' ' * len(step)}  in study {study.name}, beside its baseline {first}")
    section("Formula", formula_lines(mechanisms(study, cfg, models[step])))
    section("Symbols it sets", symbol_lines(study, [*read_layer(path), *inline]))
    shapes = {"layers": cfg.GPT2_N_LAYER, "heads": cfg.GPT2_N_HEAD, "width": cfg.GPT2_N_EMBD, "context": cfg.GPT2_BLOCK_SIZE,
              **models[step].sizes()}
    section("Sizes", wrapped(", ".join(f"{key}={value}" for key, value in shapes.items())))
    section("Function class", [f"  {known}: {known.sentence or 'the class is named after this step'}"])
    section("Parameters", parameter_table(step, first, models[step], models[first]).splitlines())
    section("KV cache of one sequence, 2 bytes a number", cache_table(models).splitlines())
    equals = step_header(path, "Equals")
    section("What make check demands", (
        line for demand in demands(step, first, equals, known) for line in wrapped(demand, "- ")))


def class_of(study: Study, first: str, step: str, cfg: "Config") -> FunctionClass:
    """The step's function class, named after the first step there is of it, the study's baseline before all."""
    configurations = {}
    for one in dict.fromkeys([first, *step_files(study.config.STEPS_DIR)]):
        with contextlib.suppress(UserError):  # some other fragment that does not hold in this study
            configurations[one] = study.resolve(one).config
    return function_classes({**configurations, step: cfg})[step]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.show", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="*", help="V3, or V3@RA_R=8 (default: $STEP)")
    args = parser.parse_args()
    steps = list(dict.fromkeys([*args.step, *os.environ.get("STEP", "").split()]))
    if not steps:
        raise UserError("no step is named.", f"make show STEP={next(iter(step_files()), 'NAME')} (make list-steps).")
    study = Study(os.environ.get("STUDY") or None)
    announce(study)
    for number, step in enumerate(steps):
        if number:
            print("\n")
        show(study, step)


if __name__ == "__main__":
    with reported():
        main()
