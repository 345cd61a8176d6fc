"""Muon in one process against its equations; test_sharded_optimizers.py has the other layouts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from photon.errors import IncompatibleConfigError
from photon.training import muon
from photon.training.muon import Muon

SHAPES = [(24, 16), (7, 13), (24, 16), (13, 7), (1, 9), (24, 16)]


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def take(optimizer: torch.optim.Optimizer, mine: list[nn.Parameter], steps: int) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        for parameter in mine:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def reference(theta: Tensor, gs: list[Tensor], *, lr: float, mu: float, decay: float) -> Tensor:
    """Jordan et al.'s Muon with Moonshot's update size, fp64, one matrix."""
    theta, momentum = theta.double(), torch.zeros_like(theta, dtype=torch.float64)
    for g in (g.double() for g in gs):
        momentum = mu * momentum + (1 - mu) * g
        x = (1 - mu) * g + mu * momentum
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        theta = (1 - lr * decay) * theta - lr * 0.2 * math.sqrt(max(theta.shape)) * x
    return theta


def test_steps_are_the_papers():
    mine, start = parameters(), parameters()
    options = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = Muon(mine, adjust_lr_fn="match_rms_adamw", **options)
    torch.manual_seed(1)
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(4)]
    for step in gradients:
        for parameter, gradient in zip(mine, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for place, parameter in enumerate(mine):
        taken = [step[place] for step in gradients]
        expected = reference(start[place].detach(), taken, lr=1e-2, mu=0.9, decay=0.1)
        torch.testing.assert_close(parameter.detach(), expected.float(), rtol=0, atol=2e-5)


def test_batches_bound_memory_and_change_nothing(monkeypatch):
    sizes = []
    real = muon.orthogonalise

    def noting(matrices: Tensor, *rest):
        sizes.append(len(matrices))
        return real(matrices, *rest)

    monkeypatch.setattr(muon, "orthogonalise", noting)
    one, other = parameters(), parameters()
    take(Muon(one), one, 2)
    assert max(sizes) == 3
    sizes.clear()
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 24 * 16 * 2)
    take(Muon(other), other, 2)
    assert max(sizes) == 2
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_parameters_without_gradients_are_left_alone():
    mine, start = parameters(), parameters()
    for parameter in mine[:3]:
        parameter.grad = torch.randn_like(parameter)
    optimizer = Muon(mine)
    optimizer.step()
    for place, (parameter, before) in enumerate(zip(mine, start, strict=True)):
        assert torch.equal(parameter, before) == (place >= 3)
        assert (parameter in optimizer.state) == (place < 3)


def test_descends_a_quadratic():
    torch.manual_seed(0)
    target = torch.randn(12, 8)
    parameter = nn.Parameter(torch.zeros(12, 8))
    optimizer = Muon([parameter], lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(150):
        parameter.grad = parameter.detach() - target
        optimizer.step()
    assert float((parameter - target).detach().abs().max()) < 0.2 * float(target.abs().max())


def test_matrices_cut_along_columns_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.randn(4, 6)
        parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)]))
        parameter.grad = distribute_tensor(whole, mesh, [Shard(1)])
        with pytest.raises(IncompatibleConfigError, match="rows"):
            Muon([parameter]).step()
    finally:
        dist.destroy_process_group()


def test_takes_no_closure():
    with pytest.raises(ValueError, match="closure"):
        Muon(parameters()).step(lambda: 0.0)
