"""An LLM node: trains whichever silo a task names, and scores states on held-out text."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from photon.config import ModelConfig, RunConfig
from photon.data import PreparedData, held_out_text, open_data, token_stream
from photon.errors import NonFiniteError
from photon.evaluation import evaluate_loss, score
from photon.federation.node_state import NodeState, NodeStateStore
from photon.federation.tasks import (
    OPTIMIZER,
    WEIGHTS,
    EvalReceipt,
    EvalTask,
    FitTask,
    GlobalState,
    Receipt,
    Update,
    section,
)
from photon.models import build_model
from photon.telemetry import Event
from photon.telemetry.events import LocalProgress
from photon.training import Schedule, Trainer, plan_compute

#: Called with a task's trainer just before its local steps; tests inject faults through it.
FaultHook = Callable[[FitTask, Trainer], None]


@dataclass(frozen=True)
class NodeSettings:
    """What a node needs to start, in this process or another.

    Attributes:
        folder: where silos' states are kept between rounds.
        processes: nodes that share this machine's cores.
        worker: number of this node, for receipts.
    """

    config: RunConfig
    folder: Path
    processes: int = 1
    worker: int = 0


class Node:
    """A trainer that lives across rounds and serves any silo (virtual clients).

    Args:
        settings: what to train with.
        on_event: told of local progress.
        data: the prepared data, when it is open already.
        model: the model, when it is built already; its weights are overwritten by each task.
        fault: for tests.
    """

    def __init__(
        self,
        settings: NodeSettings,
        on_event: Callable[[Event], None],
        *,
        data: PreparedData | None = None,
        model: nn.Module | None = None,
        fault: FaultHook | None = None,
    ) -> None:
        self._config = config = settings.config
        self._data = data or open_data(config.data.path)
        self._states = NodeStateStore(settings.folder)
        self._on_event = on_event
        self._worker = settings.worker
        self._fault = fault
        if model is None:
            model = empty_model(config, vocab_size=self._data.vocab_size, eos_id=self._data.eos_id)
        self._trainer = Trainer(
            model,
            config.local,
            Schedule.of(config),
            plan_compute(config.compute, processes=settings.processes),
            log_every=config.run.log_every,
        )

    def fit(self, task: FitTask, state: GlobalState) -> Update:
        """Take the task's local steps from the global state.

        A non-finite loss is a receipt with a failure, not an exception: the round goes on. The
        silo's own state then stays as it was.
        """
        started = time.perf_counter()
        config, trainer = self._config, self._trainer
        trainer.load_weights(section(state, WEIGHTS))
        node_state = self._states.load(task.silo, task.node_round)
        self._load_optimizer(task, state, node_state)
        load_s = time.perf_counter() - started
        if self._fault is not None:
            self._fault(task, trainer)
        stream = open_stream(config, self._data, [task.silo])
        bytes_down = sum(tensor.nbytes for tensor in state.values())
        try:
            with stream:
                result = trainer.fit(
                    stream,
                    cursor=node_state.cursor,
                    global_step=task.global_step,
                    steps=task.steps,
                    seed=stream_seed(config.run.seed, [task.silo]),
                    on_progress=lambda progress: self._on_event(
                        LocalProgress(round=task.round, silo=task.silo, **vars(progress))
                    ),
                )
        except NonFiniteError as error:
            receipt = Receipt(
                task.round,
                task.silo,
                bytes_down=bytes_down,
                load_s=load_s,
                worker=self._worker,
                failure=error.message,
            )
            return Update(receipt, lambda: iter(()))
        published = time.perf_counter()
        kept = (
            trainer.optimizer.state_tensors() if config.federation.optimizer_state == "keep" else {}
        )
        self._states.save(task.silo, task.round, NodeState(result.cursor, kept))
        receipt = Receipt(
            task.round,
            task.silo,
            tokens=result.tokens,
            loss=result.loss,
            first_loss=result.first_loss,
            last_loss=result.last_loss,
            bytes_down=bytes_down,
            bytes_up=self._update_bytes(),
            train_s=result.train_s,
            load_s=load_s,
            publish_s=time.perf_counter() - published,
            worker=self._worker,
        )
        return Update(receipt, lambda: self._shared(state))

    def evaluate(self, tasks: Sequence[EvalTask], state: GlobalState) -> Iterator[EvalReceipt]:
        """Score the global state on held-out text; the weights are loaded once for all tasks."""
        self._trainer.load_weights(section(state, WEIGHTS))
        for task in tasks:
            yield evaluate_silo(self._config, self._data, self._trainer, task)

    def _load_optimizer(self, task: FitTask, state: GlobalState, node_state: NodeState) -> None:
        optimizer = self._trainer.optimizer
        if self._config.federation.optimizer_state == "average":
            averaged = section(state, OPTIMIZER)
            steps_taken = task.global_step if averaged else None
            optimizer.load_state_tensors(averaged, steps_taken=steps_taken)
        else:
            optimizer.load_state_tensors(node_state.optimizer)

    def _shared(self, state: GlobalState) -> Iterator[tuple[str, Tensor]]:
        """What leaves the node, a tensor at a time: deltas (or weights), averaged inner state."""
        adopt = self._config.federation.merge == "adopt"
        for name, local in self._trainer.weights().items():
            shared = state[WEIGHTS + name]
            mine = local.to(shared.device)
            yield WEIGHTS + name, mine if adopt else shared - mine
        for name, tensor in self._averaged_state().items():
            yield OPTIMIZER + name, tensor.cpu()

    def _averaged_state(self) -> dict[str, Tensor]:
        """Inner state that travels with the weights; step counters follow the server's clock."""
        if self._config.federation.optimizer_state != "average":
            return {}
        return {
            name: tensor
            for name, tensor in self._trainer.optimizer.state_tensors().items()
            if not name.endswith(".step")
        }

    def _update_bytes(self) -> int:
        travelling = [*self._trainer.weights().values(), *self._averaged_state().values()]
        return sum(tensor.nbytes for tensor in travelling)


def initial_model(config: RunConfig, data: PreparedData) -> nn.Module:
    """The run's model with its initial weights."""
    return _build(config, config.model, data.vocab_size, data.eos_id)


def empty_model(config: RunConfig, *, vocab_size: int, eos_id: int) -> nn.Module:
    """The run's model with weights that are about to be overwritten (never read from a folder)."""
    shape = config.model.model_copy(update={"init": "random"})
    return _build(config, shape, vocab_size, eos_id)


def open_stream(config: RunConfig, data: PreparedData, silos: Sequence[str]):
    """The training text of these silos, pooled."""
    return token_stream(
        data, silos, config.data.sequence_length, config.run.seed, config.data.mixture or None
    )


def stream_seed(seed: int, silos: Sequence[str]) -> int:
    """Dropout seed of a stream, so that silos draw different masks."""
    return seed ^ zlib.crc32("\0".join(silos).encode())


def evaluate_silo(
    config: RunConfig, data: PreparedData, trainer: Trainer, task: EvalTask
) -> EvalReceipt:
    """Loss of the trainer's current weights on a silo's held-out text, or the global set's."""
    started = time.perf_counter()
    text = held_out_text(data, task.silo)
    total = evaluate_loss(
        trainer.model,
        text.windows(config.data.sequence_length, config.eval.max_tokens),
        device=trainer.plan.device,
        batch_size=config.eval.batch_size,
        autocast_dtype=trainer.plan.autocast_dtype,
    )
    scored = score(total, text_tokens=text.tokens, text_bytes=text.bytes)
    return EvalReceipt(
        task.silo,
        scored.loss,
        scored.perplexity,
        scored.bits_per_byte,
        total.tokens,
        time.perf_counter() - started,
    )


def _build(config: RunConfig, shape: ModelConfig, vocab_size: int, eos_id: int) -> nn.Module:
    return build_model(
        shape,
        vocab_size=vocab_size,
        sequence_length=config.data.sequence_length,
        eos_id=eos_id,
        seed=config.run.seed,
    )
