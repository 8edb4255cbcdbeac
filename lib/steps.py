"""Step fragments on disk: gpt2/steps/V3.config and what its leading comments say. Needs nothing but Python."""

import difflib
import re
from pathlib import Path

from lib.errors import UserError
from lib.paths import ROOT


def step_files(folder: str = "gpt2/steps") -> dict[str, Path]:
    """Step fragments by name, in natural order (V2 before V10)."""
    def natural(path: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]

    return {p.stem: p for p in sorted((ROOT / folder).glob("*.config"), key=natural)}


def step_header(path: Path, key: str) -> str | None:
    """What a fragment says of itself in a leading comment: `# Help: ...`, `# Equals: V0`."""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            return None
        if line.startswith(f"# {key}:"):
            return line.split(":", 1)[1].strip()
    return None


def step_path(name: str, folder: str = "gpt2/steps") -> Path:
    """The file of a step; UserError with a near miss if there is none."""
    known = step_files(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(f"there is no step '{name}'.", f"did you mean {near[0]}?" if near else "make list-steps.")
    return known[name]


def file_name(text: str) -> str:
    """A step, or a name with one in it, as part of a file name: V1@RA_R=8 is V1+RA_R-8."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", text.replace("@", "+").replace(",", "+"))
