"""Centralised training on pooled text: the baseline, with the same node and no federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from photon.aggregation import check_update
from photon.config import LinkConfig, RunConfig
from photon.errors import error_of
from photon.federation.ledger import WAY_OUT, Ledger, RoundCosts, due, local_finished, state_lost
from photon.federation.tasks import WEIGHTS, Engine, EvalTask, FitTask, section
from photon.telemetry.events import RoundStarted

#: What stands for the silo in events of centralised training.
CENTRALISED = "centralised"


def central_config(config: RunConfig, batch_size: int) -> RunConfig:
    """The run file as a node reads it that trains alone on pooled text.

    It keeps its optimizer, its weights are taken as they are, and [train] overrides [local].

    Args:
        batch_size: sequences per step.
    """
    local: dict[str, float] = {"batch_size": batch_size}
    if config.train.lr is not None:
        local["lr"] = config.train.lr
    kept = {"optimizer_state": "keep", "merge": "adopt"}
    return config.model_copy(
        update={
            "local": config.local.model_copy(update=local),
            "federation": config.federation.model_copy(update=kept),
            "link": LinkConfig(),  # nothing leaves the machine
        }
    )


class CentralisedTraining:
    """`photon train`: tau steps, evaluation, checkpoint, again; nothing is merged.

    A "round" is the span between two checkpoints, so that curves line up with a federated run.

    Args:
        config: from `central_config`.
        data_silos: silos of the prepared data, each of which is evaluated on.
        texts: the silos whose text is pooled.
        engine: its one node trains.
        ledger: totals, events and checkpoints; its state says where to go on.
        node_folder: of the node's kept state, pruned as checkpoints are.
        tensors: "global" weights, fresh or from a checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        data_silos: Sequence[str],
        texts: Sequence[str],
        engine: Engine,
        ledger: Ledger,
        node_folder: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        self._config = config
        self._data_silos = sorted(data_silos)
        self._texts = tuple(texts)
        self._engine = engine
        self._ledger = ledger
        self._node_folder = node_folder
        self.state: dict[str, Tensor] = dict(tensors["global"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by parameter name."""
        return section(self.state, WEIGHTS)

    def run(self) -> bool:
        """Train the steps that are left, and evaluate what came out; true, as the run is over then.

        Raises:
            NonFiniteError: the loss or the weights diverged; the last checkpoint stands.
        """
        config, ledger = self._config, self._ledger
        rounds = config.federation.rounds
        if ledger.state.round == 0:
            ledger.save({"global": self.state})
            if config.eval.every:
                self._evaluate(0)
        while ledger.state.round < rounds:
            self._run_span(ledger.state.round + 1)
        if ledger.evaluated_round != rounds:
            self._evaluate(rounds)
        return True

    def _run_span(self, number: int) -> None:
        config, ledger = self._config, self._ledger
        costs = RoundCosts()
        global_step = ledger.state.global_step
        ledger.recorder.emit(
            RoundStarted(round=number, global_step=global_step, participants=[CENTRALISED])
        )
        task = FitTask(
            run=config.run.name,
            round=number,
            silo=CENTRALISED,
            global_step=global_step,
            steps=config.local.steps,
            node_round=ledger.state.node_rounds.get(CENTRALISED),
            cursor=(cursor := ledger.state.cursors.get(CENTRALISED, 0)),
            texts=self._texts,
        )
        self._train(task, costs)
        if due(config.eval.every, number, config.federation.rounds):
            costs.eval_s = self._evaluate(number)
        ledger.close_round(
            costs,
            {"global": self.state},
            global_step=global_step + config.local.steps,
            node_rounds={CENTRALISED: number},
            cursors={CENTRALISED: cursor + config.local.steps * config.local.batch_size},
        )
        ledger.prune_node_states(self._node_folder)

    def _train(self, task: FitTask, costs: RoundCosts) -> None:
        """Have the node take its steps, and take over its weights."""
        for update in self._engine.fit([task], self.state):
            receipt = update.receipt
            if receipt.failure is not None:
                hint = f"{receipt.failure_hint or ''} {WAY_OUT}".lstrip()
                raise error_of(receipt.failure_code)(receipt.failure, hint=hint)
            if receipt.state_lost:
                self._ledger.recorder.emit(state_lost(task))
            check_update(update.tensors(), self.state)
            for name, tensor in update.tensors():
                self.state[name].copy_(tensor)
            costs.local_train_s, costs.tokens = receipt.train_s, receipt.tokens
            # Nothing leaves the machine.
            event = local_finished(receipt, update_norm=0.0)
            self._ledger.recorder.emit(event.model_copy(update={"bytes_up": 0, "bytes_down": 0}))

    def _evaluate(self, number: int) -> float:
        silos: list[str | None] = [None]
        if self._config.eval.per_silo:
            silos += self._data_silos
        tasks = [EvalTask(number, silo) for silo in silos]
        return self._ledger.record_evaluation(number, self._engine.evaluate(tasks, self.state))
