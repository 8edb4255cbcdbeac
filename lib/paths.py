"""Where the project lies, and how a path is written for a person."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shown(path) -> str:
    """The path as a person would type it from the project's root."""
    path = Path(path).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
