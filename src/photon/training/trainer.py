"""The one training loop: tau optimizer steps from a stream, on the server's clock."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from photon.config import LocalConfig
from photon.data import TokenStream
from photon.errors import IncompatibleConfigError, NonFiniteError, RankLostError
from photon.models import training_loss
from photon.training.batches import Batch, read_ahead
from photon.training.device import ComputePlan
from photon.training.inner import InnerOptimizer
from photon.training.micro_batch import MicroBatch, if_it_fits
from photon.training.placement import PlacedModel
from photon.training.private import ClippedSum, PrivateSteps, noise_gradients, require_whole
from photon.training.ranks import Ranks, naming_lost_ranks
from photon.training.schedule import Schedule
from photon.training.strategy import Strategy
from photon.training.timing import (
    PhaseClock,
    StepTimes,
    peak_memory_bytes,
    with_communication_s,
)


@dataclass(frozen=True)
class Progress:
    """What a node says while it trains; `step` counts from 1 within this call."""

    step: int
    global_step: int
    loss: float
    lr: float
    gradient_norm: float
    tokens_per_s: float


@dataclass(frozen=True)
class LocalResult:
    """What tau steps did, over all ranks.

    Attributes:
        loss, first_loss, last_loss: nats per token.
        cursor: the next unread sequence.
        times: where this rank's seconds went.
        communication_s: collectives of a whole call, extrapolated from its last step; None unless
            the call was profiled.
        peak_memory_bytes: of this rank; see `timing.peak_memory_bytes`.
        micro_batch_size: at the end, per rank.
    """

    loss: float
    first_loss: float
    last_loss: float
    tokens: int
    cursor: int
    train_s: float
    times: StepTimes
    communication_s: float | None
    peak_memory_bytes: int
    micro_batch_size: int


class Trainer:
    """A model and its inner optimizer, kept alive across rounds and across virtual clients.

    Where a node has several ranks, each has a Trainer, and all call the same methods together.

    Args:
        model: fp32 weights, or parameters on the meta device that `load_weights` will fill.
        log_every: steps between progress calls and checks for a non-finite loss.
        placement: this node's ranks, and how they share the model; one rank by default.
        micro_batch: for this rank; by default what the plan asks for, or the whole share.

    Raises:
        IncompatibleConfigError: the batch can't be shared out evenly among the ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LocalConfig,
        schedule: Schedule,
        plan: ComputePlan,
        *,
        log_every: int = 10,
        placement: tuple[Ranks, Strategy] | None = None,
        micro_batch: MicroBatch | None = None,
    ) -> None:
        plan.apply()
        self.plan = plan
        self.ranks, strategy = placement or (Ranks.alone(), Strategy("single", "one rank"))
        self._batch_size = config.batch_size
        self._share = rank_share(self._batch_size, self.ranks.size)
        self.micro_batch = micro_batch or MicroBatch(
            self._share, asked=plan.config.micro_batch_size
        )
        self.micro_batch.limit(self.ranks.least(self.micro_batch.size))
        self.placed = PlacedModel(model, plan, self.ranks, strategy)
        self.optimizer = InnerOptimizer(self.placed.module, config, group=self.ranks.group)
        self._config = config
        self._schedule = schedule
        self._log_every = log_every

    @property
    def model(self) -> nn.Module:
        """The model itself, cut among ranks where the strategy cuts."""
        return self.placed.module

    def weights(self) -> dict[str, Tensor]:
        """References to the trainable weights as this rank holds them, by name."""
        return {name: parameter.detach() for name, parameter in self.placed.parameters.items()}

    def whole(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors that may be cut, whole, one at a time; every rank must iterate to the end."""
        for name, tensor in tensors.items():
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Of forward passes; None in fp32, and where FSDP2 casts by itself."""
        return None if self.placed.strategy.shards else self.plan.autocast_dtype

    def load_weights(
        self, weights: Mapping[str, Tensor] | None, names: Iterable[str] | None = None
    ) -> None:
        """Copy whole weights in place; on ranks other than 0 the argument is None.

        Args:
            names: of the tensors that they are, all that is trained by default.

        Raises:
            ModelMismatchError: names or shapes differ from the model's.
        """
        self.placed.load(weights, self.placed.parameters if names is None else names)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model for scoring: uncompiled, as other batch shapes would compile it again."""
        if not self.plan.compiles:
            yield self.model
            return
        with torch.compiler.set_stance("force_eager"):
            yield self.model

    def fit(
        self,
        stream: TokenStream,
        *,
        cursor: int,
        global_step: int,
        steps: int,
        seed: int = 0,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        profile: bool = False,
        private: PrivateSteps | None = None,
    ) -> LocalResult:
        """Take `steps` optimizer steps.

        Args:
            stream: where sequences come from; each rank reads its share of every batch.
            cursor: index of the first unread sequence.
            global_step: the server's clock at the first step.
            steps: tau.
            seed: of dropout; each step is seeded by (seed, global step), so there is no RNG
                state to carry over.
            on_progress: told every `log_every` steps.
            on_notice: told in words of what was changed on the way (a smaller micro-batch).
            profile: measure the last step's collectives.
            private: clip each sequence's gradient and noise their sum; losses are then means over
                the sequences whose gradients are finite.

        Raises:
            NonFiniteError: the loss became NaN or infinite; weights and state are then garbage.
            IncompatibleConfigError: private steps of weights that are cut among ranks.
            DoesNotFitError: not even one sequence at a time fits in memory.
            RankLostError: another rank of this node is gone.
        """
        if private is not None:
            require_whole(self.placed.strategy)
        clock = PhaseClock(self.plan.device)
        meter = _Meter(self.ranks, self.plan.device, steps, global_step)
        cuda = self.plan.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.plan.device)
        self.placed.module.train()
        batches = self._batches(stream, cursor, steps)
        collectives_s: float | None = None
        with (
            contextlib.closing(batches),
            torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []),
            naming_lost_ranks("local training"),
        ):
            for index in range(steps):
                with clock.phase("data"):
                    batch = next(batches)
                now = global_step + index
                step = partial(self._step, batch, seed, now, clock, on_notice, private)
                if profile and index + 1 == steps:
                    (loss, norm), one_s = with_communication_s(step, self.plan.device)
                    collectives_s = one_s * steps
                else:
                    loss, norm = step()
                meter.add(loss, self._batch_size * (batch.tokens.shape[1] - 1))
                if (index + 1) % self._log_every == 0 or index + 1 == steps:
                    lr = self._config.lr * self._schedule.factor(now)
                    progress = meter.settle(lr, float(norm))
                    if on_progress is not None:
                        on_progress(progress)
            if private is not None:
                self._require_finite(steps, meter.tokens, global_step)
        losses = meter.losses.cpu().double()
        return LocalResult(
            loss=float(losses.mean()),
            first_loss=float(losses[0]),
            last_loss=float(losses[-1]),
            tokens=meter.tokens,
            cursor=cursor + steps * self._batch_size,
            train_s=time.perf_counter() - meter.started_s,
            times=clock.times(),
            communication_s=collectives_s,
            peak_memory_bytes=peak_memory_bytes(self.plan.device),
            micro_batch_size=self.micro_batch.size if private is None else 1,
        )

    def _batches(
        self, stream: TokenStream, cursor: int, steps: int
    ) -> Generator[Batch, None, None]:
        """This rank's share of each step's sequences."""
        return read_ahead(
            stream,
            cursor=cursor + self.ranks.seat.rank * self._share,
            stride=self._batch_size,
            share=self._share,
            steps=steps,
            device=self.plan.device,
            documents=self._config.document_mask,
        )

    def _step(
        self,
        batch: Batch,
        seed: int,
        global_step: int,
        clock: PhaseClock,
        on_notice: Callable[[str], None] | None,
        private: PrivateSteps | None,
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step: this rank's loss and the gradient's norm, fp32 0-d."""
        accumulate = partial(self._accumulate, batch, clock)
        if private is not None:
            accumulate = partial(self._accumulate_clipped, private.clip_norm, batch, clock)
        while True:
            # Seeded at each attempt, so that a repeated one draws the same dropout.
            self._seed(_step_seed(seed, global_step, self.ranks.seat.rank))
            loss = if_it_fits(accumulate)
            if loss is not None:
                break
            self._back_off(on_notice, private is None)
        with clock.phase("optimizer"):
            if private is not None:
                noise_gradients(
                    self.placed.parameters,
                    private,
                    self.ranks,
                    global_step=global_step,
                    batch_size=self._batch_size,
                )
            norm = self._clip()
            self.optimizer.step(self._schedule.factor(global_step))
            self.optimizer.zero_grad()
        return loss, norm

    def _accumulate(self, batch: Batch, clock: PhaseClock) -> Tensor:
        """Forward and backward in micro-batches; the mean loss over this rank's sequences."""
        total = torch.zeros((), device=self.plan.device)
        micro_batches = batch.split(self.micro_batch.size)
        share = 1 / len(micro_batches)
        for number, micro in enumerate(micro_batches, start=1):
            with self.placed.accumulating(last=number == len(micro_batches)):
                with clock.phase("forward"):
                    objective, loss = self._loss(self.placed, micro)
                with clock.phase("backward"):
                    (objective * share if share != 1 else objective).backward()
                total += loss.detach() * share
        return total

    def _accumulate_clipped(self, clip_norm: float, batch: Batch, clock: PhaseClock) -> Tensor:
        """As `_accumulate`, of DP-SGD: leaves the sum of clipped gradients."""
        sums = ClippedSum(self.placed.parameters, clip_norm)
        for sequence in batch.split(1):
            with clock.phase("forward"):
                objective, loss = self._loss(self.model, sequence)
            with clock.phase("backward"):
                sums.add(objective, loss)
        return sums.loss

    def _loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """What is minimised, and the cross-entropy."""
        kind, dtype = self.plan.device.type, self.autocast_dtype
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            return training_loss(
                model,
                batch.tokens,
                document_ids=batch.document_ids,
                z_loss=self._config.z_loss,
                head=self.placed.head,
            )

    @torch.no_grad()
    def _require_finite(self, steps: int, tokens: int, global_step: int) -> None:
        """Raise NonFiniteError if weights give no loss any more, on tokens that are nobody's.

        After private steps nothing but their weights may say so: whether a batch had a finite
        gradient is the text's to know.
        """
        with self.evaluating() as model:
            rows = cast(Any, model).get_input_embeddings().weight.shape[0]
            width = tokens // (steps * self._batch_size) + 1
            made_up = torch.arange(width, device=self.plan.device)[None] % rows
            loss = float(self.ranks.mean_(self._loss(model, Batch(made_up, None))[1]))
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss on made-up tokens became {loss} by global step {global_step + steps}",
                hint="Lower local.lr, lengthen local.warmup_steps, or raise privacy.clip_norm.",
            )

    def _back_off(self, on_notice: Callable[[str], None] | None, batches: bool) -> None:
        """Make the micro-batch smaller after an allocation failed, before any weight changed."""
        self.optimizer.zero_grad()
        cut = 'more ranks with compute.strategy = "fsdp", '
        if not batches:  # but single sequences, of whole gradients
            self.micro_batch.limit(1)
            cut = ""
        text = self.micro_batch.back_off(
            f"out of memory on {self.plan.device} with",
            f'Try compute.activation_checkpointing = "full", {cut}a shorter data.sequence_length, '
            "or a smaller model.",
        )
        text += " (same batch, same maths)"
        if self.ranks.size > 1:
            # The other ranks are inside a collective that this one will not reach.
            raise RankLostError(f"rank {self.ranks.seat.rank}: {text}")
        if on_notice is not None:
            on_notice(text)

    def _clip(self) -> Tensor:
        parameters = self.placed.parameters.values()
        if self._config.clip_norm:
            norm = nn.utils.clip_grad_norm_(parameters, self._config.clip_norm, foreach=True)
        else:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients, foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _seed(self, seed: int) -> None:
        # torch.manual_seed formats a stack trace at each call where CUDA is not in use: 2% of a
        # small step.
        torch.default_generator.manual_seed(seed)
        if self.plan.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.plan.device.type == "mps":
            torch.mps.manual_seed(seed)


class _Meter:
    """Losses and tokens of one call of `fit`, over all ranks."""

    def __init__(self, ranks: Ranks, device: torch.device, steps: int, global_step: int) -> None:
        self.tokens = 0
        self._ranks = ranks
        self.losses = torch.zeros(steps, device=device)
        self._global_step = global_step
        self._step = self._settled = self._settled_tokens = 0
        self.started_s = self._settled_s = time.perf_counter()

    def add(self, loss: Tensor, tokens: int) -> None:
        self.losses[self._step] = loss
        self._step += 1
        self.tokens += tokens

    def settle(self, lr: float, gradient_norm: float) -> Progress:
        """Average the newest losses over ranks, check them, and say where training stands.

        Raises:
            NonFiniteError: naming the first bad step.
        """
        self._ranks.mean_(self.losses[self._settled : self._step])
        bad = (~torch.isfinite(self.losses[: self._step])).nonzero()
        if len(bad):
            index = int(bad[0])
            raise NonFiniteError(
                f"the loss became {float(self.losses[index])} at local step {index + 1} "
                f"(global step {self._global_step + index + 1})",
                hint="Lower local.lr, lengthen local.warmup_steps, or look at that silo's text.",
            )
        now = time.perf_counter()
        tokens_per_s = (self.tokens - self._settled_tokens) / (now - self._settled_s)
        self._settled, self._settled_s, self._settled_tokens = self._step, now, self.tokens
        return Progress(
            step=self._step,
            global_step=self._global_step + self._step,
            loss=float(self.losses[self._step - 1]),
            lr=lr,
            gradient_norm=gradient_norm,
            tokens_per_s=tokens_per_s,
        )


def rank_share(batch_size: int, ranks: int) -> int:
    """Sequences of a step for each rank; IncompatibleConfigError if they are not the same."""
    if batch_size % ranks:
        raise IncompatibleConfigError(
            f"a batch of {batch_size} sequences can't be shared out evenly among {ranks} ranks",
            hint=f"Use a batch size that {ranks} divides, or another number of ranks.",
        )
    return batch_size // ranks


def _step_seed(seed: int, global_step: int, rank: int) -> int:
    # Ranks draw different masks; rank 0 draws what a single process would.
    words = [seed, global_step, rank] if rank else [seed, global_step]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
