"""The roster's file: SQLite, its tables, one transaction per change, its errors as ours."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from photon.errors import DiskFullError, MembershipError, ProtocolError

_BUSY_S = 30.0

_TABLES = """
CREATE TABLE members (
    name TEXT PRIMARY KEY, public_key TEXT NOT NULL, fingerprint TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL, flower_node_id TEXT, joined_at REAL NOT NULL,
    data_sha256 TEXT NOT NULL, tokenizer_sha256 TEXT NOT NULL, train_tokens INTEGER NOT NULL,
    photon_version TEXT NOT NULL
);
CREATE TABLE retired_keys (
    fingerprint TEXT PRIMARY KEY, name TEXT NOT NULL, retired_at REAL NOT NULL, why TEXT NOT NULL,
    public_key TEXT NOT NULL, data_sha256 TEXT NOT NULL
);
CREATE TABLE leaving_nodes (flower_node_id TEXT PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE invitations (
    token_sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, rotate INTEGER NOT NULL,
    made_at REAL NOT NULL, expires_at REAL NOT NULL, ended_at REAL, end TEXT
);
CREATE TABLE presence (name TEXT PRIMARY KEY, seen_at REAL NOT NULL, presence TEXT NOT NULL);
CREATE TABLE boots (
    name TEXT NOT NULL, boot TEXT NOT NULL, first_seen REAL NOT NULL, last_seen REAL NOT NULL,
    PRIMARY KEY (name, boot)
);
CREATE TABLE tasks (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, silo TEXT NOT NULL,
    kind TEXT NOT NULL, opened_at REAL NOT NULL, until REAL NOT NULL, closed_at REAL,
    most_bytes INTEGER NOT NULL, granted_bytes INTEGER NOT NULL DEFAULT 0,
    readable TEXT NOT NULL, writable TEXT NOT NULL,
    reply BLOB, signature TEXT, fingerprint TEXT
);
CREATE INDEX open_tasks ON tasks (silo) WHERE closed_at IS NULL;
CREATE INDEX rounds ON tasks (run, round);
CREATE TABLE events (
    n INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, what TEXT NOT NULL,
    detail TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

#: What makes a roster of version n + 1 of one of version n, the first n being 1. Append only.
_MIGRATIONS = (
    "ALTER TABLE tasks ADD COLUMN ask BLOB",
    "ALTER TABLE invitations ADD COLUMN fingerprint TEXT",
    "ALTER TABLE events ADD COLUMN refusal INTEGER NOT NULL DEFAULT 0",
    "CREATE TABLE letters (task TEXT PRIMARY KEY, id TEXT NOT NULL, silo TEXT NOT NULL,"
    " until REAL NOT NULL, message BLOB NOT NULL, reply BLOB, signature TEXT, fingerprint TEXT)",
    # Of the time when Flower carried the tasks.
    "ALTER TABLE members DROP COLUMN flower_node_id",
    "DROP TABLE leaving_nodes",
)
_VERSION = 1 + len(_MIGRATIONS)


class RosterFile:
    """An open roster. Safe to share between threads; each process opens its own.

    Args:
        path: made if missing, readable by its owner only, its folder too.

    Raises:
        MembershipError: there is no making or reading it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._named():
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                # SQLite gives its own files beside it (-wal, -shm) the mode of this one.
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                os.close(descriptor)
                if path.stat().st_mode & 0o077:
                    path.chmod(0o600)
            except OSError as error:
                raise MembershipError(f"can't open the roster {path}: {error}") from error
            self._db = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._db.row_factory = sqlite3.Row
                self._use_write_ahead_log()
                self._make_tables()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def changing(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, on disk when the block ends; nothing of it stays if the block raises.

        Inside another one it is a part of that.

        Args:
            durable: it outlives a power cut, for which the disk is waited for; without, a power cut
                may take back the newest changes.

        Raises:
            DiskFullError: no room.
            MembershipError: the file can't be used.
            ProtocolError: a text that can't be kept.
        """
        with self._lock, self._named():
            if self._db.in_transaction:  # this thread's own, which holds the lock
                yield self._db
                return
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk has rolled back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, question: str, *values: Any) -> list[sqlite3.Row]:
        """Answers to a question; raises as `changing`."""
        with self._lock, self._named():
            return self._db.execute(question, values).fetchall()

    def version(self) -> tuple[int, int]:
        """Another one after every change, of this process's or another's. Costs microseconds."""
        return self.rows("PRAGMA data_version")[0][0], self._db.total_changes

    def _use_write_ahead_log(self) -> None:
        # Changing the mode needs the file alone, and does not wait for it as other statements do.
        give_up = time.monotonic() + _BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(0.02)

    def _make_tables(self) -> None:
        with self.changing():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                version = 1
            if not 1 <= version <= _VERSION:
                raise MembershipError(
                    f"the roster {self.path} is of version {version}, this Photon reads {_VERSION}",
                    hint="Use the Photon that made it, or a newer one.",
                )
            for statement in _MIGRATIONS[version - 1 :]:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """SQLite's errors as ours, naming the file."""
        try:
            yield
        except UnicodeEncodeError as error:  # JSON can say it, a database can not keep it
            raise ProtocolError("half a character (a lone surrogate) in a text") from error
        except sqlite3.Error as error:
            if "full" in str(error):
                raise DiskFullError(
                    f"no room to write {self.path}", hint="Nothing was changed. Free some disk."
                ) from error
            raise MembershipError(
                f"can't use the roster {self.path}: {error}",
                hint="If the file is damaged, restore it from a backup, or move it away: members "
                "then need new invitations.",
            ) from error
