"""A terminal for tests: a program on a pty, and what its screen shows. No terminal emulator is needed: a VT52 has eight escape
sequences, and every terminfo database knows it."""

import curses
import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import pytest

ROWS, COLUMNS = 40, 110


class Terminal:
    """`words` run on a terminal of type `term`. As a context it ends what it started, however the test ends."""

    def __init__(self, *words, cwd=None, term="vt52", rows=ROWS, columns=COLUMNS, **variables):
        if term == "vt52":
            try:
                curses.setupterm(term, os.open(os.devnull, os.O_WRONLY))
            except curses.error:
                pytest.skip("terminfo knows no VT52 here")
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "MENUCONFIG_STYLE", "LINES", "COLUMNS")}
        environment |= {"TERM": term, "LC_ALL": "C.UTF-8"} | {k: str(v) for k, v in variables.items()}
        self.process = subprocess.Popen([str(word) for word in words], cwd=cwd, stdin=slave, stdout=slave, stderr=slave,
                                        env=environment, start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)
        self.said, self.rows, self.columns = b"", rows, columns

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)

    def read(self, seconds: float) -> bool:
        """Take in what has been written within `seconds`; whether there was anything."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            new = os.read(self.master, 65536)
        except OSError as error:  # Linux says so when the last writer is gone
            assert error.errno == errno.EIO
            new = b""
        self.said += new
        return bool(new)

    def until(self, *wanted: str, seconds: float = 15) -> str:
        """The screen, once all of `wanted` stand on it."""
        end = time.monotonic() + seconds
        while not all(text in self.screen() for text in wanted):
            assert time.monotonic() < end, f"{wanted} not on the screen:\n{self.screen()}"
            if not self.read(0.2) and self.process.poll() is not None and not self.read(0.2):
                assert all(text in self.screen() for text in wanted), f"{wanted} not said:\n{self.screen()}"
        while self.read(0.02):  # the rest of the same screen
            pass
        return self.screen()

    def type(self, keys: str, *wanted: str) -> str:
        """Press keys, and wait for `wanted`."""
        os.write(self.master, keys.encode())
        return self.until(*wanted)

    def end(self, seconds: float = 30) -> int:
        """Wait for the program's end and take in all that it said; its exit status."""
        end = time.monotonic() + seconds
        while self.read(0.1) or self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.screen()}"
        return self.process.wait()

    def screen(self) -> str:
        """What a VT52 shows now, lines without the blanks at their ends."""
        cells, row, column = [[" "] * self.columns for _ in range(self.rows)], 0, 0

        def blank(line: int, first: int = 0) -> None:
            cells[line][first:] = [" "] * (self.columns - first)

        text = self.said.decode("utf-8", "replace")
        # The first is none of a VT52's: bash announces by it, whatever the terminal, that it knows pasted text.
        for match in re.finditer(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bY(.)(.)|\x1b(.)|(.)", text, re.S):
            down, right, command, letter = match.groups()
            if down:
                row, column = ord(down) - 32, ord(right) - 32
            elif command in ("A", "B", "C", "D", "I"):
                row += {"A": -1, "B": 1, "I": -1}.get(command, 0)
                column += {"C": 1, "D": -1}.get(command, 0)
            elif command == "H":
                row = column = 0
            elif command in ("J", "K"):
                blank(row, column)
                for line in range(row + 1, self.rows) if command == "J" else ():
                    blank(line)
            elif letter == "\n":
                row += 1
            elif letter == "\r":
                column = 0
            elif letter == "\b":
                column -= 1
            elif letter and letter.isprintable():
                cells[row][column] = letter
                column += 1  # no further than the last one: a VT52 does not go on in the next line
            while row >= self.rows:
                cells, row = [*cells[1:], [" "] * self.columns], row - 1
            row, column = max(row, 0), min(max(column, 0), self.columns - 1)
        return "\n".join("".join(line).rstrip() for line in cells)
