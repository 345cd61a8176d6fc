"""Words of a ring: whole numbers from 0 to 2^bits - 1, as masked updates are (photon.secure)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from photon.compression.codec import Codec, Empty, Memory, Parts, flat, require_finite, require_part


class Ring(Codec):
    """The low byte of each word, and its other bits by 4, 2 and 1: bits / 8 bytes a value.

    Of a plane of c bits a value, byte i of m has those of values i, i + m, i + 2 m ...
    """

    name = "ring"
    bits: int

    def encode(self, tensor: Tensor, memory: Memory | None = None) -> dict[str, Tensor]:
        values = flat(tensor)
        if values.numel():
            require_finite(torch.stack([values.amax(), values.amin()]), self.name)
        return self.packed(values.int().numpy().astype(np.uint16))

    def packed(self, words: np.ndarray) -> dict[str, Tensor]:
        """Of words [n], uint16, whose bits beyond `bits` don't count."""
        parts = {}
        for done, wide in self._planes():
            plane = (words >> done).astype(np.uint8) & ((1 << wide) - 1)
            size = -(-len(words) * wide // 8)
            folded = plane[:size].copy()
            for number in range(1, 8 // wide):
                rest = plane[number * size : (number + 1) * size]
                folded[: len(rest)] |= rest << (number * wide)
            parts[f"bits{done}"] = torch.from_numpy(folded)
        return parts

    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        count = math.prod(shape)
        words = np.zeros(count, np.int32)
        for done, wide in self._planes():
            size = -(-count * wide // 8)
            plane = require_part(parts, f"bits{done}", torch.uint8, size).numpy()
            turns = [(plane >> at) & ((1 << wide) - 1) for at in range(0, 8, wide)]
            words |= np.concatenate(turns)[:count].astype(np.int32) << done
        return empty(count).copy_(torch.from_numpy(words)).view(tuple(shape))

    def _planes(self) -> Iterator[tuple[int, int]]:
        """First bit and bits of each."""
        done = 0
        for wide in (8, 8, 4, 2, 1):
            if self.bits - done >= wide:
                yield done, wide
                done += wide
