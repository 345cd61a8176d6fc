"""Updates as whole numbers, so that masks cancel to the bit and sums can't overflow.

With weights w_u and W their sum over the cohort, b bits and M = 2^(b-1) - 1, a member sends of each
value x of a tensor whose range is R

    q = round(x w_u M / (W R)),  kept within floor(w_u M / W)

so sums over any members lie within M, and sum(q) W R / M over the weights of those in it is their
weighted mean. What rounding and the bound left out, x - q W R / (M w_u), is fed back next round.
Before noise on the sum q is rounded to 0, so that no update is longer than its clip let it be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon.compression.codec import flat, require_finite
from photon.secure.documents import MOST_BITS, MOST_WEIGHT, Cohort
from photon.secure.masks import Words

#: Steps from 0 to a member's range: with one bit more than int8 has, as the range is a whole
#: tensor's and not that of 128 values; and the fewest that are an update still.
_LEVELS, _FEWEST_LEVELS = 255, 15
#: Values at once: they stay in the processor's cache.
_PIECE = 1 << 16
#: Most members of a sum: 2,184.
MOST_SUMMED = ((1 << MOST_BITS - 1) - 1) // _FEWEST_LEVELS


def bits_for(members: int) -> int:
    """Bits of a word: 12 for 8 members, 14 for 32, never more than 16."""
    return min(MOST_BITS, 1 + (_LEVELS * members).bit_length())


def whole_weights(shares: Sequence[float]) -> list[int]:
    """Shares as whole numbers up to MOST_WEIGHT, the smallest that say the same."""
    weights = [max(1, round(MOST_WEIGHT * one / max(shares))) for one in shares]
    common = math.gcd(*weights)
    return [one // common for one in weights]


@dataclass(frozen=True)
class FixedPoint:
    """How a cohort's values are written.

    Attributes:
        bits: of a word.
        total: W, of all members.
    """

    bits: int
    total: int

    @classmethod
    def of(cls, cohort: Cohort) -> FixedPoint:
        return cls(cohort.bits, sum(one.weight for one in cohort.members))

    @property
    def _most(self) -> int:
        return (1 << self.bits - 1) - 1

    def bound(self, weight: int) -> int:
        """Largest magnitude of a member's q."""
        return weight * self._most // self.total

    def unit(self, largest: float) -> float:
        """W R / M: what 1 of a sum stands for, times the weight of those in it."""
        return largest * self.total / self._most

    def whole(
        self, tensor: Tensor, weight: int, largest: float, *, to_zero: bool = False
    ) -> tuple[Tensor, Tensor]:
        """q, int16 [n], of a tensor's values in row-major order; and what it says of them, fp32.

        Args:
            to_zero: round to 0, and not to the nearest.

        Raises:
            NonFiniteError: it holds NaN or infinity.
        """
        values, bound, unit = flat(tensor), self.bound(weight), self.unit(largest) / weight
        whole, said = torch.empty_like(values, dtype=torch.int16), torch.empty_like(values)
        for start in range(0, len(values), _PIECE):
            at = slice(start, start + _PIECE)
            piece = values[at]
            require_finite(torch.stack([piece.amax(), piece.amin()]), "ring")
            torch.mul(piece, 1 / unit, out=said[at])
            rounded = said[at].trunc_() if to_zero else said[at].round_()
            whole[at] = rounded.clamp_(-bound, bound)
            said[at] *= unit
        return whole, said

    def signed(self, words: Words) -> np.ndarray:
        """A sum modulo 2^bits as a number around 0, int16."""
        shift = 16 - self.bits
        return (words << shift).view(np.int16) >> shift

    def mean(self, words: Words, weight: int, largest: float) -> Tensor:
        """The mean that a sum is of, fp32 [n]; weight is that of those in it."""
        mean = self.signed(words) * (self.unit(largest) / weight)
        return torch.from_numpy(mean.astype(np.float32))
