"""Print the report of the configured study and write it to OUT/report.md. Exit status 1 names cells that failed."""

import argparse
import sys

from lib import atomic
from lib.errors import UserError, reported
from lib.paths import shown
from lib.plan import Plan
from lib.report import failures, render
from scripts.plan import options_from_environment


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__)
    parser.add_argument("steps", nargs="*", help="only these steps count for the exit status")
    plan = Plan(options_from_environment(parser.parse_args().steps))
    text = render(plan)
    print("\n" + text, end="")
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        atomic.write_text(plan.out / "report.md", text)
    except OSError as error:
        raise UserError(f"{shown(plan.out)} cannot be written: {error.strerror}.",
                        "make report OUT=folder with a folder you may write to.") from None
    print(f"\nwritten to {shown(plan.out / 'report.md')}")
    broken = failures(plan)
    if broken:
        print(f"without a result: {', '.join(broken)}; make resumes interrupted cells, make RETRY=1 runs failed ones again",
              file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    with reported():
        sys.exit(main())
