"""How many of PyTorch's threads work on what this thread asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within this block, in this thread.

    Threads that ask PyTorch for something for the first time meanwhile keep that number, so no such
    thread may be started in the block.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
