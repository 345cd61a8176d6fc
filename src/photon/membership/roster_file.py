"""The roster's files: SQLite, their tables, one transaction per change, its errors as ours.

    members.sqlite   who belongs: members, invitations, keys that were somebody's
    mailbox.sqlite   what is said just now: tasks, letters, presence, settings of the run
    journal.sqlite   what happened: joins, expulsions, refusals

Each is of a numbered version of its own. A change may reach into all three: power that is lost
while it is written may part them, but the journal comes first, so nothing is done that is not
noted there.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.errors import DiskFullError, MembershipError, ProtocolError

_BUSY_S = 30.0

#: The roster's files in the aggregator's home.
ROSTER_FILE, MAILBOX_FILE, JOURNAL_FILE = ROSTER_FILES = (
    "members.sqlite",
    "mailbox.sqlite",
    "journal.sqlite",
)


@dataclass(frozen=True)
class _Database:
    """A file of the roster.

    Attributes:
        tables: what makes an empty one one of this version.
        migrations: what makes one of version n + 1 of one of version n, the first n being 1.
            Append only; `tables` changes with it.
    """

    tables: str
    migrations: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        return 1 + len(self.migrations)


_JOURNAL = _Database(
    """
CREATE TABLE main.events (
    n INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, what TEXT NOT NULL,
    detail TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1, refusal INTEGER NOT NULL DEFAULT 0
)"""
)

_MAILBOX = _Database(
    """
CREATE TABLE mailbox.tasks (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, silo TEXT NOT NULL,
    kind TEXT NOT NULL, opened_at REAL NOT NULL, until REAL NOT NULL, closed_at REAL,
    most_bytes INTEGER NOT NULL, readable TEXT NOT NULL, writable TEXT NOT NULL,
    reply BLOB, signature TEXT, fingerprint TEXT, ask BLOB
);
CREATE INDEX mailbox.open_tasks ON tasks (silo) WHERE closed_at IS NULL;
CREATE INDEX mailbox.rounds ON tasks (run, round);
CREATE TABLE mailbox.letters (
    task TEXT PRIMARY KEY, id TEXT NOT NULL, silo TEXT NOT NULL, until REAL NOT NULL,
    message BLOB NOT NULL, reply BLOB, signature TEXT, fingerprint TEXT
);
CREATE INDEX mailbox.letter_ids ON letters (id);
CREATE INDEX mailbox.unanswered ON letters (silo, until, id) WHERE reply IS NULL;
CREATE TABLE mailbox.presence (
    name TEXT PRIMARY KEY, seen_at REAL NOT NULL, presence TEXT NOT NULL
);
CREATE TABLE mailbox.settings (key TEXT PRIMARY KEY, value TEXT NOT NULL)"""
)


def _moved(table: str, to: str, columns: str) -> str:
    # Emptied first: where power was lost between the commits of two files, it is done again.
    return (
        f"DELETE FROM {to}.{table}; INSERT INTO {to}.{table} ({columns})"
        f" SELECT {columns} FROM members.{table}; DROP TABLE members.{table};"
    )


_MEMBERS = _Database(
    """
CREATE TABLE members.members (
    name TEXT PRIMARY KEY, public_key TEXT NOT NULL, fingerprint TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL, joined_at REAL NOT NULL,
    data_sha256 TEXT NOT NULL, tokenizer_sha256 TEXT NOT NULL, train_tokens INTEGER NOT NULL,
    photon_version TEXT NOT NULL
);
CREATE TABLE members.retired_keys (
    fingerprint TEXT PRIMARY KEY, name TEXT NOT NULL, retired_at REAL NOT NULL, why TEXT NOT NULL,
    public_key TEXT NOT NULL, data_sha256 TEXT NOT NULL
);
CREATE TABLE members.invitations (
    token_sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, rotate INTEGER NOT NULL,
    made_at REAL NOT NULL, expires_at REAL NOT NULL, ended_at REAL, end TEXT, fingerprint TEXT
)""",
    (
        "ALTER TABLE members.tasks ADD COLUMN ask BLOB",
        "ALTER TABLE members.invitations ADD COLUMN fingerprint TEXT",
        "ALTER TABLE members.events ADD COLUMN refusal INTEGER NOT NULL DEFAULT 0",
        "CREATE TABLE members.letters (task TEXT PRIMARY KEY, id TEXT NOT NULL, silo TEXT NOT NULL,"
        " until REAL NOT NULL, message BLOB NOT NULL, reply BLOB, signature TEXT,"
        " fingerprint TEXT)",
        # Of the time when Flower carried the tasks.
        "ALTER TABLE members.members DROP COLUMN flower_node_id",
        "DROP TABLE members.leaving_nodes",
        # Until then this file was all of the roster.
        _moved(
            *("tasks", "mailbox"),
            "id, run, round, silo, kind, opened_at, until, closed_at, most_bytes, readable,"
            " writable, reply, signature, fingerprint, ask",
        )
        + _moved(
            "letters", "mailbox", "task, id, silo, until, message, reply, signature, fingerprint"
        )
        + _moved("presence", "mailbox", "name, seen_at, presence")
        + _moved("settings", "mailbox", "key, value")
        + _moved("events", "main", "n, at, actor, what, detail, times, refusal")
        + "DROP TABLE members.boots",
    ),
)

#: By the name that SQL knows it by. The first is on disk first where a change reaches into several.
_DATABASES = {"main": _JOURNAL, "mailbox": _MAILBOX, "members": _MEMBERS}


class RosterFile:
    """An open roster. Safe to share between threads; each process opens its own.

    Args:
        path: of members.sqlite; the others lie beside it. Made if missing, readable by their
            owner only, their folder too.

    Raises:
        MembershipError: there is no making or reading it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._paths = {
            "main": path.with_name(JOURNAL_FILE),
            "mailbox": path.with_name(MAILBOX_FILE),
            "members": path,
        }
        self._lock = threading.RLock()
        self._durable: bool | None = None
        with self._named():
            for one in self._paths.values():
                _make_private(one)
            self._db = sqlite3.connect(
                self._paths["main"],
                timeout=_BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._db.row_factory = sqlite3.Row
                for name in ("mailbox", "members"):
                    self._db.execute(f"ATTACH ? AS {name}", (str(self._paths[name]),))
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
            if durable is not self._durable:
                for name in _DATABASES:
                    level = "FULL" if durable else "NORMAL"
                    self._db.execute(f"PRAGMA {name}.synchronous = {level}")
                self._durable = durable
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

    def version(self) -> tuple[int, ...]:
        """Another one after every change of members or mailbox, of this process's or another's.

        Costs microseconds.
        """
        found = [self.rows(f"PRAGMA {one}.data_version")[0][0] for one in ("mailbox", "members")]
        return *found, self._db.total_changes

    def _use_write_ahead_log(self) -> None:
        # Changing the mode needs the file alone, and does not wait for it as other statements do.
        give_up = time.monotonic() + _BUSY_S
        while True:
            try:
                for name in _DATABASES:
                    self._db.execute(f"PRAGMA {name}.journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(0.02)

    def _make_tables(self) -> None:
        """Bring each file to its version, or refuse before anything is changed."""
        with self.changing():
            found: dict[str, int] = {}
            for name, wanted in _DATABASES.items():
                (found[name],) = self._db.execute(f"PRAGMA {name}.user_version").fetchone()
                if not 0 <= found[name] <= wanted.version:
                    raise MembershipError(
                        f"the roster's {self._paths[name]} is of version {found[name]}, this "
                        f"Photon reads {wanted.version}",
                        hint="Use the Photon that made it, or a newer one.",
                    )
            for name, wanted in _DATABASES.items():
                own = (wanted.tables,) if not found[name] else wanted.migrations[found[name] - 1 :]
                for statement in "; ".join(own).split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA {name}.user_version = {wanted.version}")

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
                    f"no room to write in {self.path.parent}",
                    hint="Nothing was changed. Free some disk.",
                ) from error
            raise MembershipError(
                f"can't use the roster {self.path}, or a file beside it: {error}",
                hint="If one of the three is damaged, restore all from a backup, or move it away. "
                "Without members.sqlite, members need new invitations; without mailbox.sqlite, "
                "silos are asked again.",
            ) from error


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # SQLite gives its own files beside it (-wal, -shm) the mode of this one. One that is there
        # is not opened: closing it would end the locks that this process has on it by SQLite.
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            if not path.is_file():
                raise
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise MembershipError(f"can't open the roster {path}: {error}") from error
