"""Errors a person reads: one sentence of what is wrong, one of what to run.

Every entry point runs its work under `reported()`, so bad input ends in those two lines and exit status 2, never in a
traceback. Anything else that escapes is a defect of the program and keeps its traceback.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_BAD_INPUT = 2
LONGEST = 1500  # characters of a sentence: what was given may be a file


class UserError(Exception):
    """Bad input. `what` says what is wrong, `run` what to do about it; each is one sentence."""

    def __init__(self, what: str, run: str):
        super().__init__(what)
        self.what, self.run = what, run


@contextmanager
def reported(ends_with_make: bool = True) -> Iterator[None]:
    """Turn a UserError into its two lines on standard error and exit status 2. What make has started ends with it, unless it
    sees to that itself."""
    from lib import process  # which raises UserError itself

    try:
        if ends_with_make:
            process.die_with_make()
        yield
    except UserError as error:
        what, run = (one_line(text) for text in (error.what, error.run))
        print(f"error: {what}\n  try: {run}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe went away: `make plan | head`
        sys.stderr.close()
        sys.exit(1)


def one_line(text: str) -> str:
    """What was given stands in an error as it was, but for newlines, and for characters that would steer a terminal."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST // 2]} ... {line[-LONGEST // 3:]}"
