"""Letters: a task's question on its way to its silo, and what came back for it.

A table of the mailbox, which the federation's loop writes and the desk reads. A letter is
handed out for as long as nothing came back for it: whoever lost it on the way is given it again. It
ends with its task (photon.membership.tasks). A power cut may take letters back: the loop, which it
ended too, sends them anew, and silos answer from their disks.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

from photon.membership.records import SignedReply
from photon.membership.roster_file import RosterFile

#: Between two looks at whether another process changed the file.
_LOOK_S = 0.02


@dataclass(frozen=True)
class Letter:
    """A question for a silo.

    Attributes:
        id: random; another one each time the question is sent.
        message: an Ask, sealed.
        until: nobody waits for the answer any more (seconds since the epoch).
    """

    id: str
    message: bytes
    until: float


class Letters:
    """The letters in a roster's file. Safe to share between threads."""

    def __init__(self, file: RosterFile) -> None:
        self._file = file

    def withdraw(self) -> None:
        """Nothing of an earlier run, or of an earlier start of this one, is handed out any more."""
        with self._file.changing(durable=False) as db:
            db.execute("DELETE FROM letters")

    # --- the federation's loop ---

    def push(self, task: str, message: bytes) -> str:
        """Send an open task's question: photon.engines.remote.Post."""
        one = secrets.token_hex(16)
        with self._file.changing(durable=False) as db:
            db.execute(
                "INSERT OR REPLACE INTO letters SELECT id, ?, silo, until, ?, NULL, NULL, NULL"
                " FROM tasks WHERE id = ? AND closed_at IS NULL",
                (one, message, task),
            )
        return one

    def pull(self, ids: Collection[str]) -> dict[str, SignedReply | str]:
        """What came back for these, each once: photon.engines.remote.Post."""
        rows = self._file.rows("SELECT * FROM letters WHERE reply IS NOT NULL")
        came = {row["id"]: row for row in rows if row["id"] in ids}
        if came:
            with self._file.changing(durable=False) as db:
                db.executemany("DELETE FROM letters WHERE id = ?", [(one,) for one in came])
        return {
            one: str(row["reply"], "utf-8", "replace")
            if row["signature"] is None
            else SignedReply("", row["reply"], row["signature"], row["fingerprint"])
            for one, row in came.items()
        }

    def wait(self, timeout_s: float) -> None:
        """Until something came back for any, or for so long: photon.engines.remote.Post."""
        until_s, seen = time.monotonic() + timeout_s, None
        while True:
            if (version := self._file.version()) != seen:
                seen = version
                if self._file.rows("SELECT 1 FROM letters WHERE reply IS NOT NULL LIMIT 1"):
                    return
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(_LOOK_S, left_s))

    # --- the desk ---

    def unanswered(self) -> dict[str, list[str]]:
        """Ids of letters that nothing came back for, by silo, the oldest first."""
        found: dict[str, list[str]] = {}
        question = "SELECT silo, id FROM letters WHERE reply IS NULL AND until > ? ORDER BY rowid"
        for row in self._file.rows(question, time.time()):
            found.setdefault(row["silo"], []).append(row["id"])
        return found

    def fetch(self, ids: Collection[str]) -> dict[str, Letter]:
        """The letters of these ids that are still there."""
        question = (
            "SELECT id, message, until FROM letters WHERE id IN (SELECT value FROM json_each(?))"
        )
        rows = self._file.rows(question, json.dumps(list(ids)))
        return {row["id"]: Letter(**row) for row in rows}

    def answer(self, silo: str, one: str, reply: SignedReply | str) -> bool:
        """Keep what a silo says to a letter, or why it says nothing; the first time counts.

        Returns:
            Whether there is such a letter to this silo.
        """
        if isinstance(reply, str):
            kept = (reply.encode(), None, None)
        else:
            kept = (reply.text, reply.signature, reply.fingerprint)
        with self._file.changing(durable=False) as db:
            (found,) = db.execute(
                "SELECT count(*) FROM letters WHERE id = ? AND silo = ?", (one, silo)
            ).fetchone()
            if found:
                db.execute(
                    "UPDATE letters SET reply = ?, signature = ?, fingerprint = ?"
                    " WHERE id = ? AND reply IS NULL",
                    (*kept, one),
                )
        return bool(found)
