"""What a stream can show: plain lines only, a line that is drawn again, or colour. Needs nothing but Python.

A file, a pipe and TERM=dumb get plain lines. A terminal gets lines that are drawn again, and emphasis unless NO_COLOR is set
to anything (no-color.org). Whatever is emphasised says the same without: no information is in a colour alone.
"""

import os
from typing import TextIO

HEADING = "1"  # bold: readable on a dark and on a light background


def redraws(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which a line can be drawn again."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def coloured(stream: TextIO) -> bool:
    """Whether escape sequences for emphasis may go to `stream`."""
    return redraws(stream) and not os.environ.get("NO_COLOR")


def emphasised(text: str, stream: TextIO) -> str:
    """`text` as a heading, on a stream that may have it; elsewhere as it is."""
    return f"\x1b[{HEADING}m{text}\x1b[0m" if coloured(stream) else text
