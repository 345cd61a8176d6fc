"""How many sequences go through the model at once: the most that fit, found once, remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from photon.errors import DoesNotFitError, RankLostError
from photon.store.disk import write_json
from photon.training.ranks import Ranks

T = TypeVar("T")


class MicroBatch:
    """Sequences per forward pass on one rank; gradients accumulate to its share of the batch.

    Args:
        share: this rank's sequences of a step; sizes are its divisors.
        asked: compute.micro_batch_size; None looks for the largest.
        guess: what an estimate of memory thinks will fit; where the search begins.
        memo: JSON file in which sizes are remembered; None remembers nothing.
        key: what the size depends on: model, device, strategy, ranks, precision, recomputation.
    """

    def __init__(
        self,
        share: int,
        *,
        asked: int | None = None,
        guess: int | None = None,
        memo: Path | None = None,
        key: str = "",
    ) -> None:
        self._sizes = [size for size in range(share, 0, -1) if share % size == 0]
        self._memo = memo
        self._key = f"{key}, {share} sequences"
        known = self._read().get(self._key)
        limit = known if known is not None else asked if asked is not None else guess or share
        self.size = self._largest_within(limit)

    def limit(self, size: int) -> None:
        """Take at most `size`; ranks must agree, as each pass exchanges weights or gradients."""
        self.size = self._largest_within(min(size, self.size))

    def back_off(self, doing: str, hint: str) -> str:
        """Take the next smaller size after a failed allocation, and remember it; says so in words.

        Memory is given back. Raises DoesNotFitError if one sequence was too many.
        """
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if self.size == 1:
            raise DoesNotFitError(f"{doing} one sequence at a time", hint=hint)
        was, self.size = self.size, self._largest_within(self.size - 1)
        if self._memo is not None:
            write_json(self._memo, self._read() | {self._key: self.size})
        return f"{doing} {was} sequences at a time; going on with {self.size}"

    def _largest_within(self, limit: int) -> int:
        return next((size for size in self._sizes if size <= limit), 1)

    def _read(self) -> dict[str, int]:
        # A file that can't be read costs another search, nothing else.
        if self._memo is None or not self._memo.exists():
            return {}
        try:
            return dict(json.loads(self._memo.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


def within_memory(
    act: Callable[[int], T],
    batch: MicroBatch,
    device: torch.device,
    ranks: Ranks,
    *,
    cut: bool = False,
    on_notice: Callable[[str], None] = lambda _: None,
) -> T:
    """`act(batch.size)`, done again with a smaller size wherever an allocation failed on any rank.

    Args:
        cut: the model is cut among ranks: where one fails, the others wait inside a collective.
        on_notice: told in words.

    Raises:
        DoesNotFitError: not even one sequence at a time fits.
        RankLostError: as `cut` says; the size is remembered for when the ranks start again.
    """
    hint = "Free memory on it, or use another device or a shorter data.sequence_length."
    while True:
        done = if_it_fits(partial(act, batch.size))
        lost = done is None and cut and ranks.size > 1
        if not lost and ranks.least(int(done is not None)) and done is not None:
            return done
        text = batch.back_off(f"out of memory on {device} when scoring", hint)
        if lost:
            raise RankLostError(f"rank {ranks.seat.rank}: {text}")
        on_notice(text)


def if_it_fits(act: Callable[[], T]) -> T | None:
    """What `act` gives; None where an allocation failed, and nothing holds what filled memory."""
    try:
        return act()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
    return None


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on CUDA or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
