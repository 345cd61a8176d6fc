"""The rounds of a run that are left, and its books: each is closed by a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from photon.energy.account import Spent
from photon.errors import QuorumLostError
from photon.federation import CheckpointStore, Closed, EvalReceipt, Federation, RunState
from photon.federation.account import RoundCosts
from photon.federation.group import needed_states
from photon.federation.node_state import prune_node_states
from photon.telemetry import Recorder
from photon.telemetry.events import CheckpointSaved, Evaluated, RoundFinished

#: Tensors of a checkpoint, by group.
Groups = dict[str, Mapping[str, Tensor]]


class Rounds:
    """Drives a federation from the last checkpoint to the end, and keeps the books.

    Args:
        federation: what trains.
        checkpoints: of the run; what silos keep lies beside them, and is pruned as they are.
        draining: asked before each round; where it is true, the round before was the last for now.
        ended: asked before each round; where it is true, the round before was the last of all.
        clock: what a resume needs of the engine's time, where that is simulated.
        ahead: whether a round's books are closed while the next one's tasks are at work already:
            a kill meanwhile has both rounds done again.
        used: the energy that no answer told of since it was last asked (with true: at the end), and
            joules of all since this process began, counted another way; None: none is counted.

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
        ahead: bool = False,
        used: Callable[[bool], tuple[Spent | None, float]] | None = None,
    ) -> None:
        self.state = state
        self._used, self._witnessed_j = used, state.witness_j
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
        self._ahead = ahead
        self._open: tuple[RoundCosts, Groups] | None = None

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
            self._save(self._groups())
            if every:
                self._evaluate(self.state, self.state)
        while self.state.global_step < self._config.total_steps and not self._ended():
            number = self.state.round + 1
            candidates = None if self._draining() else self.federation.fleet.drawn_from(number)
            if candidates is None:
                self._close_books()
                return False
            try:
                closed = self.federation.round(self.state, candidates, meanwhile=self._close_books)
            except QuorumLostError:
                if not self.federation.fleet.lost(number):
                    raise
                continue
            last = closed.after.global_step >= self._config.total_steps
            if last or (every and number % every == 0):
                asked = closed.participants
                closed.costs.eval_s = self._evaluate(self.state, closed.after, asked)
            self._add_up(closed)
            if not self._ahead:
                self._close_books()
        self._close_books()
        if self._evaluated_round != self.state.round:
            self._evaluate(self.state, self.state)
        self.state = self._with_energy(self.state, over=True)
        return True

    def _groups(self) -> Groups:
        """The server's tensors, and the versions that somebody still works from."""
        return self.federation.server.groups() | self.federation.outstanding.versions()

    def _save(self, groups: Groups) -> float:
        """Checkpoint the current state; returns the seconds it took."""
        started = time.perf_counter()
        self.state = replace(self.state, elapsed_s=self._recorder.elapsed_s)
        size = self._checkpoints.save(self.state, groups)
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
            if number == 0 and receipt.silo is None:
                self.state = replace(self.state, first_loss=receipt.loss)
            self._evaluation_bytes += receipt.bytes_down or 0
            scores = Evaluated(round=number, perplexity=receipt.perplexity, **vars(receipt))
            self._recorder.emit(scores)
        return time.perf_counter() - started

    def _add_up(self, closed: Closed) -> None:
        """Add a round's costs to the totals, and open its books.

        What participants received to evaluate a state counts as the round's in which they did; the
        next round's participants need not receive that state again.
        """
        old, costs = self.state, closed.costs
        costs.bytes_down += self._evaluation_bytes
        self._evaluation_bytes = 0
        self.state = replace(
            self._with_energy(closed.after),
            total_tokens=old.total_tokens + costs.tokens,
            tokens_lost=old.tokens_lost + costs.tokens_lost,
            bytes_inside=old.bytes_inside + costs.bytes_inside,
            bytes_up=old.bytes_up + costs.bytes_up,
            bytes_down=old.bytes_down + costs.bytes_down,
            local_train_s=old.local_train_s + costs.local_train_s,
            clock=self._clock(),
            epsilon=old.epsilon | {name: one and vars(one) for name, one in costs.epsilon.items()},
        )
        self._open = costs, self._groups()

    def _with_energy(self, state: RunState, *, over: bool = False) -> RunState:
        """With what answers told of, and what else was used, since the last time."""
        if self._used is None:
            return state
        own, witnessed_j = self._used(over)
        self.federation.note_energy(state.round, None, own, 0)
        told, self.federation.energy = self.federation.energy, []
        all_j = vars(Spent.sum([*told, Spent(**state.energy) if state.energy else None]))
        count, joules = state.energy_untold + told.count(None), self._witnessed_j + witnessed_j
        return replace(state, energy=all_j, energy_untold=count, witness_j=joules)

    def _close_books(self) -> None:
        """Checkpoint the round that is over, if its books are open, tell of it, and prune."""
        if self._open is None:
            return
        (costs, groups), self._open = self._open, None
        checkpoint_s = self._save(groups)
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
        kept = list(self._checkpoints.states(*self._checkpoints.rounds()))
        # A task that is out may have left its state already.
        kept.append(replace(self.state, in_flight=self.federation.outstanding.in_flight()))
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
