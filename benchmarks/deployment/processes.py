"""What /proc says of processes and their children. Processes end while they are looked at."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Sample:
    """Of one process, now: resident memory, the most it ever had, open file descriptors."""

    rss_bytes: int
    peak_bytes: int
    descriptors: int


def sample(pid: int | None) -> Sample | None:
    """None where there is no such process any more."""
    if pid is None:
        return None
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    rss, peak = _kib(status, "VmRSS:"), _kib(status, "VmHWM:")
    return None if rss is None or peak is None else Sample(rss, peak, descriptors)


def _kib(status: str, name: str) -> int | None:
    """Bytes; a process that has ended and is not yet reaped has no such line."""
    _, found, rest = status.partition(name)
    return int(rest.split(maxsplit=1)[0]) * 1024 if found else None


def children(pid: int) -> list[int]:
    """Processes that any thread of this one started."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                listed = Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii")
                found += map(int, listed.split())
    return found


def tree(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for child in children(pid):
        yield from tree(child)


def available_bytes() -> int:
    """Memory that new processes can have without swapping."""
    told = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(told.split("MemAvailable:")[1].split()[0]) * 1024


def disk_bytes(folder: Path, *, leave_out: frozenset[str] = frozenset()) -> int:
    """Disk that a folder's files take; files may go meanwhile.

    Args:
        leave_out: names of files and folders that do not count.
    """
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in leave_out:
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += disk_bytes(Path(entry.path), leave_out=leave_out)
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


class PeakWatch:
    """Samples the memory of whole trees of processes from a thread of its own.

    A tree's memory is the sum of its processes' resident memory: pages that they share (libraries,
    most of all) count for each. Attributes can be read at any time.

    Attributes:
        peaks: for each tree, the most its processes had together at one moment, in bytes.
        largest: for each tree, the most that one process of it ever had, in bytes.
        lowest_available: the least memory that was left on the machine, in bytes.
    """

    def __init__(self, roots: Mapping[str, int], *, every_s: float = 0.25) -> None:
        self._roots = dict(roots)
        self._every_s = every_s
        self.peaks = dict.fromkeys(roots, 0)
        self.largest = dict.fromkeys(roots, 0)
        self.lowest_available = available_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peaks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            self.lowest_available = min(self.lowest_available, available_bytes())
            for name, root in self._roots.items():
                found = [one for pid in tree(root) if (one := sample(pid)) is not None]
                now = sum(one.rss_bytes for one in found)
                self.peaks[name] = max(self.peaks[name], now)
                most = max((one.peak_bytes for one in found), default=0)
                self.largest[name] = max(self.largest[name], most)
