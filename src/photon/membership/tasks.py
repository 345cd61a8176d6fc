"""Tasks: what silos are asked, what they may read and write for it, and what they answered.

A table of the mailbox (photon.membership.roster_file).
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import fields
from typing import Any

from photon.membership.records import OpenTask, SignedReply
from photon.membership.roster_file import RosterFile


class Tasks:
    """The tasks in a roster's file. Safe to share between threads."""

    def __init__(self, file: RosterFile) -> None:
        self._file = file

    def open(self, task: OpenTask) -> None:
        """Let a silo read and write what a task needs.

        Opened again, a task keeps a reply that it has, and its question is to be sent anew.
        """
        keys = {name: json.dumps(getattr(task, name)) for name in ("readable", "writable")}
        with self._file.changing() as db:
            db.execute(
                "INSERT INTO tasks (id, run, round, silo, kind, opened_at, until, most_bytes,"
                " readable, writable) VALUES (:id, :run, :round, :silo, :kind, :opened_at, :until,"
                " :most_bytes, :readable, :writable)"
                " ON CONFLICT (id) DO UPDATE SET opened_at = excluded.opened_at,"
                " until = excluded.until, most_bytes = excluded.most_bytes,"
                " readable = excluded.readable, writable = excluded.writable, closed_at = NULL",
                vars(task) | keys,
            )
            db.execute("DELETE FROM letters WHERE task = ?", (task.id,))

    def close(self, task_id: str, reply: SignedReply | None) -> None:
        """Nothing is granted for the task any more; `reply` is kept, if there is one.

        Without one, a reply that the task had before stays: a task that is asked again after a
        restart was answered.
        """
        now = time.time()
        with self._file.changing() as db:
            db.execute("DELETE FROM letters WHERE task = ?", (task_id,))
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
        question = "SELECT * FROM tasks WHERE silo = ? AND closed_at IS NULL ORDER BY opened_at, id"
        return [_task(row) for row in self._file.rows(question, silo)]

    def reply(self, task_id: str) -> SignedReply | None:
        """The answer that a task was closed with."""
        rows = self._file.rows("SELECT * FROM tasks WHERE id = ? AND reply IS NOT NULL", task_id)
        return _reply(rows[0]) if rows else None

    def replies(self, run: str, round: int) -> list[SignedReply]:
        """All answers of a round, by silo."""
        answered = "SELECT * FROM tasks WHERE run = ? AND round = ? AND reply IS NOT NULL"
        question = f"{answered} ORDER BY silo, id"
        return [_reply(row) for row in self._file.rows(question, run, round)]

    def asked(self, run: str, round: int) -> set[str]:
        """Silos that were given a task of training in a round."""
        question = "SELECT DISTINCT silo FROM tasks WHERE run = ? AND round = ? AND kind = 'fit'"
        return {row["silo"] for row in self._file.rows(question, run, round)}

    def prune(self, run: str, before_round: int) -> None:
        """Forget a run's tasks of earlier rounds, and their replies."""
        old = "FROM tasks WHERE run = ? AND round < ?"
        with self._file.changing() as db:
            db.execute(f"DELETE FROM letters WHERE task IN (SELECT id {old})", (run, before_round))
            db.execute(f"DELETE {old}", (run, before_round))

    def end_all(self, db: sqlite3.Connection, silo: str, now: float) -> None:
        """Nothing is granted to a silo any more; within the transaction that says why."""
        db.execute("DELETE FROM letters WHERE silo = ?", (silo,))
        db.execute(
            "UPDATE tasks SET closed_at = ? WHERE silo = ? AND closed_at IS NULL", (now, silo)
        )


def _task(row: sqlite3.Row) -> OpenTask:
    kept: dict[str, Any] = {one.name: row[one.name] for one in fields(OpenTask)}
    for name in ("readable", "writable"):
        kept[name] = tuple(json.loads(kept[name]))
    return OpenTask(**kept)


def _reply(row: sqlite3.Row) -> SignedReply:
    ask = row["ask"] or b""  # none from before asks were kept
    return SignedReply(row["id"], row["reply"], row["signature"], row["fingerprint"], ask)
