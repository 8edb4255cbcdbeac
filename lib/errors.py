"""Errors a person reads: one sentence of what is wrong, one of what to run.

Every entry point runs its work under `reported()`, so bad input ends in those two lines and exit status 2, never in a
traceback. Anything else that escapes is a defect of the program and keeps its traceback.
"""

import sys
from contextlib import contextmanager

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input. `what` says what is wrong, `run` what to do about it; each is one sentence."""

    def __init__(self, what: str, run: str):
        super().__init__(what)
        self.what, self.run = what, run


@contextmanager
def reported():
    """Turn a UserError into its two lines on standard error and exit status 2."""
    try:
        yield
    except UserError as error:
        what, run = (" ".join(text.splitlines()) for text in (error.what, error.run))  # what was given may hold newlines
        print(f"error: {what}\n  try: {run}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe went away: `make plan | head`
        sys.stderr.close()
        sys.exit(1)
