"""Kill tiny studies, fill their disk, let them hang, turn their clock back, damage their files, and see that nothing is lost.

The small size takes a few kills and the parts kills, disk, hang, clock and damage. KILLS=200 is the full size: longer cells,
and also the parts fuzz (10,000 cases of what is read from outside) and random (200 random configurations, each built, checked
and trained).

Everything happens to the real program (make and real training), in a copy of the project below a temporary folder; neither
.config nor any study is touched. A table at the end says what held; exit status 1 if anything did not, and then the folder
is kept. The table is also in OUT/torture.md and .json from the first case on, so that a run which is ended early leaves what it
has. KILLS, SEED, WHAT (parts) and OUT on make's command line are the options of these names.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lib.cells import whole
from lib.errors import UserError, reported
from lib.paths import ROOT, shown
from scripts.torturing import clock, damage, disk, hang, kills
from scripts.torturing.arena import Arena, Failed, Reference, steps
from scripts.torturing.drawn import CONFIGURATIONS, FUZZ_CASES, Drawn
from scripts.torturing.evidence import Evidence

ON_STUDIES = ("kills", "disk", "hang", "clock", "damage")
PARTS = (*ON_STUDIES, "fuzz", "random")
FULL_SIZE, ITERATIONS, FEW_ITERATIONS = 100, 100, 40  # with fewer kills than that, cells are shorter and parts are left out
DEFAULT_OUT = ROOT / "test_matrix_results/torture"


class Torture:
    """Runs the parts; what comes of each case goes to `evidence`."""

    def __init__(self, arena: Arena, seed: int, number_of_kills: int, study: int | None, evidence: Evidence):
        self.arena, self.seed, self.number_of_kills, self.only = arena, seed, number_of_kills, study
        self.drawn, self.evidence = Drawn(arena.root, seed), evidence
        self.begun, self.lock = time.monotonic(), threading.Lock()

    def say(self, text: str) -> None:
        with self.lock:
            print(f"{time.monotonic() - self.begun:7.1f} s  {text}", flush=True)

    def run(self, parts: list[str], side_by_side: int, case: str = "") -> None:
        mounts = disk.own_mounts() if "disk" in parts else None  # before there are threads
        reference = self._reference(side_by_side) if set(parts) & set(ON_STUDIES) else None
        with ThreadPoolExecutor(side_by_side) as pool:
            waiting = []
            if "kills" in parts and not case:
                campaign = kills.Campaign(self.arena, reference, self.number_of_kills, self.seed, self.say, self.only)
                self.evidence.follow(campaign)
                waiting += [pool.submit(campaign.run) for _ in range(campaign.streams)]
            for part, name, function in self._cases(parts, reference, mounts):
                if case in name:
                    self.evidence.await_case(part, name)
                    waiting.append(pool.submit(self._case, part, name, function))
            try:
                for one in waiting:
                    one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise
        if mounts:
            self.evidence.add("disk", "on file systems of their own", f"left out: {mounts}", 0.0, True)

    def close(self) -> None:
        """End whatever still runs."""
        self.arena.close()
        self.drawn.close()

    def _reference(self, side_by_side: int) -> Reference:
        two = {"ABLATION_STEPS": f'"{" ".join(steps(2))}"', "SEEDS": '"2"'}
        reference = Reference(self.arena.study("reference", **two), f"-j{side_by_side}")
        self.say(f"an undisturbed study of {len(reference.records)} cells took {reference.seconds:.0f} s")
        return reference

    def _cases(self, parts: Any, reference: Any, mounts: Any) -> Iterator[Any]:
        found = {"fuzz": self.drawn.fuzz, "random": self.drawn.random,  # the longest first
                 "hang": lambda: hang.cases(self.arena, reference.first()),
                 "disk": lambda: disk.cases(self.arena, reference, mounts),
                 "clock": lambda: clock.cases(self.arena, reference),
                 "damage": lambda: damage.Damages(self.arena, reference.first(), self.seed).cases()}
        for part in found:
            if part in parts:
                for name, function in found[part]():
                    yield part, name, function

    def _case(self, part: str, name: str, function: Any) -> None:
        begun = time.monotonic()
        try:
            result, held = function(), True
        except Failed as error:
            if self.arena.closed:
                return  # it was ended, and has not failed
            result, held = str(error), False
        self.say(f"{part}: {name}: {'' if held else 'FAILED: '}{result}")
        self.evidence.add(part, name, result, time.monotonic() - begun, held)


def command(args: argparse.Namespace) -> str:
    """What a person types to do the same again."""
    if args.case or args.study is not None:
        words = ["python -m scripts.torture", *args.parts, "--kills", args.kills, "--seed", args.seed]
        words += ["--case", shlex.quote(args.case)] if args.case else []
        return " ".join(words + (["--study", str(args.study)] if args.study is not None else []))
    what = [f"WHAT={shlex.quote(' '.join(args.parts))}"] if args.parts else []
    return " ".join(["make torture", f"KILLS={args.kills}", f"SEED={args.seed}", *what])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.torture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get
    parser.add_argument("parts", nargs="*", default=given("WHAT", "").split(), metavar="PART",
                        help=f"of {', '.join(PARTS)} (default: all from {FULL_SIZE} kills on, else the first five); "
                             f"fuzz is always {FUZZ_CASES} cases, random {CONFIGURATIONS} configurations")
    parser.add_argument("--kills", default=given("KILLS") or "8", metavar="N",
                        help=f"how many kills in all (default 8); from {FULL_SIZE} on cells are longer, and all parts are run")
    parser.add_argument("--seed", default=given("SEED") or "1", metavar="N", help="draws moments, victims and bits (default 1)")
    parser.add_argument("--study", type=int, metavar="N", help="kill only study N of a seed, once more")
    parser.add_argument("--case", default="", metavar="TEXT", help="only the cases whose name holds TEXT")
    parser.add_argument("--out", type=Path, default=given("KABLATE_OUT") or DEFAULT_OUT, metavar="FOLDER",
                        help=f"where the table is written (default {shown(DEFAULT_OUT)}; OUT= of make)")
    parser.add_argument("--side-by-side", type=int, default=len(os.sched_getaffinity(0)) + 1, metavar="N",
                        help="cases at a time (default: one more than cores, since they often wait)")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder in any case")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise UserError(f"there is no torture '{unknown[0]}'.", f"make torture WHAT='{' '.join(PARTS)}', or some of them.")
    if None in (whole(args.kills), whole(args.seed)):
        raise UserError(f"KILLS={args.kills} or SEED={args.seed} is no whole number.", "make torture KILLS=200 SEED=1.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    number = int(args.kills)
    full, held = number >= FULL_SIZE, False
    parts = args.parts or list(("kills",) if args.study is not None else PARTS if full else ON_STUDIES)
    evidence = Evidence(ROOT / args.out, command(args), PARTS)
    evidence.keep()  # before all that work: whether it can be written at all
    root = Path(tempfile.mkdtemp(prefix="kablate-torture-"))
    arena = Arena(root / "arena", iterations=ITERATIONS if full else FEW_ITERATIONS)
    torture = Torture(arena, int(args.seed), number, args.study, evidence)
    try:
        torture.run(parts, max(1, args.side_by_side), args.case)
        held = evidence.held()
        evidence.end("ended")
    except Failed as error:
        evidence.end(f"given up: {error}")
        print(f"error: {error}", file=sys.stderr)
    except (KeyboardInterrupt, SystemExit):
        evidence.end("stopped before its end")
        raise
    finally:
        torture.close()
        print("\n" + evidence.text() + f"written to {shown(evidence.folder)}/torture.md and .json", flush=True)
        if held and not args.keep:
            shutil.rmtree(root, ignore_errors=True)
        else:
            print(f"what was tortured is in {root}", file=sys.stderr)
    return 0 if held else 1


if __name__ == "__main__":
    with reported():
        sys.exit(main())
