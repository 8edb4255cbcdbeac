"""Kill tiny studies, fill their disk, turn their clock back, damage their files, and see that nothing is lost.

The small size takes a few kills and the parts kills, disk, clock and damage. KILLS=200 is the full size: longer cells, and
also the parts fuzz (10,000 cases of what is read from outside) and random (200 random configurations, each built, checked and
trained).

Everything happens to the real program (make and real training), in a copy of the project below a temporary folder; neither
.config nor any result is touched. A table at the end says what held; exit status 1 if anything did not, and then the folder
is kept. KILLS, SEED and WHAT on make's command line are the options of these names.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.cells import whole
from lib.errors import UserError, reported
from lib.tables import duration, table
from scripts.torturing import clock, damage, disk, kills
from scripts.torturing.arena import Arena, Failed, Reference, steps
from scripts.torturing.drawn import CONFIGURATIONS, FUZZ_CASES, Drawn

ON_STUDIES = ("kills", "disk", "clock", "damage")
PARTS = (*ON_STUDIES, "fuzz", "random")
FULL_SIZE, ITERATIONS, FEW_ITERATIONS = 100, 100, 40  # with fewer kills than that, cells are shorter and parts are left out
SHOWN = 120  # characters of what came of a case in the table; the line above it has all of them


class Torture:
    """Runs the parts and collects a row for each case: (part, case, result, seconds, whether it held)."""

    def __init__(self, arena: Arena, seed: int, number_of_kills: int, study: int | None):
        self.arena, self.seed, self.number_of_kills, self.only = arena, seed, number_of_kills, study
        self.drawn = Drawn(arena.root, seed)
        self.rows: list[tuple[str, str, str, float, bool]] = []
        self.begun, self.lock = time.monotonic(), threading.Lock()
        self.tally = None

    def say(self, text: str) -> None:
        with self.lock:
            print(f"{time.monotonic() - self.begun:7.1f} s  {text}", flush=True)

    def run(self, parts: list[str], side_by_side: int, case: str = "") -> None:
        mounts = disk.own_mounts() if "disk" in parts else None  # before there are threads
        reference = self._reference(side_by_side) if set(parts) & set(ON_STUDIES) else None
        with ThreadPoolExecutor(side_by_side) as pool:
            waiting = []
            if "kills" in parts and not case:
                waiting.append(pool.submit(self._kills, reference))
            for part, name, function in self._cases(parts, reference, mounts):
                if case in name:
                    waiting.append(pool.submit(self._case, part, name, function))
            try:
                for one in waiting:
                    one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise
        if "disk" in parts and mounts:
            self.rows.append(("disk", "full and read-only disks", f"left out: {mounts}", 0.0, True))

    def close(self) -> None:
        """End whatever still runs."""
        self.arena.close()
        self.drawn.close()

    def _reference(self, side_by_side: int) -> Reference:
        two = {"ABLATION_STEPS": f'"{" ".join(steps(2))}"', "SEEDS": '"2"'}
        reference = Reference(self.arena.study("reference", **two), f"-j{side_by_side}")
        self.say(f"an undisturbed study of {len(reference.records)} cells took {reference.seconds:.0f} s")
        return reference

    def _cases(self, parts, reference, mounts):
        found = {"fuzz": self.drawn.fuzz, "random": self.drawn.random,  # the longest first
                 "disk": lambda: disk.cases(self.arena, reference.first(), mounts),
                 "clock": lambda: clock.cases(self.arena, reference),
                 "damage": lambda: damage.Damages(self.arena, reference.first(), self.seed).cases()}
        for part in found:
            if part in parts:
                for name, function in found[part]():
                    yield part, name, function

    def _case(self, part: str, name: str, function) -> None:
        begun = time.monotonic()
        try:
            result, held = function(), True
        except Failed as error:
            result, held = str(error), False
        seconds = time.monotonic() - begun
        self.say(f"{part}: {name}: {'' if held else 'FAILED: '}{result}")
        self.rows.append((part, name, result, seconds, held))

    def _kills(self, reference) -> None:
        begun = time.monotonic()
        self.tally, failures = kills.campaign(self.arena, reference, self.number_of_kills, self.seed, self.say, self.only)
        seconds = time.monotonic() - begun
        self.rows += [("kills", where, what, 0.0, False) for where, what in failures]
        tally = self.tally
        self.rows.append(("kills", f"{tally.total} kills, {tally.studies} studies, {tally.makes} makes",
                          f"complete and equal to the bit; nothing outlived its make by more than {tally.slowest:.1f} s"
                          if not failures else f"{len(failures)} studies failed", seconds, not failures))

    def report(self) -> bool:
        """Print the tables; whether all held."""
        if self.tally:
            names = sorted({name for name, _ in self.tally.kills})
            rows = [[victim, *(self.tally.kills[name, victim] for name in names)]
                    for victim in kills.VICTIMS if any(self.tally.kills[name, victim] for name in names)]
            print("\n" + table(["killed", *names], rows, "l" + "r" * len(names)), end="")
            print(", ".join(f"{count} {when}" for when, count in sorted(self.tally.moments.items())))
        rows = sorted(self.rows, key=lambda row: PARTS.index(row[0]))
        print("\n" + table(["part", "case", "held", "s", "what came of it"],
                           [[part, name, "yes" if held else "NO", f"{seconds:.0f}", result[:SHOWN]]
                            for part, name, result, seconds, held in rows], "lllr"), end="")
        failed = sum(not row[4] for row in rows)
        print(f"seed {self.seed}, {duration(time.monotonic() - self.begun)}: "
              + ("everything held" if not failed else f"{failed} of {len(rows)} did not hold"))
        return not failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.torture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get
    parser.add_argument("parts", nargs="*", default=given("WHAT", "").split(), metavar="PART",
                        help=f"of {', '.join(PARTS)} (default: all from {FULL_SIZE} kills on, else the first four); "
                             f"fuzz is always {FUZZ_CASES} cases, random {CONFIGURATIONS} configurations")
    parser.add_argument("--kills", default=given("KILLS") or "8", metavar="N",
                        help=f"how many kills in all (default 8); from {FULL_SIZE} on cells are longer, and all parts are run")
    parser.add_argument("--seed", default=given("SEED") or "1", metavar="N", help="draws moments, victims and bits (default 1)")
    parser.add_argument("--study", type=int, metavar="N", help="kill only study N of a seed, once more")
    parser.add_argument("--case", default="", metavar="TEXT", help="only the cases whose name holds TEXT")
    parser.add_argument("--side-by-side", type=int, default=len(os.sched_getaffinity(0)) + 1, metavar="N",
                        help="cases at a time (default: one more than cores, since they often wait)")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder in any case")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise UserError(f"there is no torture '{unknown[0]}'.", f"make torture WHAT='{' '.join(PARTS)}', or some of them.")
    if None in (whole(args.kills), whole(args.seed)):
        raise UserError(f"KILLS={args.kills} or SEED={args.seed} is no whole number.", "make torture KILLS=200 SEED=1.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    root = Path(tempfile.mkdtemp(prefix="kablate-torture-"))
    number = int(args.kills)
    full, held = number >= FULL_SIZE, False
    arena = Arena(root / "arena", iterations=ITERATIONS if full else FEW_ITERATIONS)
    torture = Torture(arena, int(args.seed), number, args.study)
    try:
        usual = ("kills",) if args.study is not None else PARTS if full else ON_STUDIES
        torture.run(args.parts or list(usual), max(1, args.side_by_side), args.case)
        held = torture.report()
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        torture.close()
        if held and not args.keep:
            shutil.rmtree(root, ignore_errors=True)
        else:
            print(f"what was tortured is in {root}", file=sys.stderr)
    return 0 if held else 1


if __name__ == "__main__":
    with reported():
        sys.exit(main())
