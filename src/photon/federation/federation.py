"""The federated round: sample, dispatch, merge as updates arrive, step (Photon, algorithm 1)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from photon.config import RunConfig
from photon.config.children import LEAF, group_of
from photon.errors import NonFiniteError, QuorumLostError, error_of
from photon.federation.account import (
    WAY_OUT,
    RoundCosts,
    implausible,
    local_finished,
    mean_score,
    scaled_down,
    state_lost,
)
from photon.federation.checkpoint import RunState
from photon.federation.engine import Engine, Mailbox, Version
from photon.federation.order import Order
from photon.federation.pace import (
    Book,
    build_pace,
    running_mean,
    staleness_weight,
    unequal_steps,
)
from photon.federation.sampling import Candidates, Fleet, sample_participants
from photon.federation.server import Server, Step
from photon.federation.tasks import EvalReceipt, EvalTask, FitTask, Receipt, Update
from photon.telemetry import Event
from photon.telemetry.events import RoundMerged, RoundStarted, UpdateDropped


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


@dataclass(frozen=True)
class _Going:
    """A task that was handed in and is not answered yet.

    Attributes:
        share: weight of its update before tokens count.
        bytes_down: what its participant gets to start, on the wire.
    """

    version: Version
    share: float
    bytes_down: int


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
        self._config = config
        self._fleet = fleet
        self._engine = engine
        self._mailbox = Mailbox(engine)
        self._pace = build_pace(config.federation)
        self.server = server
        self._tell = on_event
        self._pooled = tuple(pooled)
        self._order = order or Order()
        self._going: dict[FitTask, _Going] = {}

    def round(
        self, before: RunState, candidates: Candidates, costs: RoundCosts | None = None
    ) -> Closed:
        """Have participants train, merge what they send, and step.

        Args:
            before: the run so far.
            candidates: who may be drawn.
            costs: what the round costs is added to these.

        Raises:
            QuorumLostError: too few good updates; the version is as it was.
        """
        number, costs = before.round + 1, costs or RoundCosts()
        new = self._ask(before, candidates)
        asked = [task.silo for task in self._going]
        quorum, most = self._config.quorum_of(len(asked)), self._config.federation.sample
        most = min(most or len(asked), len(asked))
        book = Book(most, quorum, self._engine.now_s, before.quorum_s)
        self._tell(RoundStarted(round=number, global_step=before.global_step, participants=asked))
        self.server.begin(before)
        merged: list[tuple[FitTask, Receipt]] = []
        try:
            for task, going, update in self._arriving(number, book):
                receipt = self._counted(update.receipt, going)
                reason = self._merge(task, going, replace(update, receipt=receipt), number, costs)
                update.let_go()
                if reason is None:
                    merged.append((task, receipt))
                    book.note_good(self._engine.now_s)
                else:
                    self._drop(number, receipt, reason, costs)
            self._leave_behind(number, book, costs)
            self._engine.settle()
            self._require_quorum(number, len(merged), len(asked), costs)
        except BaseException:
            self._give_up()
            raise
        costs.local_train_s /= self._engine.processes
        step = self._step(number, merged, costs)
        after = self._after(before, new, merged, len(asked), step)
        usual_s = running_mean(before.quorum_s, book.quorum_s or 0.0)
        receipts = [receipt for _, receipt in merged]
        return Closed(replace(after, quorum_s=usual_s), costs, asked, receipts)

    def evaluate(
        self, before: RunState, participants: Collection[str], node_rounds: Mapping[str, int]
    ) -> Iterator[EvalReceipt]:
        """Score the version of now on the global held-out set, and on each silo's own.

        Where silos have personal parts nobody has a whole model but for their own text, and the
        global score, which then comes last, is the mean of theirs.

        Args:
            before: the run before the round that led to that version, as far as that is known.
            participants: of that round, who hold the version before.
            node_rounds: RunState.node_rounds of now: which personal part each silo scores with.
        """
        version, own = self.server.version, list[EvalReceipt]()
        silos = sorted(self._fleet.present()) if self._config.eval.per_silo else []
        personal, number = bool(self._config.parts.personal), version.number
        if personal:
            tasks = [EvalTask(number, silo, node_rounds.get(silo)) for silo in silos]
        else:
            tasks = [EvalTask(number, silo) for silo in (None, *silos)]
        children, scored = self._config.federation.children, set[str]()
        for receipt in self._mailbox.in_task_order(tasks, version):
            if not isinstance(receipt, EvalReceipt):
                continue
            bytes_down = receipt.bytes_down
            if bytes_down is None:
                bytes_down, held = 0, version.number - 1
                # A group gets it once, and hands it on.
                member = group_of(children, receipt.silo or "")
                if member not in scored and receipt.silo is not None and not self._pooled:
                    scored.add(member)
                    if member not in participants:
                        held = self._held(member, before, held)
                    bytes_down = version.bytes_down(held)
            own.append(receipt)
            yield replace(receipt, bytes_down=bytes_down)
        if personal:
            yield mean_score(own)

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """All tensors that a checkpoint needs, by group: the server's, and versions in use."""
        versions = {going.version for going in self._going.values()}
        old = {f"version-{one.number}": one.tensors for one in versions}
        return self.server.groups() | old

    def go_on_with(
        self, in_flight: Sequence[Mapping[str, Any]], groups: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Hand in again what was not answered when a checkpoint was written.

        Args:
            in_flight: RunState.in_flight.
            groups: from the checkpoint, with the versions that the tasks start from.
        """
        versions: dict[int, Version] = {}
        for one in in_flight:
            task = FitTask(**{**one["task"], "texts": tuple(one["task"]["texts"])})
            number = task.round - 1
            if number not in versions:
                versions[number] = self.server.version_of(number, groups[f"version-{number}"])
            self._going[task] = _Going(versions[number], one["share"], one["bytes_down"])
            self._engine.submit(task, versions[number])

    # --- asking --------------------------------------------------------------------------------

    def _ask(self, before: RunState, candidates: Candidates) -> list[FitTask]:
        """Draw participants among those who are idle, and hand their tasks in."""
        config, version = self._config, self.server.version
        busy = {task.silo for task in self._going}
        tokens = {silo: count for silo, count in candidates.tokens.items() if silo not in busy}
        count = config.federation.sample
        if count is not None and config.federation.pace != "synchronous":
            count = max(0, min(len(tokens), count - len(busy) + config.federation.over_sample))
        drawn = sample_participants(
            tokens,
            count=count,
            sampling=config.federation.sampling,
            seed=config.run.seed,
            round_number=before.round + 1,
            attempt=candidates.attempt,
        )
        by_data = config.federation.weighting == "data"
        steps: dict[str, int] = {}
        if config.federation.unequal_steps:
            steps = unequal_steps(config.local.steps, before.speeds)
        new = []
        # Silos before groups: an engine lets groups work when these are done.
        children = config.federation.children
        for silo, times in sorted(Counter(drawn).items(), key=lambda one: one[0] in children):
            task = FitTask(
                run=config.run.name,
                round=before.round + 1,
                silo=silo,
                global_step=before.global_step,
                steps=steps.get(silo, config.local.steps),
                node_round=before.node_rounds.get(silo),
                cursor=before.cursors.get(silo, 0),
                texts=tuple(candidates.texts) or self._pooled,
            )
            share = float(times * (tokens[silo] if by_data else 1))
            down = 0 if self._pooled else version.bytes_down(self._held(silo, before, before.round))
            self._going[task] = _Going(version, share, down)
            self._engine.submit(task, version)
            new.append(task)
        return new

    def _held(self, silo: str, before: RunState, last: int) -> int | None:
        """The newest version up to `last` that a silo has: it trained from it, or scored it."""
        took_part = before.node_rounds.get(silo)
        held = [] if took_part is None else [took_part - 1]
        every = self._config.eval.every
        if self._config.eval.per_silo and every and last >= 0:
            held.append(last - last % every)
        return max(held, default=None)

    # --- merging -------------------------------------------------------------------------------

    def _arriving(self, number: int, book: Book) -> Iterator[tuple[FitTask, _Going, Update]]:
        """Updates, until the pace has the round closed.

        First in the order in which a process before this one merged them, as far as it came.
        """
        turn, here = self._order.of(number, list(self._going)), dict[FitTask, Update]()
        replayed = len(turn)
        if self._pace.in_task_order:
            turn += [task for task in self._going if task not in turn]
        while True:
            while (task := turn[0] if turn else next(iter(here), None)) in here:
                assert task is not None
                turn, replayed = turn[1:], replayed - 1
                self._order.note(number, task)
                yield task, self._going.pop(task), here.pop(task)
            book.now_s = self._engine.now_s
            left_s = math.inf if replayed > 0 else self._pace.left_s(book)
            waiting = [one for one in self._going if one not in here]
            if left_s <= 0 or not waiting:
                break
            for one, answer in self._mailbox.take(waiting, left_s):
                assert isinstance(one, FitTask)
                assert isinstance(answer, Update)
                here[one] = answer
        # Here in time, behind one that was not.
        for task in sorted(here, key=[*turn, *here].index):
            self._order.note(number, task)
            yield task, self._going.pop(task), here[task]

    def _counted(self, receipt: Receipt, going: _Going) -> Receipt:
        """With the bytes that a wire would have carried, where there was none."""
        if self._pooled:
            return replace(receipt, bytes_up=0, bytes_down=0)
        if receipt.bytes_down is None:
            return replace(receipt, bytes_down=going.bytes_down)
        return receipt

    def _merge(
        self, task: FitTask, going: _Going, update: Update, number: int, costs: RoundCosts
    ) -> str | None:
        """Check and add one update; the reason if it is refused."""
        receipt, config = update.receipt, self._config
        if receipt.failure is not None and self._pooled:
            hint = f"{receipt.failure_hint or ''} {WAY_OUT}".lstrip()
            raise error_of(receipt.failure_code)(receipt.failure, hint=hint)
        if receipt.state_lost:
            self._tell(state_lost(task))
        leaves = config.federation.children.get(task.silo, LEAF).leaves
        step_tokens = leaves * config.local.batch_size * config.data.sequence_length
        if (reason := implausible(receipt, task.steps * step_tokens)) is not None:
            return reason
        costs.local_train_s += receipt.train_s
        costs.bytes_inside += receipt.bytes_inside
        costs.tokens_lost += receipt.tokens_lost
        costs.bytes_down += receipt.bytes_down or 0
        costs.bytes_up += receipt.bytes_up
        if receipt.failure is not None:
            return receipt.failure
        started = time.perf_counter()
        weight = going.share * staleness_weight(number - task.round)
        if config.federation.weighting == "tokens":
            weight *= receipt.tokens
        scale = config.local.steps / task.steps if config.federation.normalise else 1.0
        verdict = self.server.offer(update, weight, scale)
        costs.merge_s += time.perf_counter() - started
        if verdict.refused is not None:
            costs.tokens_lost += receipt.tokens
            if self._pooled:
                raise NonFiniteError(verdict.refused, hint=WAY_OUT)
            return verdict.refused
        costs.tokens += receipt.tokens
        self._tell(local_finished(receipt, update_norm=verdict.norm))
        if verdict.share < 1:
            self._tell(scaled_down(receipt, verdict.norm, verdict.share))
        return None

    def _leave_behind(self, number: int, book: Book, costs: RoundCosts) -> None:
        """Give up who is late, if the pace does not go on listening to it, or for too long."""
        most, limits = self._config.federation.max_staleness, self._config.federation
        batch_tokens = self._config.local.batch_size * self._config.data.sequence_length
        for task in list(self._going):
            missed = number + 1 - task.round  # merges, when it answers next
            if self._pace.keeps_late and missed <= most:
                continue
            because = self._engine.cancel(task)
            del self._going[task]
            if self._pace.keeps_late:
                why = f"missed {missed} merges, more than federation.max_staleness = {most}"
            elif book.now_s - book.began_s >= limits.deadline_s:
                why = f"has not answered in the {limits.deadline_s:g} s of round {number}"
            else:
                why = f"had not answered when round {number} closed"
            costs.tokens_lost += task.steps * batch_tokens
            failure = f"{task.silo} {why}{because}"
            self._drop(number, Receipt(task.round, task.silo, failure=failure), failure, costs)

    def _drop(self, number: int, receipt: Receipt, reason: str, costs: RoundCosts) -> None:
        costs.dropped.append(receipt.silo)
        named = reason.startswith(receipt.silo)
        costs.reasons.append(reason if named else f"{receipt.silo}: {reason}")
        costs.diverged += receipt.failure_code == NonFiniteError.exit_code
        self._tell(UpdateDropped(round=number, silo=receipt.silo, reason=reason))

    def _give_up(self) -> None:
        """Forget what was merged since the last step, and who is still at work."""
        self.server.discard()
        for task in self._going:
            self._engine.cancel(task)
        self._going.clear()

    def _require_quorum(self, number: int, good: int, asked: int, costs: RoundCosts) -> None:
        quorum = self._config.quorum_of(asked)
        if good >= quorum:
            return
        raise QuorumLostError(
            f"round {number} has {good} good updates of {asked}, the quorum is {quorum}; "
            f"dropped: {'; '.join(costs.reasons) or 'none'}",
            hint=f"Round {number - 1} is saved. See update_dropped in events.jsonl, mend the "
            "silo, then `photon resume DIR`."
            + (f" {WAY_OUT}" if costs.diverged == len(costs.dropped) else ""),
        )

    # --- stepping ------------------------------------------------------------------------------

    def _step(
        self, number: int, merged: Sequence[tuple[FitTask, Receipt]], costs: RoundCosts
    ) -> Step:
        started = time.perf_counter()
        step = self.server.step(keep_version=bool(self._going))
        costs.merge_s += time.perf_counter() - started
        tokens = sum(receipt.tokens for _, receipt in merged)
        loss = sum(receipt.loss * receipt.tokens for _, receipt in merged) / max(1, tokens)
        self._tell(
            RoundMerged(
                round=number,
                participants=[receipt.silo for _, receipt in merged],
                tokens=tokens,
                train_loss=loss,
                pseudo_gradient_norm=step.norm,
                merge_s=costs.merge_s,
            )
        )
        return step

    def _after(
        self,
        before: RunState,
        new: Sequence[FitTask],
        merged: Sequence[tuple[FitTask, Receipt]],
        asked: int,
        step: Step,
    ) -> RunState:
        """The run's numbers after a round."""
        tau, batch = self._config.local.steps, self._config.local.batch_size
        children = self._config.federation.children

        def read(task: FitTask) -> int:
            return task.steps * batch * (children.get(task.silo, LEAF).nodes or 1)

        if self._config.federation.pace == "buffered":
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
            in_flight=[
                {"task": asdict(task), "share": going.share, "bytes_down": going.bytes_down}
                for task, going in self._going.items()
            ],
            **step.changes,
        )
