"""Tables for people: aligned Markdown, so that what the terminal shows can be pasted into a report."""

from dataclasses import dataclass
from typing import Any

from lib.errors import one_line


@dataclass(frozen=True)
class Section:
    """A table with what it is called, what it is of, and notes below it; `aligned` as `table` takes it."""

    title: str
    caption: str
    header: list[str]
    aligned: str
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")

    def markdown(self) -> str:
        notes = "".join(f"\n- {note}" for note in self.notes) + ("\n" if self.notes else "")
        return f"## {self.title}\n\n{self.caption}\n\n" + table(self.header, self.rows, self.aligned) + notes


def table(header: list[str], rows: list[list], right: str = "") -> str:
    """Aligned Markdown table. `right` holds an 'r' at each column that is set to the right: 'lrr'."""
    widths = [max(len(escaped(row[i])) for row in [header, *rows]) for i in range(len(header))]
    return table_head(header, widths, right) + "".join(table_row(row, widths, right) for row in rows)


def table_head(header: list[str], widths: list[int], right: str = "") -> str:
    """The first two lines of a table whose rows are printed as they are known."""
    rule = "|".join("-" * (w + 1) + (":" if s == "r" else "-") for w, s in zip(widths, right.ljust(len(widths)), strict=True))
    return table_row(header, widths, right) + f"|{rule}|\n"


def table_row(row: list[str], widths: list[int], right: str = "") -> str:
    """One line of a table; a cell wider than its column pushes the others."""
    cells = (escaped(c).rjust(w) if s == "r" else escaped(c).ljust(w)
             for c, w, s in zip(row, widths, right.ljust(len(widths)), strict=True))
    return f"| {' | '.join(cells)} |\n"


def escaped(cell: Any) -> str:
    return one_line(str(cell)).replace("|", "\\|")


def duration(seconds: float) -> str:
    """'45 s', '3 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def count(number: float) -> str:
    """'124.5 M', '33.1 k', '512'."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:g}"


def size(count: float) -> str:
    """Bytes as KiB or MiB: '320 KiB', '14.1 MiB'."""
    return f"{count / 2 ** 20:.1f} MiB" if count >= 2 ** 20 else f"{count / 2 ** 10:.0f} KiB"


def plural(number: int, noun: str) -> str:
    """'1 seed', '3 seeds'."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
