"""Print the report of the configured study, and write it to OUT as report.md, .csv, .json, .html and pictures.

Reads what is on disk, also of a study that is half finished. Exit status 1 names cells that ended without a result.
make report FROM=docs/results/STUDY draws the page of a report that is kept without its cells, from its report.json alone.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from lib import atomic
from lib.errors import UserError, reported
from lib.paths import shown
from lib.plan import Plan
from scripts.plan import options_from_environment


def draw_again(folder: Path) -> int:
    """report.html of a folder that holds a report.json; nothing else in it is touched."""
    try:
        from lib.report import charts, page

        content = json.loads((folder / "report.json").read_text())
        text = page.render(content, charts.charts(content))
        atomic.write_text(folder / "report.html", text)
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs {error.name}, which is not installed.", f"pip install {error.name}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{shown(folder / 'report.json')} gives no page: {error}.",
                        "make report FROM=folder with a folder that holds a report.json of make report.") from None
    print(f"written to {shown(folder / 'report.html')}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="only these steps count for the exit status")
    args = parser.parse_args()
    if os.environ.get("FROM"):
        return draw_again(Path(os.environ["FROM"]))
    plan = Plan(options_from_environment(args.steps))
    try:
        from lib.report import files
        from lib.report.content import content, failures
    except ImportError as error:
        package = (error.name or "scipy").partition(".")[0]
        raise UserError(f"the report needs {package}, which is not installed.",
                        f"pip install {package}, then make report (finished cells are kept).") from None
    try:
        text, left_out = files.write(plan.out, content(plan))
    except OSError as error:
        raise UserError(f"{shown(plan.out)} cannot be written: {error.strerror}.",
                        "make report OUT=folder with a folder you may write to.") from None
    print("\n" + text, end="")
    print(f"\nwritten to {shown(plan.out / 'report.md')}" + (f" ({left_out})" if left_out else ", .csv, .json, .html"))
    if plan.study.config.TRACKER != "none":
        from lib import trackers

        try:
            said = trackers.attach_report(plan.study.config, plan.out)
        except OSError as error:  # the report is on disk, and a tracker stops nothing
            said = f"warning: not attached to {plan.study.config.TRACKER}: {error}"
        print(said or "", end="\n" if said else "")
    broken = failures(plan)
    if broken:
        print(f"without a result: {', '.join(broken)}; make resumes interrupted cells, make RETRY=1 runs failed ones again",
              file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    with reported():
        sys.exit(main())
