"""List what there is: goals of the Makefile, studies and fragments, or steps. Needs nothing but Python,
and kconfiglib for the steps' function classes. With --plain names alone, one a line, which the shell's completion reads
(scripts/completion.bash)."""

import argparse
import contextlib
import re
import sys
from pathlib import Path

from lib.errors import UserError, reported
from lib.paths import ROOT
from lib.steps import step_files, step_header
from lib.terminal import emphasised

BUDGETS = ("GPT2_MAX_TIME", "GPT2_MAX_ITERS", "GPT2_MAX_TOKENS")  # also of the environment; what lib/kconfig.py calls BUDGET


GOAL = re.compile(r"([A-Za-z%-]+):.*?## (.*)")


def goals() -> None:
    """Groups and goals from the `##@ group` and `goal: ## text` comments of the Makefile."""
    for line in (ROOT / "Makefile").read_text().splitlines():
        if line.startswith("##@"):
            print(f"\n{emphasised(line[3:].strip(), sys.stdout)}")
        elif match := GOAL.match(line):
            name, text = match.groups()
            print(f"  {name.replace('%', 'NAME'):17} {text}")
    print("""
One step: make V3. Overrides: GPT2_MAX_TIME=7200 make, make SEEDS=3, make OUT=folder, make TIME=60.
Until every step has a verdict: make UNTIL=decided MAX_SEEDS=16.
Also: -jN or JOBS=N runs N cells side by side, V=1 shows commands, V=2 reasons, RETRY=1 runs failed cells again.""")


def first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""


def defconfigs() -> None:
    """Studies and fragments, each with the first line of its comment."""
    for title, pattern in (("Studies (make defconfig-NAME)", "*"), ("Older studies", "old/*"),
                           ("Fragments (make defconfig-NAME+FRAGMENT)", "fragments/*")):
        files = [p for p in sorted((ROOT / "defconfigs").glob(pattern)) if p.is_file()]
        if files:
            print(emphasised(title, sys.stdout))
            for path in files:
                print(f"  {path.name:34} {first_comment(path)}")


def steps() -> None:
    """Steps, each with the first step of its function class and its `# Help:` line."""
    classes = classes_of_steps()
    width = max(map(len, classes.values())) if classes else 0
    for name, path in step_files().items():
        equals = step_header(path, "Equals")
        print(f"  {name:10} {classes.get(name, ''):{width}}  {step_header(path, 'Help') or ''}"
              f"{f' (equals {equals})' if equals else ''}")
    print("""
The second column is the function class: two steps of one class compute the same functions, and differ in optimisation only.
"inside V0": whatever the step computes, V0 can, and more.""" if classes else """
After make setup this list shows the steps' function classes too.""")


def classes_of_steps() -> dict[str, str]:
    """The function class of every step in the default study, V0 before all; empty where kconfiglib is not installed yet."""
    try:
        from lib.classes import function_classes
        from lib.config import DEFAULT_STUDY, Study
    except ImportError:
        return {}
    study, configurations = Study(DEFAULT_STUDY), {}
    for step in [study.config.ABLATION_STEPS.split()[0], *step_files()]:
        with contextlib.suppress(UserError):  # a fragment that does not hold is listed all the same
            configurations[step] = study.resolve(step).config
    return {step: str(known) for step, known in function_classes(configurations).items()}


def plain_names(what: str) -> list[str]:
    """Names of one kind: of goals those that are whole, and of variables those that the Makefile and budgets take."""
    makefile, folder = (ROOT / "Makefile").read_text(), ROOT / "defconfigs"
    if what == "goals":
        return [match[1] for line in makefile.splitlines() if (match := GOAL.match(line)) and "%" not in match[1]]
    if what == "variables":
        listed = re.search(r"^\$\(foreach v,([A-Z0-9_ ]+),", makefile, re.M)[1].split()
        return sorted({*listed, *re.findall(r"\(call on_command_line,([A-Z_]+)\)", makefile), *BUDGETS, "PYTHON", "V"})
    if what == "steps":
        return list(step_files())
    places = [folder / "fragments"] if what == "fragments" else [folder, folder / "old"]
    return [path.name for place in places if place.is_dir() for path in sorted(place.iterdir()) if path.is_file()]


def main() -> None:
    tables = {"goals": goals, "defconfigs": defconfigs, "steps": steps}
    parser = argparse.ArgumentParser(prog="python -m scripts.listing", description=__doc__)
    parser.add_argument("what", nargs="+", choices=[*tables, "fragments", "variables"])
    parser.add_argument("--plain", action="store_true", help="names alone, one a line")
    args = parser.parse_args()
    for what in args.what:
        if args.plain:
            print(*plain_names(what), sep="\n")
        elif what in tables:
            tables[what]()
        else:
            parser.error(f"{what} are listed with --plain only")


if __name__ == "__main__":
    with reported():
        main()
