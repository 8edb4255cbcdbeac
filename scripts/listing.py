"""List what there is: goals of the Makefile, studies and fragments, or steps. Needs nothing but Python."""

import argparse
import re
from pathlib import Path

from lib.errors import reported
from lib.paths import ROOT
from lib.steps import step_files, step_header


def goals() -> None:
    """Groups and goals from the `##@ group` and `goal: ## text` comments of the Makefile."""
    for line in (ROOT / "Makefile").read_text().splitlines():
        if line.startswith("##@"):
            print(f"\n{line[3:].strip()}")
        elif match := re.match(r"([A-Za-z%-]+):.*?## (.*)", line):
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
            print(f"{title}")
            for path in files:
                print(f"  {path.name:28} {first_comment(path)}")


def steps() -> None:
    """Steps, each with its `# Help:` line."""
    for name, path in step_files().items():
        equals = step_header(path, "Equals")
        print(f"  {name:10} {step_header(path, 'Help') or ''}{f' (equals {equals})' if equals else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.listing", description=__doc__)
    parser.add_argument("what", choices=["goals", "defconfigs", "steps"])
    {"goals": goals, "defconfigs": defconfigs, "steps": steps}[parser.parse_args().what]()


if __name__ == "__main__":
    with reported():
        main()
