"""The one way commands print: nothing that is not ours is markup, nothing is cut, nothing is fatal.

    say(text)                 a sentence for whoever waits, on standard error
    show(text)                a result, on standard output
    show_facts(pairs)         results with their names, one a line
    show_table(headings, rows)
    show_json(record)         a result for a program, on standard output
    program()                 `photon` as this shell can call it, for commands to copy
    view_of_run()             a run as it goes on, on standard error
    console()                 standard error for live views, bars and spinners; never `Console(...)`

Names, paths and what other machines sent come as plain `str`: brackets stay brackets, and control
characters are replaced. For colour pass `style=`, or a `rich.text.Text` as a cell. Lines are never
wrapped or cut, so a hash or a path can be copied whole; cells fold where a terminal is narrow.

`main` calls `guard_output` first. From then on a stream that can't take what is printed (a full
disk, a closed pipe, a terminal that is gone, an encoding without the character) never raises, so it
can't end a run or change the exit code of finished work.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import select
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from photon.telemetry import Listener

#: What a terminal without the character gets instead; anything else is written as \uXXXX.
_SPELLED = {"…": "...", "–": "-", "−": "-", "—": "-", "×": "x", "’": "'"}
#: Wide enough for any row, where no terminal has to show it.
_PIPE_WIDTH = 10_000


#: By whether it is standard error's: the stream that a console was made for, and the console.
_consoles: dict[bool, tuple[Any, Console]] = {}


def console(*, stderr: bool = True) -> Console:
    """Standard error (or output) without markup, emoji codes or guesses at what is a number.

    The same one for everybody, as a live view lets only its own console print above it.
    """
    stream = sys.stderr if stderr else sys.stdout
    stream = getattr(stream, "rich_proxied_file", stream)  # what a live view put in its place
    known = _consoles.get(stderr)
    if known is None or known[0] is not stream:
        made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
        if not made.is_terminal and "COLUMNS" not in os.environ:
            made.width = _PIPE_WIDTH
        known = _consoles[stderr] = (stream, made)
    return known[1]


def say(text: str, *, style: str | None = None) -> None:
    """What a person should know: progress, notes, errors, the next step."""
    console().print(_printable(text), style=style, soft_wrap=True)


def show(text: str) -> None:
    """A result, for a person or a script."""
    console(stderr=False).print(_printable(text), soft_wrap=True)


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Results with their names in front."""
    pairs = list(facts)
    width = max((len(name) for name, _ in pairs), default=0)
    show("\n".join(f" {name:<{width}}  {value}" for name, value in pairs))


def show_json(record: Any) -> None:
    """A result as JSON, as it is."""
    typer.echo(json.dumps(record, indent=1))


def show_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    right: Collection[int] = (),
    frame: bool = True,
) -> None:
    """A table on standard output.

    Args:
        headings: none for a table without a header.
        right: numbers of the columns, from 0, that are aligned to the right.
        frame: lines around it.
    """
    table = Table(show_header=bool(headings), box=HEAVY_HEAD if frame else None)
    cells = [[_cell(one) for one in row] for row in rows]
    for number in range(len(headings) or max(map(len, cells), default=0)):
        table.add_column(
            headings[number] if headings else "",
            justify="right" if number in right else "left",
            overflow="fold",
        )
    for row in cells:
        table.add_row(*row)
    console(stderr=False).print(table)


def view_of_run(*, quiet: bool = False, label: Callable[[], str] = str) -> Listener | None:
    """What shows a run as it goes on; none if it is to be quiet.

    Args:
        label: gives what a line begins with where no terminal shows a frame.
    """
    from photon.dashboard import progress_view

    return None if quiet else progress_view(console(), label=label)


def program(name: str = "photon") -> str:
    """A program of this installation as the shell that called photon can call it."""
    here = Path(sys.argv[0])  # .venv/bin/photon, where that is not on the PATH
    if here.name != "photon" or shutil.which(name) is not None:
        return name
    return shlex.quote(str(here.with_name(name)))


def guard_output() -> None:
    """Standard output and error of this process from now on never raise; see above."""
    codecs.register_error("photon", _spell)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            continue
        stream.flush()
        guarded = io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(stream.fileno(), "wb", closefd=False)),
            encoding=stream.encoding,
            errors="photon",
            line_buffering=name == "stderr" or stream.isatty(),
        )
        setattr(sys, name, guarded)


class _Forgiving(io.FileIO):
    """A descriptor that becomes /dev/null once it can't be written, for C code and children too."""

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # not ready: somebody made it so
                select.select([], [self], [])
            return written
        except OSError as error:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            if self.fileno() == 1 and error.errno != errno.EPIPE:  # `| head` is no fault
                say(f"note: standard output is incomplete: {error.strerror}")
            return len(data)


def _spell(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    spelled = b""
    for character in error.object[error.start : error.end]:
        if "\udc80" <= character <= "\udcff":  # a byte of a file's name that is not UTF-8
            spelled += bytes([ord(character) - 0xDC00])
        else:
            plain = _SPELLED.get(character, character)
            spelled += plain.encode("ascii", "backslashreplace")
    return spelled, error.end


def _cell(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(_printable(cell))


def _printable(text: str) -> str:
    """Without control characters, by which a name could write anywhere on the screen."""
    return "".join(
        one if one.isprintable() or one in "\n\t" or "\udc80" <= one <= "\udcff" else "\ufffd"
        for one in text
    )
