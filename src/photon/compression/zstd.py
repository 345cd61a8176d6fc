"""Another codec's parts, compressed without loss (Zstandard, RFC 8878)."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
import zstandard
from torch import Tensor

from photon.compression.codec import Codec, Empty, Memory, Number, Parts, Update
from photon.compression.nested import Nesting

#: Before the frame: what kind of number the bytes are, and how many bytes they are.
_HEADER = struct.Struct("<BQ")
#: By code.
_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
_DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
#: Bytes from which on the compressor's own threads win more than they cost.
_THREADED = 2**25
#: Numbers whose bytes are sorted at a time.
_PIECE = 2**16
#: What all parts of a tensor of n values may grow to: no codec needs more, and a bomb wants more.
_BYTES_PER_VALUE, _BYTES_BESIDE = 8, 4096


class Zstd(Nesting):
    """Another codec, and each of its parts compressed.

    Of numbers of several bytes, all first bytes go together, then all second ones: exponents are
    alike and compress well, the last bits of mantissas do not. A part is then uint8: a code of its
    dtype (1 byte), its bytes (8 bytes, little-endian) and a frame. An empty part stays as it is.

    The parts of large tensors depend on the version of the zstd library, never on the number of
    threads.
    """

    name = "zstd"
    #: 1 (fast) to 19 (small).
    level: int

    def __init__(self, inner: Codec | None = None, **given: Number) -> None:
        super().__init__(inner, **given)
        self.lossless, self.learns = self.inner.lossless, self.inner.learns

    def fitted(self, update: Update) -> Codec:
        return Zstd(self.inner.fitted(update), level=self.level)

    def encode(self, tensor: Tensor, memory: Memory | None = None) -> dict[str, Tensor]:
        parts = self.inner.encode(tensor, memory)
        return {name: self._compressed(part) for name, part in parts.items()}

    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        # All sizes are known to be right before the first is believed.
        left = _BYTES_PER_VALUE * math.prod(shape) + _BYTES_BESIDE
        frames = {name: _frame(name, part) for name, part in parts.items() if part.numel()}
        for name, (_, raw, _) in frames.items():
            left -= raw
            if left < 0:
                raise ValueError(
                    f"part {name!r} unpacks to more bytes than a tensor of {math.prod(shape)} "
                    f"values can need (expected {_BYTES_PER_VALUE} x values + {_BYTES_BESIDE})"
                )
        opened = {name: _decompressed(name, *frame) for name, frame in frames.items()}
        return self.inner.decode({**parts, **opened}, shape, empty)

    def _compressed(self, part: Tensor) -> Tensor:
        if not part.numel():
            return part
        if part.dtype not in _CODES:
            raise TypeError(f"codec {self.inner.name} gives parts of {part.dtype}, unknown to zstd")
        # One thread of the compressor's own and none give different frames, two and one the same.
        threads = torch.get_num_threads() if part.nbytes >= _THREADED else 0
        writer = zstandard.ZstdCompressor(
            level=self.level, threads=threads, write_checksum=False, write_content_size=True
        )
        frame = writer.compress(_by_significance(part).data)
        header = _HEADER.pack(_CODES[part.dtype], part.nbytes)
        return torch.frombuffer(bytearray(header + frame), dtype=torch.uint8)


def _bytes_of(part: Tensor) -> np.ndarray:
    """uint8 [n, itemsize], the very memory of a contiguous part."""
    return part.flatten().view(torch.uint8).numpy().reshape(-1, part.element_size())


def _by_significance(part: Tensor) -> np.ndarray:
    """uint8 [itemsize, n] of a part's n numbers."""
    numbers = _bytes_of(part)
    if numbers.shape[1] == 1:
        return numbers.reshape(1, -1)
    planes = np.empty(numbers.shape[::-1], np.uint8)
    # NumPy moves bytes at a stride several times faster than torch, one plane at a time.
    for start in range(0, len(numbers), _PIECE):
        for place, plane in enumerate(planes):
            plane[start : start + _PIECE] = numbers[start : start + _PIECE, place]
    return planes


def _frame(name: str, part: Tensor) -> tuple[torch.dtype, int, memoryview]:
    """dtype, bytes that it says it unpacks to, and frame of a part that is not empty.

    Raises ValueError if its header and its frame don't agree, or it is no part of this codec.
    """
    if part.dtype != torch.uint8 or part.numel() <= _HEADER.size:
        raise ValueError(
            f"part {name!r} is {part.numel()} x {part.dtype}, expected {_HEADER.size + 1} x "
            f"{torch.uint8} or more"
        )
    packed = part.contiguous().flatten().numpy()
    code, raw = _HEADER.unpack(packed[: _HEADER.size].tobytes())
    frame = packed[_HEADER.size :].data
    if code >= len(_DTYPES) or raw % _DTYPES[code].itemsize:
        raise ValueError(f"part {name!r} has no zstd header: dtype {code}, {raw} bytes")
    try:
        said = zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError as error:
        raise ValueError(f"part {name!r} is no zstd frame: {error}") from error
    if said != raw:
        raise ValueError(f"part {name!r} unpacks to {said} bytes, expected {raw} x torch.uint8")
    return _DTYPES[code], raw, frame


def _decompressed(name: str, dtype: torch.dtype, raw: int, frame: memoryview) -> Tensor:
    """The part as the inner codec made it; `_frame` has found its sizes right."""
    try:
        found = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"part {name!r} is a broken zstd frame: {error}") from error
    if len(found) != raw:
        raise ValueError(f"part {name!r} unpacks to {len(found)} x torch.uint8, expected {raw} x")
    part = torch.empty(raw // dtype.itemsize, dtype=dtype)
    planes = np.frombuffer(found, np.uint8).reshape(dtype.itemsize, -1)
    numbers = _bytes_of(part)
    for start in range(0, len(numbers), _PIECE):
        for place, plane in enumerate(planes):
            numbers[start : start + _PIECE, place] = plane[start : start + _PIECE]
    return part
