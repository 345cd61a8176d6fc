"""Many objects to or from a store: several streams, one bandwidth cap, and a deadline on silence.

A transfer may take days and is never cut off for that; it ends when no byte moved for `silence_s`.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from photon.errors import ChunkCorruptError, LinkError, ObjectMissingError
from photon.store.contract import Buffer, FolderStore, Pace, Store
from photon.store.streams import BandwidthCap, Crew, Patience

#: Objects asked for, and held in memory, beyond those on their way.
_ASKING_AHEAD = 2


@dataclass(frozen=True)
class Wanted:
    """An object to fetch, and what its bytes must be."""

    key: str
    bytes: int
    sha256: str


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
        announce: told the keys of a fetch before it begins, so that leave is asked for at once.
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
        announce: Callable[[Iterable[str]], None] | None = None,
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
        self._announce = announce
        self._patience = Patience(BandwidthCap(bytes_per_s), silence_s, attempts, on_progress)
        #: Attempts beyond the first of each object, since this was made.
        self.retries = 0

    def send(self, objects: Iterable[tuple[str, Buffer]]) -> None:
        """Write objects that the store does not have; when this returns, it has them all.

        `objects` is read as streams become free, in this thread: at most `streams` objects are
        on their way and two wait. Their memory must not change before this returns; after an
        error, not at all, as a thread may still be reading it.

        Raises:
            StoreUnavailableError: one object failed in all its attempts.
            TransferStalledError: no byte moved for silence_s.
            ChunkCorruptError: the store has an object of another size under one of these keys.
            AccessRefusedError: the store refuses.
        """
        # Threads beyond the streams ask whether the store has the next objects while these are on
        # their way: over a long link each question costs a stream nothing then.
        with self._crew("to write", ahead=_ASKING_AHEAD) as crew:
            places = threading.BoundedSemaphore(self._streams)
            pending: set[Future[None]] = set()
            for key, data in objects:
                pending.add(crew.begin(lambda k=key, d=data: self._send_one(crew, places, k, d)))
                while len(pending) >= self._streams + _ASKING_AHEAD:
                    crew.some(pending)
            while pending:
                crew.some(pending)

    def fetch(self, wanted: Iterable[Wanted], *, spool: Path | None = None) -> Iterator[Buffer]:
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
        if self._announce is not None:
            self._announce(one.key for one in todo)
        total_bytes = sum(one.bytes for one in todo)
        kept = FolderStore(spool, durable=False) if spool is not None else None
        with self._crew("to read", total_bytes) as crew:
            window: deque[Future[Buffer]] = deque()

            def fill() -> None:
                while todo and len(window) < self._streams:
                    one = todo.popleft()
                    window.append(crew.begin(lambda o=one: self._fetch_one(crew, o, kept)))

            fill()
            while window:
                # No name for it here: it is the caller's, and may be let go there.
                arrived = crew.some({window.popleft()})
                fill()
                yield arrived.pop()

    def _send_one(
        self, crew: Crew, places: threading.BoundedSemaphore, key: str, data: Buffer
    ) -> None:
        count = memoryview(data).nbytes

        def attempt(pace: Pace) -> None:
            # Asked before each attempt: the one before may have got through, its answer lost.
            found = self._store.size(key)
            if found == count:
                return
            if found is not None:
                raise ChunkCorruptError(
                    f"{self._store} has an object {key} of {found} bytes, this one has {count}",
                    hint="Keys are never written twice. Another writer used this one.",
                )
            crew.take(places)
            try:
                self._store.put(key, data, pace=pace)
            finally:
                places.release()

        crew.persist(f"writing {key}", count, attempt)

    def _fetch_one(self, crew: Crew, one: Wanted, kept: FolderStore | None) -> Buffer:
        if kept is not None:
            found = _from_spool(kept, one)
            if found is not None:
                crew.add_done(one.bytes)
                return found

        def attempt(pace: Pace) -> Buffer:
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
    def _crew(
        self, purpose: str, total_bytes: int | None = None, *, ahead: int = 0
    ) -> Iterator[Crew]:
        threads = self._streams + ahead
        crew = Crew(self._patience, str(self._store), purpose, total_bytes, threads)
        try:
            yield crew
            crew.tell()
        finally:
            crew.leave()
            self.retries += crew.retries


def _from_spool(kept: FolderStore, one: Wanted) -> Buffer | None:
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


def _mismatch(data: Buffer, one: Wanted) -> str | None:
    """What is wrong with bytes that arrived; None if nothing is."""
    if len(data) != one.bytes:
        return f"has {len(data)} bytes, {one.bytes} were promised"
    found = hashlib.sha256(data).hexdigest()
    if found != one.sha256:
        return f"has the sha256 {found}, {one.sha256} was promised"
    return None
