"""The federated round: sample, dispatch, merge as updates arrive, step (Photon, algorithm 1)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from photon.config import RunConfig
from photon.config.children import LEAF, group_of
from photon.errors import NonFiniteError, QuorumLostError, error_of
from photon.federation.checkpoint import RunState
from photon.federation.engine import Engine, Mailbox
from photon.federation.outstanding import Going, Order, Outstanding
from photon.federation.pace import running_mean, staleness_weight
from photon.federation.sampling import Candidates, Fleet
from photon.federation.server import Server
from photon.federation.tasks import EvalReceipt, EvalTask, FitTask, Receipt, Update
from photon.telemetry import Event
from photon.telemetry.events import LocalFinished, Notice, RoundMerged, RoundStarted, UpdateDropped

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

    tokens were merged; tokens_lost were trained, or were to be, and are not. bytes_inside went both
    ways inside groups, and over no link of the federation itself.

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
        new = self.outstanding.ask(before, candidates, self.server.version)
        asked = self.outstanding.silos
        book = self.outstanding.book(before)
        self._tell(RoundStarted(round=number, global_step=before.global_step, participants=asked))
        self.server.begin(before)
        merged: list[tuple[FitTask, Receipt]] = []
        try:
            for task, going, update in self.outstanding.arriving(number, book):
                receipt = self._admit(number, task, going, update, costs)
                if receipt is not None:
                    merged.append((task, receipt))
                    book.note_good(self.engine.now_s)
            for task, reason in self.outstanding.left_behind(number, book):
                self._leave(number, task, reason, costs)
            self.engine.settle()
            self._require_quorum(number, len(merged), len(asked), costs)
        except BaseException:
            self.server.discard()
            self.outstanding.give_up()
            raise
        costs.local_train_s /= self.engine.processes
        started = time.perf_counter()
        norm, changes = self.server.step(keep_version=len(self.outstanding) > 0)
        costs.merge_s += time.perf_counter() - started
        tokens = sum(receipt.tokens for _, receipt in merged)
        self._tell(
            RoundMerged(
                round=number,
                participants=[receipt.silo for _, receipt in merged],
                tokens=tokens,
                train_loss=sum(one.loss * one.tokens for _, one in merged) / max(1, tokens),
                pseudo_gradient_norm=norm,
                merge_s=costs.merge_s,
            )
        )
        after = replace(
            _after_round(self.config, before, new, merged, len(asked)),
            quorum_s=running_mean(before.quorum_s, book.quorum_s or 0.0),
            in_flight=self.outstanding.in_flight(),
            **changes,
        )
        return Closed(after, costs, asked, [receipt for _, receipt in merged])

    def evaluate(
        self, before: RunState, participants: Collection[str], node_rounds: Mapping[str, int]
    ) -> Iterator[EvalReceipt]:
        """Score the version of now, on the global held-out set and on each silo's own.

        Where silos have personal parts nobody has a whole model but for their own text, and the
        global score, which then comes last, is the mean of theirs.

        Args:
            before: the run before the round that led to that version, as far as that is known.
            participants: of that round, who hold the version before.
            node_rounds: RunState.node_rounds of now: which personal part each silo scores with.
        """
        config, version = self.config, self.server.version
        own, told, last = list[EvalReceipt](), set[str](), version.number - 1
        personal = bool(config.parts.personal)
        silos = sorted(self.fleet.present()) if config.eval.per_silo else []
        tasks = [] if personal else [EvalTask(version.number, None)]
        for silo in silos:
            number = node_rounds.get(silo) if personal else None
            tasks.append(EvalTask(version.number, silo, number))
        for receipt in self._mailbox.in_task_order(tasks, version):
            if not isinstance(receipt, EvalReceipt):
                continue
            bytes_down = receipt.bytes_down or 0
            # A group gets it once, and hands it on.
            member = group_of(config.federation.children, receipt.silo or "")
            unknown = receipt.bytes_down is None and receipt.silo is not None
            if unknown and not self._pooled and member not in told:
                told.add(member)
                held = self.outstanding.held(before, member, last)
                bytes_down = version.bytes_down(last if member in participants else held)
            own.append(receipt)
            yield replace(receipt, bytes_down=bytes_down)
        if personal:
            yield _mean_score(own)

    # --- which answers count ------------------------------------------------------------------

    def _admit(
        self, number: int, task: FitTask, going: Going, update: Update, costs: RoundCosts
    ) -> Receipt | None:
        """Merge an answer into round `number`; its receipt, or None where it is dropped."""
        receipt = self._counted(update.receipt, going)
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
        named = reason.startswith(receipt.silo)
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

    def _counted(self, receipt: Receipt, going: Going) -> Receipt:
        """With the bytes that a wire would have carried, where there was none."""
        if self._pooled:
            return replace(receipt, bytes_up=0, bytes_down=0)
        if receipt.bytes_down is None:
            return replace(receipt, bytes_down=going.bytes_down)
        return receipt

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
        if (reason := _implausible(receipt, task.steps * step_tokens)) is not None:
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
        figures = vars(receipt) | vars(receipt.times)  # what else there is is passed over
        self._tell(LocalFinished(**figures, update_norm=verdict.norm))
        if verdict.share < 1:
            self._notice(
                receipt,
                f"the update of {receipt.silo} is merged {1 / verdict.share:.3g} times smaller: "
                f"its norm {verdict.norm:.4g} is far above the last round's median",
            )
        return None

    def _notice(self, receipt: Receipt, text: str) -> None:
        self._tell(Notice(text=text, round=receipt.round, silo=receipt.silo))


def _after_round(
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


def _implausible(receipt: Receipt, most_tokens: int) -> str | None:
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


def _mean_score(own: Sequence[EvalReceipt]) -> EvalReceipt:
    """The silos' own scores as one, weighted by tokens; its loss is NaN where there are none."""
    tokens = sum(one.tokens for one in own)
    nats = [one.loss * one.tokens for one in own]
    loss = math.fsum(nats) / tokens if tokens else math.nan
    bits_per_byte = None
    # Nats over bits a byte are bytes, but for a factor that is the same for all.
    if own and all(one.bits_per_byte for one in own):
        sizes = [part / (one.bits_per_byte or 1) for part, one in zip(nats, own, strict=True)]
        bits_per_byte = math.fsum(nats) / math.fsum(sizes)
    figures = {"loss": loss, "bits_per_byte": bits_per_byte, "tokens": tokens}
    return EvalReceipt(None, **figures, eval_s=0.0, bytes_down=0)
