"""Named random streams: every use of randomness has its own, keyed by the cell's seed and a purpose.

Two arms of a study therefore share every draw that has the same purpose, and no draw depends on how many were made for
another purpose before it. An arm with another set of streams (STREAMS) shares none of them: what it differs by from its
twin of the same seed is what chance alone does.
"""

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib.config import Config


def stream_seed(seed: int, *purpose: Any) -> int:
    """A 63-bit seed for (seed, purpose...), the same on every machine and Python."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def cell_seed(cfg: "Config") -> int:
    """What keys every stream of a cell (start, batches, dropout): SEED itself, or a seed of its own where STREAMS is not 0."""
    return stream_seed(cfg.SEED, "streams", cfg.STREAMS) if cfg.STREAMS else cfg.SEED
