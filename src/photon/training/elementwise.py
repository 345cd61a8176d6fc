"""What optimizers of our own share that compute value by value: AdamW's options, and a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor


class Elementwise(torch.optim.Optimizer):
    """An optimizer of parameters that may be DTensors; nothing is sent.

    Args:
        params: parameters or groups of them.
        lr, weight_decay: of every group that says nothing else.
        betas, eps: likewise; the class's own by default.
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
