"""Held-out text, cut into windows that score each token but the first exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from photon.data.prepared import PreparedData, TextSet
from photon.data.shards import HELD_OUT
from photon.errors import EmptySiloError


@dataclass(frozen=True)
class HeldOut:
    """One held-out set.

    Attributes:
        tokens: all of them.
        bytes: UTF-8 bytes of the text behind them.
    """

    text_set: TextSet
    dtype: np.dtype
    tokens: int
    bytes: int

    def windows(self, sequence_length: int, max_tokens: int | None = None) -> Iterator[np.ndarray]:
        """int64 windows of up to sequence_length + 1 tokens, in order.

        Neighbours share one token (the target of one, the first input of the next); the last
        window may be shorter.

        Args:
            sequence_length: predictions of a full window.
            max_tokens: stop once so many tokens are predicted.
        """
        left = self.tokens if max_tokens is None else min(self.tokens, max_tokens + 1)
        carry = np.empty(0, dtype=np.int64)
        for shard in self.text_set.shards(HELD_OUT):
            tokens = np.memmap(self.text_set.path / shard.file, dtype=self.dtype, mode="r")
            tokens = tokens[:left]
            left -= len(tokens)
            start = 0
            while start < len(tokens):
                take = sequence_length + 1 - len(carry)
                carry = np.concatenate([carry, tokens[start : start + take].astype(np.int64)])
                start += take
                if len(carry) == sequence_length + 1:
                    yield carry
                    carry = carry[-1:]
        if len(carry) > 1:
            yield carry


def held_out_text(data: PreparedData, silo: str | None) -> HeldOut:
    """A silo's held-out text, or the global set for None.

    Raises:
        EmptySiloError: no such silo, or its set has fewer than two tokens.
    """
    if silo is not None and silo not in data.silos:
        raise EmptySiloError(
            f"no silo named {silo!r} in {data.path}", hint=f"Its silos: {', '.join(data.silos)}."
        )
    text_set = data.held_out if silo is None else data.silos[silo]
    tokens = text_set.count(HELD_OUT, "tokens")
    if tokens < 2:
        raise EmptySiloError(
            f"the held-out set of {silo or data.path} has {tokens} tokens, at least 2 are needed",
            hint="Prepare the data again with more text held out.",
        )
    return HeldOut(text_set, data.dtype, tokens, text_set.count(HELD_OUT, "bytes"))
