"""Held-out text, cut into windows that score each token but the first exactly once."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from photon.data.prepared import PreparedData, SiloData
from photon.data.shards import HELD_OUT, TokenRun
from photon.data.tokenizer import read_tokenizer
from photon.errors import EmptySiloError

#: Parts of a tokenizer.json that may turn text into one character for each byte.
_CUTTING = ("normalizer", "pre_tokenizer", "decoder")
_FALLBACK_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class TokenBytes:
    """Bytes by token id.

    Attributes:
        sizes: int64 [vocab_size]; 0 for special tokens, which no text is cut into.
        unknown: the token that stands for whatever the tokenizer has no token for; -1 without one.
    """

    sizes: np.ndarray
    unknown: int


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
    """A silo's held-out text, or the global set for None; EmptySiloError below two tokens."""
    part = data.held_out if silo is None else data.silo(silo)
    tokens = part.held_out_tokens
    if tokens < 2:
        whose = f"silo {silo!r}" if silo is not None else str(data.path)
        raise EmptySiloError(
            f"the held-out set of {whose} has {tokens} tokens; at least 2 are needed",
            hint="Prepare the data again with more text held out (--global-fraction, "
            "--silo-fraction).",
        )
    sizes = token_bytes(part.tokenizer_file, part.tokenizer_sha256, data.vocab_size, data.eos_id)
    return HeldOut(part, data.dtype, sizes)


@lru_cache(maxsize=64)
def token_bytes(file: Path, sha256: str, vocab_size: int, eos_id: int) -> TokenBytes:
    """Of a tokenizer.json. Exact where tokens are pieces of the text's bytes (byte-level BPE).

    Elsewhere it is the length that a token adds to decoded text, whose spaces and case may differ
    from those of the text that was cut.

    Args:
        sha256: its hash, so that another file under its name is read anew.
        eos_id: ends documents; no part of any text.

    Raises:
        DataError: not a readable tokenizer.
    """
    tokenizer = read_tokenizer(file)
    record = json.loads(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder()
    byte_level = "ByteLevel" in json.dumps([record[part] for part in _CUTTING])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocab_size, 1 + max(vocabulary.values())), dtype=np.int64)
    others: list[int] = []
    for token, number in vocabulary.items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        elif byte_level:  # one character for each byte
            sizes[number] = len(token)
        elif _FALLBACK_BYTE.fullmatch(token):
            sizes[number] = 1
        else:
            others.append(number)
    if others:
        # Behind another token, as the first of a text may lose its space.
        first = others[0]
        alone = len(tokenizer.decode([first], skip_special_tokens=False).encode())
        pairs = [[first, number] for number in others]
        texts = tokenizer.decode_batch(pairs, skip_special_tokens=False)
        sizes[others] = [max(0, len(text.encode()) - alone) for text in texts]
    unknown = record["model"].get("unk_id")
    if unknown is None and record["model"].get("unk_token") is not None:
        unknown = tokenizer.token_to_id(record["model"]["unk_token"])
    unknown = -1 if unknown is None else int(unknown)
    sizes[[number for number in (eos_id, unknown) if number >= 0]] = 0
    return TokenBytes(sizes, unknown)
