"""One Ask on its way to a silo: how often it was sent, what came back, why there is no answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from photon.config import RunConfig
from photon.config.children import LEAF
from photon.engines.remote.depot import silo_folder
from photon.errors import PhotonError, ProtocolError
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
        message: the Ask as it travels, signed.
        most_bytes: that the silo may write to the store for it; 0: nothing.
        begun_s: when it was made up (this machine's epoch, s).
        letter: what the answer to its last message is called; None: none is to come.
        asked_s, next_s: when it was sent last, and before when it is not sent again (epoch, s).
        pause_s: before it is sent once more.
        doing, moved_s: what its silo said last that it does, and since when (epoch, s).
        troubles: that count against the silo; ATTEMPTS are the end.
        last_trouble: in words, for the message that says why there is no answer.
        reply: verified.
        failure: why there will be none.
    """

    ask: Ask
    message: bytes = b""
    most_bytes: int = 0
    begun_s: float = field(default_factory=time.time)
    letter: str | None = None
    asked_s: float = 0.0
    next_s: float = 0.0
    pause_s: float = _FIRST_PAUSE_S
    doing: tuple[str, int] = ("", 0)
    moved_s: float = 0.0
    troubles: int = 0
    last_trouble: str = ""
    reply: Reply | None = None
    failure: PhotonError | None = None

    @property
    def over(self) -> bool:
        return self.reply is not None or self.failure is not None

    @property
    def until(self) -> float:
        """When nobody waits for the answer any more (epoch, s)."""
        return self.begun_s + self.ask.within_s

    def require_possible(self, reply: Reply, config: RunConfig) -> None:
        """Refuse an answer whose figures contradict what was asked.

        They weigh the update, and are summed, shown and kept: what can't be true counts for
        nothing.

        Args:
            reply: to this errand's Ask.

        Raises:
            ProtocolError: names the figure, and the most that it can be.
        """
        ask, bounds = self.ask, []
        leaves = config.federation.children.get(ask.silo, LEAF).leaves
        down = sum(ref.wire_bytes for ref in ask.state.parcels)
        if reply.fit is not None and ask.fit is not None:
            batch = config.local.batch_size
            read = ask.fit.steps * batch * config.data.sequence_length
            bounds = [
                ("tokens", reply.fit.tokens, read * leaves),
                ("micro_batch_size", reply.fit.micro_batch_size, batch),
                ("bytes_down", reply.fit.bytes_down, down),
            ]
            if (update := reply.fit.update) is not None:
                bounds.append(("bytes of its update", update.wire_bytes, self.most_bytes))
                own = f"{silo_folder(ask.run.id, ask.silo)}/"
                if not update.key.startswith(own):
                    raise ProtocolError(
                        f"{ask.silo} names an update {update.key!r}; its own are under {own}"
                    )
        if reply.evaluate is not None:
            bounds = [("bytes_down", reply.evaluate.bytes_down, down)]
            if config.eval.max_tokens is not None:
                bounds.append(("tokens", reply.evaluate.tokens, config.eval.max_tokens * leaves))
        for name, said, most in bounds:
            if said > most:
                raise ProtocolError(
                    f"{ask.silo} answered {name} = {said}; what it was asked has at most {most}",
                    hint="A node of another version, or one that means harm: nothing of its answer "
                    f"is used. A federation needs [federation.children.{ask.silo}] here.",
                )

    @property
    def update(self) -> Ref | None:
        """Where the update lies that the reply names."""
        fit = self.reply.fit if self.reply is not None else None
        return fit.update if fit is not None else None

    @property
    def because(self) -> str:
        """The last that was heard, to end a message with."""
        return f"; the last that was heard: {self.last_trouble}" if self.last_trouble else ""

    def again(self, now_s: float, why: str) -> None:
        """Ask once more, after a pause that grows."""
        self.last_trouble = why
        self.next_s = now_s + self.pause_s
        self.pause_s = min(2 * self.pause_s, _LAST_PAUSE_S)
