"""Centralised training on pooled text: the baseline, with the same loop and no federation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from photon.config import RunConfig
from photon.data import PreparedData
from photon.federation.ledger import Ledger, RoundCosts, due
from photon.federation.node import evaluate_silo, open_stream, stream_seed
from photon.federation.tasks import EvalTask
from photon.telemetry.events import LocalFinished, LocalProgress, RoundStarted
from photon.training import Progress, Schedule, Trainer, plan_compute

#: What stands for the silo in events of centralised training.
CENTRALISED = "centralised"


class CentralisedTraining:
    """`photon train`: tau steps, evaluation, checkpoint, again; nothing is sent or merged.

    A "round" is the span between two checkpoints, so that curves line up with a federated run.

    Args:
        config: the run file.
        data: prepared text.
        silos: whose text is pooled.
        batch_size: sequences per step.
        model: with its initial weights.
        ledger: totals, events and checkpoints; its state says where to go on.
        tensors: "global" weights and "optimizer" state of a checkpoint; empty at the start.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        silos: Sequence[str],
        *,
        batch_size: int,
        model: nn.Module,
        ledger: Ledger,
        tensors: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        self._config = config
        self._data = data
        self._silos = list(silos)
        self._ledger = ledger
        local = config.local
        if config.train.lr is not None:
            local = local.model_copy(update={"lr": config.train.lr})
        self._trainer = Trainer(
            model,
            local,
            Schedule.of(config),
            plan_compute(config.compute),
            batch_size=batch_size,
            log_every=config.run.log_every,
        )
        if tensors:
            self._trainer.load_weights(tensors["global"])
            self._trainer.optimizer.load_state_tensors(tensors["optimizer"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by parameter name."""
        return self._trainer.weights()

    def run(self) -> None:
        """Train the steps that are left, and evaluate what came out.

        Raises:
            NonFiniteError: the loss diverged; the last checkpoint stands.
        """
        config, ledger = self._config, self._ledger
        rounds = config.federation.rounds
        if ledger.state.round == 0:
            ledger.save(self._groups())
            if config.eval.every:
                self._evaluate(0)
        seed = stream_seed(config.run.seed, self._silos)
        with open_stream(config, self._data, self._silos) as stream:
            while ledger.state.round < rounds:
                self._run_span(ledger.state.round + 1, stream, seed)
        if ledger.evaluated_round != rounds:
            self._evaluate(rounds)

    def _run_span(self, number: int, stream, seed: int) -> None:
        config, ledger = self._config, self._ledger
        costs = RoundCosts()
        global_step = ledger.state.global_step
        ledger.recorder.emit(
            RoundStarted(round=number, global_step=global_step, participants=[CENTRALISED])
        )
        result = self._trainer.fit(
            stream,
            cursor=ledger.state.cursor,
            global_step=global_step,
            steps=config.local.steps,
            seed=seed,
            on_progress=self._telling(number),
        )
        costs.local_train_s, costs.tokens = result.train_s, result.tokens
        ledger.recorder.emit(
            LocalFinished(
                round=number,
                silo=CENTRALISED,
                loss=result.loss,
                first_loss=result.first_loss,
                last_loss=result.last_loss,
                tokens=result.tokens,
                update_norm=0.0,
                train_s=result.train_s,
                load_s=0.0,
                publish_s=0.0,
                bytes_down=0,
                bytes_up=0,
            )
        )
        if due(config.eval.every, number, config.federation.rounds):
            costs.eval_s = self._evaluate(number)
        ledger.close_round(
            costs,
            self._groups(),
            global_step=global_step + config.local.steps,
            node_rounds={},
            cursor=result.cursor,
        )

    def _telling(self, number: int) -> Callable[[Progress], None]:
        def tell(progress: Progress) -> None:
            self._ledger.recorder.emit(
                LocalProgress(round=number, silo=CENTRALISED, **vars(progress))
            )

        return tell

    def _evaluate(self, number: int) -> float:
        silos: list[str | None] = [None]
        if self._config.eval.per_silo:
            silos += sorted(self._data.silos)
        return self._ledger.record_evaluation(
            number,
            (
                evaluate_silo(self._config, self._data, self._trainer, EvalTask(number, silo))
                for silo in silos
            ),
        )

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "global": self._trainer.weights(),
            "optimizer": self._trainer.optimizer.state_tensors(),
        }
