"""Memory for bytes that come and go: used again as soon as the last reader lets go of it."""

from __future__ import annotations

import threading
import weakref

import numpy as np


class ReusedMemory:
    """Lends pieces of memory, and lends them again. Safe to use from several threads.

    Pieces that are taken from the heap and given back each time leave holes there that small things
    break up, and the heap grows by them; and they come filled with zeros, or page by page.

    Args:
        most_free: pieces kept for later, the largest ones. The default is for an update at a time:
            the chunks on their way, the one that is read, tensors that span chunks, and those that
            were decoded.
    """

    def __init__(self, most_free: int = 12) -> None:
        self._most_free = most_free
        self._free: list[np.ndarray] = []
        # Reentrant: a piece may come back while this thread is in here, when garbage is collected.
        # So nothing below relies on what it saw of the list a moment before.
        self._lock = threading.RLock()

    def take(self, size: int) -> memoryview:
        """Writable, of `size` bytes and unknown contents.

        It is lent again when nothing refers to it any more: no memoryview, array or tensor.
        """
        with self._lock:
            # Not one that is far too large: it may be long before it comes back.
            fits = (one for one in list(self._free) if size <= len(one) <= 2 * size)
            piece = next(fits, None)
            if piece is not None:
                self._free = [one for one in self._free if one is not piece]
        if piece is None:
            # Not NumPy's own memory, which asks for huge pages: those take longer to come by.
            piece = np.frombuffer(bytearray(size), np.uint8)
        lent = piece[:size]
        weakref.finalize(lent, _take_back, weakref.ref(self), piece).atexit = False
        return lent.data

    def _keep(self, piece: np.ndarray) -> None:
        with self._lock:
            self._free = sorted([*self._free, piece], key=len)[-self._most_free :]


def _take_back(memory: weakref.ref[ReusedMemory], piece: np.ndarray) -> None:
    """Not a method: what is lent must not keep alive what nobody will take from any more."""
    owner = memory()
    if owner is not None:
        owner._keep(piece)
