"""Say how the effect of each arm changes with the size of the model, from the reports of one study at several sizes.

FROM names two or more folders, each with a report.json of make report, of one baseline and metric. Written are ladder.md (which
is printed), ladder.json, ladder.png and ladder.svg: into OUT, or else into the first of these folders. The reports are only
read.
"""

import argparse
import os
from pathlib import Path

from lib import atomic
from lib.errors import UserError, reported
from lib.paths import shown
from lib.report import kept

AGAIN = 'make ladder FROM="folder folder", each with a report.json of make report.'


def read_report(folder: Path) -> dict:
    """The report.json of a folder; raises UserError where there is none that a ladder can use."""
    return kept.read(folder / "report.json", "make report", AGAIN, lambda content: (
        content["format"] == 1 and {"metric", "sentence"} <= content["plan"].keys()
        and {"study", "baseline", "margin"} <= content.keys()
        and {"device", "torch", "source_hash"} <= content["environment"].keys()
        and {"train_hash", "eval_hash"} <= content["data"].keys()
        and all({"name", "is_baseline", "seeds_done", "configuration"} <= step.keys() for step in content["steps"])))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.ladder", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="folders with a report.json (default: FROM of the environment)")
    parser.add_argument("--out", type=Path, default=os.environ.get("KABLATE_OUT") or None, metavar="FOLDER",
                        help="where to write (default: make's OUT, or the first of the folders)")
    args = parser.parse_args(arguments)
    folders = args.folders or [Path(name) for name in os.environ.get("FROM", "").split()]
    reports = [(shown(folder), read_report(folder)) for folder in folders]
    try:
        from lib.report import charts, ladder

        found = ladder.ladder(reports)
        out = args.out or folders[0]
        if not out.is_dir():
            raise UserError(f"there is no folder {shown(out)}.", "create it first.")
        text, spec = ladder.markdown(found), ladder.chart(found)
        png, svg = charts.png(spec), charts.svg(spec)
        atomic.write_json(out / "ladder.json", found)  # first, since it takes no infinity
    except ModuleNotFoundError as error:
        raise UserError(f"a ladder needs {error.name}, which is not installed.", f"pip install {error.name}.") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"these reports give no ladder: {type(error).__name__}: {error}.", AGAIN) from None
    atomic.write_text(out / "ladder.md", text)
    atomic.write_bytes(out / "ladder.png", png)
    atomic.write_text(out / "ladder.svg", svg)
    print(text + f"\nwritten to {shown(out / 'ladder.md')}, .json, .png, .svg")


if __name__ == "__main__":
    with reported():
        main()
