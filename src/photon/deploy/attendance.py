"""Who is here, and what each node does: kept in memory, and written to the mailbox for others.

However many nodes speak, it is a few writes a second: what comes within a moment of the last one
goes with the next. What a power cut or a desk that dies takes back, nodes say again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from photon.errors import KeyInUseError
from photon.membership.records import Presence
from photon.membership.roster import Roster

logger = logging.getLogger("photon.desk")

#: Two processes with one key are two nodes if both speak within so many seconds.
ALONE_S = 60.0

#: Between two writes; and of what is not new, that somebody still is here.
_GAP_S, _LATEST_S = 0.25, 5.0


class Attendance:
    """What nodes say of themselves. Safe to share between threads.

    Args:
        roster: its presences are where this goes on from.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._lock = threading.Lock()
        self._said = roster.presences()
        #: By member: its processes, the oldest first; of each when it spoke first, and last.
        self._boots: dict[str, dict[str, tuple[float, float]]] = {
            name: {one.boot: (at, at)} for name, (one, at) in self._said.items()
        }
        #: Since when a member does what it does.
        self._since: dict[str, float] = {}
        self._unwritten: set[str] = set()
        self._written_s = 0.0
        self._news, self._over = threading.Event(), threading.Event()

    def start(self, idle: Callable[[], Iterable[tuple[str, str]]] = tuple) -> None:
        """Write what comes too soon after a write, a moment later; until `close`.

        Args:
            idle: member and process of those that wait for a question; asked every few seconds.
        """
        self._over.clear()
        threading.Thread(
            target=self._write_late, args=(idle,), name="photon-attendance", daemon=True
        ).start()

    def seen(self, name: str, presence: Presence, *, now: float | None = None) -> None:
        """Note that a node is here, and what it does.

        A node that starts again is another process (`boot`), and is welcome at once. Two that both
        go on speaking are two nodes with one key: of them the older one stays, and the newer one is
        refused from its second call on, for as long as the older one is not silent for ALONE_S.

        Args:
            name: a member's.
            now: seconds since the epoch, of this machine's clock.

        Raises:
            KeyInUseError: see above.
        """
        now = time.time() if now is None else now
        self.require_alone(name, presence.boot, now=now)
        with self._lock:
            before = self._said.get(name)
            if before is None or _doing(before[0]) != _doing(presence):
                self._since[name] = now
            self._said[name] = (presence, now)
            self._unwritten.add(name)
            late = time.monotonic() - self._written_s < _GAP_S
        if late:
            self._news.set()
        else:
            self._write()

    def waits(self, name: str, boot: str) -> None:
        """An idle node that waits for a question is here, whether it says so again or not.

        One that has a question speaks for itself: else nobody would notice a trainer that hangs.
        """
        with self._lock:
            now, (presence, _) = time.time(), self._said.get(name, (None, 0.0))
            if presence is not None and (presence.boot, presence.state) == (boot, "idle"):
                self._said[name] = (presence, now)
                self._unwritten.add(name)
                self._older(name, boot, now)

    def require_alone(self, name: str, boot: str, *, now: float | None = None) -> None:
        """Refuse the newer of two nodes with one key, as `seen`, for another kind of request.

        Raises:
            KeyInUseError: see `seen`.
        """
        now = time.time() if now is None else now
        with self._lock:
            older = self._older(name, boot, now) if boot else None
        if older is None:
            return
        raise KeyInUseError(
            f"another node runs with the key of {name}: this one ({_shown(boot)}) came later "
            f"than {_shown(older)}, which was here in the last {ALONE_S:.0f} s",
            hint="Stop one of them. If the other one is not yours, the key was copied: ask the "
            f"aggregator's operator for `photon members rotate {name}`.",
        )

    def forget(self, name: str) -> None:
        """With a new key a member begins anew."""
        with self._lock:
            self._boots.pop(name, None)

    def now(self) -> dict[str, tuple[Presence, float, float]]:
        """What each node said last, when, and since when it does that (seconds since the epoch)."""
        with self._lock:
            return {
                name: (one, at, self._since.get(name, at)) for name, (one, at) in self._said.items()
            }

    def count(self) -> int:
        """Those that ever were here."""
        return len(self._said)

    def close(self) -> None:
        """Write what is left."""
        self._over.set()
        self._news.set()
        self._write()

    def _older(self, name: str, boot: str, now: float) -> str | None:
        """A process that was here before this one, and spoke since this one is here."""
        boots = self._boots.setdefault(name, {})
        for gone in [one for one, (_, last) in boots.items() if last < now - ALONE_S]:
            del boots[gone]
        first, _ = boots.get(boot, (now, now))
        boots[boot] = (first, now)
        for one, (_, last) in boots.items():
            if one == boot:
                return None
            if last > first:
                return one
        return None

    def _write(self) -> None:
        with self._lock:
            said = {name: self._said[name] for name in self._unwritten}
            self._unwritten.clear()
            self._written_s = time.monotonic()
        if said:
            self._roster.all_seen(said)

    def _write_late(self, idle: Callable[[], Iterable[tuple[str, str]]]) -> None:
        again_s = 0.0
        while not self._over.is_set():
            if self._news.wait(_LATEST_S):
                self._over.wait(_GAP_S)
            self._news.clear()
            try:
                if time.monotonic() >= again_s:
                    again_s = time.monotonic() + _LATEST_S
                    for name, boot in idle():
                        self.waits(name, boot)
                self._write()
            except Exception as error:  # who speaks next writes, and is told
                logger.error("noting who is here: %s", type(error).__name__, exc_info=error)


def _doing(presence: Presence) -> tuple[str, str, int, str]:
    """What has a beginning: another step of the same task is not something else."""
    return (presence.state, presence.run, presence.round, presence.task)


def _shown(boot: str) -> str:
    return f"process {boot[:12]!r}"
