"""The threads of a transfer: what they have moved, when a byte moved last, and how they end."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TypeVar

from photon.errors import LinkError, StoreUnavailableError, TransferStalledError
from photon.store.contract import Pace

_T = TypeVar("_T")

#: How often progress is told and silence is looked at.
_TICK_S = 0.2

#: Pauses before another attempt are drawn from 0 to 1, 2, 4, ... s, never more than this or a third
#: of silence_s: full jitter, so that nodes which lost a store together don't come back together.
_LONGEST_PAUSE_S = 20.0

#: After an error, threads get so long to notice; what still hangs in a socket then is left behind.
_LEAVE_S = 1.0


class Leaving(BaseException):
    """The call is over: its threads stop where they are."""


class BandwidthCap:
    """A token bucket shared by streams: who takes more than there is sleeps until it is there."""

    #: Saved up when nothing moves, for a smooth start.
    _BURST_S = 0.25

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        # When all that was taken has been paid for.
        self._paid_at = time.monotonic()

    def keep(self, count: int, pause: Callable[[float], None]) -> None:
        """Take `count` bytes, which moved just now; `pause` sleeps for seconds."""
        if self._bytes_per_s is None:
            pause(0.0)
            return
        with self._lock:
            now = time.monotonic()
            self._paid_at = max(self._paid_at, now - self._BURST_S) + count / self._bytes_per_s
            ahead_s = self._paid_at - now
        pause(ahead_s)


@dataclass(frozen=True)
class Patience:
    """How fast a transfer may go, and when it gives up; as `Transfer` says."""

    cap: BandwidthCap
    silence_s: float
    attempts: int
    on_progress: Callable[[int], None] | None


class Crew:
    """The threads of one call, what they have moved, and when a byte moved last.

    Daemon threads: one that hangs in a socket does not keep the process from ending.
    """

    def __init__(
        self, patience: Patience, store: str, purpose: str, total_bytes: int | None, threads: int
    ) -> None:
        self._patience = patience
        self._store = store
        self._purpose = purpose
        self._total_bytes = total_bytes
        self._most = threads
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._moved_at = time.monotonic()
        self._doing: dict[int, str] = {}
        self._last_error: LinkError | None = None
        self.retries = 0

    def begin(self, job: Callable[[], _T]) -> Future[_T]:
        """Have a thread do a job."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name="photon-transfer", daemon=True)
            self._threads.append(thread)
            thread.start()
        # The caller may have been away for long, with nothing to move: silence is counted anew.
        self._touch()
        return future

    def take(self, places: threading.BoundedSemaphore) -> None:
        """Wait for a place; others that move bytes hold them."""
        while not places.acquire(timeout=_TICK_S):
            if self._leaving.is_set():
                raise Leaving

    def some(self, pending: set[Future[_T]]) -> list[_T]:
        """Wait for any of some jobs, and take those that are done out of them.

        Returns what they returned; raises what one raised.

        Raises:
            TransferStalledError: no byte moved for too long.
        """
        while not (done := wait(pending, _TICK_S, FIRST_COMPLETED).done):
            self._watch()
        pending -= done
        results = [future.result() for future in done]
        self.tell()
        return results

    def persist(self, doing: str, count: int, attempt: Callable[[Pace], _T]) -> _T:
        """Attempt one object until it moved, with pauses while its store is unavailable.

        Args:
            doing: for messages.
            count: bytes of it, done when an attempt succeeds.
            attempt: given the pace to keep.
        """
        attempts = self._patience.attempts
        for number in range(1, attempts + 1):
            moved = 0

            def pace(some: int) -> None:
                nonlocal moved
                moved += some
                self.add_done(some)
                self._patience.cap.keep(some, self._pause)

            self._say(doing)
            try:
                result = attempt(pace)
            except StoreUnavailableError as error:
                self.add_done(-moved)
                self._last_error = error
                if number == attempts:
                    raise StoreUnavailableError(
                        f"{error.message} (attempt {number} of {attempts}; {self._so_far()})",
                        hint=error.hint or "Nothing that arrived is lost: try again later.",
                    ) from error
                self.count_retry()
                most_s = min(2.0 ** (number - 1), _LONGEST_PAUSE_S, self._patience.silence_s / 3)
                pause_s = random.uniform(0, most_s)
                self._say(f"{doing}, to be tried again")
                if self._leaving.wait(pause_s):
                    raise Leaving from None
            except BaseException:
                self.add_done(-moved)
                raise
            else:
                # Stores may tell less than all (what was there already, say).
                self.add_done(count - moved)
                self._say(None)
                return result
        raise AssertionError("the last attempt returns or raises")

    def add_done(self, count: int) -> None:
        """Bytes that moved, or (negative) that count for nothing as their attempt failed."""
        with self._lock:
            self._done_bytes += count
            if count > 0:
                self._moved_at = time.monotonic()

    def count_retry(self) -> None:
        with self._lock:
            self.retries += 1

    def tell(self) -> None:
        if self._patience.on_progress is not None:
            self._patience.on_progress(self._done_bytes)

    def leave(self) -> None:
        """End the threads: at once when they are idle, at the next byte when they are not."""
        self._leaving.set()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _LEAVE_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None or self._leaving.is_set():
                return
            job()
            # It holds an object; the next job may be long in coming.
            del job

    def _pause(self, seconds: float) -> None:
        """Sleep to keep the cap: our own wait, not the store's."""
        while seconds > 0:
            if self._leaving.wait(min(seconds, _TICK_S)):
                raise Leaving
            self._touch()
            seconds -= _TICK_S
        if self._leaving.is_set():
            raise Leaving

    def _touch(self) -> None:
        with self._lock:
            self._moved_at = time.monotonic()

    def _say(self, doing: str | None) -> None:
        with self._lock:
            if doing is None:
                self._doing.pop(threading.get_ident(), None)
            else:
                self._doing[threading.get_ident()] = doing

    def _watch(self) -> None:
        """Tell the caller, and look whether anything moves."""
        self.tell()
        silent_s = time.monotonic() - self._moved_at
        if silent_s < self._patience.silence_s:
            return
        with self._lock:
            doing = list(self._doing.values())
        waited_for = doing[0] if doing else self._purpose
        others = f" and {len(doing) - 1} others" if len(doing) > 1 else ""
        because = f"; last: {self._last_error.message}" if self._last_error else ""
        raise TransferStalledError(
            f"no byte moved for {silent_s:.0f} s between here and {self._store}, {waited_for}"
            f"{others}; {self._so_far()}{because}",
            hint="Check the store and the network between. What arrived is kept: the same "
            "transfer goes on from there.",
        ) from self._last_error

    def _so_far(self) -> str:
        of = f" of {self._total_bytes}" if self._total_bytes is not None else ""
        return f"{self._done_bytes}{of} bytes done"
