"""This rank's part of each batch, read ahead of the step that needs it."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.data import TokenStream


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step: int64 and int32 [share, L + 1].

    There are no document_ids where documents may see each other.
    """

    tokens: Tensor
    document_ids: Tensor | None

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` sequences, which divides the share."""
        tokens = self.tokens.split(size)
        if self.document_ids is None:
            return [Batch(part, None) for part in tokens]
        ids = self.document_ids.split(size)
        return [Batch(part, own) for part, own in zip(tokens, ids, strict=True)]


def read_ahead(
    stream: TokenStream,
    *,
    cursor: int,
    stride: int,
    share: int,
    steps: int,
    device: torch.device,
    documents: bool,
) -> Generator[Batch, None, None]:
    """The batches of `steps` steps; a thread reads the next one while this one is used.

    Args:
        stream: touched by that thread alone until the iterator is closed.
        cursor: this rank's first sequence of the first step.
        stride: sequences of a step over all ranks; `share` are this rank's.
        device: where they end up; on CUDA through pinned memory, without waiting.
        documents: whether document_ids are wanted.
    """

    def read(step: int) -> Batch:
        start = cursor + step * stride
        tokens = torch.from_numpy(stream.batch(start, share))
        ids = torch.from_numpy(stream.document_ids(start, share)) if documents else None
        if device.type == "cuda":
            return Batch(tokens.pin_memory(), ids.pin_memory() if ids is not None else None)
        return Batch(tokens, ids)

    with ThreadPoolExecutor(1, thread_name_prefix="photon-batches") as reader:
        ahead: Future[Batch] = reader.submit(read, 0)
        for step in range(steps):
            batch = ahead.result()
            if step + 1 < steps:
                ahead = reader.submit(read, step + 1)
            ids = batch.document_ids
            yield Batch(
                batch.tokens.to(device, non_blocking=True),
                ids.to(device, non_blocking=True) if ids is not None else None,
            )
