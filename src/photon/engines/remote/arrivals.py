"""A round's updates on their way here: fetched as answers come, merged in the order of tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

from photon.engines.remote.depot import Depot
from photon.engines.remote.errand import ATTEMPTS, Errand
from photon.engines.remote.messenger import Messenger
from photon.errors import (
    ChunkCorruptError,
    LinkError,
    ManifestError,
    StoreUnavailableError,
    TransferStalledError,
)
from photon.federation import FitTask, Receipt, Update
from photon.federation.tasks import GlobalState
from photon.link import Parcel

#: Updates on their way here at once.
_FETCHES = 3


class Arrivals:
    """A round's answers, in the order of its tasks, each with its update already here.

    Updates of later tasks wait on this disk, as far as it has room: whoever is slow keeps nobody
    else's from coming.

    Args:
        messenger: runs the errands meanwhile.
        depot: brings the updates.
        tasks, errands: of the round, in the same order.
        state: that the tasks start from.
    """

    def __init__(
        self,
        messenger: Messenger,
        depot: Depot,
        tasks: Sequence[FitTask],
        errands: Sequence[Errand],
        state: GlobalState,
    ) -> None:
        self._messenger = messenger
        self._depot = depot
        self._tasks = tasks
        self._errands = errands
        self._state = state
        self._room_bytes = depot.room_bytes()
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="photon-arrivals")
        self._fetching: dict[int, Future[Parcel]] = {}

    def updates(self) -> Iterator[Update]:
        for position, errand in enumerate(self._errands):
            parcel = None
            while not errand.failure:
                self._fetch(position)
                self._ask_again(position)
                fetching = self._fetching.get(position)
                if fetching is not None and fetching.done():
                    parcel = self._arrived(position, fetching)
                    if parcel is not None:
                        # It may have waited long for its turn: who was expelled meanwhile is out.
                        errand.failure = self._messenger.barred(errand.ask.silo)
                        break
                elif errand.reply is not None and errand.update is None:
                    break
                elif not self._messenger.turn(self._errands):
                    pause_s = self._messenger.pause_s(self._errands)
                    if fetching is None:
                        time.sleep(pause_s)
                    else:
                        wait([fetching], pause_s)
            yield self._update(position, parcel)
            if errand.update is not None:
                self._depot.let_go(errand.update)
            self._fetching.pop(position, None)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, position: int) -> None:
        """Begin to bring here what was answered; the next to be merged, whatever room there is."""
        here = [ref.payload_bytes for one in self._fetching if (ref := self._errands[one].update)]
        room = self._room_bytes - sum(here)
        for number in range(position, len(self._errands)):
            ref = self._errands[number].update
            if ref is None or number in self._fetching:
                continue
            if number > position and ref.payload_bytes > room:
                continue
            room -= ref.payload_bytes
            fetch = partial(self._depot.fetch, self._tasks[number], ref, self._state)
            self._fetching[number] = self._pool.submit(fetch)

    def _ask_again(self, position: int) -> None:
        """Ask for updates of later tasks that could not be had, without waiting for their turn."""
        for number, fetching in list(self._fetching.items()):
            if number > position and fetching.done() and fetching.exception() is not None:
                self._arrived(number, fetching)

    def _arrived(self, position: int, fetching: Future[Parcel]) -> Parcel | None:
        """An update that is here; None where it could not be had and is asked for again."""
        errand = self._errands[position]
        try:
            return fetching.result()
        except LinkError as error:
            del self._fetching[position]
            # A store that is away is no fault of the silo's: it is waited for.
            errand.troubles += not isinstance(error, StoreUnavailableError | TransferStalledError)
            if errand.troubles >= ATTEMPTS or isinstance(error, ManifestError):
                errand.failure = error
                return None
            if isinstance(error, ChunkCorruptError):
                self._depot.discard(errand.ask.silo)
            errand.reply = None
            self._messenger.open(errand)  # closed when it was answered
            errand.again(time.time(), error.message)
            return None

    def _update(self, position: int, parcel: Parcel | None) -> Update:
        errand, task = self._errands[position], self._tasks[position]
        if errand.failure is not None:
            return Update(Receipt.failed(task, errand.failure), lambda: iter(()))
        assert errand.reply is not None
        assert errand.reply.fit is not None
        receipt = errand.reply.fit.receipt(task.round, task.silo)
        ref = errand.update
        if ref is None or parcel is None:
            return Update(receipt, lambda: iter(()))
        tensors = partial(self._depot.tensors, parcel, task, ref, self._state)
        return Update(receipt, tensors, wire_bytes=ref.payload_bytes)
