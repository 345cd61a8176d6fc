"""Muon (Jordan et al. 2024) on every layout: one process, copies (DDP), rows cut by FSDP2.

State and options are torch.optim.Muon's. That one orthogonalises one matrix at a time, in bf16
(on a CPU without bf16 units that takes several times as long as the rest of the step, LAB.md), and
knows nothing of other ranks. Here matrices of one shape go through Newton-Schulz as a batch, and
each rank orthogonalises only its share of them.
"""

# torch._foreach_* is how torch.optim itself steps many tensors at once.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import _adjust_lr

from photon.errors import IncompatibleConfigError
from photon.training.local_tensors import locals_of

#: Elements that one rank orthogonalises at a time; bounds the memory of a step, which holds a few
#: copies of such a batch, and the size of a message.
BATCH_ELEMENTS = 2**26

#: State of NorMuon, beside Muon's "momentum_buffer".
ROW_MOMENT = "row_moment"
_LEAST = 1e-12

#: What is done to whole matrices, [n, rows, columns].
Whole = Callable[[Tensor], Tensor]


class Muon(torch.optim.Muon):
    """Muon with shape-batched orthogonalisation (fp32 on CPUs, bf16 on CUDA), shared by ranks.

    Matrices may be plain tensors, the same on every rank of `group`, or DTensors whose rows are
    cut over one dimension of their mesh (FSDP2; the other dimensions replicate, and each replica
    does the work for itself). Every rank must step together, with gradients for the same
    parameters.

    Args:
        params: 2-D parameters or groups of them.
        group: ranks that hold the same plain matrices and gradients (DDP); they share the
            orthogonalisation. None: this process does all of it. DTensors bring their own group.
        options: of torch.optim.Muon.
    """

    def __init__(
        self, params: Iterable[Any], *, group: dist.ProcessGroup | None = None, **options: Any
    ) -> None:
        super().__init__(params, **options)
        self._group = group if group is not None and group.size() > 1 else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; IncompatibleConfigError if a DTensor is cut otherwise than along its rows."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        turn = 0
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[_kind(parameter)].append(parameter)
            for parameters in alike.values():
                ranks = _ranks_of(parameters[0], self._group)
                world = 1 if ranks is None else ranks.size()
                size = world * max(1, BATCH_ELEMENTS // max(1, parameters[0].numel()))
                for start in range(0, len(parameters), size):
                    batch = parameters[start : start + size]
                    self._update(group, batch, ranks, turn)
                    # The next batch's first matrix goes to the next rank, so that shapes with
                    # few matrices don't all fall to rank 0.
                    turn += len(batch)

    def _update(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        ranks: dist.ProcessGroup | None,
        turn: int,
    ) -> None:
        whole_gradients: list[Tensor] = []
        whole_momenta: list[Tensor] = []
        self._init_group({"params": parameters}, [], whole_gradients, whole_momenta)
        weights, gradients = locals_of(parameters), locals_of(whole_gradients)
        momenta = locals_of(whole_momenta)
        lr, momentum = float(group["lr"]), group["momentum"]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        directions = momenta
        if group["nesterov"]:
            directions = list(torch._foreach_lerp(gradients, momenta, momentum))

        def newton_schulz(matrices: Tensor) -> Tensor:
            return orthogonalise(
                matrices, group["ns_coefficients"], group["ns_steps"], group["eps"]
            )

        updates = _orthogonalised(directions, newton_schulz, parameters[0], ranks, turn)
        updates = self._finished(parameters, updates, ranks)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(
            weights,
            [update.to(weights[0].dtype) for update in updates],
            alpha=-_adjust_lr(lr, group["adjust_lr_fn"], parameters[0].shape),
        )

    def _finished(
        self, parameters: list[Tensor], updates: list[Tensor], ranks: dist.ProcessGroup | None
    ) -> list[Tensor]:
        """What is made of this rank's parts of orthogonalised matrices; here, nothing."""
        return updates


class NorMuon(Muon):
    """NorMuon (Li et al. 2025, arXiv 2510.05491, algorithm 1): no row moves further than others.

    Each row o of an orthogonalised update is divided by the root of v, a running mean of its own
    squares, and the matrix is brought back to the norm it had:
    v <- b2 v + (1 - b2) mean(o^2). State beside Muon's: v, "row_moment", [rows, 1]. It starts at 0,
    of which the norm makes nothing, so there is no step counter.

    Args:
        row_beta2: b2.
    """

    def __init__(self, params: Iterable[Any], *, row_beta2: float, **options: Any) -> None:
        super().__init__(params, **options)
        self._row_beta2 = row_beta2

    def _finished(
        self, parameters: list[Tensor], updates: list[Tensor], ranks: dist.ProcessGroup | None
    ) -> list[Tensor]:
        for parameter in parameters:
            if ROW_MOMENT not in self.state[parameter]:
                self.state[parameter][ROW_MOMENT] = torch.zeros_like(rows_of(parameter))
        moments = locals_of([self.state[parameter][ROW_MOMENT] for parameter in parameters])
        whole = torch.stack(updates).float()
        squares = whole.square()
        torch._foreach_lerp_(moments, list(squares.mean(2, keepdim=True)), 1 - self._row_beta2)
        evened = whole / torch.stack(moments).sqrt().clamp(min=_LEAST)
        norms = torch.stack([squares.sum((1, 2)), evened.square().sum((1, 2))])
        if ranks is not None and isinstance(parameters[0], DTensor):
            dist.all_reduce(norms, group=ranks)  # each has rows of its own
        scale = (norms[0] / norms[1].clamp(min=_LEAST)).sqrt()
        return list(evened * scale.view(-1, 1, 1))


def rows_of(parameter: Tensor) -> Tensor:
    """What has one value for each row of a matrix, and is cut as it is: its first column."""
    return parameter.detach()[:, :1]


def orthogonalise(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix (Jordan et al. 2024, "Muon").

    Args:
        matrices: [n, rows, columns], fp32 or bf16.
        coefficients: a, b, c of x -> a x + (b g + c g g) x with g = x x^T.
        epsilon: least Frobenius norm that is divided by.

    Returns:
        [n, rows, columns], singular values near 1.
    """
    a, b, c = coefficients
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.transpose(1, 2) if tall else x


def _orthogonalised(
    directions: list[Tensor],
    newton_schulz: Whole,
    model: Tensor,
    ranks: dist.ProcessGroup | None,
    turn: int,
) -> list[Tensor]:
    """This rank's parts of the orthogonalised matrices.

    Args:
        directions: this rank's parts, of matrices of one shape.
        model: any of the parameters; says whether they are cut.
        turn: matrix i is done by rank (turn + i) % world.
    """
    # bf16 where there are matrix units for it, which also halves the bytes to send.
    dtype = torch.bfloat16 if directions[0].device.type == "cuda" else torch.float32
    directions = [direction.to(dtype) for direction in directions]
    if ranks is None:
        return list(newton_schulz(torch.stack(directions)))
    if isinstance(model, DTensor):
        return _over_cut_rows(directions, newton_schulz, model.shape[0], ranks, turn)
    return _over_copies(directions, newton_schulz, ranks, turn)


def _over_copies(
    directions: list[Tensor],
    newton_schulz: Whole,
    ranks: dist.ProcessGroup,
    turn: int,
) -> list[Tensor]:
    """Each rank does every world-th matrix; one all-gather."""
    world, rank = ranks.size(), ranks.rank()
    mine = directions[(rank - turn) % world :: world]
    slots = -(-len(directions) // world)
    done = directions[0].new_zeros(slots, *directions[0].shape)
    if mine:
        done[: len(mine)] = newton_schulz(torch.stack(mine))
    everyones = done.new_empty(world * slots, *directions[0].shape)
    dist.all_gather_into_tensor(everyones, done, group=ranks)
    return [everyones[(turn + i) % world * slots + i // world] for i in range(len(directions))]


def _over_cut_rows(
    directions: list[Tensor],
    newton_schulz: Whole,
    rows: int,
    ranks: dist.ProcessGroup,
    turn: int,
) -> list[Tensor]:
    """Rows travel to the rank that does their matrix, and back: two all-to-alls."""
    world, rank = ranks.size(), ranks.rank()
    columns, owners = directions[0].shape[1], range(world)
    heights = _heights(rows, world)
    owned = [range((owner - turn) % world, len(directions), world) for owner in owners]
    there = [len(owned[owner]) * heights[rank] * columns for owner in owners]
    here = [len(owned[rank]) * height * columns for height in heights]
    sent = torch.cat([directions[i].reshape(-1) for owner in owners for i in owned[owner]])
    received = sent.new_empty(sum(here))
    dist.all_to_all_single(received, sent, here, there, group=ranks)
    count = len(owned[rank])
    if count:
        parts = zip(received.split(here), heights, strict=True)
        whole = torch.cat([part.view(count, height, columns) for part, height in parts], dim=1)
        received = torch.cat([part.reshape(-1) for part in newton_schulz(whole).split(heights, 1)])
    dist.all_to_all_single(sent, received, there, here, group=ranks)
    done = list(directions)
    for owner, part in zip(owners, sent.split(there), strict=True):
        updates = part.view(len(owned[owner]), heights[rank], columns)
        for i, update in zip(owned[owner], updates, strict=True):
            done[i] = update
    return done


def _heights(rows: int, world: int) -> list[int]:
    """Rows of each rank, cut as torch.chunk does: the last ranks may have fewer, or none."""
    most = -(-rows // world)
    return [max(0, min(most, rows - rank * most)) for rank in range(world)]


def _kind(parameter: Tensor) -> Any:
    """What matrices must share to be done as a batch."""
    if isinstance(parameter, DTensor):
        return (parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.shape


def _ranks_of(parameter: Tensor, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Who shares the work on this matrix; None: nobody else."""
    if not isinstance(parameter, DTensor):
        return group
    cut = [
        (dimension, placement)
        for dimension, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    ]
    if not cut:
        return None
    if len(cut) > 1 or cut[0][1] != Shard(0):
        raise IncompatibleConfigError(
            f"Muon needs matrices cut along their rows, not {parameter.placements}"
        )
    ranks = parameter.device_mesh.get_group(cut[0][0])
    return ranks if ranks.size() > 1 else None
