"""The next-token loss against formulas written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from photon.config import ModelConfig
from photon.models import build_model, training_loss
from photon.models.loss import _predictions, positions_in_documents


class Fixed(torch.nn.Module):
    """Logits from a table: the row of the token read."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert use_cache is False
        return SimpleNamespace(logits=self.table[input_ids])


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return training_loss(model, tokens)[0]


def losses(
    model: torch.nn.Module, tokens: torch.Tensor, document_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Of the predictions one by one, [B x L]."""
    logits, targets = _predictions(model, tokens, document_ids)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def test_it_predicts_the_next_token_not_the_same_one() -> None:
    """Token t is always followed by t + 1, and the table knows it."""
    table = torch.full((5, 5), -30.0)
    table[torch.arange(4), torch.arange(1, 5)] = 30.0
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    assert mean_loss(Fixed(table), tokens).item() == pytest.approx(0.0, abs=1e-6)
    assert mean_loss(Fixed(table), torch.tensor([[3, 2, 1, 0]])).item() == pytest.approx(
        60.0, rel=1e-4
    )


def test_it_is_the_mean_over_predictions() -> None:
    table, tokens = torch.zeros(7, 7), torch.randint(0, 7, (3, 6))
    assert mean_loss(Fixed(table), tokens).item() == pytest.approx(math.log(7))
    each = losses(Fixed(table), tokens)
    assert each.sum().item() == pytest.approx(15 * math.log(7))
    assert each.shape == (15,)


def test_it_is_transformers_own_loss() -> None:
    model = build_model(
        ModelConfig(preset="tiny"), vocab_size=64, sequence_length=16, eos_id=0, seed=0
    )
    tokens = torch.randint(0, 64, (2, 17))
    theirs = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(mean_loss(model, tokens), theirs, rtol=1e-5, atol=1e-6)


def test_low_precision_logits_are_upcast() -> None:
    table = torch.randn(9, 9).bfloat16()
    tokens = torch.randint(0, 9, (2, 5))
    loss = mean_loss(Fixed(table), tokens)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mean_loss(Fixed(table.float()), tokens).item())


def test_gradients_reach_the_model() -> None:
    model = Fixed(torch.zeros(4, 4))
    mean_loss(model, torch.tensor([[0, 1]])).backward()
    assert model.table.grad is not None
    assert model.table.grad[0].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25])


def tiny() -> torch.nn.Module:
    return build_model(
        ModelConfig(preset="tiny"), vocab_size=64, sequence_length=16, eos_id=0, seed=0
    )


def test_masked_documents_are_scored_as_if_alone() -> None:
    model, tokens = (
        tiny(),
        torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1)),
    )
    ids = torch.tensor([[0] * 7 + [1] * 10, [0] * 3 + [1] + [2] * 13])
    together = losses(model, tokens, ids).view(2, 16)
    for row, start, stop in [(0, 0, 7), (0, 7, 17), (1, 0, 3), (1, 4, 17)]:
        # A document's last token predicts the next document's first; alone it predicts nothing.
        alone = losses(model, tokens[row : row + 1, start:stop])
        torch.testing.assert_close(together[row, start : stop - 1], alone, rtol=1e-4, atol=1e-5)
    unmasked = losses(model, tokens).view(2, 16)
    torch.testing.assert_close(unmasked[:, :3], together[:, :3], rtol=1e-4, atol=1e-5)
    assert (unmasked[0, 7:] - together[0, 7:]).abs().max() > 1e-2


def test_positions_start_again_with_each_document() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]]
    assert positions_in_documents(ids).tolist() == expected


def test_z_loss_is_the_mean_squared_log_partition_and_is_not_reported() -> None:
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(3))
    objective, loss = training_loss(Fixed(table), tokens, z_loss=0.1)
    log_z = torch.logsumexp(table[tokens[:, :-1]], dim=-1)
    torch.testing.assert_close(loss, losses(Fixed(table), tokens).mean())
    torch.testing.assert_close(objective - loss, 0.1 * log_z.square().mean())
    plain = training_loss(Fixed(table), tokens)
    assert plain[0] is plain[1]
    torch.testing.assert_close(plain[0], loss)
