"""An LLM node: trains whichever silo a task names, and scores states on held-out text.

A node is one process or several ranks. All of them build a Node; rank 0 is called, and announces
each call to the others, which `follow`.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from photon.config import RunConfig
from photon.data import PreparedData, held_out_text, open_data, open_stream
from photon.data.held_out import Window
from photon.energy.account import JOULES, Spent
from photon.energy.meter import METER
from photon.errors import NonFiniteError, PolicyError, RankLostError, RunError
from photon.evaluation import LossSum, evaluate_loss, score
from photon.federation.engine import Version
from photon.federation.layout import empty_model, layout_of
from photon.federation.node_state import Kept
from photon.federation.private import Purse, Spending, asked_of, require_same_privacy, spending_of
from photon.federation.secure_rounds import agreed
from photon.federation.stages import leaving
from photon.federation.tasks import (
    OPTIMIZER,
    WEIGHTS,
    EvalReceipt,
    EvalTask,
    FitTask,
    GlobalState,
    Receipt,
    SecureReceipt,
    SecureTask,
    Update,
    section,
)
from photon.models import (
    model_fingerprint,
    sequences_at_once,
)
from photon.privacy.epsilon import settled
from photon.telemetry import Event
from photon.telemetry.events import ComputeChosen, LocalProgress, Notice
from photon.training import (
    LocalResult,
    MicroBatch,
    Ranks,
    Schedule,
    Seat,
    Trainer,
    count_flops,
    mfu,
    plan_compute,
    plan_fit,
    power_of,
    stated_peak,
    within_memory,
)
from photon.version import photon_version

#: Called with a task's trainer just before its local steps; tests inject faults through it.
FaultHook = Callable[[FitTask, Trainer], None]


@dataclass(frozen=True)
class NodeSettings:
    """What a node needs to start, in this process or another.

    Attributes:
        folder: where silos' states are kept between rounds; all ranks see it.
        processes: nodes that share this machine's cores.
        worker: number of this node, for receipts.
        seat: this process's place among the node's ranks.
        scores_only: it will be given no text to train on, and needs no room for that.
        apart: its process does nothing else, so that all the energy of it is the node's.
        purse: of differential privacy, where that outlives the run; else in `folder`.
    """

    config: RunConfig
    folder: Path
    processes: int = 1
    worker: int = 0
    seat: Seat = field(default_factory=Seat)
    scores_only: bool = False
    apart: bool = False
    purse: Purse | None = None


class Node:
    """A trainer that lives across rounds and serves any silo (virtual clients).

    Args:
        settings: what to train with.
        on_event: told of local progress; on rank 0 only.
        data: the prepared data, when it is open already.
        model: the model, when it is built already; its weights are overwritten by each task.
        fault: for tests.

    Raises:
        RankMismatchError: the ranks were started with different files.
        RankLostError: the ranks did not meet.
        DoesNotFitError: the model can't be trained in this memory, however it is spread.
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
        self._config = config = settled(settings.config)
        self._purse = settings.purse or Purse(settings.folder, config.run.name)
        self._data = data or open_data(config.data.path, own_vocabularies=True)
        self._on_event = on_event
        self._worker = settings.worker
        self._folder = settings.folder
        self._fault = fault
        self._loaded: Version | None = None
        self._once_sha256: str | None = None
        if model is None:
            model = empty_model(config, vocab_size=self._data.vocab_size, eos_id=self._data.eos_id)
        self._layout = layout_of(model)
        seat = settings.seat
        sharing = settings.processes * seat.local_world_size
        plan = plan_compute(config.compute, processes=sharing, seat=seat)
        self._power = power_of(config.energy, plan, sharing=sharing)
        # Beside an aggregator, what else this process does is the aggregator's.
        beside = not settings.apart and not seat.rank
        self._phases = ("training", "evaluation", "privacy") if beside else ()
        self._ranks = Ranks.join(seat, plan.device, collective_s=config.federation.silence_s)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._ranks.close)
            self._require_same_files(model)
            memo = settings.folder / f"micro_batch-{seat.rank}.json"
            fit = plan_fit(
                model,
                config,
                plan,
                seat,
                share_of=settings.processes,
                memo=memo,
                ranks=self._ranks,
                scores_only=settings.scores_only,
            )
            strategy = fit.strategy
            self._flops_per_token = count_flops(model, config.data.sequence_length).per_token
            self._trainer = Trainer(
                model,
                config.local,
                Schedule.of(config),
                plan,
                log_every=config.run.log_every,
                placement=(self._ranks, strategy),
                micro_batch=fit.micro_batch,
            )
            # Remembered by rank like the micro-batches of training, and beside them.
            self._scored_at_once = MicroBatch(
                config.eval.batch_size,
                asked=sequences_at_once(model, config.data.sequence_length),
                memo=memo,
                key=f"scoring, {strategy.name} on {seat.world_size} ranks, {plan.device.type}",
            )
            self._scored_at_once.limit(self._ranks.least(self._scored_at_once.size))
            self._kept = Kept(settings.folder, self._trainer, self._layout, config)
            if self._ranks.leader:
                require_same_privacy(settings.folder, config)
                on_event(
                    ComputeChosen(
                        worker=settings.worker,
                        ranks=seat.world_size,
                        strategy=strategy.name,
                        reason=strategy.reason,
                        device=plan.device.type,
                        precision=plan.precision,
                    )
                )
            on_failure.pop_all()

    def fit(self, task: FitTask, version: Version) -> Update:
        """As `Participant.fit`.

        Where the kept state that the task names is gone, the silo starts without one, and the
        receipt says so.
        """
        spending = self._spending(task, asked_of(self._config, version))
        try:
            spending.begin()
        except (PolicyError, RunError) as error:
            return Update.none(Receipt.failed(task, error, worker=self._worker))
        self._load_once(version)
        self._ranks.announce(("fit", task))
        self._loaded = None
        return self._fit(task, version, spending)

    def evaluate(self, task: EvalTask, version: Version) -> EvalReceipt:
        """Score the version on held-out text; it is loaded once, whatever is scored after it."""
        self._load_once(version)
        if self._loaded is not version:
            self._ranks.announce(("load", self._layout.merged))
            self._trainer.load_weights(section(version.tensors, WEIGHTS), self._layout.merged)
            self._loaded = version
        self._ranks.announce(("evaluate", task))
        return self._evaluate(task, version)

    def agree(self, task: SecureTask) -> SecureReceipt:
        """Do a phase of secure aggregation, beside what the silo keeps; rank 0 alone does."""
        return agreed(self._folder, task)

    def settle(self) -> None:
        """Wait until all that silos keep is on disk.

        Raises:
            DiskFullError: no room for it.
        """
        self._ranks.announce(("settle", None))
        self._kept.settle()

    def close(self) -> None:
        """Let the other ranks go."""
        with contextlib.suppress(RankLostError):  # then there is nobody to let go
            self._ranks.announce(("close", None))
        self._ranks.close()

    def follow(self) -> None:
        """Do what rank 0 announces, until it closes; for the ranks other than 0.

        Raises:
            RankLostError: rank 0, or another, is gone.
        """
        with contextlib.closing(self._ranks):
            while True:
                with METER.phase("idle"):
                    call, task = self._ranks.announce(None)
                if call == "fit":
                    self._fit(task, None, self._spending(task))
                elif call == "load":
                    self._trainer.load_weights(None, task)
                elif call == "evaluate":
                    self._evaluate(task, None)
                elif call == "untold":
                    self._spent()
                elif call == "settle":
                    self._kept.settle()
                else:
                    return

    def _load_once(self, version: Version) -> None:
        """Frozen tensors, unless they are here already."""
        if self._once_sha256 != version.once_sha256:
            self._ranks.announce(("load", self._layout.once))
            self._trainer.load_weights(version.once, self._layout.once)
            self._once_sha256 = version.once_sha256

    def _fit(self, task: FitTask, version: Version | None, spending: Spending) -> Update:
        started = time.perf_counter()
        trainer, state = self._trainer, version.tensors if version is not None else None
        weights = section(state, WEIGHTS) if state is not None else None
        trainer.load_weights(weights, self._layout.merged)
        state_lost = not self._kept.take_up(task, version, partial(self._coming_loss, task))
        load_s = time.perf_counter() - started
        if self._fault is not None:
            self._fault(task, trainer)
        try:
            with METER.phase("training"):
                result = self._train(task, spending)
            published = time.perf_counter()
            self._kept.leave(task)
            with METER.phase("privacy"):
                update = self._update(task, state, spending)
        except (NonFiniteError, PolicyError) as error:
            receipt = Receipt.failed(
                task,
                error,
                load_s=load_s,
                worker=self._worker,
                state_lost=state_lost,
                energy=self._spent(),
            )
            return Update.none(receipt)
        told = {name: value for name, value in vars(result).items() if name != "cursor"}
        receipt = replace(
            update.receipt,
            **told | spending.withheld("loss", "first_loss", "last_loss"),
            load_s=load_s,
            publish_s=time.perf_counter() - published,
            worker=self._worker,
            mfu=self._mfu(result),
            state_lost=state_lost or update.receipt.state_lost,
            energy=self._spent(),
        )
        return replace(update, receipt=receipt)

    def untold(self) -> Spent:
        """What all ranks used since the last answer."""
        self._ranks.announce(("untold", None))
        return self._spent()

    def _spent(self) -> Spent:
        """By all ranks, since they last said."""
        own = self._power.taken(*self._phases)
        *joules, unsure = self._ranks.total([*own.by_phase.values(), own.how != "measured"])
        sums = dict(zip(JOULES, joules, strict=True))
        return Spent(how="estimated" if unsure else "measured", **sums)

    def _coming_loss(self, task: FitTask) -> float:
        """Loss of the weights of now on a task's first two batches, a mean over tokens."""
        size = self._config.local.batch_size
        with open_stream(self._config, self._data, task.pooled) as stream:
            rows = stream.batch(task.cursor, 2 * size)
        windows = [Window(row, None, 0, 0) for row in rows]
        own = self._loss(windows, min(size, self._scored_at_once.size))
        nats, tokens = self._ranks.total([own.nats, own.tokens])
        return nats / tokens

    def _loss(self, windows: Iterable[Window], sequences: int) -> LossSum:
        """Of the weights of now on this rank's part of the windows, so many at a time."""
        trainer, ranks = self._trainer, self._ranks
        with trainer.evaluating() as model:
            return evaluate_loss(
                model,
                windows,
                device=trainer.plan.device,
                batch_size=sequences,
                autocast_dtype=trainer.autocast_dtype,
                head=trainer.placed.head,
                part=(ranks.seat.rank, ranks.size),
            )

    def _spending(self, task: FitTask, asked: str = "") -> Spending:
        return spending_of(self._config, self._purse, self._data, task, asked)

    def _train(self, task: FitTask, spending: Spending) -> LocalResult:
        config = self._config
        with open_stream(config, self._data, task.pooled) as stream:
            return self._trainer.fit(
                stream,
                cursor=task.cursor,
                global_step=task.global_step,
                steps=task.steps,
                seed=stream_seed(config.run.seed, task.pooled),
                on_progress=lambda progress: self._tell(
                    LocalProgress(
                        round=task.round,
                        silo=task.silo,
                        **vars(progress) | spending.withheld("loss", "gradient_norm"),
                    )
                ),
                on_notice=lambda text: self._tell(
                    Notice(text=text, round=task.round, silo=task.silo)
                ),
                profile=task.profile,
                private=spending.steps(),
            )

    def _mfu(self, result: LocalResult) -> float | None:
        """Model FLOPs over the stated peak of all ranks' devices; None where no peak is stated."""
        device = self._trainer.plan.device
        stated = stated_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        peak = stated.flops(self._trainer.plan.precision) if stated is not None else None
        if peak is None:
            return None
        tokens_per_s = result.tokens / result.train_s
        return mfu(tokens_per_s, self._flops_per_token, peak * self._ranks.size)

    def _tell(self, event: Event) -> None:
        if self._ranks.leader:
            self._on_event(event)

    def _evaluate(self, task: EvalTask, version: Version | None) -> EvalReceipt:
        """Loss of the current weights on a silo's held-out text, or the global set's."""
        started = time.perf_counter()
        self._kept.personalise(task, version)
        config, trainer, ranks = self._config, self._trainer, self._ranks
        text = held_out_text(self._data, task.silo)

        def scored(sequences: int) -> LossSum:
            length, most = config.data.sequence_length, config.eval.max_tokens
            windows = text.windows(length, most, documents=config.local.document_mask)
            return self._loss(windows, sequences)

        with METER.phase("evaluation"):
            own = within_memory(
                scored,
                self._scored_at_once,
                trainer.plan.device,
                ranks,
                cut=trainer.placed.strategy.shards,
                on_notice=lambda words: self._tell(
                    Notice(text=words, round=task.round, silo=task.silo or "")
                ),
            )
        nats, *counts = ranks.total([own.nats, own.tokens, own.bytes, own.unknown])
        one = score(LossSum(nats, *map(int, counts)))
        return EvalReceipt(
            task.silo,
            loss=one.loss,
            bits_per_byte=one.bits_per_byte,
            tokens=one.tokens,
            eval_s=time.perf_counter() - started,
            energy=self._spent(),
        )

    def _update(self, task: FitTask, state: GlobalState | None, spending: Spending) -> Update:
        """What leaves the node; on ranks other than 0, nothing."""
        delta = partial(self._shared, state)
        if self._ranks.size > 1:
            delta = list(delta()).__iter__  # gathered once, on rank 0
        if state is None:
            return Update.none(Receipt(task.round, task.silo))
        shapes = {WEIGHTS + name: one.shape for name, one in self._merged().items()}
        if self._config.federation.optimizer_state == "average":
            for name, one in self._trainer.optimizer.averaged_state().items():
                shapes[OPTIMIZER + name] = one.shape
        return leaving(spending, self._config.link, self._folder, task, delta, shapes)

    def _merged(self) -> dict[str, Tensor]:
        """The weights that others' are merged with, as this rank holds them."""
        weights = self._trainer.weights()
        return {name: weights[name] for name in self._layout.merged}

    def _shared(self, state: GlobalState | None) -> Iterator[tuple[str, Tensor]]:
        """What leaves the node, a tensor at a time: deltas (or weights), averaged inner state.

        Ranks other than 0 have no state to compare with and give nothing; they only help to
        gather.
        """
        adopt = self._config.federation.merge == "adopt"
        for name, local in self._trainer.whole(self._merged()):
            if state is None:
                continue
            shared = state[WEIGHTS + name]
            mine = local.to(shared.device)
            yield WEIGHTS + name, mine if adopt else shared - mine
        if self._config.federation.optimizer_state != "average":
            return
        # Step counters stay: they follow the server's clock.
        for name, tensor in self._trainer.whole(self._trainer.optimizer.averaged_state()):
            if state is not None:
                yield OPTIMIZER + name, tensor.cpu()

    def _require_same_files(self, model: nn.Module) -> None:
        """What ranks must share; paths, threads and devices are each machine's own."""
        config = self._config
        recipe = config.model_dump(
            exclude={"data": {"path"}, "model": {"path"}, "compute": {"threads", "device"}}
        )
        facts = {
            f"{table}.{key}": value for table, keys in recipe.items() for key, value in keys.items()
        }
        self._ranks.require_agreement(
            {
                "the version of Photon": photon_version(),
                "the version of PyTorch": str(torch.__version__),
                "data sha256": self._data.sha256,
                "the model's shapes": model_fingerprint(model),
                **facts,
            }
        )


def stream_seed(seed: int, silos: Sequence[str]) -> int:
    """Dropout seed of a stream, so that silos draw different masks."""
    return seed ^ zlib.crc32("\0".join(silos).encode())
