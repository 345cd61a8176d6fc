"""The books of a run: totals, evaluations, checkpoints, and the events that tell of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from photon.federation.checkpoint import CheckpointStore, RunState
from photon.federation.node_state import prune_node_states
from photon.federation.tasks import EvalReceipt, FitTask, Receipt
from photon.telemetry import Recorder
from photon.telemetry.events import (
    CheckpointSaved,
    Evaluated,
    LocalFinished,
    Notice,
    RoundFinished,
)

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

    local_train_s is wall time: with several training processes, their busy seconds shared out.
    """

    started: float = field(default_factory=time.perf_counter)
    local_train_s: float = 0.0
    eval_s: float = 0.0
    merge_s: float = 0.0
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    dropped: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    diverged: int = 0


class Ledger:
    """Keeps a run's state between rounds and writes it down.

    Attributes:
        state: as of the last finished round.
        evaluation: newest scores by silo (None: the global set), empty before the first.
        evaluated_round: the round they are of.
    """

    def __init__(self, state: RunState, recorder: Recorder, checkpoints: CheckpointStore) -> None:
        self.state = state
        self.evaluation: dict[str | None, EvalReceipt] = {}
        self.evaluated_round: int | None = None
        self._evaluation_bytes = 0
        self.recorder = recorder
        self.checkpoints = checkpoints

    def save(self, groups: Mapping[str, Mapping[str, Tensor]]) -> float:
        """Checkpoint the current state; returns the seconds it took."""
        started = time.perf_counter()
        self.state = replace(self.state, elapsed_s=self.recorder.elapsed_s)
        size = self.checkpoints.save(self.state, groups)
        save_s = time.perf_counter() - started
        self.recorder.emit(CheckpointSaved(round=self.state.round, bytes=size, save_s=save_s))
        return save_s

    def record_evaluation(self, number: int, receipts: Iterable[EvalReceipt]) -> float:
        """Note and tell scores as they arrive; returns the seconds all of them took."""
        started = time.perf_counter()
        self.evaluation, self.evaluated_round = {}, number
        for receipt in receipts:
            self.evaluation[receipt.silo] = receipt
            self._evaluation_bytes += receipt.bytes_down
            self.recorder.emit(Evaluated(round=number, **vars(receipt)))
        return time.perf_counter() - started

    def prune_node_states(self, folder: Path) -> None:
        """Remove the silos' states that no kept checkpoint names.

        Args:
            folder: of the silos' kept states.
        """
        needed: dict[str, set[int]] = {}
        for state in self.checkpoints.kept_states():
            for silo, number in state.node_rounds.items():
                needed.setdefault(silo, set()).add(number)
        prune_node_states(folder, needed)

    def close_round(
        self,
        costs: RoundCosts,
        groups: Mapping[str, Mapping[str, Tensor]],
        *,
        global_step: int,
        node_rounds: dict[str, int],
        cursors: dict[str, int],
        outer_update_bytes: int = 0,
        merged_norm: float = 0.0,
        merged_lr_sum: float = 0.0,
    ) -> None:
        """Add a round's costs to the totals, checkpoint, and tell that it is over.

        What participants received to evaluate a state counts as the round's in which they did; the
        next round's participants need not receive that state again.
        """
        old = self.state
        costs.bytes_down += self._evaluation_bytes
        self._evaluation_bytes = 0
        self.state = replace(
            old,
            round=old.round + 1,
            global_step=global_step,
            node_rounds=node_rounds,
            cursors=cursors,
            total_tokens=old.total_tokens + costs.tokens,
            bytes_up=old.bytes_up + costs.bytes_up,
            bytes_down=old.bytes_down + costs.bytes_down,
            local_train_s=old.local_train_s + costs.local_train_s,
            outer_update_bytes=outer_update_bytes,
            merged_norm=merged_norm,
            merged_lr_sum=merged_lr_sum,
        )
        checkpoint_s = self.save(groups)
        self.recorder.emit(
            RoundFinished(
                **vars(costs),  # what else they have is passed over
                round=self.state.round,
                global_step=global_step,
                round_s=time.perf_counter() - costs.started,
                checkpoint_s=checkpoint_s,
                total_tokens=self.state.total_tokens,
                total_bytes_up=self.state.bytes_up,
                total_bytes_down=self.state.bytes_down,
            )
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


def due(every: int, number: int, rounds: int) -> bool:
    """Whether round `number` ends with an evaluation; the last one always does."""
    return number == rounds or (every > 0 and number % every == 0)
