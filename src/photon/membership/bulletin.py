"""What the aggregator tells silos of the run, in words, when they say that they are here.

Settings of the roster: the loop and `photon serve` write them, the desk reads them out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from photon.membership.roster import Roster

#: Settings: of the run, by its serve; of single silos, by its loop.
_RUN, _SILOS = "told-of-run", "told-of-silos"
#: Of one message.
_MOST_CHARACTERS = 500


def tell_all(roster: Roster, words: str, **more: Any) -> None:
    """How the run is now, for every silo, and for federations: over = "finished" or "drained"."""
    roster.set_setting(_RUN, _note(words) | more)


def tell_silos(roster: Roster, silos: Iterable[str], words: str) -> None:
    """What became of these silos' part in it, each silo's last."""
    known = roster.setting(_SILOS, {})
    roster.set_setting(_SILOS, known | {silo: _note(words) for silo in silos})


def told(roster: Roster, silo: str) -> dict[str, Any]:
    """Both, each as {"at": seconds since the epoch, "words"}; None where nothing was told."""
    return {"run": roster.setting(_RUN), "silo": roster.setting(_SILOS, {}).get(silo)}


def whom_and_what_for(waiting: dict[str, Any]) -> str:
    """Of the roster's setting "waiting": how many silos the loop waits for, and what for."""
    number = waiting["round"]
    what = "the last scores" if number is None else f"round {number}"
    return f"{waiting['for_silos']} silos for {what}"


def _note(words: str) -> dict[str, Any]:
    return {"at": time.time(), "words": words[:_MOST_CHARACTERS]}
