"""JSON files that one goal of make keeps for another."""

import json
from collections.abc import Callable
from pathlib import Path

from lib.errors import UserError
from lib.paths import shown


def read(path: Path, maker: str, again: str, fits: Callable[[dict], bool]) -> dict:
    """The content of `path`, which `maker` ("make report") has written and which `fits` what its reader needs.

    Raises UserError, with `again` as what to run, where there is no such file or none that can be used. `fits` may look up
    what is not there: KeyError, TypeError and AttributeError count as a file that cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        usable = fits(content)
    except FileNotFoundError:
        raise UserError(f"there is no {shown(path)}.", again) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{shown(path)} cannot be read: {type(error).__name__}: {error}.", again) from None
    if not usable:
        raise UserError(f"{shown(path)} is not of {maker}.", again)
    return content
