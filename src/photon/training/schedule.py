"""Learning rate as a function of the server-owned clock (global step): no state to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from photon.config import RunConfig


@dataclass(frozen=True)
class Schedule:
    """Factor on the peak learning rate at a global step.

    Attributes:
        kind: "cosine", "wsd" (warm-up, stable, decay) or "constant".
        total_steps: global steps of the whole run.
        warmup_steps: linear warm-up; step 0 takes 1 / warmup_steps of the peak.
        decay_steps: length of wsd's final linear decay.
        min_ratio: factor at the last step.
    """

    kind: str
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    min_ratio: float = 0.1

    @classmethod
    def of(cls, config: RunConfig) -> Schedule:
        """The schedule a run file asks for, stretched over rounds x tau."""
        local = config.local
        total = config.total_steps
        decay = local.decay_steps
        if decay is None:
            decay = max(1, total // 10) if local.schedule == "wsd" else 0
        return cls(local.schedule, total, local.warmup_steps, decay, local.min_lr_ratio)

    def factor(self, global_step: int) -> float:
        """Multiplier of the peak learning rate for the step with this 0-based number."""
        if global_step < self.warmup_steps:
            return (global_step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            start = self.total_steps - self.decay_steps
            if global_step < start:
                return 1.0
            progress = min(1.0, (global_step - start + 1) / self.decay_steps)
            return 1.0 - (1.0 - self.min_ratio) * progress
        span = max(1, self.total_steps - self.warmup_steps - 1)
        progress = min(1.0, (global_step - self.warmup_steps) / span)
        return self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
