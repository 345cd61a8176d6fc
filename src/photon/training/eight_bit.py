"""AdamW whose two moments take 8 bits each (Dettmers et al. 2022, arXiv 2110.02861).

Why not torchao's AdamW8bit: it compiles its step (no C++ compiler, no step; 41 s for the first one
on this project's CPU machine), its blocks run across rows and so depend on how FSDP cuts a matrix,
and coding what it decoded gives other codes (a block's most negative value is not in its table),
so that a saved run would not resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from photon.training.elementwise import Elementwise
from photon.training.local_tensors import gradients_of, like, local

#: Values that share a scale.
BLOCK = 256

#: Blocks whose largest value is below this are stored as zeros: products of a smaller scale and
#: the least code would be subnormal, and coding them again would give other codes.
_LEAST_SCALE = 1e-30

#: Elements stepped at a time; a step's temporaries take some 30 bytes for each.
_PART_ELEMENTS = 2**24


@dataclass(frozen=True)
class BlockCodes:
    """A tensor of at least two dimensions in 8 bits, with a scale for each block of a row.

    Blocks never cross rows: however rows are cut among ranks, the codes are the same, and a rare
    token's row of an embedding has a scale of its own.

    Attributes:
        codes: uint8, shaped like the tensor; indices into the code.
        scales: fp32, [..., ceil(columns / BLOCK)]; the largest magnitude of each block.
        signed: whether the code has negative values.
    """

    codes: Tensor
    scales: Tensor
    signed: bool

    @classmethod
    def encode(cls, values: Tensor, *, signed: bool) -> BlockCodes:
        """Nearest codes of `values` (fp32). Encoding what `decode` gave returns the same codes.

        Unsigned, no positive value becomes 0: a second moment of 0 beside a first moment that
        survived would divide by epsilon alone.
        """
        blocks = _blocks(values)
        scales = blocks.abs().amax(-1, keepdim=True)
        scales = torch.where(scales < _LEAST_SCALE, 0.0, scales)
        # A block of zeros: x / inf is 0, whatever x underflowed from.
        relative = blocks / torch.where(scales == 0, math.inf, scales)
        codes = _Code.of(signed, values.device).nearest(relative)
        return cls(_rows(codes, values.shape), scales.squeeze(-1), signed)

    @classmethod
    def zeros(cls, shape: torch.Size, device: torch.device, *, signed: bool) -> BlockCodes:
        blocks = -(-shape[-1] // BLOCK)
        zero = int(_Code.of(signed, device).nearest(torch.zeros(1, device=device)))
        codes = torch.full(shape, zero, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(*shape[:-1], blocks, device=device), signed)

    def __getitem__(self, rows: slice) -> BlockCodes:
        """The codes of some rows: a view."""
        return BlockCodes(self.codes[rows], self.scales[rows], self.signed)

    def write(self, values: Tensor) -> None:
        """Replace all by the codes of `values`, in place."""
        new = BlockCodes.encode(values, signed=self.signed)
        self.codes.copy_(new.codes)
        self.scales.copy_(new.scales)

    def decode(self) -> Tensor:
        """fp32, shaped like the tensor."""
        code = _Code.of(self.signed, self.codes.device)
        return _rows(code.at(_blocks(self.codes)) * self.scales.unsqueeze(-1), self.codes.shape)


class EightBitAdamW(Elementwise):
    """AdamW with exp_avg and exp_avg_sq of matrices stored as BlockCodes between steps.

    The step itself is AdamW's in fp32, from the decoded moments. Vectors (norms, biases) take no
    room worth saving and keep fp32 moments. Parameters may be DTensors cut along rows: the codes
    are of this rank's part.

    State: step, a 0-d fp32 tensor on the CPU; exp_avg and exp_avg_sq, BlockCodes or Tensor. See
    `decoded` and `encode` for tensors.
    """

    betas = (0.9, 0.95)
    eps = 1e-8

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients_of(parameters), strict=True):
            self._update(group, parameter, gradient)

    @torch.no_grad()
    def decoded(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state in fp32: tensors like the parameter (DTensors if it is), and the counter.

        What was in 8 bits is in new tensors. Empty before the first step.
        """
        state = self.state.get(parameter)
        if not state:
            return {}
        return {
            key: value if key == "step" else like(_decoded(value), parameter)
            for key, value in state.items()
        }

    @torch.no_grad()
    def encode(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Replace a parameter's state by what `decoded` gave, or tensors like that."""
        self.state[parameter] = {
            "step": state["step"],
            "exp_avg": _encoded(local(state["exp_avg"]), signed=True),
            "exp_avg_sq": _encoded(local(state["exp_avg_sq"]), signed=False),
        }

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        weights = local(parameter)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = _zeros(weights, signed=True)
            state["exp_avg_sq"] = _zeros(weights, signed=False)
        state["step"] += 1
        step = float(state["step"])
        if weights.ndim < 2:
            _step_rows(group, step, weights, gradient, state["exp_avg"], state["exp_avg_sq"])
            return
        rows = len(weights)
        size = max(1, _PART_ELEMENTS * rows // max(1, weights.numel()))
        for start in range(0, rows, size):
            part = slice(start, start + size)
            moments = state["exp_avg"][part], state["exp_avg_sq"][part]
            _step_rows(group, step, weights[part], gradient[part], *moments)


def _step_rows(
    group: dict[str, Any],
    step: float,
    weights: Tensor,
    gradient: Tensor,
    stored_first: BlockCodes | Tensor,
    stored_second: BlockCodes | Tensor,
) -> None:
    """AdamW's step, in place; the update is of the exact moments, only what is kept is rounded."""
    first, second = _decoded(stored_first), _decoded(stored_second)
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weights.mul_(1 - lr * group["weight_decay"])
    root = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weights.addcdiv_(first, root, value=-lr / (1 - beta1**step))
    for stored, values in ((stored_first, first), (stored_second, second)):
        if isinstance(stored, BlockCodes):
            stored.write(values)


def _zeros(weights: Tensor, *, signed: bool) -> BlockCodes | Tensor:
    if weights.ndim < 2:
        return torch.zeros_like(weights)
    return BlockCodes.zeros(weights.shape, weights.device, signed=signed)


def _encoded(values: Tensor, *, signed: bool) -> BlockCodes | Tensor:
    return BlockCodes.encode(values, signed=signed) if values.ndim >= 2 else values


def _decoded(stored: BlockCodes | Tensor) -> Tensor:
    return stored.decode() if isinstance(stored, BlockCodes) else stored


def _blocks(values: Tensor) -> Tensor:
    """[..., columns] as [..., blocks, BLOCK], the last block filled up; narrow rows are one."""
    columns = values.shape[-1]
    width = min(BLOCK, max(columns, 1))
    missing = -columns % width
    if missing:
        values = pad(values, (0, missing))
    return values.unflatten(-1, (-(-columns // width), width))


def _rows(blocks: Tensor, shape: torch.Size) -> Tensor:
    rows = blocks.flatten(-2)
    return rows if rows.shape == shape else rows[..., : shape[-1]].contiguous()


@dataclass(frozen=True)
class _Code:
    """The dynamic code of the paper: as many values for each decade as its bits allow.

    Decade i of seven, (10^(i-7), 10^(i-6)], holds 2^i evenly spaced magnitudes and its upper end;
    unsigned, 2^(i+1). Both ends of [-1, 1] are in the code, so a block's scale survives decoding
    and coding again (in the paper's own signed code -1 is not).

    Attributes:
        values: fp32, sorted, in [-1, 1] or [0, 1].
        boundaries: fp32, between nearest neighbours, and infinity after the last value.
        first_guess: uint8, [65536]: the code of the least number whose upper 16 bits are the
            index. No two boundaries share those bits, so the nearest code is this one or the next;
            on a CPU that is found ten times as fast as by torch.bucketize.
    """

    values: Tensor
    boundaries: Tensor
    first_guess: Tensor

    @staticmethod
    @lru_cache(maxsize=16)
    def of(signed: bool, device: torch.device) -> _Code:
        values = torch.tensor(_code_values(signed), dtype=torch.float64)
        boundaries = (values[1:] + values[:-1]) / 2
        if not signed:
            boundaries[0] = 0.0
        boundaries = boundaries.float()
        upper = torch.arange(2**16, dtype=torch.int64)
        # Of the numbers that share a sign bit of 1, the least has the greatest magnitude.
        patterns = (upper << 16) | torch.where(upper >= 2**15, 0xFFFF, 0)
        least = patterns.to(torch.int32).view(torch.float32)
        first_guess = torch.bucketize(least, boundaries).to(torch.uint8)
        boundaries = torch.cat([boundaries, torch.tensor([math.inf])])
        return _Code(values.float().to(device), boundaries.to(device), first_guess.to(device))

    def nearest(self, relative: Tensor) -> Tensor:
        """uint8 codes of numbers in [-1, 1]; ties go to the lower one."""
        flat = relative.reshape(-1)
        upper = (flat.view(torch.int32) >> 16) & 0xFFFF
        guess = self.first_guess.index_select(0, upper)
        beyond = flat > self.boundaries.index_select(0, guess.int())
        return (guess + beyond).view(relative.shape)

    def at(self, codes: Tensor) -> Tensor:
        """fp32 values of uint8 codes, shaped like them."""
        return self.values.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _code_values(signed: bool) -> list[float]:
    magnitudes: list[float] = []
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        top = 10.0 ** (decade - 6)
        magnitudes += [top * (0.1 + 0.9 * (place + 1) / count) for place in range(count)]
    if signed:
        return [*(-value for value in reversed(magnitudes)), 0.0, *magnitudes]
    return [0.0, 1e-7, *magnitudes]
