"""The rounds of a run that are left, and its books: each is closed by a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from photon.errors import QuorumLostError
from photon.federation import CheckpointStore, Closed, EvalReceipt, Federation, RunState
from photon.federation.group import needed_states
from photon.federation.node_state import prune_node_states
from photon.telemetry import Recorder
from photon.telemetry.events import CheckpointSaved, Evaluated, RoundFinished


class Rounds:
    """Drives a federation from the last checkpoint to the end, and keeps the books.

    Args:
        federation: what trains.
        checkpoints: of the run; what silos keep lies beside them, and is pruned as they are.
        draining: asked before each round; where it is true, the round before was the last for now.
        ended: asked before each round; where it is true, the round before was the last of all.
        clock: what a resume needs of the engine's time, where that is simulated.

    Attributes:
        state: as of the last finished round; at first, where to go on.
        evaluation: newest scores by silo (None: the global set), empty before the first.
    """

    def __init__(
        self,
        federation: Federation,
        state: RunState,
        recorder: Recorder,
        checkpoints: CheckpointStore,
        *,
        draining: Callable[[], bool] = lambda: False,
        ended: Callable[[], bool] = lambda: False,
        clock: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.state = state
        self.evaluation: dict[str | None, EvalReceipt] = {}
        self._evaluated_round: int | None = None
        self._evaluation_bytes = 0
        self._config = federation.config
        self.federation = federation
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._draining = draining
        self._ended = ended
        self._clock = clock

    def run(self) -> bool:
        """Run the rounds that are left, and evaluate what came out.

        Returns:
            Whether the run is over; false where it is to drain.

        Raises:
            QuorumLostError: a round had too few good updates and the fleet has no others to try it
                with; or too few silos came. The last checkpoint stands.
            NonFiniteError: centralised training diverged; the last checkpoint stands.
        """
        every = self._config.eval.every
        if self.state.round == 0:
            self._save()
            if every:
                self._evaluate(self.state, self.state)
        while self.state.global_step < self._config.total_steps and not self._ended():
            number = self.state.round + 1
            candidates = None if self._draining() else self.federation.fleet.drawn_from(number)
            if candidates is None:
                return False
            try:
                closed = self.federation.round(self.state, candidates)
            except QuorumLostError:
                if not self.federation.fleet.lost(number):
                    raise
                continue
            last = closed.after.global_step >= self._config.total_steps
            if last or (every and number % every == 0):
                asked = closed.participants
                closed.costs.eval_s = self._evaluate(self.state, closed.after, asked)
            self._close(closed)
        if self._evaluated_round != self.state.round:
            self._evaluate(self.state, self.state)
        return True

    def _save(self) -> float:
        """Checkpoint the current state; returns the seconds it took."""
        started = time.perf_counter()
        self.state = replace(self.state, elapsed_s=self._recorder.elapsed_s)
        server, outstanding = self.federation.server, self.federation.outstanding
        # The server's tensors, and the versions that somebody still works from.
        size = self._checkpoints.save(self.state, server.groups() | outstanding.versions())
        save_s = time.perf_counter() - started
        self._recorder.emit(CheckpointSaved(round=self.state.round, bytes=size, save_s=save_s))
        return save_s

    def _evaluate(
        self, before: RunState, after: RunState, participants: Collection[str] = ()
    ) -> float:
        """Note and tell scores as they arrive; returns the seconds all of them took."""
        started, number = time.perf_counter(), self.federation.server.version.number
        self.evaluation, self._evaluated_round = {}, number
        for receipt in self.federation.evaluate(before, participants, after.node_rounds):
            self.evaluation[receipt.silo] = receipt
            self._evaluation_bytes += receipt.bytes_down or 0
            scores = Evaluated(round=number, perplexity=receipt.perplexity, **vars(receipt))
            self._recorder.emit(scores)
        return time.perf_counter() - started

    def _close(self, closed: Closed) -> None:
        """Add a round's costs to the totals, checkpoint, tell that it is over, and prune.

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
            clock=self._clock(),
        )
        checkpoint_s = self._save()
        self._recorder.emit(
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
        kept = self._checkpoints.states(*self._checkpoints.rounds())
        folder = self._checkpoints.folder.parent / "nodes"
        prune_node_states(folder, needed_states(folder, kept))


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
