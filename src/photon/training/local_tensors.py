"""This rank's part of a tensor that FSDP2 may have cut among ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

#: Elements an elementwise optimizer steps at once; its temporary takes four bytes for each.
STEP_ELEMENTS = 2**26


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`: itself, or a DTensor's own memory.

    Elementwise optimizers compute on this, under torch.no_grad: writing to it writes to the
    DTensor, and nothing is dispatched or sent.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return [local(tensor) for tensor in tensors]


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each gradient; all parameters have one."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def in_batches(tensors: Sequence[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Runs of tensors with at most so many elements on this rank, or of one tensor: bounds the
    temporaries of a step that handles many tensors at once.
    """
    batch: list[Tensor] = []
    held = 0
    for tensor in tensors:
        count = local(tensor).numel()
        if batch and held + count > elements:
            yield batch
            batch, held = [], 0
        batch.append(tensor)
        held += count
    if batch:
        yield batch


def like(values: Tensor, model: Tensor) -> Tensor:
    """`values`, a local part, as a tensor of `model`'s kind: itself, or a DTensor cut alike."""
    if not isinstance(model, DTensor):
        return values
    return DTensor.from_local(
        values,
        model.device_mesh,
        model.placements,
        run_check=False,
        shape=model.shape,
        stride=model.stride(),
    )


@torch.no_grad()
def copy_as(tensor: Tensor, model: Tensor) -> Tensor:
    """A copy of `tensor` as `model` is kept: on its device and, if it is, cut as it is cut.

    Args:
        tensor: all of it, on every rank (each takes its part, nothing is sent), or a DTensor cut
            like the model.
        model: says where and how; of the same shape.

    Raises:
        ValueError: a DTensor that is cut otherwise.
    """
    if not isinstance(model, DTensor):
        if isinstance(tensor, DTensor):
            raise ValueError("it is cut among ranks, the parameter is not")
        return tensor.detach().to(model.device, copy=True)
    if isinstance(tensor, DTensor):
        if tensor.device_mesh != model.device_mesh or tensor.placements != model.placements:
            raise ValueError(f"it is cut as {tensor.placements}, the parameter {model.placements}")
        return tensor.detach().clone()
    part = distribute_tensor(
        tensor.detach(), model.device_mesh, model.placements, src_data_rank=None
    )
    # Cloned, or a view of one shard would keep the whole tensor in memory.
    return like(local(part).to(local(model).device).clone(), model)
