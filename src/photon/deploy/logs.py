"""Logs of services: a file each that can't fill the disk, and lines that can be read by eye."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

#: Longest line that is taken as one; longer ones are cut into several.
MOST_LINE_BYTES = 16 << 10

_SHOWN_LETTERS = 1000
#: Of a log and the one before it.
_MOST_BYTES = 16 << 20
# Colours and cursor movements of a terminal, then everything else that is no printable text.
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class BoundedLog:
    """A log file and the one before it, which together never hold more than 16 MiB.

    Writing never fails: on a full disk lines are lost, as the service they are from matters more.

    Args:
        path: of the file that is written to; the one before is called `path` + ".1".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._each_bytes = _MOST_BYTES // 2
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        # In Latin-1 each byte is a character: a program's output is kept as it came.
        self._file = RotatingFileHandler(
            path, maxBytes=self._each_bytes, backupCount=1, encoding="latin-1", delay=True
        )
        self._file.handleError = lambda record: None

    def write(self, text: bytes | str) -> None:
        """Append a line; a newline is added if it has none."""
        data = text.encode(errors="replace") if isinstance(text, str) else text
        line = data.removesuffix(b"\n")[2 - self._each_bytes :].decode("latin-1")
        self._file.handle(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        self._file.close()


def readable(text: str) -> str:
    """A line of another program without what a terminal would obey, and not endless."""
    text = _CONTROLS.sub("", _ESCAPES.sub("", text)).rstrip()
    return text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 3] + "..."


def merged_line(name: str, text: str) -> str:
    """`HH:MM:SS name | text`, in local time."""
    return f"{time.strftime('%H:%M:%S')} {name} | {readable(text)}"


class Herald:
    """Hands lines to one callback, one at a time, from a thread of its own.

    Whoever says a line never waits: when the callback is slower than the lines (a terminal that is
    paused, a pipe nobody reads), what doesn't fit is left out, and that is said.

    Args:
        callback: may block, and may raise (then the line is lost).
        most_lines: that wait to be handed over.
    """

    def __init__(self, callback: Callable[[str], None], *, most_lines: int = 5000) -> None:
        self._callback = callback
        self._most_lines = most_lines
        self._waiting: deque[str] = deque()
        self._left_out = 0
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="photon-herald", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        with self._change:
            if len(self._waiting) < self._most_lines:
                self._waiting.append(line)
                self._change.notify()
            else:
                self._left_out += 1

    def close(self, *, timeout_s: float = 2.0) -> None:
        """Hand over what waits, but don't wait long for that."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._waiting or self._left_out or self._closed):
                    self._change.wait()
                if self._waiting:
                    line = self._waiting.popleft()
                elif self._left_out:
                    line = merged_line("photon", f"{self._left_out} lines are not shown here")
                    self._left_out = 0
                else:
                    return
            with contextlib.suppress(Exception):
                self._callback(line)
