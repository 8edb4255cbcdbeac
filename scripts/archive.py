"""Take a study's finished cells from machine to machine: `pack` writes them to one archive, `unpack` adds those of one.

make's variables arrive in the environment: FILE names the archive, KABLATE_OUT (OUT= on make's command line) the results
folder. Records, logs and plans travel; weights do not. Cells of any seed are taken, those of another study are refused.
"""

import argparse
import os
import sys
from pathlib import Path

from lib.bundle import pack, unpack
from lib.config import announce
from lib.errors import UserError, reported
from lib.paths import ROOT, shown
from lib.plan import Plan
from lib.tables import plural
from scripts.plan import options_from_environment


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.archive", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("file", nargs="?", default=os.environ.get("FILE", ""),
                        help="the archive (default: $FILE; to pack: STUDY.tar.xz in the project's root)")
    args = parser.parse_args(arguments)
    if args.action == "unpack" and not args.file:
        raise UserError("no archive was given.", "make unpack FILE=name.tar.xz")
    plan = Plan(options_from_environment())
    announce(plan.study)
    path = ROOT / Path(args.file or f"{plan.out.name}.tar.xz").expanduser()
    if args.action == "pack":
        made = pack(plan.out, path)
        for name, why in made.left_out.items():
            print(f"left out {name}: {why}")
        print(f"{plural(len(made.cells), 'cell')} of {shown(plan.out)} in {shown(path)}, without weights: "
              f"{made.size / 1000:.1f} kB")
        return
    report = unpack(plan, path)
    for name in report.same:
        print(f"kept {name}: it is here already, with the same result")
    for name in report.measured:
        print(f"added {name}")
    for name in report.not_taken:
        print(f"left out {name}: another one is here")
    for name in report.replaced:
        print(f"replaced {name}: it was unfinished, and is in archive/ now")
    if report.other_plan:
        print(f"warning: these cells ran by another plan ({report.other_plan}) than this study's; give every machine the same "
              "SEEDS and steps", file=sys.stderr)
    print(f"{plural(len(report.added) + len(report.replaced), 'cell')} of {shown(path)} added to {shown(plan.out)}, "
          f"{len(report.same)} kept")


if __name__ == "__main__":
    with reported():
        main()
