"""Is this update fit to be merged? Asked before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from photon.errors import ModelMismatchError, NodeError, NonFiniteError, some
from photon.torch_threads import torch_threads

#: An update's tensors by name, as they come.
Named = Iterable[tuple[str, torch.Tensor]]

#: Elements whose squares are summed at once. torch.dot is ten times as fast as vector_norm on a
#: CPU, and its rounding within a piece of this size is a few parts in a million at most.
_PIECE = 1 << 17

#: A piece whose sum of squares is less may have lost values to underflow.
_SAFE = 1e-25


def check_update(
    tensors: Named,
    reference: Mapping[str, torch.Tensor],
    measured: Callable[[str, torch.Tensor], torch.Tensor | None] = lambda _, tensor: tensor,
) -> float:
    """A pass over one participant's tensors that only checks; nothing is kept.

    Run it before `MergingRule.add`, so that a rejected update leaves the mean untouched.

    Args:
        tensors: the participant's named tensors, any order, any floating dtype.
        reference: the tensors an update must have; only names and shapes are read.
        measured: by name and tensor, of what the norm is taken; None: this one does not count.

    Returns:
        The L2 norm of all that is measured, of pieces in fp32 added up in fp64.

    Raises:
        ModelMismatchError: a name is missing, unknown or given twice, a shape differs, or a
            tensor is not floating point.
        NonFiniteError: a value is NaN or infinite.
    """
    square = 0.0
    for name, tensor in matching(tensors, reference):
        counted = measured(name, tensor)
        if counted is None:
            square_sum(name, tensor)
        else:
            square += square_sum(name, counted)
    return math.sqrt(square)


def require_shape(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise ModelMismatchError unless `tensor` is floating point and shaped like `expected`."""
    if tensor.shape != expected.shape:
        raise ModelMismatchError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}",
            hint="The node trains another model than the aggregator.",
        )
    if not tensor.is_floating_point():
        raise ModelMismatchError(f"tensor {name!r} is {tensor.dtype}, expected floating point")


def require_same_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise ModelMismatchError unless both name the same tensors, in whatever order."""
    found, expected = set(found), set(expected)
    if found != expected:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise ModelMismatchError(
            f"{what}: missing {some(map(repr, missing)) or 'nothing'}; "
            f"unknown {some(map(repr, unknown)) or 'nothing'}",
            hint="These tensors belong to another model.",
        )


def matching(
    tensors: Named, expected: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same stream, checked as it passes: each name of `expected` once, in its shape.

    Raises:
        ModelMismatchError: it is not so; what came before has already passed.
    """
    missing = dict.fromkeys(expected)
    for name, tensor in tensors:
        if name not in missing:
            what = "comes twice in" if name in expected else "is not part of"
            raise ModelMismatchError(
                f"tensor {name!r} {what} the update",
                hint=None if name in expected else f"Expected {some(map(repr, expected))}.",
            )
        del missing[name]
        require_shape(name, tensor, expected[name])
        yield name, tensor
    if missing:
        raise ModelMismatchError(
            f"the update lacks {len(missing)} of {len(expected)} tensors: "
            f"{some(map(repr, missing))}",
            hint="The node trains another model, or its upload was cut.",
        )


def require_weight(weight: float) -> None:
    """Raise NodeError unless an update's weight is a finite number above zero."""
    if not (math.isfinite(weight) and weight > 0):
        raise NodeError(
            f"an update's weight is {weight}; it must be a finite number above 0",
            hint="With tokens as weights, the node trained on no tokens.",
        )


def square_sum(name: str, tensor: torch.Tensor) -> float:
    """The sum of a tensor's squares: of pieces in fp32, added up in fp64.

    It is the same, bit for bit, whatever PyTorch's number of threads.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    # Rules that clip or weight by norms would merge other bits where dot's threads add up in
    # another order; and two are no faster than one here.
    square = 0.0
    with torch_threads(1):
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            square += _square_sum(piece)
    if not math.isfinite(square):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"tensor {name!r} holds {bad} NaN or infinite values of {tensor.numel()}",
            hint="A lower learning rate or a clipped gradient norm keeps local training finite.",
        )
    return square


def _square_sum(piece: torch.Tensor) -> float:
    single = piece.float()
    square = float(torch.dot(single, single))
    if _SAFE < square < math.inf:
        return square
    # Squares of fp32 values may leave its range, which says nothing of the values. In fp64 they
    # can't, so the sum is finite if all values are.
    return float(torch.linalg.vector_norm(piece, dtype=torch.float64)) ** 2
