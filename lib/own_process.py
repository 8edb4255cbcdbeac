"""A trial of a script's own in a process of its own, on a GPU that no cell has: what it prints last, as JSON.

The process is a child: what it leaves on the device, or does to it, ends with it, and it ends with this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import process, slots
from lib.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from lib.config import Config


def run(cfg: "Config", folder: Path, what: str, *words: Any) -> dict:
    """The last line of what `python -m WORDS` prints, which holds a slot for as long as it runs; `cfg` says whether on a GPU,
    and `what` what to call it. UserError if it failed; what it refused itself is said, and ends this process alike."""
    alone = f'CONFIG_GPUS_PER_STEP=1\nCONFIG_DEVICE="{cfg.DEVICE}"\n'
    with slots.held(alone, folder, what, lambda: False) as slot:
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, pass_fds=slot.handles,
                              env={**os.environ, **slot.environment, process.LAUNCHER_VARIABLE: str(os.getpid())})
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == EXIT_BAD_INPUT:
        sys.stderr.write(done.stderr)
        sys.exit(EXIT_BAD_INPUT)
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
    raise UserError(f"{what} failed with exit status {done.returncode}: {said[-1].strip()[:300]}.",
                    "make check, which finds what is wrong with a step.")
