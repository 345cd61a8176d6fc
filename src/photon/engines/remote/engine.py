"""The engine itself: a round's tasks become errands, and their answers updates and scores."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from photon.config import RunConfig
from photon.engines.remote.arrivals import Arrivals
from photon.engines.remote.depot import Depot
from photon.engines.remote.errand import Errand
from photon.engines.remote.messenger import Messenger, Post
from photon.errors import PhotonError, ProtocolError
from photon.federation import Engine, EvalReceipt, EvalTask, FitTask, Update
from photon.federation.envelopes import Ask, EvalPart, FitPart, RunPart, StatePart, parse_reply
from photon.federation.sealing import sealed
from photon.federation.tasks import GlobalState, Publish
from photon.freed_memory import share_freed_memory
from photon.membership.keys import NodeKey
from photon.membership.roster import Roster
from photon.telemetry import Event
from photon.telemetry.events import Notice
from photon.version import photon_version

#: What an update may take on the wire beyond twice its fp32 values.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Asker:
    """With what the aggregator asks.

    Attributes:
        key: signs its Asks; silos have pinned its public half.
        log_head: of its audit log, as it is now.
    """

    key: NodeKey
    log_head: Callable[[], str]


class RemoteEngine:
    """Serves tasks by silos that have joined.

    Args:
        run: what is being trained, as silos are told; its silos are those of each round's tasks.
        config: the run file.
        post: to silos.
        roster: who is a member, what each says it does, which tasks are open.
        depot: updates and states.
        asker: signs what is asked.
        evaluator: scores the global held-out set on this machine.
        on_event: told of local progress and of what goes wrong.
    """

    def __init__(
        self,
        run: RunPart,
        config: RunConfig,
        post: Post,
        roster: Roster,
        depot: Depot,
        asker: Asker,
        evaluator: Engine,
        on_event: Callable[[Event], None],
    ) -> None:
        self._run = run
        self._config = config
        self._roster = roster
        self._evaluator = evaluator
        self._on_event = on_event
        share_freed_memory()  # threads fetch chunks, and no node trains in this process
        #: By key, the round of an update that was accepted.
        self._accepted: dict[str, int] = {}
        self._messenger = Messenger(config, post, roster, on_event)
        self._depot = depot
        self._asker = asker

    @property
    def processes(self) -> int:
        """Silos that train at the same time."""
        return len(self._run.silos)

    def offer(self, number: int, publish: Publish) -> None:
        """Publish the state after round `number` when the first task needs it."""
        self._depot.offer(number, publish)

    def fit(self, tasks: Sequence[FitTask], state: GlobalState) -> Iterator[Update]:
        ref = StatePart.of(self._depot.published())
        self._take_part(tasks)
        values = sum(tensor.numel() for tensor in state.values())
        most_bytes = 8 * values + _SPARE_BYTES
        errands = [self._errand(self._fit_ask(task, ref), most_bytes) for task in tasks]
        for errand in errands:
            self._messenger.begin(errand)
        arrivals = Arrivals(self._messenger, self._depot, tasks, errands, state)
        try:
            yield from arrivals.updates()
        finally:
            arrivals.close()
            self._messenger.close(errands)
        if tasks:
            self._sweep(tasks[0].round)

    def evaluate(self, tasks: Sequence[EvalTask], state: GlobalState) -> Iterator[EvalReceipt]:
        own = [task for task in tasks if task.silo is None]
        errands: dict[str, Errand] = {}
        if len(own) < len(tasks):
            ref = StatePart.of(self._depot.published())
            self._take_part(tasks)
            for task in tasks:
                if task.silo is not None:
                    part = EvalPart(round=task.round)
                    ask = self._ask("evaluate", task.silo, ref, evaluate=part)
                    errands[task.silo] = self._errand(ask)
                    self._messenger.begin(errands[task.silo])
        try:
            self._messenger.turn(errands.values())  # silos work while this machine does
            yield from self._evaluator.evaluate(own, state)
            while not all(errand.over for errand in errands.values()):
                if not self._messenger.turn(errands.values()):
                    time.sleep(self._messenger.pause_s(errands.values()))
            for silo, errand in errands.items():
                if errand.reply is not None and errand.reply.evaluate is not None:
                    yield errand.reply.evaluate.receipt(silo)
                elif errand.failure is not None:
                    words = f"no evaluation: {errand.failure.message}"
                    self._messenger.notice(errand.ask, words)
        finally:
            self._messenger.close(errands.values())

    def close(self) -> None:
        self._evaluator.close()
        self._depot.close()

    def _take_part(self, tasks: Sequence[FitTask | EvalTask]) -> None:
        silos = sorted({task.silo for task in tasks if task.silo is not None})
        self._run = self._run.model_copy(update={"silos": silos})

    def _sweep(self, number: int) -> None:
        """Remove from the store what no round from now on needs."""
        members = [member.name for member in self._roster.members()]
        oldest = number - self._config.serve.keep_rounds
        for reply in self._roster.tasks.replies(self._run.id, number):
            with contextlib.suppress(ProtocolError):  # of another version
                fit = parse_reply(reply.text).fit
                if fit is not None and fit.update is not None:
                    self._accepted[fit.update.key] = number
        self._accepted = {key: at for key, at in self._accepted.items() if at >= oldest}
        try:
            self._depot.sweep(members, oldest=oldest, accepted=self._accepted)
        except (PhotonError, OSError) as error:
            # The next round's sweep finds it again.
            self._on_event(
                Notice(text=f"old rounds stay in the store: {error}", round=number, silo="")
            )

    def _errand(self, ask: Ask, most_bytes: int = 0) -> Errand:
        return Errand(ask, sealed(ask, self._asker.key), most_bytes)

    def _fit_ask(self, task: FitTask, ref: StatePart) -> Ask:
        part = FitPart(
            round=task.round,
            global_step=task.global_step,
            steps=task.steps,
            node_round=task.node_round,
            cursor=task.cursor,
            state_bytes=task.state_bytes,
        )
        return self._ask("fit", task.silo, ref, fit=part)

    def _ask(self, kind, silo: str, ref: StatePart, **part) -> Ask:
        return Ask(
            photon_version=photon_version(),
            kind=kind,
            silo=silo,
            run=self._run,
            state=ref,
            log_head=self._asker.log_head(),
            within_s=self._config.serve.round_deadline_s,
            **part,
        )
