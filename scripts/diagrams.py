"""Draw the pictures of the docs from built models and committed results, as SVG and PNG.

    python -m scripts.diagrams                          all, into docs/images (make diagrams)
    python -m scripts.diagrams folded_layout --out pictures --set RA_R=8

Nothing is trained. A picture whose results are not in docs/results yet is not drawn; what it waits for is said, and files that
are left of it are removed.
"""

import argparse
from pathlib import Path

from lib import atomic
from lib.errors import UserError, reported
from lib.paths import ROOT, shown
from lib.tables import plural
from scripts.diagramming import PICTURES, draw


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.diagrams", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images", metavar="FOLDER", help="default: docs/images")
    parser.add_argument("--set", nargs="+", default=[], dest="settings", metavar="SYMBOL=VALUE",
                        help="on top of every step that sets the symbol itself")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results", metavar="FOLDER", help="default: docs/results")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in PICTURES]:
        raise UserError(f"there is no picture {unknown[0]}.", f"one of {', '.join(PICTURES)}.")
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("matplotlib is not installed.", "make setup, or pip install matplotlib.") from None

    from scripts.diagramming.canvas import METADATA, STYLE, write
    from scripts.diagramming.sources import Sources, Waits

    sources, written = Sources(tuple(args.settings), args.results), 0
    for name in args.names or PICTURES:
        with mpl.rc_context(STYLE):
            try:
                figure = draw(name, sources)
            except Waits as missing:
                print(f"{name} waits for {missing}")
                for old in [args.out / f"{name}.{kind}" for kind in METADATA]:  # it would show what nothing supports any more
                    if old.exists():
                        old.unlink()
                        print(f"{shown(old)} removed")
                continue
            atomic.make_folder(args.out)
            files = write(figure, args.out, name)
        written += len(files)
        print(", ".join(f"{shown(args.out / file)} ({size / 1e3:.0f} kB)" for file, size in files.items()))
    print(f"{plural(written, 'file')} written")


if __name__ == "__main__":
    with reported():
        main()
