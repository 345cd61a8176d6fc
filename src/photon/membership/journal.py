"""The journal: what happened at the aggregator's door, for its operator to read.

A file of its own (photon.membership.roster_file). Entries about a change are made in the change's
own transaction, and are on disk before it.
"""

from __future__ import annotations

import sqlite3
import time

from photon.membership.records import Event
from photon.membership.roster_file import RosterFile

#: The newest events, among which refusals are kept: others make those, and nothing that they do
#: takes a change of the operator's or a joining out.
_MOST_EVENTS = 20_000
_MOST_EVENT_CHARACTERS = 2000


class Journal:
    """The events in a roster's file. Safe to share between threads."""

    def __init__(self, file: RosterFile) -> None:
        self._file = file

    def note(self, actor: str, what: str, detail: str, *, refusal: bool = False) -> None:
        """Write an event down. The same one again and again takes one line, and a count.

        Args:
            refusal: of what was refused; whoever calls this bounds how often.
        """
        with self._file.changing() as db:
            self.add(db, actor, what, detail, time.time(), refusal=refusal)

    def events(self, limit: int = 100) -> list[Event]:
        """The newest, oldest of them first."""
        rows = self._file.rows("SELECT * FROM events ORDER BY n DESC LIMIT ?", limit)
        return [
            Event(row["at"], row["actor"], row["what"], row["detail"], row["times"])
            for row in reversed(rows)
        ]

    def add(
        self,
        db: sqlite3.Connection,
        actor: str,
        what: str,
        detail: str,
        now: float,
        *,
        refusal: bool = False,
    ) -> None:
        """`note`, within the transaction that it is about."""
        actor, what, detail = (part[:_MOST_EVENT_CHARACTERS] for part in (actor, what, detail))
        last = db.execute("SELECT * FROM events ORDER BY n DESC LIMIT 1").fetchone()
        if last is not None and (last["actor"], last["what"], last["detail"]) == (
            actor,
            what,
            detail,
        ):
            db.execute("UPDATE events SET at = ?, times = times + 1 WHERE n = ?", (now, last["n"]))
            return
        new = db.execute(
            "INSERT INTO events (at, actor, what, detail, refusal) VALUES (?, ?, ?, ?, ?)",
            (now, actor, what, detail, int(refusal)),
        )
        db.execute(
            "DELETE FROM events WHERE n <= ? AND refusal", ((new.lastrowid or 0) - _MOST_EVENTS,)
        )
