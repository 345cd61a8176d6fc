"""A model on a node's ranks: recomputation, compilation, then copies (DDP) or cuts (FSDP2).

Names of parameters never change, so that an update, a checkpoint and an export mean the same
tensors whatever the strategy was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from photon.errors import ModelMismatchError
from photon.models import HeadLoss, carried_tensors, trainable_parameters, transformer_blocks
from photon.training.device import ComputePlan
from photon.training.local_tensors import copy_as
from photon.training.ranks import Ranks
from photon.training.strategy import Strategy

_aten = torch.ops.aten
#: What selective recomputation keeps: matrix products and attention cost most to do again.
KEPT_ACTIVATIONS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


class PlacedModel:
    """A model ready to train on this rank, and the way to its whole tensors.

    Args:
        model: fp32 weights, or parameters on the meta device (then given memory, not values).
    """

    def __init__(
        self, model: nn.Module, plan: ComputePlan, ranks: Ranks, strategy: Strategy
    ) -> None:
        self.module = model
        self.strategy = strategy
        self._ranks = ranks
        self._plan = plan
        #: Takes the loss in training; None where the architecture wants the plain one.
        self.head = HeadLoss.of(model)
        recompute = recomputation(plan.config.activation_checkpointing)
        if recompute is not None:
            enable: Any = model.activation_checkpointing_enable
            enable(activation_checkpointing_kwargs=recompute)
        if plan.compiles:
            # FSDP2 gathers weights between blocks, which no single graph can span.
            whole = plan.config.compile == "whole" and not strategy.shards
            for part in [model] if whole else transformer_blocks(model):
                part.compile(backend=plan.config.compile_backend, dynamic=False)
        if strategy.shards:
            self._shard()
        else:
            materialise(model, plan.device)
        self._forward: nn.Module = model
        if strategy.name == "ddp":
            ids = [plan.device.index] if plan.device.type == "cuda" else None
            # gradient_as_bucket_view: gradients live in the buckets, once and not twice.
            self._forward = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False
            )
        self.parameters: dict[str, nn.Parameter] = trainable_parameters(model)
        #: Those, and all else that a model's values are.
        self.carried: dict[str, Tensor] = carried_tensors(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; copies exchange gradients in the last only."""
        if isinstance(self._forward, DistributedDataParallel) and not last:
            with self._forward.no_sync():
                yield
            return
        # FSDP2 sums every micro-batch's gradients at once: it is used where memory is short, and
        # gradients that wait for the last micro-batch would wait uncut.
        yield

    def like(self, name: str, whole: Tensor) -> Tensor:
        """`whole` (on every rank) as the tensor of that name is kept: moved, and cut if it is.

        Scalars and tensors of another shape than that are only moved.
        """
        parameter = self.carried[name]
        if whole.shape == parameter.shape:
            return copy_as(whole, parameter)
        return whole.to(parameter.device, copy=True)

    def empty(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Room for a tensor of that shape, cut as the parameter is if it has the same one."""
        parameter = self.parameters.get(name)
        if parameter is not None and shape == parameter.shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    def spread(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Whole tensors of rank 0 as each rank holds them, one at a time on the way.

        They are by "<parameter>.<key>" on rank 0; None on the others.
        """
        own = tensors or {}
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        return {
            name: self._spread(name.rpartition(".")[0], own.get(name), shape, dtype)
            for name, (shape, dtype) in self._ranks.announce(shapes).items()
        }

    def _spread(
        self, parameter: str, whole: Tensor | None, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """A tensor that rank 0 has, as this rank holds it."""
        buffer = torch.empty(shape, dtype=dtype, device=self._plan.device)
        if whole is not None:
            buffer.copy_(whole)
        if self._ranks.size > 1:
            dist.broadcast(buffer, src=0)
        return self.like(parameter, buffer)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor] | None, names: Iterable[str]) -> None:
        """Copy whole tensors in place; rank 0 gives them, the others None.

        Args:
            names: of those among `carried` that are to be given; others are left as they are.

        Raises:
            ModelMismatchError: names or shapes differ from the model's (on every rank).
        """
        mine = {name: self.carried[name] for name in names}
        problem = difference(weights, mine) if weights is not None else None
        problem = self._ranks.announce(problem)
        if problem is not None:
            raise ModelMismatchError(problem)
        self._forget_gathered()
        for name, tensor in mine.items():
            own = None if weights is None else weights[name]
            if self._ranks.size > 1 or own is None:
                own = self._spread(name, own, tensor.shape, tensor.dtype)
            tensor.copy_(own)

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, as this rank holds them, in place."""
        self._forget_gathered()
        for name, tensor in tensors.items():
            self.carried[name].copy_(tensor)

    def _forget_gathered(self) -> None:
        """FSDP2 keeps what it gathered outside of blocks after a forward pass, for a backward pass.

        After one that only scores, the next would go by it, whatever was loaded meanwhile.
        """
        if isinstance(self.module, FSDPModule):
            self.module.reshard()

    def _shard(self) -> None:
        seat, names, sides = self._ranks.seat, ("shard",), (self._ranks.seat.world_size,)
        if self.strategy.name == "hybrid":
            names, sides = ("replicate", "shard"), (seat.machines, seat.local_world_size)
        mesh = init_device_mesh(self._plan.device.type, sides, mesh_dim_names=names)
        dtype = self._plan.autocast_dtype
        precision = MixedPrecisionPolicy()
        if dtype is not None:
            # Weights travel and multiply in bf16, gradients are summed in fp32; the copies that
            # the optimizer steps stay fp32.
            precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        # Block by block, so that never more than one whole block takes memory on a device.
        for block in transformer_blocks(self.module):
            materialise(block, self._plan.device)
            fully_shard(block, mesh=mesh, mp_policy=precision)
        materialise(self.module, self._plan.device)
        fully_shard(self.module, mesh=mesh, mp_policy=precision)


def recomputation(kind: str) -> dict[str, Any] | None:
    """Options of torch's checkpoint for compute.activation_checkpointing; None for "none"."""
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return None if kind == "none" else options


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in KEPT_ACTIVATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def materialise(module: nn.Module, device: torch.device) -> None:
    """Move parameters and buffers to the device; those without memory get some, without values.

    A weight tied between modules stays tied. Parameters that are cut already are left alone.
    """
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            if id(parameter) not in moved:
                moved[id(parameter)] = _moved(parameter, device)
            setattr(part, name, moved[id(parameter)])
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if parameter.is_meta:
        data = torch.empty_like(parameter, device=device)
    elif parameter.device == device:
        return parameter
    else:
        data = parameter.detach().to(device)
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def difference(weights: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> str | None:
    """In words, how names or shapes of weights differ from a model's; None where they don't."""
    if weights.keys() != mine.keys():
        odd = sorted(weights.keys() ^ mine.keys())[0]
        return f"weights and model differ in tensor {odd!r}"
    for name, tensor in weights.items():
        if tensor.shape != mine[name].shape:
            return (
                f"tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"the model's is {tuple(mine[name].shape)}"
            )
    return None
