"""The books of a run: totals, evaluations, checkpoints, and the events that tell of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from photon.federation.account import Closed
from photon.federation.checkpoint import CheckpointStore, RunState
from photon.federation.group import needed_states
from photon.federation.node_state import prune_node_states
from photon.federation.tasks import EvalReceipt
from photon.telemetry import Recorder
from photon.telemetry.events import CheckpointSaved, Evaluated, RoundFinished


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
            self._evaluation_bytes += receipt.bytes_down or 0
            self.recorder.emit(
                Evaluated(round=number, perplexity=receipt.perplexity, **vars(receipt))
            )
        return time.perf_counter() - started

    def prune_node_states(self, folder: Path) -> None:
        """Remove the silos' states that no kept checkpoint names.

        Args:
            folder: of the silos' kept states.
        """
        kept = self.checkpoints.states(*self.checkpoints.rounds())
        prune_node_states(folder, needed_states(folder, kept))

    def close_round(self, closed: Closed, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add a round's costs to the totals, checkpoint, and tell that it is over.

        What participants received to evaluate a state counts as the round's in which they did; the
        next round's participants need not receive that state again.
        """
        old, costs = self.state, closed.costs
        costs.bytes_down += self._evaluation_bytes
        self._evaluation_bytes = 0
        self.state = replace(
            closed.after,
            total_tokens=old.total_tokens + costs.tokens,
            tokens_lost=old.tokens_lost + costs.tokens_lost,
            bytes_inside=old.bytes_inside + costs.bytes_inside,
            bytes_up=old.bytes_up + costs.bytes_up,
            bytes_down=old.bytes_down + costs.bytes_down,
            local_train_s=old.local_train_s + costs.local_train_s,
        )
        checkpoint_s = self.save(groups)
        self.recorder.emit(
            RoundFinished(
                **vars(costs),  # what else they have is passed over
                round=self.state.round,
                global_step=self.state.global_step,
                round_s=time.perf_counter() - costs.started,
                checkpoint_s=checkpoint_s,
                simulated_s=self.state.clock.get("now_s"),
                total_tokens=self.state.total_tokens,
                total_bytes_up=self.state.bytes_up,
                total_bytes_down=self.state.bytes_down,
            )
        )
