"""What a round costs, and what is told of its answers."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from photon.config import RunConfig
from photon.config.children import LEAF
from photon.federation.checkpoint import RunState
from photon.federation.pace import running_mean
from photon.federation.tasks import EvalReceipt, FitTask, Receipt
from photon.telemetry.events import LocalFinished, Notice, RoundMerged

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


@dataclass(frozen=True)
class Closed:
    """A round that is over.

    Attributes:
        after: the numbers of a run that the round changed; its totals are its keeper's.
        participants: who was asked.
        receipts: of what was merged.
    """

    after: RunState
    costs: RoundCosts
    participants: Collection[str]
    receipts: Sequence[Receipt]


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
    figures = {"loss": loss, "bits_per_byte": bits_per_byte, "tokens": tokens}
    return EvalReceipt(None, **figures, eval_s=0.0, bytes_down=0)


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


def after_round(
    config: RunConfig,
    before: RunState,
    new: Sequence[FitTask],
    merged: Sequence[tuple[FitTask, Receipt]],
    asked: int,
) -> RunState:
    """A run's numbers after a round, but for the server's and for who is still at work.

    Args:
        new: tasks that were handed in for it.
        merged: and their receipts.
        asked: how many were at work in it.
    """
    tau, batch = config.local.steps, config.local.batch_size
    children = config.federation.children

    def read(task: FitTask) -> int:
        return task.steps * batch * (children.get(task.silo, LEAF).nodes or 1)

    if config.federation.pace == "buffered":
        # The clock goes by what the whole fleet trained, of which a merge has a part.
        tau = max(1, round(sum(task.steps for task, _ in merged) / asked))
    speeds = dict(before.speeds)
    for task, receipt in merged:
        speed = task.steps / max(receipt.train_s, 1e-9)
        speeds[task.silo] = running_mean(speeds.get(task.silo, 0.0), speed)
    return replace(
        before,
        round=before.round + 1,
        global_step=before.global_step + tau,
        node_rounds=before.node_rounds | {task.silo: task.round for task, _ in merged},
        # Whatever came of it: nothing in a silo's text can keep it out for longer than once.
        cursors=before.cursors | {one.silo: one.cursor + read(one) for one in new},
        merged={task.silo: task.round for task, _ in merged},
        speeds=speeds,
        good_s=before.good_s + sum(one.train_s for _, one in merged),
        exposed_s=before.exposed_s + sum(one.load_s + one.publish_s for _, one in merged),
    )


def round_merged(
    number: int, merged: Sequence[tuple[FitTask, Receipt]], norm: float, merge_s: float
) -> RoundMerged:
    """What is told of a round that was merged."""
    tokens = sum(receipt.tokens for _, receipt in merged)
    loss = sum(receipt.loss * receipt.tokens for _, receipt in merged) / max(1, tokens)
    return RoundMerged(
        round=number,
        participants=[receipt.silo for _, receipt in merged],
        tokens=tokens,
        train_loss=loss,
        pseudo_gradient_norm=norm,
        merge_s=merge_s,
    )
