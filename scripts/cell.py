"""Run one planned cell: what the recipes of cells.mk call. `make` is the usual way to run cells."""

import argparse
import sys
from pathlib import Path

from lib.errors import reported
from lib.launch import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.cell", description=__doc__)
    parser.add_argument("folder", type=Path, help="the cell's folder")
    parser.add_argument("--plan", type=Path, required=True, help="the step's resolved configuration, OUT/plan/HASH.json")
    parser.add_argument("--seed", type=int, required=True, help="the cell's seed")
    parser.add_argument("--of", default="1/1", metavar="N/TOTAL", help="its place among the cells that run, for display")
    parser.add_argument("--parent", help="folder name of the cell whose model it starts from")
    parser.add_argument("--retry", action="store_true", help="run it again if it has failed: it was planned so")
    args = parser.parse_args()
    return run(args.folder, args.plan, args.seed, args.of, args.parent, args.retry)


if __name__ == "__main__":
    with reported(ends_with_make=False):  # lib.launch stops the cell first
        sys.exit(main())
