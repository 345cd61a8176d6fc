"""ADOPT and AMSGrad, and what optimizers of our own share that compute value by value."""

# torch._foreach_* is how torch.optim itself steps many tensors at once.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from photon.training.local_tensors import STEP_ELEMENTS, gradients_of, in_batches, locals_of


class Elementwise(torch.optim.Optimizer):
    """An optimizer of parameters that may be DTensors; nothing is sent.

    What a group says of itself goes before the options; betas and eps are the class's by default.
    """

    betas: ClassVar[tuple[float, float]]
    eps: ClassVar[float]

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"lr": lr, "betas": betas or self.betas, "weight_decay": weight_decay}
        super().__init__(params, options | {"eps": self.eps if eps is None else eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure")
        for group in self.param_groups:
            self._step(group, [p for p in group["params"] if p.grad is not None])

    @abstractmethod
    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Step those parameters of a group that have a gradient."""


class Adopt(Elementwise):
    """ADOPT: Adam that converges at the optimal rate with any beta2 (arXiv 2411.02853).

    Algorithm 2, with the paper's clipping and decoupled weight decay.

    The gradient is divided by the second moment of the steps before it, which makes the two
    independent, and only then averaged:

        v_0 = g_0^2
        m_t = beta1 m_{t-1} + (1 - beta1) clip(g_t / max(sqrt(v_{t-1}), eps), t^(1/4))
        theta_t = (1 - lr weight_decay) theta_{t-1} - lr m_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2

    for t = 1, 2, ... In the paper g_0 only starts v, and no weight moves. Here g_0 is stepped with,
    too, as t = 1 would be: m = (1 - beta1) sign(g_0), and v stays g_0^2. Where a federation resets
    state each round the paper's form would waste a step of each: all of it where tau is 1.

    State: exp_avg (m) and exp_avg_sq (v), shaped like the parameter, and step, the gradients seen
    so far, a 0-d fp32 tensor on the CPU. Parameters may be DTensors; nothing is sent.
    """

    betas = (0.9, 0.9999)
    eps = 1e-6

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        # Counters agree unless some parameter lately had no gradient.
        by_step: dict[int, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_step[int(self._state_of(parameter)["step"])].append(parameter)
        for step, alike in by_step.items():
            for batch in in_batches(alike, STEP_ELEMENTS):
                self._update(group, step, batch)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        gradients = gradients_of(parameters)
        second = locals_of(state["exp_avg_sq"] for state in states)
        for state in states:
            state["step"] += 1
        if step == 0:
            torch._foreach_zero_(second)
            torch._foreach_addcmul_(second, gradients, gradients)
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        weights = locals_of(parameters)
        first = locals_of(state["exp_avg"] for state in states)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        # One buffer the size of the weights, and not two: g times the reciprocal.
        normalised = torch._foreach_sqrt(second)
        torch._foreach_clamp_min_(normalised, group["eps"])
        torch._foreach_reciprocal_(normalised)
        torch._foreach_mul_(normalised, gradients)
        bound = max(1.0, float(step)) ** 0.25
        torch._foreach_clamp_min_(normalised, -bound)
        torch._foreach_clamp_max_(normalised, bound)
        torch._foreach_lerp_(first, normalised, 1 - beta1)
        torch._foreach_add_(weights, first, alpha=-lr)
        if step > 0:
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)


class Amsgrad(Elementwise):
    """The local step of FedLALR (arXiv 2309.09719, Algorithm 1), with decoupled weight decay.

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        v_hat = max(v_hat, v)
        theta = (1 - lr weight_decay) theta - lr m / sqrt(v_hat)

    Unlike torch's Adam(amsgrad=True) there is no bias correction, and epsilon is not added to the
    root: v_hat starts at epsilon^2 and, being a maximum (and a mean of such between rounds), never
    falls below it.

    A round starts with the aggregator's means of m and v_hat, and with v = v_hat: v itself never
    leaves its silo. So where a state holds no exp_avg_sq, it starts as max_exp_avg_sq.

    State: exp_avg (m), max_exp_avg_sq (v_hat), exp_avg_sq (v), shaped like the parameter.
    Parameters may be DTensors; nothing is sent.
    """

    betas = (0.9, 0.99)
    eps = 1e-3

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for batch in in_batches(parameters, STEP_ELEMENTS):
            self._update(group, batch)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(parameter, group["eps"]) for parameter in parameters]
        weights = locals_of(parameters)
        gradients = gradients_of(parameters)
        first = locals_of(state["exp_avg"] for state in states)
        second = locals_of(state["exp_avg_sq"] for state in states)
        greatest = locals_of(state["max_exp_avg_sq"] for state in states)
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        torch._foreach_maximum_(greatest, second)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, first, torch._foreach_sqrt(greatest), value=-lr)

    def _state_of(self, parameter: Tensor, epsilon: float) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["max_exp_avg_sq"] = torch.full_like(parameter, epsilon**2)
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = state["max_exp_avg_sq"].clone()
        return state
