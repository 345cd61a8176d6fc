"""Perplexity and bits per byte of held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from photon.errors import EmptySiloError
from photon.models import next_token_loss


@dataclass(frozen=True)
class LossSum:
    """A summed cross-entropy; sums of parts add up to the sum of the whole.

    Args:
        nats: total cross-entropy of the predictions, in nats.
        tokens: number of predictions.
    """

    nats: float
    tokens: int

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.nats + other.nats, self.tokens + other.tokens)


@dataclass(frozen=True)
class HeldOutScore:
    """A model's score on one held-out text.

    Args:
        loss: nats per predicted token.
        perplexity: exp(loss); infinite where that overflows.
        bits_per_byte: loss / ln 2 x tokens per byte of the text; comparable between tokenizers.
        tokens: number of predictions behind it.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


def evaluate_loss(
    model: torch.nn.Module,
    windows: Iterable[np.ndarray],
    *,
    device: torch.device | str,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    part: tuple[int, int] = (0, 1),
) -> LossSum:
    """Cross-entropy of every token of the windows but each window's first.

    The model is in evaluation mode meanwhile and then as it was. The fp32 losses are summed in
    fp64, so batch_size moves the result only by the kernels' rounding (< 1e-6 relative).

    Args:
        model: a Hugging Face causal LM, already on `device`.
        windows: int64 arrays of 2 or more tokens; neighbours of equal length share a batch.
        device: the model's.
        batch_size: windows per forward pass.
        autocast_dtype: of the forward pass; None computes in the weights' own dtype.
        part: this process's number and how many share the batches; add up their sums. All make
            equally many forward passes, as a model that is cut among ranks needs.
    """
    number, parts = part
    device = torch.device(device)
    training = model.training
    nats, tokens = 0.0, 0
    model.eval()
    try:
        for batch, counts in _dealt(_batches(windows, batch_size), number, parts):
            inputs = torch.from_numpy(batch.astype(np.int64, copy=False)).to(device)
            with (
                # FSDP2 can't gather weights in inference mode.
                torch.inference_mode() if parts == 1 else torch.no_grad(),
                torch.autocast(
                    device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
                ),
            ):
                loss = next_token_loss(model, inputs, reduction="none")
            if counts:
                nats += float(loss.cpu().double().sum())
                tokens += loss.numel()
    finally:
        model.train(training)
    return LossSum(nats, tokens)


def score(loss_sum: LossSum, *, text_tokens: int, text_bytes: int) -> HeldOutScore:
    """Loss, perplexity and bits per byte.

    Args:
        loss_sum: from `evaluate_loss`; may cover a part of the held-out text only.
        text_tokens: tokens of the whole held-out text.
        text_bytes: its UTF-8 bytes.

    Raises:
        EmptySiloError: there are no predictions, bytes or tokens to score.
    """
    if loss_sum.tokens < 1 or text_bytes < 1 or text_tokens < 1:
        raise EmptySiloError(
            f"nothing to score: {loss_sum.tokens} predictions on a held-out text of "
            f"{text_tokens} tokens, {text_bytes} bytes",
            hint="Hold out more text when preparing the data.",
        )
    loss = loss_sum.nats / loss_sum.tokens
    return HeldOutScore(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=loss / math.log(2) * text_tokens / text_bytes,
        tokens=loss_sum.tokens,
    )


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token; infinity where a float can't hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _dealt(
    batches: Iterable[np.ndarray], number: int, parts: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """Every `parts`-th batch from `number` on, each with True; where a last one is lacking, any
    batch with False, to keep step with the others."""
    hand: list[np.ndarray] = []
    for batch in batches:
        hand.append(batch)
        if len(hand) == parts:
            yield hand[number], True
            hand = []
    if hand:
        yield hand[min(number, len(hand) - 1)], number < len(hand)


def _batches(windows: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """int64 [b, length] of neighbours that are equally long, b <= batch_size."""
    batch: list[np.ndarray] = []
    for window in windows:
        if batch and (len(batch) == batch_size or len(batch[0]) != len(window)):
            yield np.stack(batch)
            batch = []
        batch.append(window)
    if batch:
        yield np.stack(batch)
