"""What a round costs, and what is told of its answers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from photon.evaluation.perplexity import perplexity
from photon.federation.tasks import EvalReceipt, FitTask, Receipt
from photon.telemetry.events import LocalFinished, Notice

#: Where training diverged: the same rounds again would diverge again.
WAY_OUT = (
    "Where the loss diverged, go on with another recipe: `photon resume DIR --set local.lr=...`, "
    "or local.clip_norm, local.warmup_steps."
)

#: No figure of a receipt is larger: sums of them stay finite and exact.
_MOST = 2**53


@dataclass
class RoundCosts:
    """What a round took, in seconds, tokens and payload bytes.

    tokens were merged; tokens_lost were trained, or were to be, and are not. bytes_inside went both
    ways inside groups, and over no link of the federation itself.

    local_train_s is wall time: with several training processes, their busy seconds shared out.
    """

    started: float = field(default_factory=time.perf_counter)
    local_train_s: float = 0.0
    eval_s: float = 0.0
    merge_s: float = 0.0
    tokens: int = 0
    tokens_lost: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_inside: int = 0
    dropped: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    diverged: int = 0


def mean_score(own: Sequence[EvalReceipt]) -> EvalReceipt:
    """The silos' own scores as one, weighted by tokens; its loss is NaN where there are none."""
    tokens = sum(one.tokens for one in own)
    nats = [one.loss * one.tokens for one in own]
    loss = math.fsum(nats) / tokens if tokens else math.nan
    bits_per_byte = None
    # Nats over bits a byte are bytes, but for a factor that is the same for all.
    if own and all(one.bits_per_byte for one in own):
        sizes = [part / (one.bits_per_byte or 1) for part, one in zip(nats, own, strict=True)]
        bits_per_byte = math.fsum(nats) / math.fsum(sizes)
    return EvalReceipt(None, loss, perplexity(loss), bits_per_byte, tokens, 0.0, 0)


def implausible(receipt: Receipt, most_tokens: int) -> str | None:
    """What is wrong with a receipt's figures, which are summed, kept and shown; None: nothing.

    Args:
        most_tokens: that its task has.
    """
    for name, value in (vars(receipt) | vars(receipt.times)).items():
        if isinstance(value, int | float) and not (
            (-_MOST if "loss" in name else 0) <= value <= _MOST
        ):
            return f"its receipt says {name} = {value}"
    if receipt.failure is None and not 0 < receipt.tokens <= most_tokens:
        return f"its receipt says {receipt.tokens} tokens; its task has {most_tokens}"
    return None


def local_finished(receipt: Receipt, *, update_norm: float) -> LocalFinished:
    """A good receipt as an event."""
    # What else a receipt says is passed over.
    return LocalFinished(**vars(receipt), **vars(receipt.times), update_norm=update_norm)


def state_lost(task: FitTask) -> Notice:
    """What is told of a silo that lost the state its task names."""
    return Notice(
        text=f"{task.silo} has lost what it kept after round {task.node_round}: its inner "
        "optimizer and error feedback started afresh, its text went on where it was",
        round=task.round,
        silo=task.silo,
    )


def scaled_down(receipt: Receipt, norm: float, share: float) -> Notice:
    """What is told of an update that is merged as if it were smaller."""
    return Notice(
        text=f"the update of {receipt.silo} is merged {1 / share:.3g} times smaller: its norm "
        f"{norm:.4g} is far above the last round's median",
        round=receipt.round,
        silo=receipt.silo,
    )
