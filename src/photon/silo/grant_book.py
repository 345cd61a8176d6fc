"""Leave for the objects of one task, asked of the aggregator's desk in few requests."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from photon.errors import (
    AccessRefusedError,
    LinkError,
    PhotonError,
    StoreUnavailableError,
    UnreachableError,
)
from photon.membership.desk_documents import MOST_WANTS
from photon.store.presign import Grant, Verb

#: A grant that was fetched ahead is used for a new transfer only if it is valid for so much longer.
_LEFT_S = 60.0

#: "verb" and "key" of an object; where it is to be written, also its "bytes" and "sha256".
Want = dict[str, Any]


@dataclass(frozen=True)
class Leave:
    """Leave for one object.

    Attributes:
        good_until: seconds of time.monotonic.
    """

    grant: Grant
    good_until: float


class Desk(Protocol):
    """The aggregator's desk, as far as grants go; photon.silo.desk_client.DeskClient is one."""

    def ask_grants(self, task_id: str, wants: list[Want]) -> list[Leave | PhotonError]: ...


class GrantBook:
    """Asks the desk for leave: photon.store.granted_store.Grants, for one task.

    Called by several threads at once, it asks for all of them in one request: while one request is
    on its way, what is wanted meanwhile collects for the next. `expect` names what will be read, so
    that leave for it comes along ahead of time.
    """

    #: Asked for ahead of what is wanted now.
    ahead = 64

    def __init__(self, desk: Desk, task_id: str) -> None:
        self._desk = desk
        self._task_id = task_id
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._waiting: deque[tuple[Want, Future[Grant]]] = deque()
        #: Keys to be read, in order, for which nothing was asked yet.
        self._expected: OrderedDict[str, None] = OrderedDict()
        self._cached: dict[str, Leave] = {}
        #: Requests made.
        self.requests = 0

    def expect(self, keys: Iterable[str]) -> None:
        """Objects that will be read soon, in this order: a manifest's chunks."""
        with self._lock:
            for key in keys:
                if key not in self._cached:
                    self._expected[key] = None

    def __call__(self, verb: Verb, key: str, bytes: int | None, sha256: str | None) -> Grant:
        """Leave for one request.

        Raises:
            StoreUnavailableError: the desk can't be reached or is busy: try again.
            AccessRefusedError: it refuses.
        """
        future: Future[Grant] = Future()
        want: Want = {"verb": verb, "key": key}
        if verb == "PUT":
            want |= {"bytes": bytes, "sha256": sha256}
        with self._lock:
            cached = self._from_cache(want)
            if cached is not None:
                return cached
            self._waiting.append((want, future))
        while not future.done():
            with self._asking:
                # Who had the turn before may have asked for this too.
                if not future.done():
                    self._ask()
        return future.result()

    def _ask(self) -> None:
        """Ask for what is waiting, oldest first, and some of what is expected."""
        with self._lock:
            batch: list[tuple[Want, Future[Grant]]] = []
            while self._waiting and len(batch) < MOST_WANTS:
                want, future = self._waiting.popleft()
                # It may have come along with the request before this one.
                cached = self._from_cache(want)
                if cached is not None:
                    future.set_result(cached)
                else:
                    batch.append((want, future))
            extra = self._take_expected([want for want, _ in batch])
        if not batch:
            return
        wants = [want for want, _ in batch] + [{"verb": "GET", "key": key} for key in extra]
        try:
            answers = self._desk.ask_grants(self._task_id, wants)
        except BaseException as error:
            for _, future in batch:
                future.set_exception(_as_link_error(error))
            if not isinstance(error, PhotonError):
                raise
            return
        finally:
            self.requests += 1
        for (_, future), answer in zip(batch, answers, strict=False):
            if isinstance(answer, Leave):
                future.set_result(answer.grant)
            else:
                future.set_exception(_as_link_error(answer))
        with self._lock:
            # A refusal is not kept: who wants the object is told when it asks.
            self._cached |= {
                key: answer
                for key, answer in zip(extra, answers[len(batch) :], strict=True)
                if isinstance(answer, Leave)
            }

    def _from_cache(self, want: Want) -> Grant | None:
        """Leave that came ahead. Once: who asks again was refused by the store with it."""
        found = self._cached.pop(want["key"], None) if want["verb"] == "GET" else None
        if found is None or found.good_until - _LEFT_S < time.monotonic():
            return None
        return found.grant

    def _take_expected(self, wanted: list[Want]) -> list[str]:
        """Expected keys to ask for along with these, if one of these is such a key."""
        hits = {want["key"] for want in wanted if want["verb"] == "GET"} & self._expected.keys()
        for key in hits:
            del self._expected[key]
        if not hits:
            return []
        room = min(self.ahead, MOST_WANTS - len(wanted), len(self._expected))
        return [self._expected.popitem(last=False)[0] for _ in range(max(0, room))]


def _as_link_error(error: BaseException) -> BaseException:
    """As a store's user knows errors. One for each who waits: tracebacks are not shared."""
    if isinstance(error, UnreachableError | StoreUnavailableError):
        made: LinkError = StoreUnavailableError(error.message, hint=error.hint)
    elif isinstance(error, PhotonError):
        made = AccessRefusedError(error.message, hint=error.hint)
    else:
        return StoreUnavailableError(f"asking for leave was interrupted ({type(error).__name__})")
    made.__cause__ = error
    return made
