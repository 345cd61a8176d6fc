"""ADOPT against its equations (arXiv 2411.02853, Algorithm 2 with clipping)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from photon.training import elementwise
from photon.training.elementwise import Adopt

SHAPES = [(6, 5), (7,), (3, 2, 4)]


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def gradients(steps: int) -> list[list[Tensor]]:
    """Scales differ tenfold between steps, so that clipping acts."""
    torch.manual_seed(1)
    return [[torch.randn(shape) * 10.0 ** (step % 3) for shape in SHAPES] for step in range(steps)]


def reference(theta: Tensor, gs: list[Tensor], *, lr, b1, b2, eps, decay) -> Tensor:
    """Algorithm 2 in fp64, one tensor."""
    theta, m = theta.double(), torch.zeros_like(theta, dtype=torch.float64)
    v = gs[0].double() ** 2
    for t, g in [(1, gs[0]), *enumerate(gs[1:], start=1)]:
        g = g.double()
        normalised = g / v.sqrt().maximum(torch.tensor(eps, dtype=torch.float64))
        m = b1 * m + (1 - b1) * normalised.clamp(-(t**0.25), t**0.25)
        theta = theta - lr * decay * theta - lr * m
        v = b2 * v + (1 - b2) * g * g
    return theta


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("beta2", [0.9999, 0.9])
def test_steps_are_the_papers(beta2, decay):
    mine, start = parameters(), parameters()
    optimizer = Adopt(mine, lr=1e-2, betas=(0.9, beta2), eps=1e-6, weight_decay=decay)
    taken = gradients(6)
    for step in taken:
        for parameter, gradient in zip(mine, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for place, parameter in enumerate(mine):
        expected = reference(
            start[place].detach(),
            [step[place] for step in taken],
            lr=1e-2,
            b1=0.9,
            b2=beta2,
            eps=1e-6,
            decay=decay,
        )
        torch.testing.assert_close(parameter.detach(), expected.float(), rtol=1e-5, atol=1e-6)


def test_the_first_step_goes_by_signs():
    """The paper's moves nothing: a federation that resets state each round would waste it."""
    mine, start = parameters(), parameters()
    optimizer = Adopt(mine, lr=0.1, weight_decay=0.5)
    for parameter in mine:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter, before in zip(mine, start, strict=True):
        expected = 0.95 * before - 0.1 * 0.1 * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected.detach())
        state = optimizer.state[parameter]
        assert torch.equal(state["exp_avg_sq"], parameter.grad**2)
        assert state["step"].shape == ()
        assert state["step"] == 1


def test_steps_are_bounded_however_large_the_gradient():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = Adopt([parameter], lr=1e-2, betas=(0.0, 0.9999))
    for size in (1e-12, 1e6):
        parameter.grad = torch.full((3,), size)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), -1e-2))


def test_each_parameter_counts_its_own_gradients():
    """One that is used from the third step on starts like any other."""
    late, alone = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    other = nn.Parameter(torch.ones(2))
    both, single = Adopt([other, late], lr=1e-2), Adopt([alone], lr=1e-2)
    torch.manual_seed(3)
    for step in range(5):
        other.grad = torch.randn(2)
        if step >= 2:
            late.grad = torch.randn(4)
            alone.grad = late.grad.clone()
            single.step()
        both.step()
    assert torch.equal(late, alone)


def test_descends_where_adam_with_a_small_beta2_does_not():
    """Reddi et al. 2018: rare large gradients point down, frequent small ones up."""
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = Adopt([parameter], lr=1e-2, betas=(0.0, 0.1))
    adam_parameter = nn.Parameter(torch.zeros(()))
    adam = torch.optim.Adam([adam_parameter], lr=1e-2, betas=(0.0, 0.1))
    torch.manual_seed(0)
    for _ in range(3000):
        gradient = 10.0 if torch.rand(()) < 0.2 else -1.0
        for one, stepper in ((parameter, optimizer), (adam_parameter, adam)):
            one.grad = torch.tensor(gradient)
            stepper.step()
    assert float(parameter.detach()) < float(adam_parameter.detach())


def test_batches_bound_memory_and_change_nothing(monkeypatch):
    results = []
    for elements in (2**26, 10):
        monkeypatch.setattr(elementwise, "STEP_ELEMENTS", elements)
        mine = parameters()
        optimizer = Adopt(mine, lr=1e-2)
        for step in gradients(3):
            for parameter, gradient in zip(mine, step, strict=True):
                parameter.grad = gradient
            optimizer.step()
        results.append(mine)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
