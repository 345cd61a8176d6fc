"""A store for tests: objects in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from photon.store.contract import (
    Buffer,
    Pace,
    Store,
    missing,
    require_key,
    require_size,
    unpaced,
)


class MemoryStore(Store):
    """Objects in this process."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: Buffer, *, pace: Pace = unpaced) -> None:
        with self._lock:
            self._objects.setdefault(require_key(key), bytes(data))
        pace(len(data))

    def get(self, key: str, *, max_bytes: int, pace: Pace = unpaced) -> bytes:
        found = self._objects.get(require_key(key))
        if found is None:
            raise missing(self, key)
        require_size(self, key, len(found), max_bytes)
        pace(len(found))
        return found

    def size(self, key: str) -> int | None:
        found = self._objects.get(require_key(key))
        return len(found) if found is not None else None

    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        with self._lock:
            found = sorted((key, len(data)) for key, data in self._objects.items())
        return iter([entry for entry in found if _under(entry[0], prefix)])

    def delete(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._objects.pop(require_key(key), None)

    def __str__(self) -> str:
        return "memory"


def _under(key: str, prefix: str) -> bool:
    """Whether a key lies in the folder `prefix`."""
    return not prefix or key.startswith(prefix + "/")
