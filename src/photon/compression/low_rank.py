"""A matrix as the product of a tall and a wide one.

Tensors of two dims and more are taken as M [m, n], the first dim by all others. Each silo's
factors are its own: the aggregator averages products, never factors, for the product of averages
is not the average of products.

What decoders compute is a matrix product. Those with the same BLAS agree bit for bit, others up to
fp32's rounding.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from photon.compression.codec import Empty, Memory, Parts, flat, require_finite, require_part
from photon.compression.nested import Nesting
from photon.torch_threads import torch_threads

_RANK = struct.Struct("<I")
#: Of PowerSGD's first basis, the same on all nodes.
_SEED = 1905_13727


class _Factors(Nesting):
    """Left [m, r] and right [r, n], or the tensor itself where they would take as many values.

    Both go through the inner codec, left as its transpose, so that a block of neighbours is of one
    singular vector: parts `left.*` and `right.*`. Vectors, and what has a side of 1, go through it
    as they are: parts `whole.*`.
    """

    #: r, or the least that there may be where each tensor has its own, which part `rank` tells.
    rank: int = 1
    _sends_rank: ClassVar[bool]

    def encode(self, tensor: Tensor, memory: Memory | None = None) -> dict[str, Tensor]:
        sides = _sides(tensor.shape)
        if sides is None or self.rank * sum(sides) >= math.prod(sides):
            return self._encode_inner(tensor, "whole")
        matrix = flat(tensor).view(sides)
        largest = matrix.abs().amax()
        require_finite(largest, self.name)
        # In units of the largest value: squares of fp32's extremes are not fp32's.
        unit = largest if float(largest) else torch.ones(())
        factors = self._factors(matrix / unit, memory)
        if factors is None:
            return self._encode_inner(tensor, "whole")
        left, right = factors
        rank = bytearray(_RANK.pack(left.shape[1]) if self._sends_rank else b"")
        return (
            ({"rank": torch.frombuffer(rank, dtype=torch.uint8)} if rank else {})
            | self._encode_inner(left.T.contiguous(), "left")
            | self._encode_inner(right * unit, "right")
        )

    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        if any(name.startswith("whole.") for name in parts):
            return self._decode_inner(parts, "whole", shape, empty)
        sides = _sides(shape)
        if sides is None:
            raise ValueError(f"no part 'whole' (there are: {', '.join(sorted(parts)) or 'none'})")
        m, n = sides
        rank = self.rank
        if self._sends_rank:
            part = require_part(parts, "rank", torch.uint8, _RANK.size)
            (rank,) = _RANK.unpack(part.numpy().tobytes())
        if not 0 <= rank * (m + n) < m * n:
            raise ValueError(f"part 'rank' is {rank}, expected r x ({m} + {n}) below {m} x {n}")
        left = self._decode_inner(parts, "left", (rank, m))
        right = self._decode_inner(parts, "right", (rank, n))
        with torch_threads(1):  # others add up in another order
            product = torch.mm(left.T, right, out=empty(m * n).view(m, n))
        return product.view(tuple(shape))

    @abstractmethod
    def _factors(self, matrix: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor] | None:
        """Left [m, r] and right [r, n] of a matrix whose largest magnitude is 1, or 0.

        None if they don't take fewer values.
        """


class LowRank(_Factors):
    """As many singular vectors as hold a share of a matrix's energy (the form of FedDLR).

    The smallest rank r whose squared singular values sum to at least `energy` times those of all,
    so that the squared error is at most 1 - energy of the squared norm (before the inner codec's).
    A tensor with r (m + n) >= m n is sent whole. The vectors are the eigenvectors of the Gram
    matrix of the smaller side, which costs that side cubed: half a second for 768.
    """

    name = "lowrank"
    _sends_rank = True
    #: Share of the squared norm that is kept.
    energy: float

    def _factors(self, matrix: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor] | None:
        m, n = matrix.shape
        tall = m > n
        gram = matrix.T @ matrix if tall else matrix @ matrix.T
        squares, vectors = torch.linalg.eigh(gram)  # ascending
        reached = squares.flip(0).to(torch.float64).clamp_(min=0).cumsum(0)
        rank = int((reached < self.energy * reached[-1]).sum()) + 1 if float(reached[-1]) else 0
        if rank * (m + n) >= m * n:
            return None
        kept = vectors[:, len(squares) - rank :].flip(1)
        return (matrix @ kept, kept.T) if tall else (kept, kept.T @ matrix)


class PowerSGD(_Factors):
    """`rank` directions, followed by one power iteration a round (arXiv 1905.13727).

    With the basis Q [n, r] of the round before: P = M Q, made orthonormal by QR, and Q = M^T P;
    what is sent is P and Q^T, and `memory["basis"]` becomes Q. While a silo's updates keep their
    directions, rounds approach the best approximation of that rank; error feedback sends the rest.
    Without memory, or with a basis of another shape, Q is drawn from a fixed seed.

    A tensor with r (m + n) >= m n is sent whole.
    """

    name = "powersgd"
    learns = True
    _sends_rank = False

    def _factors(self, matrix: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
        shape = (matrix.shape[1], self.rank)
        basis = None if memory is None else memory.get("basis")
        if basis is None or basis.shape != shape:
            basis = torch.randn(shape, generator=torch.Generator().manual_seed(_SEED))
        left = torch.linalg.qr(matrix @ basis.to(torch.float32)).Q
        basis = matrix.T @ left
        # A silo that sent nothing keeps the directions of its last update.
        if memory is not None and bool(basis.any()):
            memory["basis"] = basis
        return left, basis.T


def _sides(shape: Sequence[int]) -> tuple[int, int] | None:
    """m and n of the matrix that a tensor of this shape is; None if it is none."""
    if len(shape) < 2:
        return None
    m, n = shape[0], math.prod(shape[1:])
    return (m, n) if m > 1 and n > 1 and math.prod(shape) else None
