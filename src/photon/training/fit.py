"""Strategy and micro-batch for a model on this node's devices, or why it can't be trained here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from photon.config import RunConfig
from photon.config.children import mechanisms
from photon.errors import DoesNotFitError
from photon.training.device import ComputePlan
from photon.training.hardware import memory_of
from photon.training.memory import (
    MemoryEstimate,
    MemorySettings,
    describe_shortfall,
    estimate_with,
    largest_micro_batch,
    standing_bytes,
)
from photon.training.micro_batch import MicroBatch
from photon.training.ranks import Ranks, Seat
from photon.training.strategy import Strategy, choose_strategy, cut_strategy
from photon.training.trainer import rank_share


@dataclass(frozen=True)
class Fit:
    """How a model is spread over ranks, and how much goes through it at once on each."""

    strategy: Strategy
    micro_batch: MicroBatch
    settings: MemorySettings

    def estimate(self, model: nn.Module, micro_batch_size: int) -> MemoryEstimate:
        """Memory on each device with that micro-batch."""
        settings = replace(self.settings, micro_batch_size=micro_batch_size)
        return estimate_with(model, settings)


def plan_fit(
    model: nn.Module,
    config: RunConfig,
    plan: ComputePlan,
    seat: Seat,
    *,
    share_of: int = 1,
    memo: Path | None = None,
    ranks: Ranks | None = None,
    scores_only: bool = False,
) -> Fit:
    """Choose from estimates of memory; nothing is allocated.

    Args:
        model: on the CPU or the meta device.
        share_of: nodes that share this machine's main memory.
        memo: file of micro-batches found before; see MicroBatch.
        ranks: that must come to the same choice, and so go by the least memory among them.
        scores_only: whether training fits does not matter.

    Raises:
        IncompatibleConfigError: the batch or the strategy does not suit the ranks.
        DoesNotFitError: not even one sequence at a time fits; says by how much, and what helps.
    """
    share = rank_share(config.local.batch_size, seat.world_size)
    settings = MemorySettings(
        optimizer=config.local.optimizer,
        optimizer_bits=config.local.optimizer_bits,
        sequence_length=config.data.sequence_length,
        bf16=plan.autocast_dtype is not None,
        activation_checkpointing=config.compute.activation_checkpointing,
        device_type=plan.device.type,
        accumulates=share > 1,
        private=any(one.mechanism == "dp_sgd" for one in mechanisms(config)),
    )
    total, free = memory_of(plan.device)
    if plan.device.type != "cuda":  # one memory for all processes of this machine
        total //= share_of * seat.local_world_size
        free //= share_of * seat.local_world_size
    if ranks is not None:
        total, free = ranks.least(total), ranks.least(free)
    strategy = choose_strategy(
        config.compute.strategy,
        seat,
        state_bytes=standing_bytes(model, settings),
        device_bytes=total,
        private=settings.private,
    )
    asked = config.compute.micro_batch_size
    most = 1 if settings.private else min(asked or share, share)
    settings = _spread(settings, strategy, seat)
    guess = None if scores_only else _guess(model, settings, free, most)
    may_cut = config.compute.strategy == "auto" and not settings.private
    if guess == 0 and may_cut and strategy.name == "ddp":
        strategy = cut_strategy(seat, "a copy leaves no room for activations")
        settings = _spread(settings, strategy, seat)
        guess = _guess(model, settings, free, most)
    if guess == 0:
        shortfall = describe_shortfall(model, estimate_with(model, settings), free)
        raise DoesNotFitError(shortfall[0], hint=shortfall[1])
    if asked is not None:
        guess = None  # as asked: the estimate may be wrong, and a failed allocation backs off
    sizes = [parameter.numel() for parameter in model.parameters()]
    device = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else None
    facts = [len(sizes), sum(sizes)], device or plan.device.type, seat.world_size
    key = json.dumps([asdict(settings), *facts])
    micro_batch = MicroBatch(share, asked=asked, guess=guess, memo=memo, key=key)
    return Fit(strategy, micro_batch, settings)


def _spread(settings: MemorySettings, strategy: Strategy, seat: Seat) -> MemorySettings:
    shards = {"fsdp": seat.world_size, "hybrid": seat.local_world_size}.get(strategy.name, 1)
    return replace(settings, strategy=strategy.name, shards=shards)


def _guess(model: nn.Module, settings: MemorySettings, free: int, most: int) -> int | None:
    """The largest micro-batch by estimate, 0 if one sequence is too many; None: can't be told."""
    try:
        return largest_micro_batch(model, settings, free, most=most)
    except Exception:
        # Some architectures can't be traced on fake tensors. That must not stop what may well
        # train: the search begins with the whole share, and failed allocations back off.
        return None
