"""Draw the validation loss of a study's steps against the bytes of their caches and their decoding speed.

Reads the finished cells of a results folder (default: the configured study's) and what `make bench-decode FILE=...` kept of the
same steps at the same sizes (in several files, if they are of one machine and one way of measuring: FILE="a.json b.json"), and
writes frontier.md and frontier.png into the folder. Every finished cell with a cache takes part; a step whose speed was not
measured, or at other sizes, stands in the panel of bytes only, and frontier.md says why. A cell whose mechanism never acted
within its budget is left out.
"""

import argparse
import os
from pathlib import Path

from lib import atomic, results
from lib.errors import UserError, reported
from lib.paths import shown
from lib.report import kept


def finished_cells(folder: Path | None) -> tuple[str, Path, list[dict]]:
    """(name of the study, its folder, the records of its finished cells), of a folder or of the configured study."""
    if folder:
        read = [results.read(path) for path in sorted(folder.glob("test_*"))]
        records = [r for r in read if r and r["state"] == "done"]
        return (records[0]["study"] if records else folder.name), folder, records
    from lib.plan import Plan
    from scripts.plan import options_from_environment

    plan = Plan(options_from_environment())
    found = [status for _, status in plan.found(plan.common)]
    return plan.study.name, plan.out, [status.record for status in found if status.state == "done"]


def read_decode(path: Path) -> dict:
    """What bench-decode kept."""
    return kept.read(path, "make bench-decode", "make bench-decode FILE=name.json writes one.", lambda record: (
        record["format"] == 1 and all({"step", "context", "batch", "error"} <= row.keys() for row in record["rows"])
        and {"device", "torch"} <= record["environment"].keys() and {"batches", "baseline"} <= record.keys()))


SAME = ("baseline", "eager", "compiled", "dtype")


def joined(records: dict[Path, dict]) -> dict:
    """What several files of one machine and one way of measuring hold, as one; of a row that is in two, the first file's."""
    (origin, first), *others = records.items()
    rows = {(row["step"], row["context"], row["batch"]): row for row in first["rows"]}
    for path, other in others:
        for name in SAME:
            if other.get(name) != first.get(name):
                raise UserError(f"{shown(path)} has {name} {other.get(name)}, {shown(origin)} {first.get(name)}.",
                                "give files of one way of measuring.")
        for name in ("device", "torch"):
            if other["environment"][name] != first["environment"][name]:
                raise UserError(f"{shown(path)} is of {other['environment'][name]}, {shown(origin)} of "
                                f"{first['environment'][name]}.", "give files of one machine and one torch.")
        rows = {(row["step"], row["context"], row["batch"]): row for row in other["rows"]} | rows
    batches = {batch for one in records.values() for batch in one["batches"]}
    return first | {"rows": list(rows.values()), "batches": sorted(batches)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.frontier", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a results folder (default: the configured study's)")
    parser.add_argument("--decode", type=Path, nargs="+", metavar="FILE.json",
                        default=[Path(name) for name in os.environ.get("FILE", "").split()],
                        help="what make bench-decode kept, in one file or several (default: FILE of the environment)")
    parser.add_argument("--batch", type=int, help="which batch's speed (default: the largest that was measured)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: the results folder)")
    args = parser.parse_args(arguments)
    if not args.decode:
        raise UserError("no decoding speeds were given.", "make frontier FILE=name.json, which make bench-decode has written.")
    decode = joined({path: read_decode(path) for path in args.decode})
    if args.folder and not args.folder.is_dir():
        raise UserError(f"there is no folder {shown(args.folder)}.", "give a study's folder of results.")
    study, folder, records = finished_cells(args.folder)
    records = [r for r in records if r["kv_cache_bytes"] and not r["inactive"]]
    if not records:
        raise UserError(f"{shown(folder)} has no finished cell that can be compared.", "make, then make frontier.")
    batch = args.batch or max(decode["batches"])
    if batch not in decode["batches"]:
        raise UserError(f"{' '.join(map(shown, args.decode))} has no batch of {batch}.",
                        f"give one of {', '.join(map(str, decode['batches']))}.")
    out = args.out or folder
    if not out.is_dir():
        raise UserError(f"there is no folder {shown(out)}.", "create it first.")
    try:
        from lib.report import charts, frontier

        found = frontier.points(records, decode, batch)
        context = records[0]["configuration"]["GPT2_BLOCK_SIZE"]
        where = (f"Speed: relative to {decode['baseline']}, timed beside each; batch {batch}, context {context}, "
                 f"{decode['environment']['device']}, torch {decode['environment']['torch']}, {decode['dtype']}.")
        if not decode.get("eager", True) and any("index" in (r.get("kv_cache_parts") or {}) for r in records):
            where += "\nOf a pruned cache: of a step between two borders, without what ranking and dropping take at one."
        picture = charts.png(frontier.chart(found, study, where, decode["baseline"]))
        text = frontier.markdown(found, study, where)
    except ModuleNotFoundError as error:
        raise UserError(f"the picture needs {error.name}, which is not installed.", f"pip install {error.name}.") from None
    atomic.write_text(out / "frontier.md", text)
    atomic.write_bytes(out / "frontier.png", picture)
    print(text + f"\nwritten to {shown(out / 'frontier.md')}, .png")


if __name__ == "__main__":
    with reported():
        main()
