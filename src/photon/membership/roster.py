"""The roster: who is a member, who was invited, who is here; with the tasks and the journal.

Three SQLite files (photon.membership.roster_file) that several processes use at once (the desk, the
federation's loop, the command line). Every change is one transaction and is on disk when the method
returns; every question is asked of the files, so that a member who is suspended is suspended from
the next request on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import sqlite3
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from photon.errors import MembershipError, UnknownMemberError
from photon.membership.admission import (
    STANDING,
    find,
    judged,
    member_of,
    stands,
    unknown,
)
from photon.membership.journal import Journal
from photon.membership.keys import FINGERPRINT, canonical_pem, fingerprint_of
from photon.membership.letters import Letters
from photon.membership.records import (
    MEMBER_NAME,
    Facts,
    Member,
    PendingInvitation,
    Presence,
    Signer,
    Status,
    utc,
)
from photon.membership.roster_file import ROSTER_FILE, RosterFile
from photon.membership.tasks import Tasks

#: Setting: folder of the run that is served from this home, or was last.
RUN_SETTING = "run"

#: Setting: what ended the loop that was started last: "exit_code" and "words".
ENDED_SETTING = "ended"

#: Invitations are forgotten so many seconds after they expired.
_REMEMBER_INVITATIONS_S = 90 * 86_400


class Roster:
    """An aggregator's roster. Safe to share between threads; each process opens its own.

    Args:
        path: of members.sqlite; made if missing with those beside it, readable by their owner
            only, their folder too.

    Raises:
        MembershipError: there is no making or reading it.
        DiskFullError: also raised by every method that writes.

    Attributes:
        tasks: what silos are asked, and what they answered.
        letters: the questions on their way, and what came back.
        journal: what happened to members, keys and invitations.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = RosterFile(self.path)
        self.tasks = Tasks(self._file)
        self.letters = Letters(self._file)
        self.journal = Journal(self._file)

    def close(self) -> None:
        """Let go of the file; the roster can't be used after."""
        self._file.close()

    def together(self) -> AbstractContextManager[Any]:
        """Make one transaction of all changes in the block: on disk at once, and sooner."""
        return self._file.changing()

    def version(self) -> tuple[int, ...]:
        """Another one after every change of members or mailbox, whoever makes it. Costs little."""
        return self._file.version()

    def __enter__(self) -> Roster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- members ----------------------------------------------------------------------------------

    def invite(
        self,
        name: str,
        valid_s: float,
        *,
        rotate: bool = False,
        key: str | None = None,
        now: float | None = None,
    ) -> str:
        """A token that makes its first bearer the member `name`. Only its sha256 is kept.

        An earlier invitation of that name that was not used is void from now on. Who was expelled
        may be invited again, and then comes with another key.

        Args:
            rotate: for a member that is to have a new key (or registers other data): the old key
                ends when the invitation is redeemed.
            valid_s: seconds.
            key: fingerprint of the only key that may come with it; None: the first that comes.

        Raises:
            MembershipError: no name for a member, no fingerprint; or there is such a member and
                `rotate` is not set.
            UnknownMemberError: `rotate` is set and there is no such member.
        """
        now = _now(now)
        if not MEMBER_NAME.fullmatch(name):
            raise MembershipError(
                f"{name[:120]!r} is no name for a member",
                hint="Up to 100 letters, digits, dots, dashes and underscores; the first one a "
                "letter or a digit.",
            )
        if not (math.isfinite(valid_s) and valid_s > 0):
            raise MembershipError(f"an invitation can't be valid for {valid_s} s")
        if key is not None and not FINGERPRINT.fullmatch(key):
            raise MembershipError(
                f"{key[:100]!r} is no fingerprint of a key",
                hint="It is sha256: and 64 hexadecimal digits; `photon join --show-key` prints it.",
            )
        token = secrets.token_urlsafe(32)
        with self._file.changing() as db:
            found = find(db, name)
            here = stands(found)
            if rotate and not here:
                raise unknown(name, found)
            if here and not rotate:
                raise MembershipError(
                    f"{name} is a member already",
                    hint=f"`photon members rotate {name}` invites it with a new key or new data.",
                )
            self._void_invitations(db, name, "replaced by a newer one", now)
            db.execute(
                "DELETE FROM invitations WHERE expires_at < ?", (now - _REMEMBER_INVITATIONS_S,)
            )
            db.execute(
                "INSERT INTO invitations"
                " (token_sha256, name, rotate, made_at, expires_at, fingerprint)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (_digest(token), name, int(rotate), now, now + valid_s, key),
            )
            what = "invited with a new key" if rotate else "invited"
            self.journal.add(db, "operator", what, f"{name}, until {utc(now + valid_s)}", now)
        return token

    def redeem(
        self, token: str, name: str, public_key_pem: str, facts: Facts, *, now: float | None = None
    ) -> Member:
        """Turn an invitation into a membership; of several who try, one succeeds.

        With a rotation invitation the member's old key ends here.

        Raises:
            InvitationError: no such token, or it expired, was used, replaced, or is another name's.
            MembershipError: no P-384 public key, or one that is or was somebody's.
        """
        now = _now(now)
        pem = canonical_pem(public_key_pem)
        fingerprint = fingerprint_of(pem)
        shown = name if MEMBER_NAME.fullmatch(name) else repr(name[:100])
        status: Status = "active"
        with self._file.changing() as db:
            row = judged(db, _digest(token), shown, name, fingerprint, now)
            old = find(db, name)
            if old is not None:
                self._retire(db, old, "replaced by a newer key", now)
                status = old.status if row["rotate"] else status
            db.execute(
                "UPDATE invitations SET ended_at = ?, end = 'used' WHERE token_sha256 = ?",
                (now, row["token_sha256"]),
            )
            db.execute(
                "INSERT OR REPLACE INTO members VALUES (:name, :pem, :key, :status, :now,"
                " :data_sha256, :tokenizer_sha256, :train_tokens, :photon_version)",
                {"name": name, "pem": pem, "key": fingerprint, "status": status, "now": now}
                | vars(facts),
            )
            what = "joined" if old is None else "joined with a new key"
            self.journal.add(db, name, what, f"{fingerprint}, {facts.train_tokens} tokens", now)
        return Member(name, pem, fingerprint, status, facts, now)

    def members(self) -> list[Member]:
        """All, the suspended and expelled too, by name."""
        return [member_of(row) for row in self._file.rows("SELECT * FROM members ORDER BY name")]

    def invitation(self, token: str) -> str | None:
        """What an invitation is called here, used or not; None if there is none of that token."""
        rows = self._file.rows("SELECT 1 FROM invitations WHERE token_sha256 = ?", _digest(token))
        return _digest(token)[:16] if rows else None

    def invitations(self, *, now: float | None = None) -> list[PendingInvitation]:
        """Those that can still be redeemed, by name."""
        rows = self._file.rows(
            "SELECT * FROM invitations WHERE ended_at IS NULL AND expires_at > ? ORDER BY name",
            _now(now),
        )
        return [
            PendingInvitation(row["name"], bool(row["rotate"]), row["made_at"], row["expires_at"])
            for row in rows
        ]

    def active_keys(self) -> set[str]:
        """Fingerprints of all that may take part just now."""
        rows = self._file.rows("SELECT fingerprint FROM members WHERE status = 'active'")
        return {row["fingerprint"] for row in rows}

    def member(self, name: str) -> Member:
        """One of them, whatever its status.

        Raises:
            UnknownMemberError: there is none of that name.
        """
        rows = self._file.rows("SELECT * FROM members WHERE name = ?", name)
        if not rows:
            raise unknown(name, None)
        return member_of(rows[0])

    def by_fingerprint(self, fingerprint: str) -> Member:
        """Whose key that is, whatever the member's status.

        Raises:
            UnknownMemberError: it is no member's, or was one's.
        """
        rows = self._file.rows("SELECT * FROM members WHERE fingerprint = ?", fingerprint)
        if rows:
            return member_of(rows[0])
        retired = self._file.rows("SELECT * FROM retired_keys WHERE fingerprint = ?", fingerprint)
        shown = fingerprint[:80]
        if retired:
            row = retired[0]
            message = (
                f"key {shown} was {row['name']}'s until {utc(row['retired_at'])}: {row['why']}"
            )
            hint = "Use the newer key; or ask the aggregator's operator for an invitation."
        else:
            message = f"key {shown} is no member's"
            hint = "Join with an invitation: `photon join --invite FILE`."
        raise UnknownMemberError(message, hint=hint)

    def signer(self, fingerprint: str) -> Signer:
        """Whose key that is or was, for the record: a reply that was merged may be older than its
        member's present key. Nothing is accepted on its strength.

        Raises:
            UnknownMemberError: it never was a member's.
        """
        rows = self._file.rows(
            "SELECT name, public_key, data_sha256 FROM members WHERE fingerprint = ?1"
            " UNION ALL SELECT name, public_key, data_sha256 FROM retired_keys"
            " WHERE fingerprint = ?1",
            fingerprint,
        )
        if not rows:
            raise UnknownMemberError(f"key {fingerprint[:80]} never was a member's")
        row = rows[0]
        return Signer(row["name"], fingerprint, row["public_key"], row["data_sha256"])

    def active(self, fingerprint: str) -> Member:
        """Whose key that is, if the member may take part just now.

        Raises:
            UnknownMemberError: it is no member's, or the member is suspended or was expelled.
        """
        found = self.by_fingerprint(fingerprint)
        if found.status != "active":
            raise UnknownMemberError(
                f"{found.name} {STANDING[found.status]}", hint="Ask the aggregator's operator."
            )
        return found

    def active_member(self, name: str) -> Member:
        """One of them, if it may take part just now.

        Raises:
            UnknownMemberError: there is none of that name, or it is suspended or was expelled.
        """
        found = self.member(name)
        if found.status != "active":
            raise UnknownMemberError(
                f"{name} {STANDING[found.status]}",
                hint="`photon members list` has the status of each.",
            )
        return found

    def suspend(self, name: str) -> None:
        """From its next request on the member is refused, until it is reinstated.

        Raises:
            UnknownMemberError: no such member, or it was expelled.
        """
        self._set_status(name, "suspended")

    def reinstate(self, name: str) -> None:
        """End a suspension.

        Raises:
            UnknownMemberError: no such member, or it was expelled (`invite` takes it back).
        """
        self._set_status(name, "active")

    def expel(self, name: str) -> None:
        """From its next request on the member is refused, and its key is never accepted again.

        Of somebody who has not joined yet, the invitation is withdrawn.

        Raises:
            UnknownMemberError: neither such a member nor such an invitation.
        """
        now = time.time()
        with self._file.changing() as db:
            invited = find(db, name) is None and self._void_invitations(db, name, "withdrawn", now)
            if invited:
                self.journal.add(db, "operator", "invitation withdrawn", name, now)
        if not invited:
            self._set_status(name, "expelled")

    # --- presence ---------------------------------------------------------------------------------

    def all_seen(self, said: Mapping[str, tuple[Presence, float]]) -> None:
        """Note what each of these nodes does, and when it said so (seconds since the epoch, of this
        machine's clock). A power cut may take it back: they say it again.
        """
        rows = [(name, at, json.dumps(vars(one))) for name, (one, at) in said.items()]
        with self._file.changing(durable=False) as db:
            db.executemany("INSERT OR REPLACE INTO presence VALUES (?, ?, ?)", rows)

    def presences(self) -> dict[str, tuple[Presence, float]]:
        """What each node said last, and when (seconds since the epoch, this side's clock)."""
        rows = self._file.rows("SELECT * FROM presence ORDER BY name")
        return {
            row["name"]: (Presence(**json.loads(row["presence"])), row["seen_at"]) for row in rows
        }

    # --- settings ---------------------------------------------------------------------------------

    def setting(self, key: str, default: Any = None) -> Any:
        """What all processes of this aggregator share, for instance "draining"."""
        rows = self._file.rows("SELECT value FROM settings WHERE key = ?", key)
        return json.loads(rows[0]["value"]) if rows else default

    def set_setting(self, key: str, value: Any) -> None:
        """Anything that JSON can say."""
        with self._file.changing() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, json.dumps(value)))

    # --- inside -----------------------------------------------------------------------------------

    def _retire(self, db: sqlite3.Connection, member: Member, why: str, now: float) -> None:
        db.execute(
            "INSERT OR IGNORE INTO retired_keys VALUES (?, ?, ?, ?, ?, ?)",
            (
                member.fingerprint,
                member.name,
                now,
                why,
                member.public_key,
                member.facts.data_sha256,
            ),
        )

    def _void_invitations(self, db: sqlite3.Connection, name: str, why: str, now: float) -> bool:
        done = db.execute(
            "UPDATE invitations SET ended_at = ?, end = ? WHERE name = ? AND ended_at IS NULL",
            (now, why, name),
        )
        return done.rowcount > 0

    def _set_status(self, name: str, status: Status) -> None:
        now = time.time()
        with self._file.changing() as db:
            found = find(db, name)
            if found is None or (found.status == "expelled" and status != "expelled"):
                raise unknown(name, found)
            if found.status == status:
                return
            db.execute("UPDATE members SET status = ? WHERE name = ?", (status, name))
            if status == "expelled":
                self._void_invitations(db, name, "withdrawn", now)
                self._retire(db, found, "the member was expelled", now)
                self.tasks.end_all(db, name, now)
            what = "reinstated" if status == "active" else status
            self.journal.add(db, "operator", what, name, now)


def roster_at(home: str | os.PathLike[str]) -> Roster:
    """The roster of an aggregator's home that is there already.

    Raises:
        MembershipError: none is there.
    """
    path = Path(home) / ROSTER_FILE
    if not path.is_file():
        raise MembershipError(
            f"no members yet: there is no {path}",
            hint="If the aggregator's home is elsewhere, say so with --home, or with --run-file in "
            "the folder where serve runs. The first `photon serve` makes one, or `photon invite "
            "NAME --new`.",
        )
    return Roster(path)


def _now(now: float | None) -> float:
    return time.time() if now is None else now


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
