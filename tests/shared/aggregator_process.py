"""A served run's loop in a process of its own; its silos are the test's, which reads its memory."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np
from silos_in_process import Wire

from photon.fork_server import fork_context
from photon.runs.serving import continue_run

LOG = "aggregator.log"
Key = TypeVar("Key")


class _Post:
    """In the loop's process: carries what is asked to the test, and its answers back."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def push(self, task: str, message: bytes) -> str:
        return self._call("push", task, message)

    def pull(self, ids: Collection[str]):
        return self._call("pull", list(ids))

    def wait(self, timeout_s: float) -> None:
        time.sleep(min(timeout_s, 0.01))

    def _call(self, *words):
        self._pipe.send(words)
        return self._pipe.recv()


def _loop(folder: Path, pipe: Connection) -> None:
    log = os.open(folder.parent / "home" / LOG, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    continue_run(folder, _Post(pipe))
    pipe.send(("over",))
    pipe.recv()
    sys.stdout.flush()


@contextmanager
def aggregating(folder: Path, wire: Wire) -> Iterator[tuple[int, Callable[[], None]]]:
    """Its pid, and what answers its questions until the run is over."""
    context = fork_context()  # of a process that has imported Photon, and knows no silo
    ours, theirs = context.Pipe()
    process = context.Process(target=_loop, args=(folder, theirs))
    process.start()
    theirs.close()
    assert process.pid is not None

    def go_on() -> None:
        while (words := ours.recv())[0] != "over":
            ours.send(getattr(wire, words[0])(*words[1:]))

    try:
        yield process.pid, go_on
        ours.send(None)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


#: Bytes that are looked through at once.
_PIECE, _PAGE = 1 << 24, 1 << 12


def memory(pid: int) -> Iterator[bytes]:
    """What a process can write to, in pieces that overlap, without pages of zeros."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for first, last in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw", maps, re.MULTILINE):
            for start in range(int(first, 16), int(last, 16), _PIECE):
                file.seek(start)
                try:
                    piece = file.read(min(_PIECE + _PAGE, int(last, 16) - start))
                except OSError:  # [vvar], or gone by now
                    continue
                pages = np.frombuffer(piece, "<u8").reshape(-1, _PAGE // 8)
                yield pages[pages.any(1)].tobytes()


def among(needles: Mapping[Key, bytes]) -> Callable[[bytes], set[Key]]:
    """Which of these, of 24 bytes or more, are in a block, wherever they begin.

    A word begins at each eighth byte of a block, and in a needle at one of the first eight.
    """
    parts: dict[int, list[tuple[Key, int]]] = {}
    for what, needle in needles.items():
        for first in range(8):  # of its words there, one that is not in most memory
            at = max((first, first + 8), key=lambda at: len({*needle[at : at + 8]}))
            parts.setdefault(int.from_bytes(needle[at : at + 8], "little"), []).append((what, at))
    wanted, table = np.array([*parts], np.uint64), np.zeros(1 << 16, bool)
    table[_hashed(wanted)] = True

    def found(block: bytes) -> set[Key]:
        words = np.frombuffer(block, "<u8", len(block) // 8)
        maybe = np.flatnonzero(table[_hashed(words)])
        return {
            what
            for place in maybe[np.isin(words[maybe], wanted)].tolist()
            for what, at in parts[int(words[place])]
            if 8 * place >= at and block.startswith(needles[what], 8 * place - at)
        }

    return found


def _hashed(words: np.ndarray) -> np.ndarray:
    return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(48)
