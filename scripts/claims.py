"""Write docs/claims.md from docs/claims.toml, the tests and the artifacts it names.

With --check nothing is written: it exits 1 if docs/claims.md is not what they give, or if a measured figure in README.md or
docs/ (less docs/results/) has no artifact behind it. A figure is backed by a comment behind it in the same line,
`<!-- docs/results/STUDY/report.json: steps.V1.comparison.difference -->`: a path of keys whose number rounds to what is
printed. ' * 100' or ' / other.path' may follow, `rows[step=V1,batch=64].time` picks an item of a list, and ';' divides several
references (lib/figures.py says it in full). `<!-- claims: ID -->` backs a figure of a source document's claim. A figure that is
a setting, and no measurement, is a [[constant]] in docs/claims.toml.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib import atomic
from lib.claims import MEANINGS, NAME, PAGE, Ledger, read, render
from lib.errors import UserError, reported
from lib.figures import NUMBER, RESULTS, figure_at, numeric
from lib.paths import ROOT

JOINED = r"\s*(?:±|\+/-|to|and|or|-|–|/|,\s)\s*"
NUMBERS = rf"{NUMBER}(?:{JOINED}{NUMBER})*"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TIME = r"(?:micro|milli)?seconds?|minutes?|hours?|days?"
COMPARED = r"(?:times|x|×)\s+(?:as|faster|slower|smaller|larger|better|worse|cheaper|more|less|fewer|lower|higher|longer)"
UNIT = (rf"%|per\s?cent\b|percentage points?\b|nats?\b|bits?\b|perplexity\b|PPL\b|(?:{TIME})\b|(?:ms|µs|s|min|h)\b|[kMGT]i?B\b"
        r"|(?:[kMG]\s?)?(?:tokens?|tok|steps|iterations|its?)\s?(?:/|per|a)\s?(?:s|second)\b|[kMGTP]?FLOPs?\b"
        rf"|{COMPARED}\b|(?:x\b|×)(?!\s*\d)|-?fold\b|[kMGB]\b")
START = r"(?<![\w.,\-−])"  # a number, not the end of GPT-2 or of 1.5
MEASURE = re.compile(rf"{START}{NUMBERS}[\s-]*(?:{UNIT})|\b(?i:(?:{'|'.join(WORDS)})\s+(?:(?:{TIME})|{COMPARED}))\b"
                     rf"|(?i:(?<=loss)|(?<=perplexity)|(?<=PPL))\s+(?:(?:of|is|was|at|to|from|=)\s+)?{NUMBERS}(?:[\s-]*(?:{UNIT}))?")
COLUMN = re.compile(rf"(?i)\b(?:nats?|bits|loss|perplexity|ppl|difference|{TIME}|ms|s|time|latency|throughput|speed|speed-?up"
                    r"|tok(?:en)?s?/s|memory|[kmgt]i?b|flops?)\b|%")
BEFORE = re.compile(rf"({START}{NUMBERS})[,;.:)]* *$")
CODE = re.compile(r"^(?P<fence>```|~~~).*?^(?P=fence)[^\n]*$|(?<!`)(?P<tick>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=tick)(?!`)",
                  re.M | re.S)
COMMENT = re.compile(r"<!--(.*?)-->", re.S)


@dataclass(frozen=True)
class Figure:
    """A figure that looks measured: its text and numbers as printed, and where it lies in the page."""

    text: str
    numbers: tuple[str, ...]
    start: int
    end: int


def figures(text: str, references: Iterable[int] = ()) -> list[Figure]:
    """The figures of a text without code and comments, in order: numbers with a unit, columns headed by a measure, and what
    stands right before the place of a reference."""
    text = text.replace("*", " ").replace("\u00a0", " ")
    spans: list[tuple[int, int]] = []
    before = (match.span(1) for at in references if (match := BEFORE.search(text, text.rfind("\n", 0, at) + 1, at)))
    for start, end in [*measured_cells(text), *(match.span() for match in MEASURE.finditer(text)), *before]:
        if not any(start < other_end and other_start < end for other_start, other_end in spans):
            spans.append((start, end))
    return [Figure(" ".join(text[a:b].split()), numbers_of(text[a:b]), a, b) for a, b in sorted(spans)]


def numbers_of(said: str) -> tuple[str, ...]:
    """The numbers of a figure as printed: '36 / 6 / 3 MiB' has three, 'two hours' has '2'."""
    match = re.search(START + NUMBER, said)
    found = [match[0]] if match else []
    while match:
        if match := re.compile(rf"{JOINED}({NUMBER})").match(said, match.end()):
            found.append(match[1])
    return tuple(found) or (str(WORDS.index(said.split()[0].lower()) + 1),)


def measured_cells(text: str) -> Iterator[tuple[int, int]]:
    """Spans of the numbers in table columns whose header names a measure."""
    header, at, lines = None, 0, text.splitlines(keepends=True)
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 1:
            header = None
        elif header is None:
            header = cells if re.fullmatch(r"[\s|:-]*-[\s|:-]*", below) else None
        else:
            begin = at
            for cell, title in zip(cells, header, strict=False):
                if COLUMN.search(title):
                    yield from ((begin + match.start(), begin + match.end()) for match in re.finditer(START + NUMBERS, cell))
                begin += len(cell) + 1
        at += len(line)


def blank(text: str, pattern: re.Pattern) -> str:
    """The text with every match turned into spaces; offsets and lines stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def constant(said: str) -> re.Pattern:
    """Finds a constant, however its words are wrapped, where it is not part of a longer number or word."""
    words = r"\s+".join(map(re.escape, said.split()))
    return re.compile(rf"(?<![\w.,+\-−]){words}(?!\w)")


def pages(root: Path) -> list[Path]:
    """The pages whose figures are guarded: README.md and docs/, less the evidence itself and the ledger's page."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [p for p in found if p.is_file() and p != root / PAGE and root / RESULTS not in p.parents]


def unbacked(ledger: Ledger, root: Path = ROOT) -> list[tuple[str, str]]:
    """What is wrong with the figures of all pages and what to do about it, a sentence each."""
    found, used = [], set()
    for path in pages(root):
        text = blank(path.read_text(encoding="utf-8"), CODE)
        references = [(match.start(), match[1].strip()) for match in COMMENT.finditer(text)
                      if match[1].strip().startswith((RESULTS, "claims:"))]
        text = blank(text, COMMENT)
        for said in ledger.constants:
            if constant(said).search(text):
                used.add(said)
                text = blank(text, constant(said))
        found += page_faults(str(path.relative_to(root)), text, references, ledger, root)
    for said in ledger.constants:
        if not figures(said):
            found.append((f"{NAME}: the constant '{said}' does not look measured.", "take it out: it needs no entry."))
        elif said not in used:
            found.append((f"{NAME}: the constant '{said}' is in no page.", "take it out, or write it as the page does."))
    return found


def page_faults(page: str, text: str, references: list[tuple[int, str]], ledger: Ledger,
                root: Path) -> Iterator[tuple[str, str]]:
    """Faults of one page, whose text comes without code, comments and constants."""
    printed, taken = figures(text, (at for at, _ in references)), set()
    for figure, following in zip(printed, [*(f.start for f in printed[1:]), len(text)], strict=False):
        where = f"{page}:{line_of(text, figure.end)}"
        behind = [(at, said) for at, said in references
                  if figure.end <= at < following and line_of(text, at) == line_of(text, figure.end)]
        taken.update(at for at, _ in behind)
        cited = [part.strip() for _, said in behind for part in said.split(";")]
        if not cited:
            yield (f"{where}: the figure '{figure.text}' has no artifact behind it.",
                   f"write <!-- {RESULTS}STUDY/report.json: steps.STEP.comparison.difference --> behind it in the same line, "
                   f"<!-- claims: ID --> for a figure of a source document, or a [[constant]] in {NAME} for a setting.")
            continue
        try:
            values = [value for reference in cited for value in values_of(reference, where, ledger, root)]
        except UserError as error:
            yield error.what, error.run
            continue
        for number in figure.numbers:
            if not any(rounds_to(value, number) for value in values):
                yield (f"{where}: {number} in '{figure.text}' is not what {' and '.join(cited)} gives, which is "
                       f"{', '.join(f'{value:.6g}' for value in values) or 'no number'}.",
                       "print the artifact's number, or scale it behind the path (' * 100', ' / 1048576').")
    for at, said in references:
        if at not in taken:
            yield (f"{page}:{line_of(text, at)}: the reference '{said}' stands behind no figure.",
                   "put it behind the figure it is for, in the same line, or take it out.")


def values_of(reference: str, where: str, ledger: Ledger, root: Path) -> list[float]:
    """The numbers a reference gives: one of an artifact, or two with ' .. ', or all of a claim's sentence."""
    if reference.startswith("claims:"):
        wanted = reference.removeprefix("claims:").strip()
        said = [claim.claim for claim in ledger.claims if claim.id == wanted]
        if not said:
            raise UserError(f"{where}: there is no claim '{wanted}'.", f"name a claim of {NAME}.")
        return [numeric(match[0]) for match in re.finditer(START + NUMBER, said[0])]
    return list(figure_at(reference, where, root).values)


def rounds_to(value: float, printed: str) -> bool:
    """Whether the value rounds to what is printed; a number printed without a sign is a size."""
    mantissa, _, exponent = printed.replace(",", "").lower().partition("e")
    last_place = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    size = value if printed[0] in "+-−" else abs(value)
    return abs(size - numeric(printed)) <= last_place / 2 * (1 + 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"write nothing; exit 1 if {PAGE} or a figure is not backed")
    args = parser.parse_args()
    ledger = read(ROOT)
    text, path, wrong = render(ledger), ROOT / PAGE, []
    if args.check:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            wrong.append((f"{PAGE} is not what {NAME} and the artifacts give.", "make claims, and commit what it writes."))
        wrong += unbacked(ledger)
    else:
        atomic.write_text(path, text)
    for what, run in wrong:
        print(f"error: {what}\n  try: {run}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    counts = Counter(claim.state for claim in ledger.claims)
    print(f"{PAGE}: {len(ledger.claims)} claims: {', '.join(f'{counts[state]} {state}' for state in MEANINGS)}")


if __name__ == "__main__":
    with reported():
        main()
