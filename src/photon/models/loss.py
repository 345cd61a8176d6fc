"""The loss of a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from photon.models.head_loss import HeadLoss, rows_at_once


def training_loss(
    model: Callable[..., Any],
    tokens: Tensor,
    *,
    document_ids: Tensor | None = None,
    z_loss: float = 0.0,
    head: HeadLoss | None = None,
) -> tuple[Tensor, Tensor]:
    """What is minimised, and the cross-entropy of predicting tokens[:, 1:] from tokens[:, :-1].

    They are the same without a z-loss: z_loss * mean(log(Z)^2), Z the softmax's denominator (PaLM,
    arXiv 2204.02311).

    Args:
        model: a Hugging Face causal LM, or what stands for it (DDP): called with input_ids [B, L],
            gives logits [B, L, V].
        tokens: int64 [B, L + 1], L >= 1.
        document_ids: [B, L + 1], rising from 0 along a row: attention then stays inside a document.
        z_loss: weight; 0 leaves it out.
        head: takes the loss inside the model, without whole logits.

    Returns:
        fp32 0-d objective and fp32 0-d cross-entropy in nats per token. Logits are upcast before
        the softmax, autocast or not.
    """
    if head is not None:
        targets = tokens[:, 1:].flatten()
        return head(model, targets, z_loss, **_inputs(tokens, document_ids))
    logits, targets = _predictions(model, tokens, document_ids)
    logits = logits.float()
    if not z_loss:
        loss = functional.cross_entropy(logits, targets)
        return loss, loss
    log_z = torch.logsumexp(logits, dim=-1)
    loss = (log_z - logits.gather(-1, targets[:, None]).squeeze(-1)).mean()
    return loss + z_loss * log_z.square().mean(), loss


def held_out_loss(
    model: Callable[..., Any],
    tokens: Tensor,
    *,
    document_ids: Tensor | None = None,
    head: HeadLoss | None = None,
) -> float:
    """Summed cross-entropy of predicting tokens[:, 1:], in nats; no gradient.

    Args:
        model, tokens, document_ids: as in `training_loss`.
        head: takes the loss inside the model, without whole logits. Without one the model makes
            them; they are upcast some rows at a time.
    """
    if head is not None:
        targets = tokens[:, 1:].flatten()
        _, mean = head(model, targets, 0.0, **_inputs(tokens, document_ids))
        return float(mean) * len(targets)
    logits, targets = _predictions(model, tokens, document_ids)
    rows = rows_at_once(logits.shape[-1], logits.device.type)
    parts = [
        functional.cross_entropy(
            logits[start : start + rows].float(), targets[start : start + rows], reduction="sum"
        )
        for start in range(0, len(targets), rows)
    ]
    return float(torch.stack(parts).cpu().double().sum())


def _predictions(
    model: Callable[..., Any], tokens: Tensor, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits [B x L, V] in the model's dtype, and targets [B x L]."""
    logits = model(**_inputs(tokens, document_ids)).logits
    return logits.flatten(0, 1), tokens[:, 1:].flatten()


def _inputs(tokens: Tensor, document_ids: Tensor | None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": tokens[:, :-1], "use_cache": False}
    if document_ids is not None:
        inputs["position_ids"] = positions_in_documents(document_ids[:, :-1])
    return inputs


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Positions that start again at 0 with each document: transformers masks where they do.

    Args:
        document_ids: [B, L], rising along a row.

    Returns:
        int64 [B, L].
    """
    index = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
