"""Many objects to or from a store: several streams, one bandwidth cap, and a deadline on silence.

A transfer may take days and is never cut off for that; it ends when no byte moved for `silence_s`.
"""

from __future__ import annotations

import hashlib
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from photon.errors import (
    ChunkCorruptError,
    LinkError,
    ObjectMissingError,
    StoreUnavailableError,
    TransferStalledError,
)
from photon.link.store import Buffer, FolderStore, Pace, Store

_T = TypeVar("_T")

#: How often progress is told and silence is looked at.
_TICK_S = 0.2

#: Pauses before another attempt are drawn from 0 to 1, 2, 4, ... s, never more than this or a third
#: of silence_s: full jitter, so that nodes which lost a store together don't come back together.
_LONGEST_PAUSE_S = 20.0

#: After an error, threads get so long to notice; what still hangs in a socket then is left behind.
_LEAVE_S = 1.0


@dataclass(frozen=True)
class Wanted:
    """An object to fetch, and what its bytes must be."""

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Sent:
    """What a send did.

    Attributes:
        bytes: of the objects that were written.
        objects: how many of them.
        skipped_bytes: of those that the store had already.
        seconds: from the first to the last.
        retries: attempts beyond the first of each object.
    """

    bytes: int
    objects: int
    skipped_bytes: int
    seconds: float
    retries: int


class Transfer:
    """Moves objects between this process and one store. One call at a time.

    Args:
        store: to and from where.
        streams: objects on their way at once.
        bytes_per_s: cap over all streams and both directions; None for none.
        silence_s: raise TransferStalledError when no byte of any object moved for so long, pauses
            between attempts included. A put by a store that takes objects as a whole (ObjectStore)
            moves no byte until it is done.
        attempts: for each object, while its store is unavailable.
        on_progress: told the bytes done so far in this call, in the caller's thread.
    """

    def __init__(
        self,
        store: Store,
        *,
        streams: int = 8,
        bytes_per_s: float | None = None,
        silence_s: float = 60.0,
        attempts: int = 8,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        if (
            streams < 1
            or attempts < 1
            or silence_s <= 0
            or (bytes_per_s is not None and bytes_per_s <= 0)
        ):
            raise LinkError(
                f"a transfer needs streams >= 1 (found {streams}), attempts >= 1 ({attempts}), "
                f"silence_s > 0 ({silence_s}) and bytes_per_s > 0 ({bytes_per_s})"
            )
        self._store = store
        self._streams = streams
        self._cap = _BandwidthCap(bytes_per_s)
        self._silence_s = silence_s
        self._attempts = attempts
        self._on_progress = on_progress
        #: Attempts beyond the first of each object, since this was made.
        self.retries = 0

    def send(self, objects: Iterable[tuple[str, Buffer]]) -> Sent:
        """Write objects that the store does not have; when this returns, it has them all.

        `objects` is read as streams become free, in this thread: at most `streams` objects are
        on their way and one waits. Their memory must not change before this returns; after an
        error, not at all, as a thread may still be reading it.

        Raises:
            StoreUnavailableError: one object failed in all its attempts.
            TransferStalledError: no byte moved for silence_s.
            ChunkCorruptError: the store has an object of another size under one of these keys.
            AccessRefusedError: the store refuses.
        """
        start = time.monotonic()
        sent = _Tally()
        with self._crew("to write") as crew:
            todo = iter(objects)
            pending: set[Future[None]] = set()
            while True:
                while len(pending) > self._streams:
                    pending = crew.some(pending)
                try:
                    key, data = next(todo)
                except StopIteration:
                    break
                pending.add(crew.begin(lambda k=key, d=data: self._send_one(crew, k, d, sent)))
            while pending:
                pending = crew.some(pending)
            retries = crew.retries
        return Sent(
            bytes=sent.bytes,
            objects=sent.objects,
            skipped_bytes=sent.skipped_bytes,
            seconds=time.monotonic() - start,
            retries=retries,
        )

    def fetch(self, wanted: Iterable[Wanted], *, spool: Path | None = None) -> Iterator[bytes]:
        """Read objects, in order, each verified; up to `streams` ahead of the caller.

        Args:
            wanted: what, and what it must be.
            spool: keeps verified objects by their sha256, so that a transfer that broke off does
                not fetch them again; whoever has all of them removes the folder.

        Raises:
            ObjectMissingError: there is none of that key.
            ChunkCorruptError: an object is not what was promised, twice in a row.
            StoreUnavailableError: one object failed in all its attempts.
            TransferStalledError: no byte moved for silence_s.
            AccessRefusedError: the store refuses.
        """
        todo = deque(wanted)
        total_bytes = sum(one.bytes for one in todo)
        kept = FolderStore(spool, durable=False) if spool is not None else None
        with self._crew("to read", total_bytes) as crew:
            window: deque[Future[bytes]] = deque()
            while todo or window:
                while todo and len(window) < self._streams:
                    one = todo.popleft()
                    window.append(crew.begin(lambda o=one: self._fetch_one(crew, o, kept)))
                # No name for it here: it is the caller's, and may be let go there.
                yield crew.one(window.popleft())

    def _send_one(self, crew: _Crew, key: str, data: Buffer, sent: _Tally) -> None:
        count = memoryview(data).nbytes

        def attempt(pace: Pace) -> bool:
            # Asked before each attempt: the one before may have got through, its answer lost.
            found = self._store.size(key)
            if found == count:
                return False
            if found is not None:
                raise ChunkCorruptError(
                    f"{self._store} has an object {key} of {found} bytes, this one has {count}",
                    hint="Keys are never written twice. Another writer used this one.",
                )
            self._store.put(key, data, pace=pace)
            return True

        written = crew.persist(f"writing {key}", count, attempt)
        sent.add(count, written=written)

    def _fetch_one(self, crew: _Crew, one: Wanted, kept: FolderStore | None) -> bytes:
        if kept is not None:
            found = _from_spool(kept, one)
            if found is not None:
                crew.add_done(one.bytes)
                return found

        def attempt(pace: Pace) -> bytes:
            data = self._store.get(one.key, max_bytes=one.bytes, pace=pace)
            problem = _mismatch(data, one)
            if problem:
                raise ChunkCorruptError(f"{one.key} from {self._store} {problem}")
            return data

        reading = f"reading {one.key}"
        try:
            data = crew.persist(reading, one.bytes, attempt)
        except ChunkCorruptError:
            # Once more, as it may have happened on the way.
            crew.count_retry()
            data = crew.persist(reading, one.bytes, attempt)
        if kept is not None:
            kept.put(one.sha256, data)
        return data

    @contextmanager
    def _crew(self, purpose: str, total_bytes: int | None = None) -> Iterator[_Crew]:
        crew = _Crew(
            str(self._store),
            purpose,
            total_bytes,
            streams=self._streams,
            cap=self._cap,
            silence_s=self._silence_s,
            attempts=self._attempts,
            on_progress=self._on_progress,
        )
        try:
            yield crew
            crew.tell()
        finally:
            crew.leave()
            self.retries += crew.retries


class _Tally:
    """What was written and what was there, added up by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes = self.objects = self.skipped_bytes = 0

    def add(self, count: int, *, written: bool) -> None:
        with self._lock:
            if written:
                self.bytes += count
                self.objects += 1
            else:
                self.skipped_bytes += count


class _Leaving(BaseException):
    """The call is over: its threads stop where they are."""


class _Crew:
    """The threads of one call, what they have moved, and when a byte moved last.

    Daemon threads: one that hangs in a socket does not keep the process from ending.
    """

    def __init__(
        self,
        store: str,
        purpose: str,
        total_bytes: int | None,
        *,
        streams: int,
        cap: _BandwidthCap,
        silence_s: float,
        attempts: int,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._store = store
        self._purpose = purpose
        self._total_bytes = total_bytes
        self._streams = streams
        self._cap = cap
        self._silence_s = silence_s
        self._attempts = attempts
        self._on_progress = on_progress
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
        if len(self._threads) < self._streams:
            thread = threading.Thread(target=self._work, name="photon-transfer", daemon=True)
            self._threads.append(thread)
            thread.start()
        # The caller may have been away for long, with nothing to move: silence is counted anew.
        self._touch()
        return future

    def one(self, future: Future[_T]) -> _T:
        """What a job returns, or raises.

        Raises:
            TransferStalledError: no byte moved for too long.
        """
        while not wait([future], timeout=_TICK_S).done:
            self._watch()
        self.tell()
        return future.result()

    def some(self, pending: set[Future[_T]]) -> set[Future[_T]]:
        """Wait for any of some jobs; those still to do. Raises what a job raised."""
        while True:
            done, rest = wait(pending, timeout=_TICK_S, return_when=FIRST_COMPLETED)
            if done:
                break
            self._watch()
        for future in done:
            future.result()
        self.tell()
        return rest

    def persist(self, doing: str, count: int, attempt: Callable[[Pace], _T]) -> _T:
        """Attempt one object until it moved, with pauses while its store is unavailable.

        Args:
            doing: for messages.
            count: bytes of it, done when an attempt succeeds.
            attempt: given the pace to keep.
        """
        for number in range(1, self._attempts + 1):
            moved = 0

            def pace(some: int) -> None:
                nonlocal moved
                moved += some
                self.add_done(some)
                self._cap.keep(some, self._pause)

            self._say(doing)
            try:
                result = attempt(pace)
            except StoreUnavailableError as error:
                self.add_done(-moved)
                self._last_error = error
                if number == self._attempts:
                    raise StoreUnavailableError(
                        f"{error.message} (attempt {number} of {self._attempts}; {self._so_far()})",
                        hint=error.hint or "Nothing that arrived is lost: try again later.",
                    ) from error
                self.count_retry()
                most_s = min(2.0 ** (number - 1), _LONGEST_PAUSE_S, self._silence_s / 3)
                pause_s = random.uniform(0, most_s)
                self._say(f"{doing}, to be tried again")
                if self._leaving.wait(pause_s):
                    raise _Leaving from None
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
        if self._on_progress is not None:
            self._on_progress(self._done_bytes)

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
                raise _Leaving
            self._touch()
            seconds -= _TICK_S
        if self._leaving.is_set():
            raise _Leaving

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
        if silent_s < self._silence_s:
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


class _BandwidthCap:
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


def _from_spool(kept: FolderStore, one: Wanted) -> bytes | None:
    """An object that an earlier transfer left, if it is what is wanted."""
    try:
        data = kept.get(one.sha256, max_bytes=one.bytes)
    except (ObjectMissingError, ChunkCorruptError):
        data = None
    if data is not None and not _mismatch(data, one):
        return data
    # Half of a file, after a power cut: make room for the whole.
    kept.delete([one.sha256])
    return None


def _mismatch(data: bytes, one: Wanted) -> str | None:
    """What is wrong with bytes that arrived; None if nothing is."""
    if len(data) != one.bytes:
        return f"has {len(data)} bytes, {one.bytes} were promised"
    found = hashlib.sha256(data).hexdigest()
    if found != one.sha256:
        return f"has the sha256 {found}, {one.sha256} was promised"
    return None
