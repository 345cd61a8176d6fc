"""Where objects lie between those who write and those who read: one small contract.

Objects are written once and never changed. A key says what an object is (a chunk by the sha256 of
its bytes, a manifest by its run, round and silo), so that writing it again changes nothing.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from photon.errors import ChunkCorruptError, LinkError, ObjectMissingError
from photon.store.disk import put_whole, writing

if TYPE_CHECKING:
    from photon.store.memory import ReusedMemory  # NumPy's 10 MB, which most services don't need

#: What is written and read. Bytes that were read are valid for as long as something refers to them.
Buffer = bytes | bytearray | memoryview

#: Told of each run of bytes that moved, as it moves; sleeps to keep a bandwidth cap.
Pace = Callable[[int], None]

_KEY = re.compile(r"(?:[A-Za-z0-9_=-][A-Za-z0-9._=-]*/)*[A-Za-z0-9_=-][A-Za-z0-9._=-]*")


def unpaced(_: int) -> None:
    """As fast as it goes."""


class Store(ABC):
    """Objects by key, there whole or not at all. Safe to use from several threads.

    Keys are relative paths of letters, digits and "._=-", no part beginning with a dot. All
    methods raise StoreUnavailableError where another attempt may help and AccessRefusedError where
    it will not.
    """

    @abstractmethod
    def put(self, key: str, data: Buffer, *, pace: Pace = unpaced) -> None:
        """Write an object, unless one of that key is there: then that one stays.

        Raises:
            DiskFullError: no room.
        """

    @abstractmethod
    def get(self, key: str, *, max_bytes: int, pace: Pace = unpaced) -> Buffer:
        """A whole object.

        Args:
            max_bytes: never is more than that read.

        Raises:
            ObjectMissingError: there is none.
            ChunkCorruptError: it is longer than max_bytes, or broke off.
        """

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""

    @abstractmethod
    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Key and bytes of each object under a folder ("" for all), sorted by key.

        Raises:
            LinkError: this store can't be listed (a node's view of it).
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there don't matter."""

    @abstractmethod
    def __str__(self) -> str:
        """For messages: where it is, without secrets."""


class FolderStore(Store):
    """Objects as files under a folder, each renamed into place when it is complete.

    Args:
        folder: made when something is written.
        durable: also wait until the disk has each object.
        memory: for what is read; None takes it from the heap.
    """

    def __init__(
        self, folder: Path, *, durable: bool = True, memory: ReusedMemory | None = None
    ) -> None:
        self._folder = folder
        self._durable = durable
        self._memory = memory

    def put(self, key: str, data: Buffer, *, pace: Pace = unpaced) -> None:
        path = self._path(key)
        if path.exists():
            return
        with writing("an object", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another thread or process may write the same object at once: each has its own file.
            put_whole(path, data, durable=self._durable)
        pace(len(data))

    def get(self, key: str, *, max_bytes: int, pace: Pace = unpaced) -> Buffer:
        try:
            with self._path(key).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                require_size(self, key, size, max_bytes)
                # Writable, so that tensors can lie in it without a copy.
                data = bytearray(size) if self._memory is None else self._memory.take(size)
                done = 0
                while done < size and (some := file.readinto(memoryview(data)[done:])):
                    done += some
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise missing(self, key) from error
        if done < size:
            raise ChunkCorruptError(f"{key} in {self} ended after {done} of its {size} bytes")
        pace(size)
        return data

    def size(self, key: str) -> int | None:
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        root = self._path(prefix) if prefix else self._folder
        files = [path for path in root.rglob("*") if path.is_file() and path.name[0] != "."]
        names = sorted((path.relative_to(self._folder).as_posix(), path) for path in files)
        return iter([(name, path.stat().st_size) for name, path in names])

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self._folder:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def _path(self, key: str) -> Path:
        return self._folder / require_key(key)

    def __str__(self) -> str:
        return str(self._folder)


def require_key(key: str) -> str:
    """The key, if it is one.

    Raises:
        LinkError: it is not a relative path of allowed characters.
    """
    if len(key) > 512 or not _KEY.fullmatch(key):
        raise LinkError(
            f"{key[:200]!r} can't name an object in a store",
            hint='Allowed: parts of letters, digits and "._=-" that do not begin with a dot, '
            "joined by slashes, 512 characters in all.",
        )
    return key


def require_size(store: Store, key: str, found: int, max_bytes: int) -> None:
    """Raise ChunkCorruptError if an object is longer than it may be."""
    if found > max_bytes:
        raise ChunkCorruptError(
            f"{key} in {store} has {found} bytes, at most {max_bytes} were expected"
        )


def missing(store: Store, key: str) -> ObjectMissingError:
    """The error for an object that is not there."""
    return ObjectMissingError(f"{store} has no object {key}")
