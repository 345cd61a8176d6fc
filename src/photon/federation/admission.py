"""Which answers count: each is held against its task, merged, and told of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from photon.config import RunConfig
from photon.config.children import LEAF
from photon.errors import NonFiniteError, QuorumLostError, error_of
from photon.federation.account import RoundCosts, implausible
from photon.federation.outstanding import Going
from photon.federation.pace import staleness_weight
from photon.federation.server import Server
from photon.federation.tasks import FitTask, Receipt, Update
from photon.telemetry import Event
from photon.telemetry.events import LocalFinished, Notice, UpdateDropped

#: Where training diverged: the same rounds again would diverge again.
WAY_OUT = (
    "Where the loss diverged, go on with another recipe: `photon resume DIR --set local.lr=...`, "
    "or local.clip_norm, local.warmup_steps."
)


class Admission:
    """Gives good updates to the server, and names the bad ones.

    Args:
        config: the run file.
        server: what they are merged into.
        on_event: told what becomes of each.
        pooled: see Federation.
    """

    def __init__(
        self,
        config: RunConfig,
        server: Server,
        on_event: Callable[[Event], None],
        pooled: Sequence[str],
    ) -> None:
        self._config, self._server = config, server
        self._tell, self._pooled = on_event, pooled

    def admit(
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

    def leave(self, number: int, task: FitTask, reason: str, costs: RoundCosts) -> None:
        """Drop a task whose answer is not waited for any more."""
        step_tokens = self._config.local.batch_size * self._config.data.sequence_length
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

    def require_quorum(self, number: int, good: int, asked: int, costs: RoundCosts) -> None:
        """Raise QuorumLostError unless enough of those asked gave good updates."""
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
        receipt, config = update.receipt, self._config
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
        verdict = self._server.offer(update, weight, scale)
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
