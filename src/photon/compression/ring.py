"""Words of a ring: whole numbers from 0 to 2^bits - 1, as masked updates are (photon.secure)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from photon.compression.codec import (
    Codec,
    Empty,
    Memory,
    Parts,
    flat,
    require_finite,
    require_part,
)


class Ring(Codec):
    """The low byte of each word, and its other bits by 4, 2 and 1: bits / 8 bytes a value.

    Words modulo 2^bits of whole numbers below 2^24, which fp32 holds. Of each plane of c bits, a
    byte holds values i, i + n c / 8, i + 2 n c / 8 ...: all reads and writes are of runs.
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
        parts, done = {}, 0
        for wide in self._planes:
            plane = ((words >> done) & ((1 << wide) - 1)).astype(np.uint8)
            parts[f"bits{done}"] = torch.from_numpy(_folded(plane, wide))
            done += wide
        return parts

    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        count, done = math.prod(shape), 0
        words = np.zeros(count, np.uint16)
        for wide in self._planes:
            size = -(-count * wide // 8)
            plane = require_part(parts, f"bits{done}", torch.uint8, size).numpy()
            words |= _unfolded(plane, wide, count).astype(np.uint16) << done
            done += wide
        return empty(count).copy_(torch.from_numpy(words.astype(np.int32))).view(tuple(shape))

    @property
    def _planes(self) -> list[int]:
        """Their bits, from the low end."""
        left, planes = self.bits - 8, [8]
        for wide in (8, 4, 2, 1):
            if left >= wide:
                planes.append(wide)
                left -= wide
        return planes


def _folded(plane: np.ndarray, wide: int) -> np.ndarray:
    """uint8 [n] below 2^wide as uint8 [n wide / 8, rounded up]."""
    share = 8 // wide
    size = -(-len(plane) // share)
    folded = plane[:size].copy()
    for number in range(1, share):
        rest = plane[number * size : (number + 1) * size]
        folded[: len(rest)] |= rest << (number * wide)
    return folded


def _unfolded(plane: np.ndarray, wide: int, count: int) -> np.ndarray:
    if wide == 8:
        return plane
    shifts = range(0, 8, wide)
    return np.concatenate([plane >> shift & ((1 << wide) - 1) for shift in shifts])[:count]
