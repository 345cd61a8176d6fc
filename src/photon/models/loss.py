"""The loss of a causal language model."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional


def next_token_loss(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> torch.Tensor:
    """Cross-entropy of predicting tokens[:, 1:] from tokens[:, :-1], in nats.

    Args:
        model: a Hugging Face causal LM; called with input_ids [B, L], gives logits [B, L, V].
        tokens: int64 [B, L + 1], L >= 1.
        reduction: over the B x L predictions; none gives them one by one, [B x L].

    Returns:
        fp32, 0-d unless reduction is none. Logits are upcast before the softmax, autocast or not.
    """
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction
    )
