"""The one training loop: tau optimizer steps from a stream, on the server's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from photon.config import LocalConfig
from photon.errors import ModelMismatchError, NonFiniteError
from photon.models import next_token_loss
from photon.training.device import ComputePlan
from photon.training.inner import InnerOptimizer
from photon.training.schedule import Schedule


class Stream(Protocol):
    """Endless training text that seeks: sample i is the same whenever it is asked for."""

    def batch(self, start: int, count: int) -> np.ndarray: ...


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
    """What tau steps did. Losses are nats per token; `cursor` is the next unread sequence."""

    loss: float
    first_loss: float
    last_loss: float
    tokens: int
    cursor: int
    train_s: float


class Trainer:
    """A model and its inner optimizer, kept alive across rounds and across virtual clients.

    Args:
        model: fp32 weights; moved to the plan's device.
        config: the [local] table.
        schedule: learning-rate factor by global step.
        plan: device, arithmetic, threads.
        batch_size: sequences per optimizer step; config.batch_size by default.
        log_every: steps between progress calls and checks for a non-finite loss.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LocalConfig,
        schedule: Schedule,
        plan: ComputePlan,
        *,
        batch_size: int | None = None,
        log_every: int = 10,
    ) -> None:
        plan.apply()
        self.model = model.to(plan.device)
        self.plan = plan
        self.optimizer = InnerOptimizer(model, config)
        self._config = config
        self._schedule = schedule
        self._log_every = log_every
        self._batch_size = batch_size or config.batch_size
        self._micro_batch_size = plan.micro_batch_size or self._batch_size

    def weights(self) -> dict[str, Tensor]:
        """References to the trainable weights, by name."""
        return {name: parameter.detach() for name, parameter in self.optimizer.parameters.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights in place.

        Raises:
            ModelMismatchError: names or shapes differ from the model's.
        """
        mine = self.weights()
        if weights.keys() != mine.keys():
            odd = sorted(weights.keys() ^ mine.keys())[0]
            raise ModelMismatchError(f"weights and model differ in tensor {odd!r}")
        for name, tensor in weights.items():
            if tensor.shape != mine[name].shape:
                raise ModelMismatchError(
                    f"tensor {name!r} has shape {tuple(tensor.shape)}, "
                    f"the model's is {tuple(mine[name].shape)}"
                )
            mine[name].copy_(tensor)

    def fit(
        self,
        stream: Stream,
        *,
        cursor: int,
        global_step: int,
        steps: int,
        seed: int = 0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> LocalResult:
        """Take `steps` optimizer steps.

        Args:
            stream: where sequences come from.
            cursor: index of the first unread sequence.
            global_step: the server's clock at the first step.
            steps: tau.
            seed: of dropout; each step is seeded by (seed, global step), so there is no RNG
                state to carry over.
            on_progress: told every `log_every` steps.

        Raises:
            NonFiniteError: the loss became NaN or infinite; weights and state are then garbage.
        """
        losses = torch.zeros(steps, device=self.plan.device)
        tokens = 0
        started = logged = time.perf_counter()
        logged_tokens = 0
        self.model.train()
        with torch.random.fork_rng(devices=self._rng_devices()):
            for index in range(steps):
                batch = self._batch(stream, cursor)
                cursor += self._batch_size
                torch.manual_seed(_step_seed(seed, global_step + index))
                factor = self._schedule.factor(global_step + index)
                norm = self._step(batch, factor, losses[index])
                tokens += batch.shape[0] * (batch.shape[1] - 1)
                if (index + 1) % self._log_every == 0 or index + 1 == steps:
                    loss = float(losses[index])
                    self._check_finite(losses[: index + 1], global_step)
                    now = time.perf_counter()
                    if on_progress is not None:
                        on_progress(
                            Progress(
                                step=index + 1,
                                global_step=global_step + index + 1,
                                loss=loss,
                                lr=self._config.lr * factor,
                                gradient_norm=float(norm),
                                tokens_per_s=(tokens - logged_tokens) / (now - logged),
                            )
                        )
                    logged, logged_tokens = now, tokens
        return LocalResult(
            loss=float(losses.double().mean()),
            first_loss=float(losses[0]),
            last_loss=float(losses[-1]),
            tokens=tokens,
            cursor=cursor,
            train_s=time.perf_counter() - started,
        )

    def _step(self, batch: Tensor, lr_factor: float, loss_out: Tensor) -> Tensor:
        micro_batches = batch.split(self._micro_batch_size)
        for micro in micro_batches:
            with torch.autocast(
                self.plan.device.type,
                self.plan.autocast_dtype,
                enabled=self.plan.autocast_dtype is not None,
            ):
                loss = next_token_loss(self.model, micro)
            # A short last micro-batch (photon train with odd sizes) still counts by its sequences.
            share = len(micro) / len(batch)
            (loss * share if share != 1 else loss).backward()
            loss_out += loss.detach() * share
        norm = self._clip()
        self.optimizer.step(lr_factor)
        self.optimizer.zero_grad()
        return norm

    def _clip(self) -> Tensor:
        parameters = self.optimizer.parameters.values()
        if self._config.clip_norm:
            return nn.utils.clip_grad_norm_(parameters, self._config.clip_norm, foreach=True)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients, foreach=True)

    def _batch(self, stream: Stream, cursor: int) -> Tensor:
        batch = torch.from_numpy(stream.batch(cursor, self._batch_size))
        if self.plan.device.type == "cuda":
            return batch.pin_memory().to(self.plan.device, non_blocking=True)
        return batch.to(self.plan.device)

    def _rng_devices(self) -> list[int]:
        return [torch.cuda.current_device()] if self.plan.device.type == "cuda" else []

    @staticmethod
    def _check_finite(losses: Tensor, global_step: int) -> None:
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            index = int(bad[0])
            raise NonFiniteError(
                f"the loss became {float(losses[index])} at local step {index + 1} "
                f"(global step {global_step + index + 1})",
                hint="Lower local.lr, lengthen local.warmup_steps, or look at that silo's text.",
            )


def _step_seed(seed: int, global_step: int) -> int:
    return int(np.random.SeedSequence([seed, global_step]).generate_state(1, np.uint64)[0] >> 1)
