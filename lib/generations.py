"""The checkpoints of a running cell: the newest and the one before it.

Invariants: once there is one, there is a good one, whenever the process ends: a new one is whole, on disk and found finite
before the one before it is let go, and a damaged one never takes the place of a good one, but is moved aside. Knows no
torch, so that what plans and launches can ask whether a cell has something to resume from.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import atomic
from lib.errors import UserError
from lib.paths import shown

if TYPE_CHECKING:
    import torch

NAMES = NEWEST, BEFORE = ("checkpoint.pt", "checkpoint.before.pt")
DAMAGED = "checkpoint.damaged.pt"  # the last newest that could not be read, for a person to look at; until the cell ends


def there(folder: Path) -> bool:
    """Whether `folder` has anything to resume from."""
    return any((folder / name).exists() for name in NAMES)


def save(folder: Path, **content: Any) -> None:
    """Make `content` the newest one. The newest so far must be good: of this process, or given back by its `load`."""
    from lib import checkpoint

    checkpoint.save(folder / NEWEST, kept_as=folder / BEFORE, **content)


def load(folder: Path, device: "torch.device | str") -> dict | None:
    """The newest good one, with a warning if that is not the newest; None if there is none at all. UserError if there are only
    damaged ones: whether a day of training is to begin anew is for the user to say."""
    from lib import checkpoint

    damage = []
    for name in NAMES:
        if not (folder / name).exists():
            continue
        try:
            content = checkpoint.load(folder / name, device)
        except checkpoint.Damaged as error:
            damage.append(error)
            continue
        if damage:
            atomic.rename(folder / NEWEST, folder / DAMAGED)
            print(f"warning: {damage[0].what.removesuffix('.')}, it is {DAMAGED} now; going on from the one before it, of "
                  f"iteration {content['progress']['iteration']}", flush=True)
        if name == BEFORE:  # what is saved next is to push out no good one
            atomic.rename(folder / BEFORE, folder / NEWEST)
        return content
    if damage:
        raise UserError(f"{shown(folder)} has no checkpoint that can be read: {damage[0].what}",
                        f"restore {NEWEST} there, or remove {' and '.join(NAMES)}: make RETRY=1 then starts the cell anew.")
    return None


def remove(folder: Path) -> None:
    for name in (*NAMES, DAMAGED):
        (folder / name).unlink(missing_ok=True)
