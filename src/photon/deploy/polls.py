"""Silos that wait at the desk for a question: none is kept waiting once there is one.

A poll is answered when its silo has a letter that it does not hold yet, when its member may take
part no more, or when its time is over. What it was given it is given again, until the answer is
here: a poll that was cut costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from photon.membership.letters import Letter
from photon.membership.records import Member
from photon.membership.roster import Roster

logger = logging.getLogger("photon.desk")

#: Between two looks at whether the roster's file changed, while somebody waits.
_LOOK_S = 0.02
#: After a look that failed.
_TROUBLE_S = 1.0


@dataclass(eq=False)
class _Poll:
    """One that waits.

    Attributes:
        have: ids of letters that it holds.
        news: there may be something for it.
        over: it is answered now, with a letter or without.
    """

    member: Member
    have: frozenset[str]
    news: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    def end(self) -> None:
        self.over = True
        self.news.set()


class Polls:
    """Holds polls. All but `close` and `count` is called in the event loop that serves them.

    Args:
        roster: has the letters; asked in threads.
        most: that wait for one member; of more, the oldest is answered at once, as its connection
            was cut, most likely.
    """

    def __init__(self, roster: Roster, most: int) -> None:
        self._roster = roster
        self._most = most
        self._held: dict[str, deque[_Poll]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def next(self, member: Member, have: Collection[str], wait_s: float) -> Letter | None:
        """A letter for a member; waits for one.

        Raises:
            UnknownMemberError: it may not take part, any more.
        """
        loop = self._loop = asyncio.get_running_loop()
        poll, until_s = _Poll(member, frozenset(have)), loop.time() + wait_s
        held = self._held.setdefault(member.name, deque())
        held.append(poll)
        while len(held) > self._most:
            held.popleft().end()
        if self._watch is None or self._watch.done():
            self._watch = loop.create_task(self._look_again())
        try:
            while True:
                poll.news.clear()
                found = await run_in_threadpool(self._look, poll)
                if found is not None or poll.over or self._closed or loop.time() >= until_s:
                    return found
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until_s):
                        await poll.news.wait()
        finally:
            with contextlib.suppress(ValueError):
                held.remove(poll)
            if not held and self._held.get(member.name) is held:
                del self._held[member.name]

    def count(self) -> int:
        """Those that wait now. From any thread."""
        return len(self._all())

    def close(self) -> None:
        """Answer all that wait; nobody waits any more. From any thread."""
        self._closed = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it ended
                self._loop.call_soon_threadsafe(self._end_all)

    def _end_all(self) -> None:
        for poll in self._all():
            poll.end()

    def _all(self) -> list[_Poll]:
        return [poll for held in tuple(self._held.values()) for poll in tuple(held)]

    def _look(self, poll: _Poll) -> Letter | None:
        self._roster.active(poll.member.fingerprint)
        return self._roster.letters.next(poll.member.name, poll.have)

    async def _look_again(self) -> None:
        """Wake those who have news, for as long as anybody waits."""
        seen = None
        while self._held:
            try:
                version = await run_in_threadpool(self._roster.version)
                if version != seen:
                    letters, active = await run_in_threadpool(self._standing)
                    for poll in self._all():
                        mine = letters.get(poll.member.name, set())
                        if mine - poll.have or poll.member.fingerprint not in active:
                            poll.news.set()
                seen = version
                await asyncio.sleep(_LOOK_S)
            except Exception as error:  # a roster that can't be read: who polls is told
                logger.error("looking for letters: %s", type(error).__name__, exc_info=error)
                for poll in self._all():
                    poll.news.set()
                await asyncio.sleep(_TROUBLE_S)

    def _standing(self) -> tuple[dict[str, set[str]], set[str]]:
        """Letters that wait, by silo; keys of members that may take part."""
        members = self._roster.members()
        active = {one.fingerprint for one in members if one.status == "active"}
        return self._roster.letters.unanswered(), active
