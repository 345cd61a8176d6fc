"""Silos that can't take part in a run as they are, and why: asked again once they start anew.

Another policy, other data, another version: each needs a restart of the node, which its next word
of presence tells (`Presence.boot`). Until then the run goes on without it, or waits.
"""

from __future__ import annotations

from photon.errors import (
    ConfigError,
    DataChangedError,
    DataError,
    MembershipError,
    ModelError,
    PolicyError,
    ProtocolError,
)
from photon.membership.roster import Roster

#: For these a silo would refuse again. (A full disk or a dead rank may be mended meanwhile.)
LASTING = (
    ConfigError,
    DataChangedError,
    DataError,
    MembershipError,
    ModelError,
    PolicyError,
    ProtocolError,
)


def note_refusal(roster: Roster, run_id: str, silo: str, why: str) -> None:
    """A silo refused a run's task for a reason that lasts.

    Args:
        why: in its own words.
    """
    seen = roster.presences().get(silo)
    refusals = roster.setting(_key(run_id), {})
    refusals[silo] = {"boot": seen[0].boot if seen is not None else "", "why": why}
    roster.set_setting(_key(run_id), refusals)


def refusing(roster: Roster, run_id: str) -> dict[str, str]:
    """Silos of a run that refused it and have not started anew since, each with its reason."""
    seen = roster.presences()
    return {
        silo: told["why"]
        for silo, told in roster.setting(_key(run_id), {}).items()
        if silo not in seen or seen[silo][0].boot == told["boot"]
    }


def _key(run_id: str) -> str:
    return f"refusing/{run_id}"
