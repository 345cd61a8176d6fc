"""One Ask on its way to a silo: how often it was sent, what came back, why there is no answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from photon.errors import PhotonError
from photon.federation.envelopes import Ask, Reply
from photon.link import Ref

#: Before a task is asked again: doubled each time, up to the last.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 30.0
#: How often an update that can't be had, or a silo's trouble of its own, is asked for again.
ATTEMPTS = 3


@dataclass
class Errand:
    """An Ask that is to be answered.

    Attributes:
        most_bytes: that the silo may write to the store for it; 0: nothing.
        ids: of its messages that may still be answered.
        asked_s, next_s: when it was sent last, and before when it is not sent again (epoch, s).
        pause_s: before it is sent once more.
        troubles: that count against the silo; ATTEMPTS are the end.
        last_trouble: in words, for the message that says why there is no answer.
        reply: verified.
        failure: why there will be none.
    """

    ask: Ask
    most_bytes: int = 0
    ids: set[str] = field(default_factory=set)
    asked_s: float = 0.0
    next_s: float = 0.0
    pause_s: float = _FIRST_PAUSE_S
    troubles: int = 0
    last_trouble: str = ""
    reply: Reply | None = None
    failure: PhotonError | None = None

    @property
    def over(self) -> bool:
        return self.reply is not None or self.failure is not None

    @property
    def update(self) -> Ref | None:
        """Where the update lies that the reply names."""
        if self.reply is None or self.reply.fit is None or self.reply.fit.update is None:
            return None
        return self.reply.fit.update.ref()

    @property
    def because(self) -> str:
        """The last that was heard, to end a message with."""
        return f"; the last that was heard: {self.last_trouble}" if self.last_trouble else ""

    def again(self, now_s: float, why: str) -> None:
        """Ask once more, after a pause that grows."""
        self.last_trouble = why
        self.next_s = now_s + self.pause_s
        self.pause_s = min(2 * self.pause_s, _LAST_PAUSE_S)

    def fail(self, error: PhotonError) -> None:
        self.failure = error
