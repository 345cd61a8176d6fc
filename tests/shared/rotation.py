"""A member's key changes: what `photon members rotate` and the node's next join come to."""

from __future__ import annotations

from photon.membership.records import Member
from photon.membership.roster import Roster


def rotate(roster: Roster, name: str, public_pem: str) -> Member:
    """The member with another key, and the data that it had registered."""
    facts = roster.member(name).facts
    return roster.redeem(roster.invite(name, 60, rotate=True), name, public_pem, facts)
