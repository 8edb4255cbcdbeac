"""One page over all studies of a folder: how many cells of each are finished, what it found, where its report lies.

A study is a folder with a report.json or with cell folders (test_*). What cannot be read is a row that says so: the page
exists to find out what state the folder is in. Cells are counted on disk, so that a running study shows up before its
report is made.
"""

import json
from pathlib import Path
from urllib.parse import quote

from lib.report import page

TEMPLATE = page.TEMPLATE.with_name("index.html.j2")
FORMAT = 1


def collect(root: Path) -> list[dict]:
    """A row a study, newest result first. Keys: name, title, report, link, finished, done, planned, words, device, problem."""
    root = Path(root).resolve()
    rows = []
    for folder in sorted(_entries(root)):
        if folder.name.startswith("."):
            continue
        if not all(p.resolve().is_relative_to(root) for p in (folder, folder / "report.json")):
            rows.append(_row(folder) | {"problem": "a link leads out of this folder"})
            continue
        entries = _entries(folder)
        cells = {e.name: (e / "metrics.json").is_file() for e in entries if e.name.startswith("test_") and e.is_dir()}
        if cells or (folder / "report.json").is_file():
            rows.append(_study(folder, cells))
    return sorted(rows, key=lambda row: row["finished"] or "", reverse=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError:
        return []  # a folder that may not be read holds nothing for us


def _row(folder: Path) -> dict:
    return {"name": folder.name, "title": None, "report": "missing", "link": quote(f"{folder.name}/report.html"),
            "finished": None, "done": 0, "planned": None, "words": {}, "device": None, "problem": None}


def _study(folder: Path, cells: dict[str, bool]) -> dict:
    """The row of one study. `cells` are the cell folders there are, and whether each has a result."""
    row = _row(folder) | {"done": sum(cells.values())}
    if (folder / "report.html").is_file():
        row["report"] = "old"  # until it is shown to be current
    if not (folder / "report.json").is_file():
        return row
    try:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return row | {"problem": "report.json is not one of this program"}
        known = {c["name"]: c["state"] in ("done", "diverged") for step in content["steps"] for c in step["cells"]}
        known = {name: cells.get(name, done) for name, done in known.items()} | cells
        words = [one["comparison"]["word"] for one in [*content["steps"], *content.get("contrasts", [])] if one["comparison"]]
        row |= {"title": str(content["title"]), "done": sum(known.values()), "planned": len(known),
                "words": {str(w): words.count(w) for w in dict.fromkeys(words)},
                "device": str((content.get("environment") or {}).get("device") or "") or None,
                "finished": max((str(c["finished"]) for step in content["steps"] for c in step["cells"] if c["finished"]),
                                default=None)}
        if row["report"] == "old" and page.is_current(folder / "report.html", content):
            row["report"] = "current"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        row["problem"] = "report.json is damaged"
    return row


def render(rows: list[dict]) -> str:
    """index.html, to lie in the folder that the rows were collected from."""
    return page.environment().get_template(TEMPLATE.name).render(rows=rows)
