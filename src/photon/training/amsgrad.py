"""AMSGrad as FedLALR's clients run it (Sun et al. 2023, arXiv 2309.09719)."""

# torch._foreach_* is how torch.optim itself steps many tensors at once.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from photon.training.elementwise import Elementwise
from photon.training.local_tensors import STEP_ELEMENTS, gradients_of, in_batches, locals_of


class Amsgrad(Elementwise):
    """The local step of FedLALR's Algorithm 1, with decoupled weight decay.

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
