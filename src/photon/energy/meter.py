"""What this process used, by phase: at any moment it is in one, so phases sum to all of it."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from photon.energy.counters import Packages, device_counter

#: Counters are read at least so often: they turn over, after some twenty minutes at the earliest.
_WATCH_S = 60.0


class Used(NamedTuple):
    """CPU seconds of a process and of its children that have ended; on the clock meanwhile; joules
    and busy core-seconds of the whole machine's packages; joules of the process's device."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    package_j: float = 0.0
    busy_s: float = 0.0
    device_j: float = 0.0

    def plus(self, other: Used, sign: int = 1) -> Used:
        return Used(*(mine + sign * theirs for mine, theirs in zip(self, other, strict=True)))


class Meter:
    """Charges what this process uses to the phase it is in; "other" where it is in none.

    Phases are those of `photon.energy.account.Spent`. One inside another stops the outer one.

    Args:
        make: opens the counters, at the first reading: who only imports this reads none.
    """

    def __init__(self, make: Callable[[], Packages] = Packages) -> None:
        self._make = make
        self.begin_anew()

    def begin_anew(self) -> None:
        """As in a process that was just forked: nothing is used, and no thread is here."""
        self._lock = threading.Lock()
        self._phase, self._charged = "other", dict[str, Used]()
        self._packages: Packages | None = None
        self.device: Callable[[], float] | None = None
        self._last = Used(wall_s=time.perf_counter())

    @property
    def packages(self) -> Packages:
        if self._packages is None:
            self._packages = self._make()
            self._last = self._last._replace(busy_s=self._packages.busy_s())
            if self._packages.readable:
                threading.Thread(target=self._watch, daemon=True).start()
        return self._packages

    def watch_device(self, uuid: str) -> None:
        """Read the counter of this NVIDIA device too, if it has one."""
        with self._lock:
            self.device = device_counter(uuid)
            self._last = self._last._replace(device_j=self.device() if self.device else 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what happens inside to this phase."""
        before = self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def take(self, *phases: str) -> dict[str, Used]:
        """What was charged to these phases, or to all, since it was last taken."""
        with self._lock:
            self._charge()
            wanted = set(phases or self._charged) & set(self._charged)
            return {name: self._charged.pop(name) for name in wanted}

    def _enter(self, name: str) -> str:
        with self._lock:
            self._charge()
            before, self._phase = self._phase, name
            return before

    def _charge(self) -> None:
        ended, packages = resource.getrusage(resource.RUSAGE_CHILDREN), self.packages
        cpu_s = time.process_time() + ended.ru_utime + ended.ru_stime
        device_j = self.device() if self.device else 0.0
        now = Used(cpu_s, time.perf_counter(), packages.joules(), packages.busy_s(), device_j)
        before = self._charged.get(self._phase, Used())
        self._charged[self._phase], self._last = before.plus(now.plus(self._last, -1)), now

    def _watch(self) -> None:
        while True:
            time.sleep(_WATCH_S)
            with self._lock:
                self._charge()


#: This process's.
METER = Meter()
os.register_at_fork(after_in_child=METER.begin_anew)
