"""A fixed number of values from each chunk, in two bits and a place each (SparseLoCo)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon.compression.codec import Codec, Empty, Memory, Parts, require_finite, require_part

#: Side of a tile of a matrix, and its values: a chunk, whose places take 12 bits.
_SIDE = 64
_CHUNK = _SIDE * _SIDE
#: Values taken at a time.
_PIECE = 2**17
#: Tensors with fewer values (norms, biases) are sent whole.
_SMALL = 512
#: Turns of the search for a chunk's two levels. It never gets worse, and most chunks need five.
_TURNS = 6


class SparseLoco(Codec):
    """The k values of each chunk of 4096 that are largest, as a place, a sign and a level.

    The form of arXiv 2508.15706: a matrix is cut into tiles of 64 x 64 (dims after the first taken
    together, edges padded with zeros), anything else into runs of 4096. Of the kept values a chunk
    sends 12 bits of place, 2 bits of value (its sign, and which of the chunk's two magnitudes) and
    those two magnitudes in bf16. For k = 64 that is 116 bytes for 4096 values, 141 times less than
    fp32. It is made to be used with error feedback: the rest is sent when it has grown. In
    trials with it an outer learning rate of 2 was best, and 1 without a codec (LAB.md).

    Values are compared by 20 bits (12 of precision); those that tie are taken in order. The
    magnitudes are the means of two groups of the kept ones, split where their squared error is
    smallest (Lloyd's algorithm on a line, from the split at their mean).
    """

    name = "sparseloco"
    #: Values kept of each chunk.
    k: int

    def encode(self, tensor: Tensor, memory: Memory | None = None) -> dict[str, Tensor]:
        values = tensor.detach().to(device="cpu", dtype=torch.float32)
        if values.numel() < _SMALL:
            whole = values.to(torch.bfloat16).flatten().clone()
            require_finite(whole, self.name)
            return {"values": whole}
        grid = _Grid.of(values.shape)
        places = torch.empty(grid.chunks, self.k, dtype=torch.int32)
        kept = torch.empty(grid.chunks, self.k)
        done = 0
        for chunks in map(grid.cut, grid.pieces(values)):
            into = slice(done, done := done + len(chunks))
            some = _largest(chunks, self.k)
            places[into] = some
            kept[into] = chunks.gather(1, some)
        return self._packed(places, kept)

    def _packed(self, places: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Parts of the kept values [chunks, k] and their places."""
        chunks = len(kept)
        index = torch.empty(chunks, 3, self.k // 2, dtype=torch.uint8)
        codes = torch.empty(chunks, self.k // 4, dtype=torch.uint8)
        levels = torch.empty(chunks, 2, dtype=torch.bfloat16)
        # Kept values are few: many chunks at a time, or the work is all in calling torch.
        for start in range(0, chunks, step := max(1, _PIECE // self.k)):
            some = slice(start, start + step)
            magnitude = kept[some].abs()
            # The largest of all are among the kept, and NaN ranks above infinity.
            require_finite(magnitude.amax(), self.name)
            levels[some] = _two_levels(magnitude)
            require_finite(levels[some], self.name)
            middle = levels[some].float().mean(dim=1, keepdim=True)
            upper = (magnitude > middle).view(torch.int8)
            codes[some] = _pack_codes((upper << 1) | (kept[some] < 0).view(torch.int8))
            index[some] = _pack_places(places[some])
        return {"index": index.flatten(), "codes": codes.flatten(), "levels": levels.flatten()}

    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        count = math.prod(shape)
        if count < _SMALL:
            whole = require_part(parts, "values", torch.bfloat16, count)
            return empty(count).copy_(whole).view(tuple(shape))
        grid, k = _Grid.of(shape), self.k
        chunks = grid.chunks
        index = require_part(parts, "index", torch.uint8, chunks * 3 * k // 2).view(chunks, 3, -1)
        codes = require_part(parts, "codes", torch.uint8, chunks * k // 4).view(chunks, -1)
        levels = require_part(parts, "levels", torch.bfloat16, chunks * 2).view(chunks, 2)
        result = empty(count).view(tuple(shape))
        done = 0
        for target in grid.pieces(result):
            tiles = _Grid(target.shape[0], target.shape[1], grid.tall, grid.wide).chunks
            some = slice(done, done := done + tiles)
            places = _unpack_places(index[some])
            if bool((places.diff(dim=1) <= 0).any()):
                raise ValueError("part 'index' is not ascending within its chunks")
            code = _unpack_codes(codes[some])
            kept = levels[some].float().gather(1, (code >> 1).to(torch.int64))
            kept = torch.where((code & 1).bool(), -kept, kept)
            grid.put(kept.new_zeros(len(kept), _CHUNK).scatter_(1, places, kept), target)
        return result


@dataclass(frozen=True)
class _Grid:
    """A tensor as a matrix [rows, columns], cut into chunks of [tall, wide]."""

    rows: int
    columns: int
    tall: int
    wide: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> _Grid:
        """Tiles of [d0, rest] where both sides hold one; else runs of one row."""
        columns = math.prod(shape[1:])
        if len(shape) >= 2 and shape[0] >= _SIDE and columns >= _SIDE:
            return cls(shape[0], columns, _SIDE, _SIDE)
        return cls(1, math.prod(shape), 1, _CHUNK)

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.tall) * -(-self.columns // self.wide)

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """Parts of the matrix that fit a cache: whole chunks, in order; views if contiguous."""
        matrix, tall, wide = tensor.reshape(self.rows, -1), self.tall, self.wide
        # Several bands of chunks at a time where they are short, a share of one where it is long.
        bands = max(1, _PIECE // (tall * -(-self.columns // wide) * wide))
        step = self.columns if bands > 1 else _PIECE // tall
        for top in range(0, self.rows, bands * tall):
            for left in range(0, self.columns, step):
                yield matrix[top : top + bands * tall, left : left + step]

    def cut(self, piece: Tensor) -> Tensor:
        """A piece's chunks [n, 4096], filled up with zeros."""
        below, beside = -piece.shape[0] % self.tall, -piece.shape[1] % self.wide
        if below or beside:
            piece = torch.nn.functional.pad(piece, (0, beside, 0, below))
        tiles = piece.reshape(piece.shape[0] // self.tall, self.tall, -1, self.wide)
        return tiles.transpose(1, 2).reshape(-1, _CHUNK)

    def put(self, chunks: Tensor, into: Tensor) -> None:
        """Chunks to the piece that `cut` had them from, without their padding."""
        across = -(-into.shape[1] // self.wide)
        tiles = chunks.view(-1, across, self.tall, self.wide).transpose(1, 2)
        piece = tiles.reshape(-1, across * self.wide)
        into.copy_(piece[: into.shape[0], : into.shape[1]])


def _largest(chunks: Tensor, k: int) -> Tensor:
    """Places [n, k] of the largest magnitudes of chunks [n, 4096], ascending, int64."""
    # The high bits of a magnitude and its place make one number, so that no two are the same and
    # an earlier place wins a tie. NumPy's partition of whole numbers is three times torch.topk.
    numbers = torch.arange(_CHUNK - 1, -1, -1, dtype=torch.int32)
    keys = (chunks.contiguous().view(torch.int32) & 0x7FFFF000).bitwise_or_(numbers).numpy()
    keys.partition(_CHUNK - k, axis=1)
    places = (_CHUNK - 1) - (keys[:, _CHUNK - k :] & (_CHUNK - 1))
    places.sort(axis=1)
    return torch.from_numpy(places.astype(np.int64))


def _two_levels(magnitude: Tensor) -> Tensor:
    """bf16 [n, 2], lower and upper, of the magnitudes [n, k] of a chunk each."""
    # In units of the largest: sums of values near fp32's end would overflow.
    unit = magnitude.amax(dim=1, keepdim=True)
    shares = magnitude / torch.where(unit > 0, unit, 1.0)
    total, k = shares.sum(dim=1, keepdim=True), magnitude.shape[1]
    middle = total / k
    low = high = middle
    for _ in range(_TURNS):
        upper = shares > middle
        count = upper.sum(dim=1, keepdim=True)
        above = (shares * upper).sum(dim=1, keepdim=True)
        # The values of a chunk may be all the same, and there are then none above.
        high = torch.where(count > 0, above / count.clamp(min=1), middle)
        low = (total - above) / (k - count).clamp(min=1)
        middle = (low + high) / 2
    return (torch.cat([low, high], dim=1) * unit).to(torch.bfloat16)


def _pack_places(places: Tensor) -> Tensor:
    """uint8 [n, 3, k / 2] of places [n, k], int32: 12 bits each.

    Three bytes hold a place of the first half and one of the second.
    """
    first, second = places.chunk(2, dim=1)
    packed = torch.stack([first, (first >> 8) | (second << 4), second >> 4], dim=1)
    return packed.to(torch.int8).view(torch.uint8)


def _unpack_places(packed: Tensor) -> Tensor:
    """Places [n, k], int64, each below 4096."""
    low, mixed, high = packed.to(torch.int64).unbind(dim=1)
    return torch.cat([low | (mixed & 15) << 8, mixed >> 4 | high << 4], dim=1)


def _pack_codes(codes: Tensor) -> Tensor:
    """uint8 [n, k / 4] of codes [n, k] of 2 bits: a byte holds one from each quarter."""
    first, second, third, fourth = codes.chunk(4, dim=1)
    return (first | second << 2 | third << 4 | fourth << 6).view(torch.uint8)


def _unpack_codes(packed: Tensor) -> Tensor:
    return torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
