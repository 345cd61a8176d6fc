"""The largest values of a whole update, and where they are (FLASC, arXiv 2406.05233)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from photon.compression.codec import (
    Empty,
    Memory,
    Parts,
    Update,
    flat,
    require_finite,
    require_part,
)
from photon.compression.nested import Nesting

#: Values whose places share 16 bits.
_BLOCK = 2**16
#: The bits of fp32 infinity; magnitudes are in the order of their bits, NaN beyond infinity.
_INFINITY = 0x7F800000


class TopK(Nesting):
    """The share `density` of an update's values that are largest in magnitude; the rest is 0.

    One threshold holds for all tensors of an update that the codec was `fitted` to, so that
    tensors which moved more send more; without, each tensor sends the same share of itself. The
    threshold is the magnitude of the last value that is due: what ties with it is sent too, zeros
    never are.

    Places are 16 bits each within blocks of 65,536 values, with a count for each block (parts
    `index` and `counts`), or one bit for every value where that takes less, beyond a density of
    1/16 (part `bitmap`). Kept values, in their order in the tensor, go through the inner codec
    (parts `values.*`), which is given them without memory and is not fitted itself.
    """

    name = "topk"
    density: float
    _threshold: int | None = None

    def fitted(self, update: Update) -> TopK:
        """This codec with one threshold for all tensors of the update, which is walked twice.

        Raises NonFiniteError if it holds NaN or infinity.
        """
        codec = copy.copy(self)
        codec._threshold = _threshold(update, self.density)
        return codec

    def encode(self, tensor: Tensor, memory: Memory | None = None) -> dict[str, Tensor]:
        values = flat(tensor)
        threshold = self._threshold
        if threshold is None:
            threshold = _threshold(lambda: [("", values)], self.density)
        counts: list[int] = []
        index: list[Tensor] = [torch.empty(0, dtype=torch.int16)]
        kept: list[Tensor] = [values[:0]]
        for block in values.split(_BLOCK) if values.numel() else ():
            bits = _magnitude(block)
            _require_numbers(bits)
            where = torch.from_numpy(np.flatnonzero(bits >= threshold))
            counts.append(len(where))
            index.append(where.to(torch.int16))
            kept.append(block[where])
        if 2 * sum(counts) + 4 * len(counts) <= -(-values.numel() // 8):
            places = {
                "counts": torch.tensor(counts, dtype=torch.int32).view(torch.uint8),
                "index": torch.cat(index).view(torch.uint8),
            }
        else:
            places = {"bitmap": _bitmap(values, threshold)}
        return places | self._encode_inner(torch.cat(kept), "values")

    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        count = math.prod(shape)
        if "bitmap" in parts:
            places = _places_of_bitmap(parts, count)
        elif "index" in parts:
            places = _places_of_index(parts, count)
        else:
            raise ValueError(f"no part 'index' or 'bitmap' (there are: {', '.join(sorted(parts))})")
        values = empty(count).zero_()
        values[places] = self._decode_inner(parts, "values", (len(places),))
        return values.view(tuple(shape))


def _magnitude(values: Tensor) -> np.ndarray:
    """The bits of |x|, int32, in the order of |x|."""
    # In NumPy, here and below: its comparisons and searches need no second thread to be fast.
    return values.numpy().view(np.int32) & 0x7FFFFFFF


def _require_numbers(bits: np.ndarray) -> None:
    """Raise NonFiniteError if there is NaN or infinity among magnitudes."""
    if bits.max() >= _INFINITY:
        require_finite(torch.tensor(torch.inf), TopK.name)


def _magnitudes(update: Update) -> Iterator[np.ndarray]:
    """All of an update, a piece at a time that fits a CPU's cache."""
    for _, tensor in update():
        values = flat(tensor)
        for piece in values.split(_BLOCK) if values.numel() else ():
            yield _magnitude(piece)


def _threshold(update: Update, density: float) -> int:
    """Bits of the smallest magnitude that is sent, at least 1, which leaves zeros out.

    Exact: the k-th largest of all, k = density x values, at least one. First by the high half of
    its bits, then among those that share it by the low half.

    Raises:
        NonFiniteError: there is NaN or infinity.
    """
    high = torch.zeros(2**15, dtype=torch.int64)
    for bits in _magnitudes(update):
        _require_numbers(bits)
        high += torch.bincount(torch.from_numpy(bits >> 16), minlength=2**15)
    total = int(high.sum())
    if not total:
        return 1
    due = max(1, round(density * total))
    upper, larger = _bin_of(high, due)
    low = torch.zeros(2**16, dtype=torch.int64)
    for bits in _magnitudes(update):
        within = bits[np.flatnonzero((bits >> 16) == upper)] & 0xFFFF
        if len(within):
            low += torch.bincount(torch.from_numpy(within), minlength=2**16)
    lower, _ = _bin_of(low, due - larger)
    return max(1, upper << 16 | lower)


def _bin_of(histogram: Tensor, due: int) -> tuple[int, int]:
    """The bin of the `due`-th value from the top, and how many are in bins above."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, due))
    return len(histogram) - 1 - place, int(from_top[place - 1]) if place else 0


def _bitmap(values: Tensor, threshold: int) -> Tensor:
    """A bit for each value, set where it is sent.

    Of a block of n values, byte j holds those of values j, j + n/8, j + 2n/8, ..., so that all
    reads and writes are of runs; a last block is padded to whole bytes.
    """
    packed: list[Tensor] = []
    for block in values.split(_BLOCK):
        mask = torch.from_numpy((_magnitude(block) >= threshold).view(np.int8))
        mask = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(8, -1)
        byte = mask[0].clone()
        for place in range(1, 8):
            byte |= mask[place] << place
        packed.append(byte.view(torch.uint8))
    return torch.cat(packed)


def _places_of_bitmap(parts: Parts, count: int) -> Tensor:
    """int64 [k], ascending, below `count`; ValueError if a bit is set where there is no value."""
    bitmap = require_part(parts, "bitmap", torch.uint8, -(-count // 8))
    places = [torch.empty(0, dtype=torch.int64)]
    for number, packed in enumerate(bitmap.split(_BLOCK // 8) if count else ()):
        mask = packed.new_empty(8, len(packed))
        for place in range(8):
            torch.bitwise_right_shift(packed, place, out=mask[place])
        places.append(mask.bitwise_and_(1).flatten().nonzero().flatten() + number * _BLOCK)
    found = torch.cat(places)
    if len(found) and int(found[-1]) >= count:
        raise ValueError(f"part 'bitmap' has a value at {int(found[-1])} of {count}")
    return found


def _places_of_index(parts: Parts, count: int) -> Tensor:
    """int64 [k], ascending, below `count`; raises ValueError if the parts say otherwise."""
    blocks = -(-count // _BLOCK)
    # Copies, as what came over a wire need not lie at whole numbers of 4 bytes.
    counts = require_part(parts, "counts", torch.uint8, 4 * blocks).clone().view(torch.int32)
    if bool(((counts < 0) | (counts > _BLOCK)).any()):
        raise ValueError(f"part 'counts' is not of blocks of {_BLOCK} values")
    kept = int(counts.sum())
    index = require_part(parts, "index", torch.uint8, 2 * kept).clone().view(torch.int16)
    starts = torch.arange(0, blocks * _BLOCK, _BLOCK).repeat_interleave(counts)
    places = (index.to(torch.int64) & 0xFFFF).add_(starts)
    if kept and (bool((places.diff() <= 0).any()) or int(places[-1]) >= count):
        raise ValueError(f"part 'index' is not ascending within {count} values")
    return places
