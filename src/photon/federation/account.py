"""What a round costs, and the numbers of a run that it changes."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from photon.config import RunConfig
from photon.config.children import LEAF
from photon.federation.checkpoint import RunState
from photon.federation.pace import running_mean
from photon.federation.tasks import Epsilon, FitTask, Receipt
from photon.telemetry.events import RoundMerged

#: No figure of a receipt is larger: sums of them stay finite and exact.
_MOST = 2**53


@dataclass
class RoundCosts:
    """What a round took, in seconds, tokens and payload bytes.

    tokens were merged; tokens_lost were trained, or were to be, and are not. bytes_inside went both
    ways inside groups, and over no link of the federation itself. epsilon is what answers said.

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
    epsilon: dict[str, Epsilon | None] = field(default_factory=dict)
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
    losses = [one.loss * one.tokens for _, one in merged if one.loss is not None]
    return RoundMerged(
        round=number,
        participants=[receipt.silo for _, receipt in merged],
        tokens=tokens,
        train_loss=sum(losses) / max(1, tokens) if len(losses) == len(merged) else None,
        pseudo_gradient_norm=norm,
        merge_s=merge_s,
    )


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
