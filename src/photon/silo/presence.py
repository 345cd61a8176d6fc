"""Telling the aggregator what this node does, from a thread that training never waits for."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from dataclasses import replace
from typing import Any

from photon.errors import KeyInUseError, PhotonError
from photon.membership.roster import Presence
from photon.silo.desk_client import DeskClient
from photon.silo.gateway import Gateway
from photon.silo.narrator import Narrator

log = logging.getLogger(__name__)

#: Environment variable: the node that a process belongs to, as `photon join` drew it.
BOOT = "PHOTON_BOOT"

#: Between two reports that say the same.
_EVERY_S = 5.0

#: A desk with many members asks idle nodes to speak less often, at least so often.
_MOST_IDLE_S = 300.0

#: Between any two reports: a change is told at once, a hundred changes are told as one.
_LEAST_GAP_S = 0.5

#: Why a site refuses may be long; operators see its first words.
_MOST_DETAIL_CHARACTERS = 300


class Reporter:
    """Says what this node does, again and again, and remembers what the desk answered.

    A desk that is down, slow or angry costs nothing but lines in the log.

    Args:
        desk: None keeps everything to itself.
        narrator: tells this site's screen the same.
    """

    def __init__(
        self, desk: DeskClient | Gateway | None, *, narrator: Narrator | None = None
    ) -> None:
        self._desk = desk
        self._narrator = narrator or Narrator(lambda _: None)
        #: What is told.
        self.now = Presence("idle", boot=os.environ.get(BOOT) or secrets.token_hex(8))
        self._changed = threading.Event()
        self._reporting = threading.Lock()
        self._ended = False
        self._trouble: str | None = None
        #: The desk wants this node to take no new task.
        self.draining = False
        #: As photon.membership.bulletin.tell_all has it.
        self.over = ""
        #: When the desk took a report last (seconds since the epoch); what was moved, in bytes.
        self.heard_at: float | None = None
        self.bytes_up = self.bytes_down = 0
        #: What the desk said to the last report, where another node uses this one's key.
        self.key_in_use: KeyInUseError | None = None
        #: Between two reports that this node is idle, as the desk would have it.
        self._idle_s = _EVERY_S
        if desk is not None:
            threading.Thread(target=self._report, name="photon-presence", daemon=True).start()

    def say(self, state: str, **what: Any) -> None:
        """From now on this node does this; `what` are fields of Presence."""
        if self._ended:
            return  # work that goes on until the process is gone
        detail = str(what.pop("detail", ""))[:_MOST_DETAIL_CHARACTERS]
        self.now = Presence(state, boot=self.now.boot, detail=detail, **what)
        self._narrator.doing(self.now)
        self._changed.set()

    def note(self, words: str) -> None:
        """For this site's screen only."""
        self._narrator.say(words)

    def add(self, **what: Any) -> None:
        """The same as before, but for these fields; told with the next report."""
        self.now = replace(self.now, **what)
        self._narrator.doing(self.now)

    def figures(self) -> dict[str, Any]:
        """What this node does, and has moved: photon.silo.socket.ask_figures."""
        kept = ("heard_at", "bytes_up", "bytes_down")
        return {"presence": vars(self.now), **{name: getattr(self, name) for name in kept}}

    def stop(self, timeout_s: float) -> None:
        """Say that this node ends, if that is possible in this time."""
        self.say("stopping")
        self._ended = True
        if self._desk is not None:
            last = threading.Thread(target=self._tell, daemon=True)
            last.start()
            last.join(timeout_s)

    def _report(self) -> None:
        while True:
            self._tell()
            time.sleep(_LEAST_GAP_S)
            self._changed.wait(self._idle_s if self.now.state == "idle" else _EVERY_S)

    def _tell(self) -> None:
        with self._reporting:
            self._changed.clear()
            assert self._desk is not None
            try:
                answer = self._desk.presence(self.now)
                self.draining = bool(answer.get("draining"))
                run = (answer.get("told") or {}).get("run") or {}
                self.over = str(run.get("over", ""))
                self.key_in_use, trouble, self.heard_at = None, None, time.time()
                self._idle_s = min(max(_EVERY_S, float(answer.get("next_s", 0))), _MOST_IDLE_S)
                self._narrator.heard(answer)
            except Exception as error:  # whatever it is, it must not end the reports
                trouble, self._idle_s = str(error), _EVERY_S
                if isinstance(error, KeyInUseError):
                    self.key_in_use = error
                elif not isinstance(error, PhotonError):
                    trouble = f"{type(error).__name__}: {error}"
                self._narrator.missed(error)
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble is None:
                log.info("the aggregator hears of this node again")
            else:
                log.warning("the aggregator does not hear of this node: %s", trouble)
