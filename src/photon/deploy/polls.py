"""Silos that wait at the desk for a question: none is kept waiting once there is one.

A poll is answered when its silo has a letter that it does not hold yet, when its member may take
part no more, or when its time is over. What it was given it is given again, until the answer is
here: a poll that was cut costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from starlette.concurrency import run_in_threadpool

from photon.membership.desk_documents import (
    LEAST_LEFT_S,
    MOST_PATIENCE_S,
    PATIENCE_HEADER,
    POLL_PATIENCE_S,
    TaskBody,
)
from photon.membership.letters import Letter
from photon.membership.records import Member
from photon.membership.roster import Roster

logger = logging.getLogger("photon.desk")

#: Between two looks at whether the roster's file changed, while somebody waits.
_LOOK_S = 0.02
#: All that wait are held for so long that no more end.
_POLLS_PER_S = 5.0
#: Who may take part is asked so often, and at once where another process changed it.
_MEMBERS_S = 1.0
#: After a look that failed.
_TROUBLE_S = 1.0


@dataclass(eq=False)
class _Poll:
    """One that waits.

    Attributes:
        boot: the process that asks.
        have: ids of letters that it holds.
        found: what it is answered: a letter, none, or "look" where that is to be seen.
    """

    member: Member
    boot: str
    have: frozenset[str]
    found: asyncio.Future[Letter | Literal["look"] | None]

    def answer(self, found: Letter | Literal["look"] | None) -> None:
        if not self.found.done():
            self.found.set_result(found)


class Polls:
    """Holds polls. All but `close` and `count` is called in the event loop that serves them.

    Args:
        roster: has the letters; asked in threads.
        most: that wait for one member; of more, the oldest is answered at once, as its connection
            was cut, most likely.
        given: letters are handed out here, not by somebody else.
    """

    def __init__(self, roster: Roster, most: int, *, given: bool = True) -> None:
        self._roster = roster
        self._most = most
        self._given = given
        self._held: dict[str, deque[_Poll]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        self._new = False
        #: Keys of those who may take part, as of a version of the members' file; until when.
        self._active, self._seen, self._again_s = set[str](), -1, 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def next(self, member: Member, body: TaskBody, wait_s: float) -> Letter | None:
        """A letter for a member; waits for one.

        Raises:
            UnknownMemberError: it may not take part, any more.
        """
        loop = self._loop = asyncio.get_running_loop()
        poll = _Poll(member, body.boot, frozenset(body.have), loop.create_future())
        until_s = loop.time() + wait_s
        held = self._held.setdefault(member.name, deque())
        held.append(poll)
        while len(held) > self._most:
            held.popleft().answer(None)
        self._new = True
        if self._watch is None or self._watch.done():
            self._watch = loop.create_task(self._look_again())
        try:
            if self._closed:
                return None
            async with asyncio.timeout_at(until_s):
                found = await poll.found
            if found != "look":
                return found
            await run_in_threadpool(self._roster.active, member.fingerprint)
            return None  # what was wrong is so no more: its node asks again
        except TimeoutError:
            return None
        finally:
            with contextlib.suppress(ValueError):
                held.remove(poll)
            if not held and self._held.get(member.name) is held:
                del self._held[member.name]

    def holding(self, least_s: float, headers: Mapping[str, str]) -> tuple[float, float]:
        """For how long to hold a poll, and for how long its node should wait for the next.

        Args:
            least_s: longer where many wait.
            headers: of its request, lower-case names.
        """
        said = headers.get(PATIENCE_HEADER.lower(), "")[:4]
        patience_s = min(float(said), MOST_PATIENCE_S) if said.isdecimal() else POLL_PATIENCE_S
        wanted_s = max(least_s, self.count() / _POLLS_PER_S)
        asked_s = min(max(POLL_PATIENCE_S, wanted_s + LEAST_LEFT_S), MOST_PATIENCE_S)
        hold_s = max(0.0, min(wanted_s, patience_s - LEAST_LEFT_S))
        # Those that began together, after a task for all, do not end together.
        return max(min(least_s, hold_s), random.uniform(0.5, 1.0) * hold_s), asked_s

    def count(self) -> int:
        """Those that wait now. From any thread."""
        return len(self._all())

    def idle(self) -> list[tuple[str, str]]:
        """Member and process of those that wait and hold no question. From any thread."""
        return [(poll.member.name, poll.boot) for poll in self._all() if not poll.have]

    def close(self) -> None:
        """Answer all that wait; nobody waits any more. From any thread."""
        self._closed = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it ended
                self._loop.call_soon_threadsafe(self._end_all)

    def _end_all(self) -> None:
        for poll in self._all():
            poll.answer(None)

    def _all(self) -> list[_Poll]:
        return [poll for held in tuple(self._held.values()) for poll in tuple(held)]

    async def _look_again(self) -> None:
        """Wake those who have news, for as long as anybody waits.

        All are looked for together, those who have just come too: where a thousand come at once,
        each would wait for the others' questions to the file.
        """
        seen = None
        while self._held:
            try:
                version = await run_in_threadpool(self._roster.version)
                if version != seen or self._new:
                    self._new = False
                    waiting = [(one, one.member.name, one.have) for one in self._all()]
                    for poll, found in await run_in_threadpool(self._news, waiting, version):
                        poll.answer(found)
                seen = version
                await asyncio.sleep(_LOOK_S)
            except Exception as error:  # a roster that can't be read: who polls is told
                logger.error("looking for letters: %s", type(error).__name__, exc_info=error)
                for poll in self._all():
                    poll.answer("look")
                await asyncio.sleep(_TROUBLE_S)

    def _news(
        self, waiting: list[tuple[_Poll, str, frozenset[str]]], version: tuple[int, ...]
    ) -> list[tuple[_Poll, Letter | Literal["look"]]]:
        """What there is for whom, all of it in three questions."""
        letters = self._roster.letters.unanswered() if self._given else {}
        keys = {poll.member.fingerprint for poll, _, _ in waiting}
        members, now_s = version[1], time.monotonic()
        if members != self._seen or now_s > self._again_s or not keys <= self._active:
            self._active, self._seen = self._roster.active_keys(), members
            self._again_s = now_s + _MEMBERS_S
        refused = [one for one, _, _ in waiting if one.member.fingerprint not in self._active]
        wanted = {
            poll: new[0]
            for poll, name, have in waiting
            if (new := [one for one in letters.get(name, ()) if one not in have])
        }
        found = self._roster.letters.fetch(wanted.values()) if wanted else {}
        given = [(poll, found[one]) for poll, one in wanted.items() if one in found]
        return [*((poll, "look") for poll in refused), *given]
