"""What a codec is: a tensor in fewer bytes, and back.

A codec is pure maths. What it gives are tensors of packed bytes and of scales, which the link
writes as they are: their sizes are the bytes on the wire.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from photon.config.codecs import STAGES, Number
from photon.errors import NonFiniteError

#: Parts of an encoded tensor by name: contiguous, on the CPU, uint8 but for scales.
Parts = Mapping[str, Tensor]

#: What a node keeps of one tensor from round to round for a codec that learns (PowerSGD's basis).
Memory = MutableMapping[str, Tensor]

#: Where decoded values are put: given their number, uninitialised fp32 [number].
Empty = Callable[[int], Tensor]

#: The way to all tensors of an update, by name; may be walked more than once.
Update = Callable[[], Iterable[tuple[str, Tensor]]]


class Codec(ABC):
    """Encodes one tensor at a time; without `memory`, the same tensor gives the same parts.

    Decoding is exact arithmetic on the parts, so two decoders agree bit for bit. Names, shapes and
    which codec it was are the caller's to keep.

    Args:
        given: parameters that `photon.config.codecs.STAGES` states, in its bounds, or ValueError;
            its defaults for the others. Plugins have constructors of their own.
    """

    #: In run files and manifests.
    name: ClassVar[str]
    #: Whether fp32 comes back bit for bit.
    lossless: bool = False
    #: Whether it uses `memory`.
    learns: bool = False

    def __init__(self, **given: Number) -> None:
        stated = STAGES[self.name].parameters if self.name in STAGES else {}
        if unknown := given.keys() - stated.keys():
            raise TypeError(f"codec {self.name} takes no {', '.join(sorted(unknown))}")
        for key, parameter in stated.items():
            value = given.get(key, parameter.default)
            if not parameter.allows(value):
                raise ValueError(f"codec {self.name}: {key} = {value}: {parameter} is needed")
            setattr(self, key, value)

    @abstractmethod
    def encode(self, tensor: Tensor, memory: Memory | None = None) -> dict[str, Tensor]:
        """A floating tensor, of any shape and layout, as parts.

        Args:
            memory: of this tensor on this node; read and changed by codecs that learn.

        Raises:
            NonFiniteError: it holds NaN or infinity, or becomes infinite in this codec's numbers.
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: Sequence[int], empty: Empty = torch.empty) -> Tensor:
        """fp32 of what `encode` made of a tensor of this shape.

        Args:
            empty: memory for the result, unless that lies in a part's own.

        Raises:
            ValueError: the parts are not those of such a tensor, in names, dtypes, sizes or values.
        """

    def fitted(self, update: Update) -> Codec:
        """This codec with what it must know of a whole update before its first tensor.

        Decoders need none of it. Most codecs look at a tensor alone and give themselves.
        """
        return self


def bytes_of(parts: Parts) -> int:
    """Bytes that the parts take on the wire."""
    return sum(part.nbytes for part in parts.values())


def flat(tensor: Tensor) -> Tensor:
    """Its values in row-major order, fp32, on the CPU; a view where that costs nothing."""
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().flatten()


def require_finite(extremes: Tensor, codec: str) -> None:
    """Raise NonFiniteError, given values among which any NaN or infinity would show."""
    if not bool(torch.isfinite(extremes).all()):
        raise NonFiniteError(
            f"codec {codec} can't encode a tensor with NaN or infinite values",
            hint="Look at the silo's loss: its training has diverged.",
        )


def require_part(parts: Parts, name: str, dtype: torch.dtype, size: int) -> Tensor:
    """A part; raises ValueError if it is missing, or of another dtype or size."""
    part = parts.get(name)
    if part is None:
        raise ValueError(f"no part {name!r} (there are: {', '.join(sorted(parts)) or 'none'})")
    if part.dtype != dtype or part.numel() != size:
        raise ValueError(
            f"part {name!r} is {part.numel()} x {part.dtype}, expected {size} x {dtype}"
        )
    return part.flatten()
