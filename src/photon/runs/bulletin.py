"""What became of each silo's update, told to the silo (photon.membership.bulletin)."""

from __future__ import annotations

from photon.membership.bulletin import tell_silos
from photon.membership.roster import Roster
from photon.telemetry import Event
from photon.telemetry.events import RoundMerged, UpdateDropped


class Bulletin:
    """A listener of a served run."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def on_event(self, event: Event) -> None:
        if isinstance(event, UpdateDropped):
            words = f"round {event.round}: this silo's update was dropped: {event.reason}"
            tell_silos(self._roster, [event.silo], words)
        elif isinstance(event, RoundMerged):
            words = f"round {event.round}: this silo's update was merged"
            tell_silos(self._roster, event.participants, words)

    def close(self) -> None:
        """Nothing is open."""
