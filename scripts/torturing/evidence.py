"""What a torture has shown so far, as tables for people and as JSON, in two files that are whole at any moment.

A row is a case, or all kills together: (part, case, result, seconds, whether it held). Cases that were begun or asked for and
have no result are named as such: a run that was stopped must not look like one that has ended.
"""

import os
import platform
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import atomic
from lib.errors import UserError
from lib.paths import shown
from lib.tables import duration, plural, table

FORMAT = 1
SHOWN = 120  # characters of what came of a case in the table; torture.json has all of them


class Evidence:
    """Rows as they come, shown in the order of `parts`. `command` is what a person types to repeat it."""

    def __init__(self, folder: Path, command: str, parts: tuple[str, ...]):
        self.folder, self.command, self.parts, self.state = folder, command, parts, "running"
        self.rows: list[tuple[str, str, str, float, bool]] = []
        self.awaited: list[tuple[str, str]] = []
        self.campaign = None
        self.started, self.begun, self.lock = datetime.now(UTC), time.monotonic(), threading.RLock()

    def follow(self, campaign: Any) -> None:
        """Show the kills of a campaign from now on; it calls `keep` at each."""
        self.campaign, campaign.keep = campaign, self.keep

    def await_case(self, part: str, name: str) -> None:
        with self.lock:
            self.awaited.append((part, name))

    def add(self, part: str, name: str, result: str, seconds: float, held: bool) -> None:
        with self.lock:
            self.rows.append((part, name, result, seconds, held))
            if (part, name) in self.awaited:
                self.awaited.remove((part, name))
            self.keep()

    def end(self, state: str) -> None:
        self.state = state
        self.keep()

    def held(self) -> bool:
        """Whether every case that came to its end held."""
        return all(row[4] for row in self._all_rows())

    def _all_rows(self) -> list[tuple[str, str, str, float, bool]]:
        with self.lock:
            found = (self.campaign.rows() if self.campaign else []) + self.rows
        return sorted(found, key=lambda row: self.parts.index(row[0]))

    def keep(self) -> None:
        """Write both files."""
        with self.lock:
            try:
                atomic.make_folder(self.folder)
                atomic.write_text(self.folder / "torture.md", f"# {self.command}\n\n{self.text()}")
                atomic.write_json(self.folder / "torture.json", self.content())
            except OSError as error:
                raise UserError(f"{shown(self.folder)} cannot be written: {error.strerror or error}.",
                                "make torture OUT=folder with a folder you may write to.") from None

    def content(self) -> dict:
        rows = self._all_rows()
        tally = self.campaign.tally if self.campaign else None
        return {"format": FORMAT, "command": self.command, "state": self.state,
                "started": self.started.isoformat("T", "seconds"),
                "seconds": round(time.monotonic() - self.begun, 1), "machine": machine(),
                "kills": tally.content() if tally else None,
                "cases": [dict(zip(("part", "case", "result", "seconds", "held"), row, strict=True)) for row in rows],
                "without_result": [{"part": part, "case": name} for part, name in self.awaited]}

    def text(self) -> str:
        """The tables and a sentence."""
        rows, text = self._all_rows(), ""
        if self.campaign and (tally := self.campaign.tally).total:
            names = sorted({name for name, _ in tally.kills})
            text = table(["killed", *names], [[victim, *(tally.kills[name, victim] for name in names)]
                                              for victim in tally.victims()], "l" + "r" * len(names))
            text += ", ".join(f"{count} {when}" for when, count in sorted(tally.moments.items())) + "\n\n"
        text += table(["part", "case", "held", "s", "what came of it"],
                      [[part, name, "yes" if held else "NO", f"{seconds:.0f}", result[:SHOWN]]
                       for part, name, result, seconds, held in rows], "lllr")
        failed, parts = sum(not row[4] for row in rows), Counter(part for part, _ in self.awaited)
        text += (f"\n`{self.command}` on {machine()}, {duration(time.monotonic() - self.begun)}, {self.state}: "
                 + (f"{failed} of {len(rows)} did not hold" if failed else
                    "everything held" if self.state == "ended" else "what has come to its end held")
                 + "".join(f"; {plural(count, 'case')} of {part} without a result" for part, count in parts.items()) + "\n")
        return text


def machine() -> str:
    """In a few words."""
    import torch

    return f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, torch {torch.__version__}"
