"""Tasks: what silos are asked, what they may read and write for it, and what they answered.

A table of the roster's file.
"""

from __future__ import annotations

import json
import sqlite3
import time

from photon.errors import MembershipError
from photon.membership.records import OpenTask, SignedReply
from photon.membership.roster_file import RosterFile


class Tasks:
    """The tasks in a roster's file. Safe to share between threads."""

    def __init__(self, file: RosterFile) -> None:
        self._file = file

    def open(self, task: OpenTask) -> None:
        """Let a silo read and write what a task needs.

        Opened again, a task counts its granted bytes from zero, and keeps a reply that it has.
        """
        with self._file.changing() as db:
            db.execute(
                "INSERT INTO tasks (id, run, round, silo, kind, opened_at, until, most_bytes,"
                " readable, writable) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET opened_at = excluded.opened_at,"
                " until = excluded.until, most_bytes = excluded.most_bytes,"
                " readable = excluded.readable, writable = excluded.writable,"
                " closed_at = NULL, granted_bytes = 0",
                (
                    task.id,
                    task.run,
                    task.round,
                    task.silo,
                    task.kind,
                    task.opened_at,
                    task.until,
                    task.most_bytes,
                    json.dumps(task.readable),
                    json.dumps(task.writable),
                ),
            )

    def close(self, task_id: str, reply: SignedReply | None) -> None:
        """Nothing is granted for the task any more; `reply` is kept, if there is one.

        Without one, a reply that the task had before stays: a task that is asked again after a
        restart was answered.
        """
        now = time.time()
        with self._file.changing() as db:
            if reply is None:
                db.execute(
                    "UPDATE tasks SET closed_at = ? WHERE id = ? AND closed_at IS NULL",
                    (now, task_id),
                )
            else:
                db.execute(
                    "UPDATE tasks SET closed_at = ?, reply = ?, signature = ?, fingerprint = ?,"
                    " ask = ? WHERE id = ?",
                    (now, reply.text, reply.signature, reply.fingerprint, reply.ask, task_id),
                )

    def open_for(self, silo: str) -> list[OpenTask]:
        """What a silo is asked just now; also what is past its `until`, until it is closed."""
        return [
            _task(row)
            for row in self._file.rows(
                "SELECT * FROM tasks WHERE silo = ? AND closed_at IS NULL ORDER BY opened_at, id",
                silo,
            )
        ]

    def get(self, task_id: str) -> OpenTask | None:
        """An open task; None if there is none, or it is closed."""
        rows = self._file.rows("SELECT * FROM tasks WHERE id = ? AND closed_at IS NULL", task_id)
        return _task(rows[0]) if rows else None

    def reply(self, task_id: str) -> SignedReply | None:
        """The answer that a task was closed with."""
        rows = self._file.rows("SELECT * FROM tasks WHERE id = ? AND reply IS NOT NULL", task_id)
        return _reply(rows[0]) if rows else None

    def replies(self, run: str, round: int) -> list[SignedReply]:
        """All answers of a round, by silo."""
        return [
            _reply(row)
            for row in self._file.rows(
                "SELECT * FROM tasks WHERE run = ? AND round = ? AND reply IS NOT NULL"
                " ORDER BY silo, id",
                run,
                round,
            )
        ]

    def asked(self, run: str, round: int) -> set[str]:
        """Silos that were given a task of training in a round."""
        rows = self._file.rows(
            "SELECT DISTINCT silo FROM tasks WHERE run = ? AND round = ? AND kind = 'fit'",
            run,
            round,
        )
        return {row["silo"] for row in rows}

    def prune(self, run: str, before_round: int) -> None:
        """Forget a run's tasks of earlier rounds, and their replies."""
        with self._file.changing() as db:
            db.execute("DELETE FROM tasks WHERE run = ? AND round < ?", (run, before_round))

    def count_granted(self, task_id: str, bytes: int) -> int:
        """Count bytes that a silo was given leave to write; the sum for that task so far.

        Raises:
            MembershipError: there is no such open task.
        """
        with self._file.changing() as db:
            # Capped, as SQLite's whole numbers are: beyond any task's most_bytes either way.
            db.execute(
                "UPDATE tasks SET granted_bytes = min(granted_bytes + ?, 1 << 60)"
                " WHERE id = ? AND closed_at IS NULL",
                (max(0, min(bytes, 1 << 60)), task_id),
            )
            row = db.execute(
                "SELECT granted_bytes FROM tasks WHERE id = ? AND closed_at IS NULL", (task_id,)
            ).fetchone()
        if row is None:
            raise MembershipError(
                f"no task {task_id[:300]!r} is open",
                hint="The round went on without it, or it was answered already.",
            )
        return row["granted_bytes"]

    def end_all(self, db: sqlite3.Connection, silo: str, now: float) -> None:
        """Nothing is granted to a silo any more; within the transaction that says why."""
        db.execute(
            "UPDATE tasks SET closed_at = ? WHERE silo = ? AND closed_at IS NULL", (now, silo)
        )


def _task(row: sqlite3.Row) -> OpenTask:
    return OpenTask(
        id=row["id"],
        run=row["run"],
        round=row["round"],
        silo=row["silo"],
        kind=row["kind"],
        opened_at=row["opened_at"],
        until=row["until"],
        most_bytes=row["most_bytes"],
        readable=tuple(json.loads(row["readable"])),
        writable=tuple(json.loads(row["writable"])),
    )


def _reply(row: sqlite3.Row) -> SignedReply:
    ask = row["ask"] or b""  # none from before asks were kept
    return SignedReply(row["id"], row["reply"], row["signature"], row["fingerprint"], ask)
