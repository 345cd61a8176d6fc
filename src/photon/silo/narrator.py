"""What happens to a site, in words for its screen; `photon join` shows them (photon.deploy.join).

A line for each change; between changes a line that goes on in place, where the screen can. What
the aggregator says of the site is its words: bounded, and on one line.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from photon.errors import PhotonError, UnknownMemberError
from photon.membership.roster import Presence

#: Begin a line of the trainer's output that is for the screen: once, or in place of the last such.
SAYS, GOES_ON = "@screen ", "@live "

#: Of the aggregator's words.
_MOST_CHARACTERS = 500

_PHRASES = {
    "loading": "asked; receives the global state",
    "training": "trains",
    "publishing": "done; sends the update",
    "refused": "this site refuses the task",
    "stopping": "this node ends",
}


class Narrator:
    """Turns what the reporter says, and what the desk answers, into lines. Never raises.

    Args:
        show: takes a line that begins with SAYS or GOES_ON.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._lock = threading.Lock()
        self._now: tuple[str, int, str] = ("idle", 0, "")
        self._heard = False
        self._away_since: float | None = None
        self._missed = ""
        self._told_run = ""
        self._told_silo_at: float | None = None

    def say(self, words: str) -> None:
        """Something that happened once."""
        with self._lock:
            self._show(f"{SAYS}{_one_line(words)}")

    def doing(self, presence: Presence) -> None:
        """What this node does now; the same with another step goes on in place."""
        now = (presence.state, presence.round, presence.task)
        changed, self._now = now != self._now, now
        detail = f": {presence.detail}" if presence.detail else ""
        if presence.state == "idle":
            if changed and presence.detail:
                self.say(f"{presence.detail}; waits for the next task")
            return
        phrase = _PHRASES.get(presence.state, presence.state)
        if "/evaluate/" in presence.task:
            if presence.state != "loading":
                return
            phrase, detail = "asked to score the global state on its held-out text", ""
        if presence.of and presence.state == "training":
            phrase += f", {presence.of} steps"
        if changed:
            in_round = presence.task or presence.round
            self.say(f"round {presence.round}: {phrase}{detail}" if in_round else phrase)
        elif presence.step:
            steps = f"step {presence.step} of {presence.of}"
            with self._lock:
                self._show(f"{GOES_ON}round {presence.round}: {steps}{_one_line(detail)}")

    def heard(self, answer: Mapping[str, Any]) -> None:
        """The desk answered a report."""
        if not self._heard:
            self.say("the aggregator knows that this node is here; waits for a task")
        elif self._away_since is not None:
            self.say(f"the aggregator answers again (it was away since {_clock(self._away_since)})")
        elif self._missed:
            self.say("the aggregator lets this node in again")
        self._heard, self._away_since, self._missed = True, None, ""
        told = answer.get("told")
        told = told if isinstance(told, Mapping) else {}
        run, silo = _note(told.get("run")), _note(told.get("silo"))
        if run is not None and run[1] != self._told_run:
            self._told_run = run[1]
            self.say(f"the aggregator: {run[1]}")
        if silo is not None and silo[0] != self._told_silo_at:
            first, self._told_silo_at = self._told_silo_at is None, silo[0]
            # What this node was told before it started is no news.
            if not first or silo[0] > _number(answer.get("server_time")) - 60:
                self.say(f"the aggregator: {silo[1]}")

    def missed(self, error: Exception) -> None:
        """A report was not taken."""
        words = error.message if isinstance(error, PhotonError) else str(error)
        if isinstance(error, UnknownMemberError):
            if words != self._missed:
                self.say(f"the aggregator refuses this node: {words}; waits until it is let in")
        elif self._away_since is None:
            self._away_since = time.time()
            self.say(
                f"no answer from the aggregator since {_clock(self._away_since)} ({words}); waits "
                "for it, for as long as it takes; what is under way goes on"
            )
        self._missed = words


def _note(told: object) -> tuple[float, str] | None:
    """When, and what; None for what is no such note."""
    if not isinstance(told, Mapping) or not isinstance(told.get("words"), str):
        return None
    return _number(told.get("at")), _one_line(told["words"])[:_MOST_CHARACTERS]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _one_line(words: str) -> str:
    return " ".join(words.split())


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
