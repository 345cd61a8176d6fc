"""The federated round: sample, dispatch, merge as updates arrive, step (Photon, algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from photon.config import RunConfig
from photon.federation.account import Closed, RoundCosts, after_round, round_merged
from photon.federation.admission import Admission
from photon.federation.checkpoint import RunState
from photon.federation.engine import Engine, Mailbox
from photon.federation.outstanding import Order, Outstanding
from photon.federation.pace import running_mean
from photon.federation.sampling import Candidates, Fleet
from photon.federation.scoring import scores
from photon.federation.server import Server
from photon.federation.tasks import EvalReceipt, FitTask, Receipt, Residual
from photon.telemetry import Event
from photon.telemetry.events import KeyMerged, RoundStarted


class Federation:
    """Participants, and the server that merges what they learn.

    Args:
        config: the run file.
        fleet: the silos.
        engine: carries tasks to participants.
        server: the global state.
        on_event: told what happens.
        pooled: the silos on whose text the fleet's only participant trains: centralised training.
            Nothing leaves the machine then, and where the participant fails the run has failed.
        order: in which updates were merged by a process before this one.
    """

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        engine: Engine,
        server: Server,
        on_event: Callable[[Event], None],
        *,
        pooled: Sequence[str] = (),
        order: Order | None = None,
    ) -> None:
        self.config, self.fleet, self.engine = config, fleet, engine
        self.server, self._tell, self._pooled = server, on_event, pooled
        self._mailbox = Mailbox(engine)
        self.outstanding = Outstanding(config, self._mailbox, order or Order(), pooled)
        self._admission = Admission(config, server, on_event, pooled)

    def round(
        self,
        before: RunState,
        candidates: Candidates,
        costs: RoundCosts | None = None,
        *,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Closed:
        """Have participants train, merge what they send, and step.

        Args:
            before: the run so far.
            candidates: who may be drawn.
            costs: what the round costs is added to these.
            meanwhile: called when tasks are out and before anything is told of them.

        Raises:
            QuorumLostError: too few good updates; the version is as it was.
        """
        number, costs = before.round + 1, costs or RoundCosts()
        new = self.outstanding.ask(before, candidates, self.server)
        asked = self.outstanding.silos
        book = self.outstanding.book(before)
        started = RoundStarted(round=number, global_step=before.global_step, participants=asked)
        merged, came = list[tuple[FitTask, Receipt]](), list[Residual]()
        try:
            meanwhile()
            self._tell(started)
            self.server.begin(before)
            for task, going, update in self.outstanding.arriving(number, book):
                receipt = self._admission.admit(number, task, going, update, costs)
                if receipt is not None:
                    merged.append((task, receipt))
                    came += update.residuals
                    book.note_good(self.engine.now_s)
            for task, reason in self.outstanding.left_behind(number, book):
                self._admission.leave(number, task, reason, costs)
            self.engine.settle()
            self._admission.require_quorum(number, len(merged), len(asked), costs)
        except BaseException:
            self.server.discard()
            self.outstanding.give_up()
            raise
        costs.local_train_s /= self.engine.processes
        started = time.perf_counter()
        norm, changes = self.server.step(keep_version=len(self.outstanding) > 0)
        ways: list[Event] = []
        if attention := self.server.attention:
            tasks, shares = [task for task, _ in merged], attention.shares
            silos = [*(task.silo for task in tasks), *attention.guests]
            ways = [KeyMerged(round=number, silo="", participants=silos, shares=shares)]
            ways += self.server.residuals.route(attention, tasks, came)
        costs.merge_s += time.perf_counter() - started
        self._tell(round_merged(number, merged, norm, costs.merge_s))
        for event in ways:
            self._tell(event)
        after = replace(
            after_round(self.config, before, new, merged, len(asked)),
            quorum_s=running_mean(before.quorum_s, book.quorum_s or 0.0),
            in_flight=self.outstanding.in_flight(),
            **changes,
        )
        return Closed(after, costs, asked, [receipt for _, receipt in merged])

    def evaluate(
        self, before: RunState, participants: Collection[str], node_rounds: Mapping[str, int]
    ) -> Iterator[EvalReceipt]:
        """Score the version of now; see `scores`.

        Args:
            before: the run before the round that led to that version, as far as that is known.
        """
        silos = self.fleet.present() if self.config.eval.per_silo else []
        held = None if self._pooled else partial(self.outstanding.held, before)
        version = self.server.version
        return scores(self.config, self._mailbox, version, silos, participants, node_rounds, held)
