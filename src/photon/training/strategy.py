"""How a node spreads a model over its ranks, and why (arXiv 2411.02908, section on LLM nodes)."""

from __future__ import annotations

from dataclasses import dataclass

from photon.errors import IncompatibleConfigError
from photon.training.ranks import Seat

#: Share of a device that weights, gradients and optimizer state may take under ddp; the rest is
#: for activations.
_ROOM_FOR_STATE = 0.7


@dataclass(frozen=True)
class Strategy:
    """A choice, "single", "ddp", "fsdp" or "hybrid", and why, for whoever starts the run."""

    name: str
    reason: str

    @property
    def shards(self) -> bool:
        """Whether weights are cut among ranks."""
        return self.name in ("fsdp", "hybrid")


def choose_strategy(
    asked: str, seat: Seat, *, state_bytes: int, device_bytes: int, private: bool = False
) -> Strategy:
    """The strategy for these ranks.

    Args:
        asked: compute.strategy.
        private: steps are those of DP-SGD, which needs whole gradients.
        state_bytes: weights, gradients and optimizer state of a whole copy.
        device_bytes: memory of one device.

    Raises:
        IncompatibleConfigError: what was asked can't work with so many ranks or machines.
    """
    if asked != "auto":
        _require_possible(asked, seat)
        return Strategy(asked, f"compute.strategy asks for it, on {seat.world_size} rank(s)")
    if seat.world_size == 1:
        return Strategy("single", "there is one rank")
    if private:
        return Strategy("ddp", "dp_sgd needs a sequence's whole gradient on each rank")
    needs, has = f"{state_bytes / 1e9:.1f} GB", f"{device_bytes / 1e9:.1f} GB"
    if state_bytes <= _ROOM_FOR_STATE * device_bytes:
        return Strategy(
            "ddp",
            f"a copy's weights, gradients and optimizer state ({needs}) leave room for activations "
            f"on each of {seat.world_size} devices ({has})",
        )
    too_large = f"a copy's weights, gradients and optimizer state ({needs}) are too large"
    return cut_strategy(seat, f"{too_large} for a device ({has})")


def cut_strategy(seat: Seat, why: str) -> Strategy:
    """Cut among all ranks; where machines have several ranks each, among a machine's.

    `why` a copy on each rank won't do is in words.
    """
    if seat.machines > 1 and seat.local_world_size > 1:
        return Strategy(
            "hybrid",
            f"{why}: the model is cut among the {seat.local_world_size} ranks of a machine, whose "
            f"interconnect is fast, and copied between the {seat.machines} machines",
        )
    return Strategy("fsdp", f"{why}: the model is cut among {seat.world_size} ranks")


def _require_possible(asked: str, seat: Seat) -> None:
    if asked == "single" and seat.world_size > 1:
        raise IncompatibleConfigError(
            f'compute.strategy = "single" with {seat.world_size} ranks would train the same model '
            f"{seat.world_size} times",
            hint='Use "auto", "ddp" or "fsdp", or one process.',
        )
    if asked != "single" and seat.world_size == 1:
        raise IncompatibleConfigError(
            f'compute.strategy = "{asked}" needs more than one rank',
            hint="Set compute.processes, or start Photon with torchrun.",
        )
    if asked == "hybrid" and (seat.local_world_size == 1 or seat.machines == 1):
        raise IncompatibleConfigError(
            f'compute.strategy = "hybrid" cuts the model inside a machine and copies it between '
            f"machines; here are {seat.machines} machine(s) of {seat.local_world_size} rank(s)",
            hint='Use "fsdp" on one machine.',
        )
