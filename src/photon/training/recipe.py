"""Photon's recipe rule (arXiv 2411.02908): keep peak LR, shrink the batch, stretch the schedule."""

from __future__ import annotations

from dataclasses import dataclass

from photon.errors import IncompatibleConfigError


@dataclass(frozen=True)
class CentralRecipe:
    """A recipe tuned for centralised training (or derived from one).

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per step.
        warmup_steps: linear warm-up.
        lr: peak learning rate.
        min_lr: last learning rate.
    """

    steps: int
    batch_size: int
    warmup_steps: int
    lr: float
    min_lr: float


@dataclass(frozen=True)
class LocalRecipe(CentralRecipe):
    """What each participant runs; `rounds` exchanges of `local_steps` (tau) steps."""

    rounds: int
    local_steps: int


def photon_recipe(central: CentralRecipe, *, batch_size: int, local_steps: int) -> LocalRecipe:
    """Derive the federated recipe from a centralised one.

    T_local = T_central * B_central / B_local, warm-up alike, peak LR unchanged (so the learning
    rate is B_central / B_local times what linear scaling would give), rounds = T_local / tau.

    Args:
        central: the centralised recipe.
        batch_size: B_local, sequences per step of one participant.
        local_steps: tau.

    Raises:
        IncompatibleConfigError: batch larger than the central one, or a tau that does not divide
            the stretched schedule into at least one round.
    """
    if not 1 <= batch_size <= central.batch_size:
        raise IncompatibleConfigError(
            f"batch_size = {batch_size} must lie between 1 and the central {central.batch_size}"
        )
    stretch = central.batch_size / batch_size
    steps = round(central.steps * stretch)
    rounds = steps // local_steps if local_steps >= 1 else 0
    if rounds < 1:
        raise IncompatibleConfigError(
            f"local_steps = {local_steps} must lie between 1 and the stretched {steps} steps"
        )
    return LocalRecipe(
        steps=steps,
        batch_size=batch_size,
        warmup_steps=round(central.warmup_steps * stretch),
        lr=central.lr,
        min_lr=central.min_lr,
        rounds=rounds,
        local_steps=local_steps,
    )
