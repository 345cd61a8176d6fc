"""Parts within parts: what a structure has its inner codec encode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from photon.compression.codec import Codec, Empty, Parts


def encode_nested(inner: Codec, tensor: Tensor, prefix: str) -> dict[str, Tensor]:
    """The inner codec's parts under names `prefix.part`.

    Without memory: what a structure sends is of another tensor in every round.
    """
    return {f"{prefix}.{name}": part for name, part in inner.encode(tensor).items()}


def decode_nested(
    inner: Codec, parts: Parts, prefix: str, shape: Sequence[int], empty: Empty = torch.empty
) -> Tensor:
    """What `encode_nested` was given.

    Raises:
        ValueError: the parts under that prefix are not those of such a tensor.
    """
    start = f"{prefix}."
    own = {name.removeprefix(start): part for name, part in parts.items() if name.startswith(start)}
    try:
        return inner.decode(own, shape, empty)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error


def has_nested(parts: Parts, prefix: str) -> bool:
    """Whether there are parts under that prefix."""
    return any(name.startswith(f"{prefix}.") for name in parts)
