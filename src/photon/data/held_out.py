"""Held-out text, cut into windows that score each token but the first exactly once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from photon.data.prepared import PreparedData, SiloData
from photon.data.shards import HELD_OUT
from photon.data.token_bytes import TokenBytes, token_bytes
from photon.data.tokens import TokenRun
from photon.errors import EmptySiloError


@dataclass(frozen=True)
class Window:
    """A stretch of held-out text, in which every token but the first is scored.

    Attributes:
        tokens: int64 [n], n >= 2.
        documents: int32 [n], which document each is of, rising from 0; None where nobody asked.
        bytes: UTF-8 bytes of text that the scored tokens stand for.
        unknown: how many of them are the tokenizer's unknown token, which counts 0 bytes.
    """

    tokens: np.ndarray
    documents: np.ndarray | None
    bytes: int
    unknown: int


@dataclass(frozen=True)
class HeldOut:
    """One held-out set, the type of its token files, and the bytes of each token."""

    part: SiloData
    dtype: np.dtype
    sizes: TokenBytes

    def windows(
        self, sequence_length: int, max_tokens: int | None = None, *, documents: bool = False
    ) -> Iterator[Window]:
        """Windows of up to sequence_length + 1 tokens, in order: all, or a sample of them.

        Neighbours share one token (the target of one, the first input of the next); the text's
        last window may be shorter. A sample is spread evenly over the whole text, and so over all
        its sources. It depends on the text and the two numbers alone, so that figures of rounds,
        runs and machines are of the same tokens.

        Args:
            sequence_length: predictions of a full window.
            max_tokens: predictions of all windows together; the last one is cut to keep to it.
            documents: tell documents apart, for attention that stays inside one.

        Raises:
            ValueError: sequence_length or max_tokens is below 1.
        """
        if sequence_length < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"{sequence_length = } and {max_tokens = } must be at least 1")
        run = TokenRun(self.part.path, self.part.shards(HELD_OUT), self.dtype)
        predictions = len(run) - 1
        count, left = -(-predictions // sequence_length), max_tokens or predictions
        for number in _spread(count, min(count, -(-left // sequence_length))):
            start = number * sequence_length
            length = min(sequence_length, predictions - start, left)
            left -= length
            tokens = np.empty(length + 1, dtype=np.int64)
            run.read(start, tokens)
            ids = run.document_of(start, length + 1) if documents else None
            yield Window(
                tokens,
                None if ids is None else (ids - ids[0]).astype(np.int32),
                int(self.sizes.sizes[tokens[1:]].sum()),
                int((tokens[1:] == self.sizes.unknown).sum()),
            )


def _spread(count: int, wanted: int) -> Iterator[int]:
    """`wanted` of 0 .. count - 1, rising: one from each of as many equal stretches."""
    draw = random.Random(0)
    for first, end in pairwise(count * k // wanted for k in range(wanted + 1)):
        yield first + int(draw.random() * (end - first))


def held_out_text(data: PreparedData, silo: str | None) -> HeldOut:
    """A silo's held-out text, or the global set for None.

    Raises:
        EmptySiloError: no such silo, or its set has fewer than two tokens.
    """
    part = data.held_out if silo is None else data.silo(silo)
    tokens = part.held_out_tokens
    if tokens < 2:
        whose = f"silo {silo!r}" if silo is not None else str(data.path)
        raise EmptySiloError(
            f"the held-out set of {whose} has {tokens} tokens; at least 2 are needed",
            hint="Prepare the data again with more text held out (--global-fraction, "
            "--silo-fraction).",
        )
    sizes = token_bytes(data.tokenizer_file, data.tokenizer_sha256, data.vocab_size, data.eos_id)
    return HeldOut(part, data.dtype, sizes)
