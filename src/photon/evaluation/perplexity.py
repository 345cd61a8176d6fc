"""Perplexity and bits per byte of held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import groupby, islice
from operator import add

import numpy as np
import torch

from photon.data import Window
from photon.errors import EmptySiloError
from photon.models import HeadLoss, held_out_loss

#: Where more of the scored tokens are the unknown token, there are no bits per byte: to predict
#: "something I have no word for" is easy, however long that something was.
MOST_UNKNOWN = 0.1


@dataclass(frozen=True)
class LossSum:
    """A summed cross-entropy; sums of parts add up to the sum of the whole.

    Args:
        nats: total cross-entropy of the predictions, in nats.
        tokens: number of predictions.
        bytes: UTF-8 bytes of text that the predicted tokens stand for.
        unknown: predicted tokens that are the tokenizer's unknown one.
    """

    nats: float
    tokens: int
    bytes: int
    unknown: int

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class HeldOutScore:
    """A model's score on one held-out text.

    Args:
        loss: nats per predicted token.
        perplexity: exp(loss); infinite where that overflows.
        bits_per_byte: nats / ln 2 / bytes of the predicted tokens; comparable between tokenizers.
            None where there is no such figure: much of the text is unknown to the tokenizer.
        tokens: number of predictions behind it.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int


def evaluate_loss(
    model: torch.nn.Module,
    windows: Iterable[Window],
    *,
    device: torch.device | str,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    head: HeadLoss | None = None,
    part: tuple[int, int] = (0, 1),
) -> LossSum:
    """Cross-entropy of every token of the windows but each window's first.

    The model is in evaluation mode meanwhile and then as it was. Losses are summed in fp64, so
    batch_size moves the result only by the kernels' rounding (< 1e-6 relative).

    Args:
        model: a Hugging Face causal LM, already on `device`.
        windows: neighbours of equal length share a batch. Where they tell documents apart,
            attention stays inside one.
        device: the model's.
        batch_size: windows per forward pass.
        autocast_dtype: of the forward pass; None computes in the weights' own dtype.
        head: the model's, so that whole logits are never made.
        part: this process's number and how many share the batches; add up their sums. All make
            equally many forward passes, as a model that is cut among ranks needs.
    """
    number, parts = part
    device = torch.device(device)
    training = model.training
    total = LossSum(0.0, 0, 0, 0)
    model.eval()
    try:
        for batch, counts in _dealt(_batches(windows, batch_size), number, parts):
            tokens = _on(device, [window.tokens for window in batch])
            documents = [one for window in batch if (one := window.documents) is not None]
            with (
                # FSDP2 can't gather weights in inference mode.
                torch.inference_mode() if parts == 1 else torch.no_grad(),
                torch.autocast(
                    device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
                ),
            ):
                nats = held_out_loss(
                    model,
                    tokens,
                    document_ids=_on(device, documents) if documents else None,
                    head=head,
                )
            if counts:
                total += LossSum(
                    nats,
                    tokens[:, 1:].numel(),
                    sum(window.bytes for window in batch),
                    sum(window.unknown for window in batch),
                )
    finally:
        model.train(training)
    return total


def score(total: LossSum) -> HeldOutScore:
    """Loss, perplexity and bits per byte.

    Raises:
        EmptySiloError: there are no predictions to score.
    """
    if total.tokens < 1:
        raise EmptySiloError(
            "there is nothing to score: not one token is predicted",
            hint="Hold out more text when preparing the data.",
        )
    loss = total.nats / total.tokens
    known = total.bytes > 0 and total.unknown <= MOST_UNKNOWN * total.tokens
    return HeldOutScore(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=total.nats / math.log(2) / total.bytes if known else None,
        tokens=total.tokens,
    )


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token; infinity where a float can't hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _on(device: torch.device, arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.int64, copy=False)).to(device)


def _dealt(
    batches: Iterator[list[Window]], number: int, parts: int
) -> Iterator[tuple[list[Window], bool]]:
    """Every `parts`-th batch from `number` on, each with True; where a last one is lacking, any
    batch with False, to keep step with the others."""
    while hand := list(islice(batches, parts)):
        yield hand[min(number, len(hand) - 1)], number < len(hand)


def _batches(windows: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """At most batch_size neighbours that are equally long."""
    for _, alike in groupby(windows, key=lambda window: len(window.tokens)):
        while batch := list(islice(alike, batch_size)):
            yield batch
