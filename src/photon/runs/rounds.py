"""The rounds of a run that are left: each is closed by a checkpoint, on time to be resumed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from photon.config import RunConfig
from photon.errors import QuorumLostError
from photon.federation import Federation, Fleet
from photon.federation.checkpoint import RunState
from photon.runs.ledger import Ledger


class Rounds:
    """Drives a federation from the last checkpoint to the end, and keeps the books.

    Args:
        config: the run file.
        federation: what trains.
        fleet: its silos.
        ledger: totals, events and checkpoints; its state says where to go on.
        node_folder: of the silos' kept states, pruned as checkpoints are.
        draining: asked before each round; where it is true, the round before was the last for now.
        ended: asked before each round; where it is true, the round before was the last of all.
        clock: what a resume needs of the engine's time, where that is simulated.
    """

    def __init__(
        self,
        config: RunConfig,
        federation: Federation,
        fleet: Fleet,
        ledger: Ledger,
        node_folder: Path,
        *,
        draining: Callable[[], bool] = lambda: False,
        ended: Callable[[], bool] = lambda: False,
        clock: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._config = config
        self._federation = federation
        self._fleet = fleet
        self._ledger = ledger
        self._node_folder = node_folder
        self._draining = draining
        self._ended = ended
        self._clock = clock

    @property
    def weights(self) -> dict[str, Tensor]:
        """The global weights by parameter name."""
        return self._federation.server.weights

    def run(self) -> bool:
        """Run the rounds that are left, and evaluate what came out.

        Returns:
            Whether the run is over; false where it is to drain.

        Raises:
            QuorumLostError: a round had too few good updates and the fleet has no others to try it
                with; or too few silos came. The last checkpoint stands.
            NonFiniteError: centralised training diverged; the last checkpoint stands.
        """
        ledger = self._ledger
        if ledger.state.round == 0:
            ledger.save(self._groups())
            if self._config.eval.every:
                self._evaluate(ledger.state, ledger.state)
        while ledger.state.global_step < self._config.total_steps and not self._ended():
            number = ledger.state.round + 1
            candidates = None if self._draining() else self._fleet.drawn_from(number)
            if candidates is None:
                return False
            before = ledger.state
            try:
                closed = self._federation.round(before, candidates)
            except QuorumLostError:
                if not self._fleet.lost(number):
                    raise
                continue
            last = closed.after.global_step >= self._config.total_steps
            every = self._config.eval.every
            if last or (every and number % every == 0):
                asked = closed.participants
                closed.costs.eval_s = self._evaluate(before, closed.after, asked)
            after = replace(closed.after, clock=self._clock())
            ledger.close_round(replace(closed, after=after), self._groups())
            ledger.prune_node_states(self._node_folder)
        if ledger.evaluated_round != ledger.state.round:
            self._evaluate(ledger.state, ledger.state)
        return True

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        """All tensors that a checkpoint needs: the server's, and the versions still in use."""
        return self._federation.server.groups() | self._federation.outstanding.versions()

    def _evaluate(
        self, before: RunState, after: RunState, participants: Collection[str] = ()
    ) -> float:
        scores = self._federation.evaluate(before, participants, after.node_rounds)
        return self._ledger.record_evaluation(self._federation.server.version.number, scores)


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
