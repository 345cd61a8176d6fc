"""Parts within parts: what a structure has its inner codec encode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from photon.compression.casts import Fp32
from photon.compression.codec import Codec, Empty, Number, Parts


class Nesting(Codec):
    """A codec around another, which encodes what this one makes of a tensor; fp32 if None."""

    def __init__(self, inner: Codec | None = None, **given: Number) -> None:
        super().__init__(**given)
        self.inner = inner or Fp32()

    def _encode_inner(self, tensor: Tensor, prefix: str) -> dict[str, Tensor]:
        """The inner codec's parts under names `prefix.part`.

        Without memory: what a structure sends is of another tensor in every round.
        """
        return {f"{prefix}.{name}": part for name, part in self.inner.encode(tensor).items()}

    def _decode_inner(
        self, parts: Parts, prefix: str, shape: Sequence[int], empty: Empty = torch.empty
    ) -> Tensor:
        """What `_encode_inner` was given; ValueError if the parts are not such a tensor's."""
        start = f"{prefix}."
        own = {name[len(start) :]: part for name, part in parts.items() if name.startswith(start)}
        try:
            return self.inner.decode(own, shape, empty)
        except ValueError as error:
            raise ValueError(f"{prefix}: {error}") from error
