"""Plain numbers of fewer bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from photon.compression.codec import Codec, Empty, Memory, Parts, flat, require_finite, require_part


class _Cast(Codec):
    _dtype: ClassVar[torch.dtype]

    def encode(self, tensor: Tensor, memory: Memory | None = None) -> dict[str, Tensor]:
        values = flat(tensor).to(self._dtype, copy=True)
        if values.numel():
            # The extremes are those of the cast values: fp16 overflows beyond 65,504.
            require_finite(torch.stack([values.amax(), values.amin()]), self.name)
        return {"values": values}

    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        values = require_part(parts, "values", self._dtype, math.prod(shape))
        if self._dtype != torch.float32:
            values = empty(values.numel()).copy_(values)
        return values.view(tuple(shape))


class Fp32(_Cast):
    """As it is."""

    name = "fp32"
    _dtype = torch.float32
    lossless = True


class Bf16(_Cast):
    """fp32's range with 8 bits of precision: an error of at most 1/256 of a value."""

    name = "bf16"
    _dtype = torch.bfloat16


class Fp16(_Cast):
    """11 bits of precision between 6e-5 and 65,504; pseudo-gradients may lie below."""

    name = "fp16"
    _dtype = torch.float16
