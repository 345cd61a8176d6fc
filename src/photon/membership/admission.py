"""Who is a member by the roster's tables, and why an invitation or a key makes none."""

from __future__ import annotations

import sqlite3
from dataclasses import fields

from photon.errors import InvitationError, MembershipError, UnknownMemberError
from photon.membership.records import Facts, Member, utc

#: How a member stands, by its status.
STANDING = {
    "active": "is a member",
    "suspended": "is suspended by the aggregator's operator",
    "expelled": "was expelled by the aggregator's operator",
}


def member_of(row: sqlite3.Row) -> Member:
    """A row of members."""
    facts = Facts(**{one.name: row[one.name] for one in fields(Facts)})
    own = {name: row[name] for name in ("name", "public_key", "fingerprint", "status", "joined_at")}
    return Member(**own, facts=facts)


def stands(member: Member | None) -> bool:
    """Whether there is such a member, and it was not expelled."""
    return member is not None and member.status != "expelled"


def find(db: sqlite3.Connection, name: str) -> Member | None:
    """The member of that name, whatever its status."""
    row = db.execute("SELECT * FROM members WHERE name = ?", (name,)).fetchone()
    return member_of(row) if row is not None else None


def unknown(name: str, found: Member | None) -> UnknownMemberError:
    """The error for a name that is no member's, or only that of one that was expelled."""
    if found is not None:
        return UnknownMemberError(
            f"{name} {STANDING[found.status]}",
            hint=f"`photon invite {name}` lets it join again, with another key.",
        )
    return UnknownMemberError(
        f"there is no member {name[:120]!r}", hint="`photon members list` has their names."
    )


def judged(
    db: sqlite3.Connection, digest: str, shown: str, name: str, fingerprint: str, now: float
) -> sqlite3.Row:
    """An invitation that makes `name` a member who has that key.

    Args:
        digest: sha256 of the invitation's token.
        shown: the name as it may be shown.

    Raises:
        InvitationError, MembershipError: see Roster.redeem.
    """
    question = "SELECT * FROM invitations WHERE token_sha256 = ?"
    row = db.execute(question, (digest,)).fetchone()
    why_not = (
        _why_not(db, row, shown, name, now)
        or _why_not_bound(row, shown, fingerprint)
        or _why_not_key(db, fingerprint, name)
    )
    if why_not is not None:
        raise why_not
    return row


def _why_not(
    db: sqlite3.Connection, row: sqlite3.Row | None, shown: str, name: str, now: float
) -> InvitationError | None:
    """Why an invitation (None: there is none) does not make `name` a member; None if it does."""
    hint = "Ask the aggregator's operator for a new one (`photon invite NAME`)."
    if row is None:
        return InvitationError(
            f"this aggregator knows no such invitation for {shown}",
            hint=f"It is another aggregator's, or long expired. {hint}",
        )
    its, why = f"the invitation for {shown}", None
    if row["name"] != name:
        why = f"the invitation is for {row['name']}, not for {shown}"
    elif row["end"] == "used":
        why = f"{its} was used at {utc(row['ended_at'])}"
        hint = (
            "If this node used it, it is a member: `photon join` without --invite goes on. "
            f"Otherwise tell the operator: somebody else has it. {hint}"
        )
    elif row["end"] is not None:
        why = f"{its} was {row['end']} at {utc(row['ended_at'])}"
    elif row["expires_at"] <= now:
        why = f"{its} expired at {utc(row['expires_at'])}"
    elif stands(find(db, name)) != bool(
        row["rotate"]
    ):  # it joined, or was expelled, after the invitation
        why = f"{its} is out of date"
    return InvitationError(why, hint=hint) if why is not None else None


def _why_not_bound(row: sqlite3.Row, shown: str, fingerprint: str) -> InvitationError | None:
    """Why an invitation does not go with a key; None if it does."""
    if row["fingerprint"] in (None, fingerprint):
        return None
    return InvitationError(
        f"the invitation for {shown} is for the key {row['fingerprint']}, not for {fingerprint}",
        hint="Join from the home that holds that key. If you did not ask for this: somebody else "
        "may hold a copy of the invitation, which is worth nothing without the key.",
    )


def _why_not_key(db: sqlite3.Connection, fingerprint: str, name: str) -> MembershipError | None:
    """Why a key can't become `name`'s; None if it can."""
    row = db.execute(
        "SELECT name FROM members WHERE fingerprint = ?1"
        " UNION ALL SELECT name FROM retired_keys WHERE fingerprint = ?1",
        (fingerprint,),
    ).fetchone()
    if row is None:
        return None
    whose = "its own before" if row["name"] == name else f"{row['name']}'s"
    return MembershipError(
        f"key {fingerprint} can't be {name}'s: it is or was {whose}",
        hint="Each node makes a key of its own: join with another --home.",
    )
