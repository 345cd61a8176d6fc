"""What glibc does with memory that is freed: the trainer and the aggregator want opposite things.

Other systems' allocators are left alone, and so is glibc's where a MALLOC_ variable is set.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Keep what is freed for what comes next, up to 2 GiB and tensors of that size.

    By default glibc gives large tensors back to the system and gets them again, page by page, at
    each training step: several percent of a small one. The peak stays as it was.
    """
    _set(_M_MMAP_THRESHOLD, 2**31 - 1)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give large buffers back to the system as soon as they are freed.

    Chunks that come and go in several threads otherwise leave holes that nothing fits: up to
    several times the memory of those that are alive.
    """
    _set(_M_MMAP_THRESHOLD, 2**20)


def _set(parameter: int, value: int) -> None:
    if any(name.startswith("MALLOC_") for name in os.environ) or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
