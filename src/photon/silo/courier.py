"""Brings the aggregator's questions to this site's trainer, and its signed answers back.

A question is given out until its answer is there: whatever dies or breaks off, here or on the way,
it comes again, and the trainer answers what it has finished from its disk. Nothing of a question is
read here; whether the aggregator asks it the trainer knows. No torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from photon.errors import PhotonError, UnreachableError
from photon.membership.records import SignedReply
from photon.silo.desk_client import Delivery, DeskClient
from photon.silo.gateway import Gateway
from photon.silo.socket import ask_trainer

#: Questions that are held at a time; the trainer, who works on one after another, hears as many.
_MOST = 32

#: Between two polls of a desk that is away or refuses; doubled each time.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
#: A desk that answers sooner that there is nothing is not asked again before.
_LEAST_POLL_S = 0.5
#: What could not be answered is not taken again before.
_AGAIN_S = 5.0


class Courier:
    """Polls, in a thread, and carries each question in one of its own, for as long as this process.

    Args:
        desk: the aggregator's, or the way to it.
        trainer: the trainer's Unix socket.
        boot: of this node: photon.membership.roster.Presence.
        log: told what goes wrong, and that it is mended; from several threads.
    """

    def __init__(
        self, desk: DeskClient | Gateway, trainer: Path, boot: str, log: Callable[[str], None]
    ) -> None:
        self._desk = desk
        self._trainer = trainer
        self._boot = boot
        self._log = log
        self._held: set[str] = set()
        self._room = threading.Semaphore(_MOST)
        self._trouble = ""

    def start(self) -> None:
        threading.Thread(target=self._poll, name="photon-courier", daemon=True).start()

    def _poll(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            self._room.acquire()
            began_s, found = time.monotonic(), None
            try:
                found = self._desk.task(self._boot, set(self._held))
                pause_s = _FIRST_PAUSE_S
                self._note("")
                if found is None:
                    time.sleep(max(0.0, began_s + _LEAST_POLL_S - time.monotonic()))
            except Exception as error:  # whatever it is, the next poll may find it mended
                self._note(str(error) or type(error).__name__)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if found is None:
                self._room.release()
                continue
            self._held.add(found.id)
            threading.Thread(
                target=self._carry, args=(found,), name="photon-question", daemon=True
            ).start()

    def _carry(self, one: Delivery) -> None:
        until_s = time.monotonic() + one.left_s
        try:
            if not self._send(one, self._answer(one), until_s):
                time.sleep(_AGAIN_S)
        except Exception as error:  # it comes again
            self._log(f"a question was not answered: {type(error).__name__}: {error}")
            time.sleep(_AGAIN_S)
        finally:
            self._held.discard(one.id)
            self._room.release()

    def _answer(self, one: Delivery) -> SignedReply | str:
        """What the trainer says, or why it says nothing."""
        try:
            return ask_trainer(self._trainer, one.message, within_s=one.left_s)
        except PhotonError as error:
            self._log(str(error))
            return error.message

    def _send(self, one: Delivery, answer: SignedReply | str, until_s: float) -> bool:
        """Give an answer to the desk, which may be away; whether it took it."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                self._desk.reply(self._boot, one.id, answer)
                return True
            except UnreachableError as error:
                if time.monotonic() + pause_s > until_s:
                    self._log(f"an answer was not delivered: {error}")
                    return False
            except PhotonError as error:
                self._log(f"an answer was refused: {error}")
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _note(self, trouble: str) -> None:
        """Log what is wrong, and that it is mended, once."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._log(trouble or "the aggregator answers again")
