"""AMSGrad against FedLALR's Algorithm 1 (arXiv 2309.09719)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from photon.config import LocalConfig
from photon.training import InnerOptimizer
from photon.training.elementwise import Amsgrad


def reference(theta: Tensor, m: Tensor, v_hat: Tensor, gs: list[Tensor], *, lr, b1, b2, decay):
    """A client's local steps in one round, fp64; returns theta, m, v, v_hat."""
    theta, m, v_hat = theta.double(), m.double(), v_hat.double()
    v = v_hat
    for g in (g.double() for g in gs):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        v_hat = torch.maximum(v_hat, v)
        theta = theta - lr * decay * theta - lr * m / v_hat.sqrt()
    return theta, m, v, v_hat


def run(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gs: list[Tensor]) -> None:
    for gradient in gs:
        parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_the_papers(decay):
    torch.manual_seed(0)
    # Falling scales: v falls and v-hat must not; some gradients are below epsilon.
    gs = [torch.randn(5, 4) * scale for scale in (1e-4, 3.0, 0.3, 0.03, 0.003, 1.0)]
    parameter = nn.Parameter(torch.randn(5, 4))
    expected = reference(
        parameter.detach(),
        torch.zeros(5, 4),
        torch.full((5, 4), 1e-6),
        gs,
        lr=1e-3,
        b1=0.9,
        b2=0.9,
        decay=decay,
    )
    optimizer = Amsgrad([parameter], lr=1e-3, betas=(0.9, 0.9), eps=1e-3, weight_decay=decay)
    run(parameter, optimizer, gs)
    state = optimizer.state[parameter]
    found = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"])
    for mine, papers in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, papers.float(), rtol=1e-5, atol=1e-7)
    assert bool((state["max_exp_avg_sq"] > state["exp_avg_sq"]).any())


def test_no_bias_correction_and_no_epsilon_in_the_denominator():
    """The first step is lr (1 - b1) g / sqrt(b2 eps^2 + (1 - b2) g^2)."""
    parameter = nn.Parameter(torch.zeros(1))
    run(parameter, Amsgrad([parameter], lr=1.0, betas=(0.9, 0.99), eps=1e-3), [torch.ones(1)])
    expected = -0.1 / (0.99e-6 + 0.01) ** 0.5
    torch.testing.assert_close(parameter.detach(), torch.tensor([expected]))
    # A gradient far below epsilon: the floor is epsilon itself.
    parameter = nn.Parameter(torch.zeros(1))
    run(
        parameter, Amsgrad([parameter], lr=1.0, betas=(0.9, 0.99), eps=1e-3), [torch.ones(1) * 1e-9]
    )
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.1e-9 / 1e-3]))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.weight = nn.Parameter(torch.randn(4, 3))


def test_a_round_starts_from_the_averages_with_v_equal_to_v_hat():
    """What FedLALR's server sends is m and v-hat; v stays with the silo that made it."""
    model = Linear()
    optimizer = InnerOptimizer(model, LocalConfig(optimizer="amsgrad", lr=1e-3))
    torch.manual_seed(4)
    averaged = {
        "weight.exp_avg": torch.randn(4, 3) * 0.1,
        "weight.max_exp_avg_sq": torch.rand(4, 3) + 0.1,
    }
    assert set(averaged) == set(optimizer.initial_state())
    optimizer.load_state_tensors(averaged, steps_taken=40)
    gs = [torch.randn(4, 3) for _ in range(3)]
    m, v_hat = averaged.values()
    expected = reference(model.weight.detach(), m, v_hat, gs, lr=1e-3, b1=0.9, b2=0.99, decay=0.0)
    for gradient in gs:
        model.weight.grad = gradient
        optimizer.step(1.0)
    torch.testing.assert_close(model.weight.detach(), expected[0].float())
    state = optimizer.state_tensors()
    torch.testing.assert_close(state["weight.exp_avg_sq"], expected[2].float())
    assert set(optimizer.averaged_state()) == set(averaged)


def test_epsilon_is_in_the_initial_state():
    config = LocalConfig(optimizer="amsgrad", epsilon=0.25)
    initial = InnerOptimizer(Linear(), config).initial_state()
    assert not initial["weight.exp_avg"].any()
    assert torch.equal(initial["weight.max_exp_avg_sq"], torch.full((4, 3), 0.0625))
