"""Shards one after another as one long run of tokens, read in place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from photon.data.shards import Shard


class TokenRun:
    """The tokens of some shards of a folder, end to end; nothing is opened before it is read."""

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> None:
        self._folder, self._shards, self._dtype = folder, list(shards), dtype
        self._starts = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._maps: dict[int, np.ndarray] = {}
        self._ends: np.ndarray | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens start .. start + len(out) - 1 into `out`; shard borders don't matter."""
        done = 0
        which = bisect_right(self._starts, start) - 1
        while done < len(out):
            offset = start + done - self._starts[which]
            part = self._tokens_of(which)[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            which += 1

    def document_of(self, start: int, count: int) -> np.ndarray:
        """int64 [count]: number of the document that tokens start .. start + count - 1 are of."""
        if self._ends is None:
            parts = [
                np.load(self._folder / shard.index_file) + np.uint64(first)
                for shard, first in zip(self._shards, self._starts, strict=False)
            ]
            self._ends = np.concatenate(parts)
        positions = np.arange(start, start + count, dtype=np.uint64)
        return np.searchsorted(self._ends, positions, side="right")

    def close(self) -> None:
        """Unmap the shards; a later read maps them again."""
        self._maps.clear()
        self._ends = None

    def _tokens_of(self, which: int) -> np.ndarray:
        if which not in self._maps:
            path = self._folder / self._shards[which].file
            # As a plain array: slicing a memmap costs several times as much.
            self._maps[which] = np.asarray(np.memmap(path, dtype=self._dtype, mode="r"))
        return self._maps[which]
