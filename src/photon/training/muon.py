"""torch.optim.Muon for hardware without bf16 matrix units.

torch.optim.Muon orthogonalises in bf16, one matrix at a time. On a CPU without bf16 units that
takes several times as long as the rest of the step (LAB.md). This subclass does the same
Newton-Schulz iteration in fp32, batched over matrices of one shape; state and options are
torch.optim.Muon's own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Fp32Muon(torch.optim.Muon):
    """Muon with fp32, shape-batched orthogonalisation; otherwise torch.optim.Muon."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise ValueError("Fp32Muon takes no closure")
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            if parameters:
                _update(group, parameters, gradients, momenta)
        return None


def orthogonalise(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix (Jordan et al. 2024, "Muon").

    Args:
        matrices: [n, rows, columns], fp32.
        coefficients: a, b, c of x -> a x + (b g + c g g) x with g = x x^T.
        steps: iterations.
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


def _update(
    group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor]
) -> None:
    momentum, lr = group["momentum"], float(group["lr"])
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        by_shape[parameter.shape].append(index)
    for shape, indices in by_shape.items():
        batch = torch.stack([gradients[index] for index in indices])
        buffers = torch.stack([momenta[index] for index in indices]).lerp_(batch, 1 - momentum)
        directions = batch.lerp(buffers, momentum) if group["nesterov"] else buffers
        updates = orthogonalise(
            directions.float(), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        step = -lr * _shape_factor(group["adjust_lr_fn"], shape)
        for position, index in enumerate(indices):
            momenta[index].copy_(buffers[position])
            parameters[index].mul_(1 - lr * group["weight_decay"])
            parameters[index].add_(updates[position], alpha=step)


def _shape_factor(rule: str | None, shape: torch.Size) -> float:
    rows, columns = shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
