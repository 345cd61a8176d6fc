"""What glibc does with memory that is freed.

Other systems' allocators are left alone, and so is glibc's where a MALLOC_ variable is set.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def keep_freed_memory() -> None:
    """Keep what is freed for what comes next, up to 2 GiB and tensors of that size.

    By default glibc gives large tensors back to the system and gets them again, page by page, at
    each training step: several percent of a small one. The peak stays as it was.
    """
    _set(_M_MMAP_THRESHOLD, 2**31 - 1)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def share_freed_memory() -> None:
    """Keep what is freed, in one heap for all threads.

    For a process in whose threads large chunks come and go: with a heap for each thread, what one
    frees is of no use to the others, and getting it from the system anew, page by page, takes
    longer than hashing it.
    """
    keep_freed_memory()
    _set(_M_ARENA_MAX, 1)


def _set(parameter: int, value: int) -> None:
    if any(name.startswith("MALLOC_") for name in os.environ) or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
