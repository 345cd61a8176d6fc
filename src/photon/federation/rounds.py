"""The federated round: sample, dispatch, merge as updates arrive, step, evaluate, checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from photon.aggregation import OuterOptimizer, build_outer_optimizer
from photon.config import RunConfig
from photon.errors import NonFiniteError, QuorumLostError
from photon.federation.broadcast import Broadcast
from photon.federation.ledger import (
    WAY_OUT,
    Ledger,
    RoundCosts,
    due,
    implausible,
    local_finished,
    scaled_down,
    state_lost,
)
from photon.federation.merging import Merging
from photon.federation.norm_bound import NormBound, lr_sum, norm_bound, usual_norm
from photon.federation.sampling import Candidates, Fleet, sample_participants
from photon.federation.tasks import (
    OPTIMIZER,
    WEIGHTS,
    Engine,
    EvalTask,
    FitTask,
    Receipt,
    StateRef,
    Update,
    section,
)
from photon.link import Carrier
from photon.telemetry.events import RoundMerged, RoundStarted, UpdateDropped


class Federation:
    """The aggregator's loop over rounds.

    Memory: the global state, one accumulator, the outer optimizer's state, and one tensor of the
    update being merged; the number of participants does not enter. (Rules that need all updates
    together keep them on disk.)

    Args:
        config: the run file.
        fleet: the silos.
        engine: carries tasks to participants.
        ledger: totals, events and checkpoints; its state says where to go on.
        node_folder: of the silos' kept states, pruned as checkpoints are.
        tensors: "global" state, "outer" optimizer state, and what the merging "rule" keeps from
            round to round; fresh or from a checkpoint.
        draining: asked before each round; where it is true, the round before was the last for now.
    """

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        engine: Engine,
        ledger: Ledger,
        node_folder: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._draining = draining
        self._engine = engine
        self._ledger = ledger
        self._node_folder = node_folder
        self.state: dict[str, Tensor] = dict(tensors["global"])
        self._merging = Merging(config.federation, node_folder.parent)
        self._bound = NormBound()
        self._outer: OuterOptimizer = build_outer_optimizer(config.outer)
        self._broadcast = Broadcast(
            config.link, config.run.name, tensors.get("broadcast"), ledger.state.outer_update_bytes
        )
        self._published: StateRef | None = None
        self._shares: dict[str, int] = {}
        self._step_tokens = config.local.batch_size * config.data.sequence_length
        if tensors.get("outer"):
            self._outer.load_state_tensors(dict(tensors["outer"]))
        if tensors.get("rule"):
            self._merging.load_state_tensors(dict(tensors["rule"]))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The global weights by parameter name."""
        return section(self.state, WEIGHTS)

    def run(self) -> bool:
        """Run the rounds that are left, and evaluate what came out.

        Returns:
            Whether the run is over; false where it is to drain.

        Raises:
            QuorumLostError: a round had too few good updates and the fleet has no others to try it
                with; or too few silos came. The last checkpoint stands.
        """
        rounds = self._config.federation.rounds
        if self._ledger.state.round == 0:
            self._ledger.save(self._groups())
            if self._config.eval.every:
                self._evaluate(0)
        while self._ledger.state.round < rounds:
            number = self._ledger.state.round + 1
            candidates = None if self._draining() else self._fleet.drawn_from(number)
            if candidates is None:
                return False
            try:
                self._run_round(number, candidates)
            except QuorumLostError:
                if not self._fleet.lost(number):
                    raise
        if self._ledger.evaluated_round != rounds:
            self._evaluate(rounds)
        return True

    def _run_round(self, number: int, candidates: Candidates) -> None:
        config, ledger = self._config, self._ledger
        costs = RoundCosts()
        drawn = sample_participants(
            candidates.tokens,
            count=config.federation.sample,
            sampling=config.federation.sampling,
            seed=config.run.seed,
            round_number=number,
            attempt=candidates.attempt,
        )
        participants = list(dict.fromkeys(drawn))
        by_data = config.federation.weighting == "data"
        self._shares = {
            silo: times * (candidates.tokens[silo] if by_data else 1)
            for silo, times in Counter(drawn).items()
        }
        global_step = ledger.state.global_step
        ledger.recorder.emit(
            RoundStarted(round=number, global_step=global_step, participants=participants)
        )
        tasks = [
            FitTask(
                run=config.run.name,
                round=number,
                silo=silo,
                global_step=global_step,
                steps=config.local.steps,
                node_round=ledger.state.node_rounds.get(silo),
                cursor=ledger.state.cursors.get(silo, 0),
                state_bytes=self._state_bytes(number - 1, self._held(silo, number)),
            )
            for silo in participants
        ]
        self._engine.offer(number - 1, partial(self._publish, number - 1))
        self._bound = norm_bound(config, ledger.state, self.state)
        merged = self._merge_updates(number, tasks, costs)
        self._require_quorum(number, merged, len(tasks), costs)
        merged_norm = self._step(number, merged, costs)
        if due(config.eval.every, number, config.federation.rounds):
            costs.eval_s = self._evaluate(number, participants)
        node_rounds = ledger.state.node_rounds | {receipt.silo: number for receipt in merged}
        # Whatever came of it: nothing in a silo's text can keep it out for longer than one round.
        asked = config.local.steps * config.local.batch_size
        cursors = ledger.state.cursors | {task.silo: task.cursor + asked for task in tasks}
        ledger.close_round(
            costs,
            self._groups(),
            global_step=global_step + config.local.steps,
            node_rounds=node_rounds,
            cursors=cursors,
            outer_update_bytes=self._broadcast.update_bytes,
            merged_norm=merged_norm,
            merged_lr_sum=lr_sum(config, global_step),
        )
        ledger.prune_node_states(self._node_folder)

    def _merge_updates(self, number: int, tasks: list[FitTask], costs: RoundCosts) -> list[Receipt]:
        """Give good updates to the merging rule, in task order, and name the bad ones."""
        merged: list[Receipt] = []
        busy_s = 0.0
        try:
            for task, update in zip(tasks, self._engine.fit(tasks, self.state), strict=True):
                receipt = update.receipt
                if receipt.state_lost:
                    self._ledger.recorder.emit(state_lost(task))
                reason = implausible(receipt, task.steps * self._step_tokens)
                if reason is None:
                    busy_s += receipt.train_s
                    costs.bytes_down += receipt.bytes_down
                    costs.bytes_up += receipt.bytes_up
                    started = time.perf_counter()
                    reason = receipt.failure or self._merge_one(update)
                    costs.merge_s += time.perf_counter() - started
                if reason is None:
                    merged.append(receipt)
                    costs.tokens += receipt.tokens
                else:
                    costs.dropped.append(receipt.silo)
                    named = reason.startswith(receipt.silo)
                    costs.reasons.append(reason if named else f"{receipt.silo}: {reason}")
                    costs.diverged += receipt.failure_code == NonFiniteError.exit_code
                    self._ledger.recorder.emit(
                        UpdateDropped(round=number, silo=receipt.silo, reason=reason)
                    )
        except BaseException:
            self._merging.discard()
            raise
        costs.local_train_s = busy_s / self._engine.processes
        return merged

    def _merge_one(self, update: Update) -> str | None:
        """Check and add one update; the reason if it is refused."""
        receipt, by_tokens = update.receipt, self._config.federation.weighting == "tokens"
        weight = float(self._shares[receipt.silo] * (receipt.tokens if by_tokens else 1))
        verdict = self._merging.offer(update, self.state, weight, self._bound)
        if verdict.refused is None:
            receipt = update.receipt
            self._ledger.recorder.emit(local_finished(receipt, update_norm=verdict.norm))
            if verdict.share < 1:
                self._ledger.recorder.emit(scaled_down(receipt, verdict.norm, verdict.share))
        return verdict.refused

    def _require_quorum(
        self, number: int, merged: list[Receipt], asked: int, costs: RoundCosts
    ) -> None:
        quorum = self._config.quorum_of(asked)
        if len(merged) >= quorum:
            return
        if merged:
            self._merging.discard()
        raise QuorumLostError(
            f"round {number} has {len(merged)} good updates of {asked}, the quorum is {quorum}; "
            f"dropped: {'; '.join(costs.reasons) or 'none'}",
            hint=f"Round {number - 1} is saved. See update_dropped in events.jsonl, mend the "
            "silo, then `photon resume DIR`."
            + (f" {WAY_OUT}" if costs.diverged == len(costs.dropped) else ""),
        )

    @torch.no_grad()
    def _step(self, number: int, merged: list[Receipt], costs: RoundCosts) -> float:
        """Turn what was merged into the next global state, as nodes will have it.

        Returns:
            What the next round's bound on updates goes by.

        Raises:
            RunError: what was merged is not fit for that; the state is as it was.
        """
        started = time.perf_counter()
        before = self._broadcast.keep(self.state)
        result = self._merging.result(self.state, self._bound)
        merged_weights = section(result.tensors, WEIGHTS)
        if self._config.federation.merge == "adopt":
            for name, weight in section(self.state, WEIGHTS).items():
                weight.copy_(merged_weights[name])
        else:
            self._outer.step(section(self.state, WEIGHTS), merged_weights)
        for name, tensor in section(self.state, OPTIMIZER).items():
            tensor.copy_(result.tensors[OPTIMIZER + name])
        self._broadcast.encode(number, self.state, before)
        costs.merge_s += time.perf_counter() - started
        tokens = sum(receipt.tokens for receipt in merged)
        loss = sum(receipt.loss * receipt.tokens for receipt in merged) / max(1, tokens)
        self._ledger.recorder.emit(
            RoundMerged(
                round=number,
                participants=[receipt.silo for receipt in merged],
                tokens=tokens,
                train_loss=loss,
                pseudo_gradient_norm=result.norm,
                merge_s=costs.merge_s,
            )
        )
        return usual_norm(result.norms, self._ledger.state)

    def _held(self, silo: str, number: int) -> int | None:
        """The newest state a silo received before round `number`: trained from, or evaluated."""
        took_part = self._ledger.state.node_rounds.get(silo)
        held = [] if took_part is None else [took_part - 1]
        last, every = number - 1, self._config.eval.every
        if self._config.eval.per_silo and every and last >= 0:
            held.append(last - last % every)
        return max(held, default=None)

    def _state_bytes(self, wanted: int, held: int | None) -> int:
        """What a silo that holds one state gets to have another (numbers of rounds they ended)."""
        if held == wanted:
            return 0
        return self._broadcast.bytes_down(wanted + 1, self.state, holds_last=held == wanted - 1)

    def _evaluate(self, number: int, participants: Collection[str] = ()) -> float:
        """Score the state after round `number`, which its participants began a state behind."""
        tasks = [EvalTask(number, None)]
        if self._config.eval.per_silo:
            tasks += [
                EvalTask(
                    number,
                    silo,
                    self._state_bytes(
                        number, number - 1 if silo in participants else self._held(silo, number)
                    ),
                )
                for silo in sorted(self._fleet.present())
            ]
        self._engine.offer(number, partial(self._publish, number))
        return self._ledger.record_evaluation(number, self._engine.evaluate(tasks, self.state))

    def _publish(self, number: int, carrier: Carrier, folder: str) -> StateRef:
        """Put the state of now, that after round `number`, into a store."""
        before = self._published
        base = before.sha256 if before is not None and before.round == number - 1 else None
        self._published = self._broadcast.publish(carrier, folder, number, self.state, base=base)
        return self._published

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        groups: dict[str, Mapping[str, Tensor]] = {
            "global": self.state,
            "outer": self._outer.state_tensors(),
        }
        if self._broadcast.lossy:
            groups["broadcast"] = self._broadcast.left_out
        rule = self._merging.state_tensors()
        if rule:
            groups["rule"] = rule
        return groups
