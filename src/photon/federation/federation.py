"""The federated round: sample, dispatch, merge as updates arrive, step (Photon, algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from photon.config import RunConfig
from photon.config.children import LEAF, group_of
from photon.energy.account import KWH_J, Spent
from photon.energy.meter import METER
from photon.errors import NonFiniteError, QuorumLostError, error_of
from photon.federation.account import Closed, RoundCosts, after_round, implausible, round_merged
from photon.federation.checkpoint import RunState
from photon.federation.engine import Engine, Mailbox
from photon.federation.envelopes import dictated
from photon.federation.merging import Verdict
from photon.federation.outstanding import Going, Order, Outstanding
from photon.federation.pace import running_mean, staleness_weight
from photon.federation.private import misstated, of_sums
from photon.federation.sampling import Candidates, Fleet
from photon.federation.secure_rounds import SecureRounds, planned_tokens, question_of
from photon.federation.server import Server
from photon.federation.tasks import EvalReceipt, EvalTask, FitTask, Receipt, Residual, Update
from photon.telemetry import Event
from photon.telemetry.events import (
    EnergySpent,
    KeyMerged,
    LocalFinished,
    Notice,
    RoundStarted,
    UpdateDropped,
)

#: Where training diverged: the same rounds again would diverge again.
WAY_OUT = (
    "Where the loss diverged, go on with another recipe: `photon resume DIR --set local.lr=...`, "
    "or local.clip_norm, local.warmup_steps."
)


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
        folder: where secure aggregation keeps its cohorts; not needed without it.

    Attributes:
        energy: all that was noted; who keeps the books takes it away.
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
        folder: Path | None = None,
    ) -> None:
        self.config, self.fleet, self.engine = config, fleet, engine
        self.server, self._tell, self._pooled = server, on_event, pooled
        self._mailbox = Mailbox(engine)
        self.energy: list[Spent | None] = []
        self.outstanding = Outstanding(config, self._mailbox, order or Order(), pooled)
        self._secure: SecureRounds | None = None
        if config.privacy.secure_aggregation:
            assert folder is not None
            recipe = dictated(config)
            self._secure = SecureRounds(
                config,
                folder,
                self._mailbox,
                lambda state, step: question_of(recipe, state, step),
                lambda words: self._tell(Notice(text=words, round=self._number, silo="")),
            )

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
        merged, came = list[tuple[FitTask, Receipt]](), list[Residual]()
        asked, new = list[str](), list[FitTask]()

        def begin(silos: list[str]) -> None:
            asked.extend(silos)
            meanwhile()
            at = before.global_step
            self._tell(RoundStarted(round=number, global_step=at, participants=silos))

        def agree(drawn: dict[FitTask, Going]) -> dict[FitTask, Going]:
            begin([task.silo for task in drawn])
            new.extend(drawn)
            return self._agree(before, drawn, costs)

        first = agree if self._secure is not None else None
        try:
            new = self.outstanding.ask(before, candidates, self.server, first)
            book = self.outstanding.book(before)
            if self._secure is None:
                begin(self.outstanding.silos)
            self.server.begin(before)
            for task, going, update in self.outstanding.arriving(number, book):
                receipt = self._admit(number, task, going, update, costs)
                if receipt is not None:
                    merged.append((task, receipt))
                    came += update.residuals
                    book.note_good(self.engine.now_s)
            for task, reason in self.outstanding.left_behind(number, book):
                self._leave(number, task, reason, costs)
            self.engine.settle()
            self._require_quorum(number, len(merged), len(asked), costs)
            if self._secure is not None:
                self._open(self._secure, number)
        except BaseException as error:
            self.server.discard()
            self.outstanding.give_up()
            if isinstance(error, QuorumLostError) and self._secure and self._secure.lost():
                return self._passed_over(error, before, new, costs)
            raise
        costs.local_train_s /= self.engine.processes
        started = time.perf_counter()
        with METER.phase("merging"):
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
            **(self._secure.changes if self._secure is not None else {}),
            **changes,
        )
        return Closed(after, costs, asked, [receipt for _, receipt in merged])

    def evaluate(
        self, before: RunState, participants: Collection[str], node_rounds: Mapping[str, int]
    ) -> Iterator[EvalReceipt]:
        """Score the version of now: on the global held-out set, and on each silo's own.

        Where silos have personal parts nobody has a whole model but for their own text, and the
        global score, which then comes last, is the mean of theirs.

        Args:
            before: the run before the round that led to that version, as far as that is known.
            participants: of that round, who hold the version before.
            node_rounds: RunState.node_rounds of now: with which parts of its own each silo scores.
        """
        silos = self.fleet.present() if self.config.eval.per_silo else []
        own, told, parts = list[EvalReceipt](), set[str](), self.config.parts
        version, number = self.server.version, self.server.version.number
        tasks = [] if parts.personal else [EvalTask(number, None)]
        # Of a group's member, the group knows what it keeps.
        whole = partial(group_of, self.config.federation.children)
        kept = {one: node_rounds.get(whole(one)) for one in silos if parts.kept}
        tasks += [EvalTask(number, one, kept.get(one)) for one in silos]
        for receipt in self._mailbox.in_task_order(tasks, version):
            if not isinstance(receipt, EvalReceipt):
                continue
            bytes_down, last = receipt.bytes_down or 0, number - 1
            # A group gets it once, and hands it on; and here nothing was carried.
            member = whole(receipt.silo or "")
            unknown = receipt.bytes_down is None and receipt.silo is not None
            if unknown and not self._pooled and member not in told:
                told.add(member)
                asked = member in participants
                held = last if asked else self.outstanding.held(before, member, last)
                bytes_down = version.bytes_down(held)
            own.append(receipt)
            self.note_energy(number, receipt.silo, receipt.energy, bytes_down)
            yield replace(receipt, bytes_down=bytes_down)
        if parts.personal:
            yield EvalReceipt.mean(own)

    # --- secure aggregation -------------------------------------------------------------------

    def _agree(
        self, before: RunState, drawn: dict[FitTask, Going], costs: RoundCosts
    ) -> dict[FitTask, Going]:
        """Those of the tasks whose silos dealt shares, as they are to be asked; the others drop."""
        assert self._secure is not None
        self._number = number = before.round + 1
        by_tokens = self.config.federation.weighting == "tokens"
        shares = [
            (task, one.share * (planned_tokens(self.config, task) if by_tokens else 1))
            for task, one in drawn.items()
        ]
        tasks, dropped = self._secure.agree(shares, before, self.server.version)
        going = {task.silo: (task, one) for task, one in drawn.items()}
        for silo, why in dropped.items():
            if silo in going:
                costs.tokens_lost += planned_tokens(self.config, going[silo][0])
            self._drop(number, Receipt(number, silo, failure=why), why, costs, "refused")
        return {task: going[task.silo][1] for task in tasks}

    def _open(self, secure: SecureRounds, number: int) -> None:
        """Merge the sum of a round's updates as the one update that it is.

        Raises:
            QuorumLostError: it can't be opened, or is further away than honest ones come.
        """
        verdict = self.server.offer(secure.open(), 1.0)
        if verdict.refused is not None:
            secure.suspect_all()
            raise QuorumLostError(f"its sum is not used: {verdict.refused}")

    def _passed_over(
        self, error: QuorumLostError, before: RunState, new: Sequence[FitTask], costs: RoundCosts
    ) -> Closed:
        """A round without a sum: clock and cursors go on, the version is as it was."""
        number, silos = before.round + 1, [task.silo for task in new]
        for silo in silos:
            if silo not in costs.dropped:
                why = f"round {number} is passed over: {error.message}"
                self._drop(number, Receipt(number, silo, failure=why), why, costs, "refused")
        costs.tokens, costs.tokens_lost = 0, costs.tokens_lost + costs.tokens
        self.server.skip()
        return Closed(after_round(self.config, before, new, [], len(silos)), costs, silos, [])

    # --- which answers count ------------------------------------------------------------------

    def _admit(
        self, number: int, task: FitTask, going: Going, update: Update, costs: RoundCosts
    ) -> Receipt | None:
        """Merge an answer into round `number`; its receipt, or None where it is dropped."""
        receipt = update.receipt
        if self._pooled:
            receipt = replace(receipt, bytes_up=0, bytes_down=0)
        elif receipt.bytes_down is None:  # nothing was carried: what a wire would have
            receipt = replace(receipt, bytes_down=going.bytes_down)
        reason = self._merge(task, going, replace(update, receipt=receipt), number, costs)
        update.let_go()
        if reason is None:
            return receipt
        met = error_of(receipt.failure_code).__name__ if receipt.failure == reason else "refused"
        self._drop(number, receipt, reason, costs, met)
        return None

    def _leave(self, number: int, task: FitTask, reason: str, costs: RoundCosts) -> None:
        """Drop a task whose answer is not waited for any more."""
        step_tokens = self.config.local.batch_size * self.config.data.sequence_length
        costs.tokens_lost += task.steps * step_tokens
        self._drop(number, Receipt(task.round, task.silo, failure=reason), reason, costs, "late")

    def _drop(
        self, number: int, receipt: Receipt, reason: str, costs: RoundCosts, cause: str
    ) -> None:
        """Note that an update is not merged, and tell why."""
        costs.dropped.append(receipt.silo)
        reason = reason.removeprefix(f"{receipt.silo}: ")  # events and screens name it themselves
        named = reason.startswith(f"{receipt.silo} ")
        costs.reasons.append(reason if named else f"{receipt.silo}: {reason}")
        costs.diverged += receipt.failure_code == NonFiniteError.exit_code
        self._tell(UpdateDropped(round=number, silo=receipt.silo, reason=reason, cause=cause))

    def _require_quorum(self, number: int, good: int, asked: int, costs: RoundCosts) -> None:
        """Raise QuorumLostError unless enough of those asked gave good updates."""
        quorum = self.config.quorum_of(asked)
        if good >= quorum:
            return
        raise QuorumLostError(
            f"round {number} has {good} good updates of {asked}, the quorum is {quorum}; "
            f"dropped: {'; '.join(costs.reasons) or 'none'}",
            hint=f"Round {number - 1} is saved. See update_dropped in events.jsonl, mend the "
            "silo, then `photon resume DIR`."
            + (f" {WAY_OUT}" if costs.diverged == len(costs.dropped) else ""),
        )

    def _merge(
        self, task: FitTask, going: Going, update: Update, number: int, costs: RoundCosts
    ) -> str | None:
        """Check and add one update; the reason if it is refused."""
        receipt, config = update.receipt, self.config
        if receipt.failure is not None and self._pooled:
            hint = f"{receipt.failure_hint or ''} {WAY_OUT}".lstrip()
            raise error_of(receipt.failure_code)(receipt.failure, hint=hint)
        if receipt.state_lost:
            self._notice(
                receipt,
                f"{task.silo} has lost what it kept after round {task.node_round}: its inner "
                "optimizer and error feedback started afresh, its text went on where it was",
            )
        leaves = config.federation.children.get(task.silo, LEAF).leaves
        step_tokens = leaves * config.local.batch_size * config.data.sequence_length
        if (reason := implausible(receipt, task.steps * step_tokens)) is not None:
            return reason
        if receipt.failure is None:
            if (reason := misstated(config, task, receipt.epsilon)) is not None:
                return reason
            if self._secure is not None:
                sums = of_sums(self._secure.privacy, number)
                receipt = replace(receipt, epsilon=receipt.epsilon or sums)
            costs.epsilon[task.silo] = receipt.epsilon
        costs.local_train_s += receipt.train_s
        costs.bytes_inside += receipt.bytes_inside
        costs.tokens_lost += receipt.tokens_lost
        costs.bytes_down += receipt.bytes_down or 0
        costs.bytes_up += receipt.bytes_up
        carried = receipt.bytes_up + (receipt.bytes_down or 0)
        self.note_energy(number, receipt.silo, receipt.energy, carried)
        if receipt.failure is not None:
            return receipt.failure
        started = time.perf_counter()
        weight = going.share * staleness_weight(number - task.round)
        if config.federation.weighting == "tokens":
            weight *= receipt.tokens
        scale = config.local.steps / task.steps if config.federation.normalise else 1.0
        with METER.phase("merging"):
            if self._secure is not None:
                verdict = Verdict(refused=self._secure.add(task, update))
            else:
                verdict = self.server.offer(update, weight, scale)
        costs.merge_s += time.perf_counter() - started
        if verdict.refused is not None:
            costs.tokens_lost += receipt.tokens
            if self._pooled:
                raise NonFiniteError(verdict.refused, hint=WAY_OUT)
            return verdict.refused
        costs.tokens += receipt.tokens
        figures = vars(receipt) | vars(receipt.times)  # what else there is is passed over
        norm = verdict.norm if self._secure is None else None
        figures["epsilon"] = receipt.epsilon and receipt.epsilon.value
        self._tell(LocalFinished(**figures, update_norm=norm))
        if verdict.share < 1:
            self._notice(
                receipt,
                f"the update of {receipt.silo} is merged {1 / verdict.share:.3g} times smaller: "
                f"its norm {verdict.norm:.4g} is far above the last round's median",
            )
        return None

    def note_energy(self, number: int, silo: str | None, spent: Spent | None, carried: int) -> None:
        """Keep and tell what an answer took, or all else (silo None), and so many bytes of it."""
        self.energy.append(spent)
        joules = {"communication": carried / 1e9 * self.config.energy.network_kwh_per_gb * KWH_J}
        joules |= spent.by_phase if spent else {}
        self._tell(EnergySpent(round=number, silo=silo, how=spent and spent.how, joules=joules))

    def _notice(self, receipt: Receipt, text: str) -> None:
        self._tell(Notice(text=text, round=receipt.round, silo=receipt.silo))
