"""Values as small codes of a scale that a block of neighbours shares.

A large value costs its block precision, not the whole tensor. A block's scale is kept in bf16,
which has fp32's range (a pseudo-gradient's values lie far below what fp16 can tell from 0), and
codes are of the scale as kept, so that its rounding is no error of its own.

Tensors are taken a piece at a time that fits a CPU's cache: each piece is read from memory once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from photon.compression.codec import Codec, Empty, Memory, Parts, flat, require_finite, require_part

#: Values taken at a time.
_PIECE = 2**17


class Blockwise(Codec):
    """Codes of `bits` bits for each value, and a bf16 scale for each block.

    The last block may be short; it is encoded as if zeros followed.
    """

    #: Of a code; divides 8.
    bits: ClassVar[int]
    #: Values that share a scale.
    block: int

    def encode(self, tensor: Tensor, memory: Memory | None = None) -> dict[str, Tensor]:
        values = flat(tensor)
        blocks = -(-values.numel() // self.block)
        codes = torch.empty(blocks, self._block_bytes, dtype=torch.uint8)
        scales = torch.empty(blocks, dtype=torch.bfloat16)
        step = max(1, _PIECE // self.block)
        for start in range(0, blocks, step):
            piece = self._piece(values, start, min(step, blocks - start))
            kept = slice(start, start + len(piece))
            scales[kept] = self._scale(piece, values.numel() - start * self.block)
            require_finite(scales[kept], self.name)
            self._pack(self._codes(piece, scales[kept].float()[:, None]), codes[kept])
        return {"codes": codes.flatten(), "scales": scales}

    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        count = math.prod(shape)
        blocks = -(-count // self.block)
        codes = require_part(parts, "codes", torch.uint8, blocks * self._block_bytes)
        scales = require_part(parts, "scales", torch.bfloat16, blocks)
        codes = codes.view(blocks, self._block_bytes)
        values = empty(blocks * self.block).view(blocks, self.block)
        step = max(1, _PIECE // self.block)
        for start in range(0, blocks, step):
            kept = slice(start, start + step)
            self._values(self._unpack(codes[kept]), scales[kept].float()[:, None], values[kept])
        return values.flatten()[:count].view(tuple(shape))

    @property
    def _block_bytes(self) -> int:
        return self.block * self.bits // 8

    def _piece(self, values: Tensor, start: int, count: int) -> Tensor:
        """[count, block] from block `start` on."""
        piece = values[start * self.block : (start + count) * self.block]
        missing = count * self.block - piece.numel()
        if missing:
            piece = torch.cat([piece, piece.new_zeros(missing)])
        return piece.view(count, self.block)

    def _pack(self, codes: Tensor, into: Tensor) -> None:
        """Codes [n, block], uint8 below 2^bits, into [n, block * bits / 8].

        A byte holds a code from each part of the block, so that all reads and writes are of runs.
        """
        share = 8 // self.bits
        parts = codes.view(len(codes), share, -1)
        into.copy_(parts[:, 0])
        for number in range(1, share):
            into |= parts[:, number] << (number * self.bits)

    def _unpack(self, packed: Tensor) -> Tensor:
        share = 8 // self.bits
        if share == 1:
            return packed
        codes = packed.new_empty(len(packed), share, packed.shape[1])
        for number in range(share):
            torch.bitwise_right_shift(packed, number * self.bits, out=codes[:, number])
        return codes.bitwise_and_(2**self.bits - 1).view(len(packed), -1)

    def _scale(self, piece: Tensor, count: int) -> Tensor:
        """[n] of pieces [n, block]; not finite where the block is not.

        Args:
            count: values of the tensor from this piece on; those beyond them are padding.
        """
        # Not torch.aminmax, which is ten times slower along rows on a CPU.
        return torch.maximum(piece.amax(dim=1), -piece.amin(dim=1)) / self._largest

    #: The largest value in units of the scale.
    _largest: ClassVar[float] = 1.0

    @abstractmethod
    def _codes(self, piece: Tensor, scale: Tensor) -> Tensor:
        """uint8 [n, block] of values [n, block], scales [n, 1]."""

    @abstractmethod
    def _values(self, codes: Tensor, scale: Tensor, into: Tensor) -> None:
        """Fill values [n, block] from codes and scales [n, 1]."""


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that overflows: values of 1e-38 and less become 0."""
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale.reciprocal(), 0.0)


def _as_bytes(codes: Tensor) -> Tensor:
    """Whole numbers as uint8. By way of int8: torch converts to it three times as fast."""
    return codes.to(torch.int8).view(torch.uint8)


class _Integers(Blockwise):
    """Whole multiples of the scale, rounded to nearest."""

    #: Added to a multiple to give its code.
    _offset: ClassVar[float]

    def _codes(self, piece: Tensor, scale: Tensor) -> Tensor:
        factor = _reciprocal(scale)
        limit = int(self._largest)
        # bf16 may have rounded the scale down, so that the largest value lies beyond the limit.
        whole = (piece * factor).round_().clamp_(-limit, limit)
        return _as_bytes(whole.add_(self._offset) if self._offset else whole)

    def _values(self, codes: Tensor, scale: Tensor, into: Tensor) -> None:
        into.copy_(codes.view(torch.int8))
        if self._offset:
            into -= self._offset
        into *= scale


class Int8(_Integers):
    """-127 to 127 times the block's largest / 127: an error of at most 0.6% of the largest."""

    name = "int8"
    bits = 8
    _largest = 127.0
    _offset = 0.0  # a code is a signed byte


class Int4(_Integers):
    """-7 to 7 times the block's largest / 7: an error of at most 7.5% of the largest."""

    name = "int4"
    bits = 4
    _largest = 7.0
    _offset = 8.0  # a code is positive, so that two share a byte


class Fp4(Blockwise):
    """E3M0: a sign and three bits of exponent (Streaming DiLoCo, arXiv 2501.18512).

    0, or 1, 1/2, ... 1/64 of the block's largest, whichever is nearest: an error of at most a
    third of a value down to 1/64 of the largest, where int4 has nothing left but 0.
    """

    name = "fp4"
    bits = 4

    def _codes(self, piece: Tensor, scale: Tensor) -> Tensor:
        bits = (piece * _reciprocal(scale)).view(torch.int32)
        sign = bits < 0
        bits &= 0x7FFFFFFF
        # Half a mantissa added: beyond 1.5 times a power of two the next one is nearer. Exponents
        # -6 .. 0 (biased 121 .. 127) become 1 .. 7.
        code = ((bits + 0x00400000) >> 23).sub_(120).clamp_(0, 7)
        # Between 0 and the smallest the middle is half of it, exponent -7.
        torch.maximum(code, (bits >> 23).sub_(119).clamp_(0, 1), out=code)
        return _as_bytes(code.add_(sign, alpha=8))

    def _values(self, codes: Tensor, scale: Tensor, into: Tensor) -> None:
        code = codes.to(torch.int32)
        sign = (code & 8) << 28
        code &= 7
        # The number's bits: its exponent, none for 0, and its sign.
        bits = (code + 120).mul_(code != 0) << 23
        torch.mul((bits | sign).view(torch.float32), scale, out=into)


class Sign(Blockwise):
    """One bit for each value, and the block's mean magnitude (EF-signSGD, arXiv 1901.09847)."""

    name = "sign"
    bits = 1

    def _scale(self, piece: Tensor, count: int) -> Tensor:
        scale = piece.abs().mean(dim=1)
        if count < piece.numel():
            scale[-1] *= self.block / (count - (len(piece) - 1) * self.block)
        return scale

    def _codes(self, piece: Tensor, scale: Tensor) -> Tensor:
        return _as_bytes((piece.view(torch.int32) >> 31).bitwise_and_(1))

    def _values(self, codes: Tensor, scale: Tensor, into: Tensor) -> None:
        into.copy_(codes).mul_(-2.0).add_(1.0).mul_(scale)
