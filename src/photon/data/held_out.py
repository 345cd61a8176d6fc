"""Held-out text, cut into windows that score each token but the first exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from photon.data.prepared import PreparedData, SiloData
from photon.data.shards import HELD_OUT
from photon.data.tokens import TokenRun
from photon.errors import EmptySiloError


@dataclass(frozen=True)
class HeldOut:
    """One held-out set.

    Attributes:
        part: whose.
        dtype: of its token files.
        tokens: all of them, end-of-text included.
        bytes: UTF-8 bytes of the text behind them.
    """

    part: SiloData
    dtype: np.dtype
    tokens: int
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token stands for, on average."""
        return self.bytes / self.tokens

    def bits_per_byte(self, loss: float) -> float:
        """loss / ln 2 / bytes_per_token: comparable between tokenizers.

        Args:
            loss: mean cross-entropy, in nats per token.
        """
        return loss / float(np.log(2)) / self.bytes_per_token

    def windows(self, sequence_length: int, max_tokens: int | None = None) -> Iterator[np.ndarray]:
        """int64 windows of up to sequence_length + 1 tokens, in order.

        Neighbours share one token (the target of one, the first input of the next); the last
        window may be shorter, with at least 2 tokens.

        Args:
            sequence_length: predictions of a full window.
            max_tokens: stop once so many tokens are predicted.

        Raises:
            ValueError: sequence_length is below 1.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length = {sequence_length} must be at least 1")
        run = TokenRun(self.part.path, self.part.shards(HELD_OUT), self.dtype)
        end = self.tokens if max_tokens is None else min(self.tokens, max_tokens + 1)
        for start in range(0, end - 1, sequence_length):
            window = np.empty(min(sequence_length + 1, end - start), dtype=np.int64)
            run.read(start, window)
            yield window


def held_out_text(data: PreparedData, silo: str | None) -> HeldOut:
    """A silo's held-out text, or the global set for None.

    Raises:
        EmptySiloError: no such silo, or its set has fewer than two tokens.
    """
    if silo is not None and silo not in data.silos:
        raise EmptySiloError(
            f"no silo named {silo!r} in {data.path}", hint=f"Its silos: {', '.join(data.silos)}."
        )
    part = data.held_out if silo is None else data.silos[silo]
    tokens = part.held_out_tokens
    if tokens < 2:
        whose = f"silo {silo!r}" if silo is not None else str(data.path)
        raise EmptySiloError(
            f"the held-out set of {whose} has {tokens} tokens; at least 2 are needed",
            hint="Prepare the data again with more text held out (--global-fraction, "
            "--silo-fraction).",
        )
    return HeldOut(part, data.dtype, tokens, part.held_out_bytes)
