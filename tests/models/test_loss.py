"""The next-token loss against formulas written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from photon.config import ModelConfig
from photon.models import build_model, next_token_loss


class Fixed(torch.nn.Module):
    """Logits from a table: the row of the token read."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert use_cache is False
        return SimpleNamespace(logits=self.table[input_ids])


def test_it_predicts_the_next_token_not_the_same_one() -> None:
    """Token t is always followed by t + 1, and the table knows it."""
    table = torch.full((5, 5), -30.0)
    table[torch.arange(4), torch.arange(1, 5)] = 30.0
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    assert next_token_loss(Fixed(table), tokens).item() == pytest.approx(0.0, abs=1e-6)
    assert next_token_loss(Fixed(table), torch.tensor([[3, 2, 1, 0]])).item() == pytest.approx(
        60.0, rel=1e-4
    )


def test_reductions() -> None:
    table, tokens = torch.zeros(7, 7), torch.randint(0, 7, (3, 6))
    assert next_token_loss(Fixed(table), tokens).item() == pytest.approx(math.log(7))
    total = next_token_loss(Fixed(table), tokens, reduction="sum").item()
    assert total == pytest.approx(15 * math.log(7))
    assert next_token_loss(Fixed(table), tokens, reduction="none").shape == (15,)


def test_it_is_transformers_own_loss() -> None:
    model = build_model(
        ModelConfig(preset="tiny"), vocab_size=64, sequence_length=16, eos_id=0, seed=0
    )
    tokens = torch.randint(0, 64, (2, 17))
    theirs = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(next_token_loss(model, tokens), theirs, rtol=1e-5, atol=1e-6)


def test_low_precision_logits_are_upcast() -> None:
    table = torch.randn(9, 9).bfloat16()
    tokens = torch.randint(0, 9, (2, 5))
    loss = next_token_loss(Fixed(table), tokens)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(next_token_loss(Fixed(table.float()), tokens).item())


def test_gradients_reach_the_model() -> None:
    model = Fixed(torch.zeros(4, 4))
    next_token_loss(model, torch.tensor([[0, 1]])).backward()
    assert model.table.grad is not None
    assert model.table.grad[0].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25])
