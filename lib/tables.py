"""Tables for people: aligned Markdown, so that what the terminal shows can be pasted into a report."""


def table(header: list[str], rows: list[list[str]], right: str = "") -> str:
    """Aligned Markdown table. `right` holds an 'r' at each column that is set to the right: 'lrr'."""
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    sides = (right + "l" * len(header))[:len(header)]

    def line(row):
        return "| " + " | ".join(c.rjust(w) if s == "r" else c.ljust(w)
                                 for c, w, s in zip(row, widths, sides, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if s == "r" else "-") for w, s in zip(widths, sides, strict=True)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])]) + "\n"


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
