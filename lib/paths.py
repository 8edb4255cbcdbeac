"""Where the project lies, where it may keep what is slow to make, and how a path is written for a person."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shown(path: Path | str) -> str:
    """The path as a person would type it from the project's root."""
    path = Path(path).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def user_cache() -> Path:
    """The project's folder in the user's cache; it may not be there, or not be writable. A user without a home, as containers
    have them, gets one in the project."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "kablate" if os.path.isabs(cache) else ROOT / ".cache"
