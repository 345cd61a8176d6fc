"""Perplexity against cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from photon.config import ModelConfig
from photon.errors import EmptySiloError
from photon.evaluation import LossSum, evaluate_loss, score
from photon.models import build_model

VOCABULARY = 50


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Table(torch.nn.Module):
    """Logits are the row of the token read; remembers what it was asked."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.shapes: list[tuple[int, ...]] = []
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        return SimpleNamespace(logits=self.table[input_ids])


def windows(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, n, dtype=np.int64) for n in lengths]


def evaluate(model: torch.nn.Module, text: Any, **changes: Any) -> LossSum:
    return evaluate_loss(model, text, **{"device": "cpu", "batch_size": 4, **changes})


def tiny(family: str = "llama") -> torch.nn.Module:
    config = ModelConfig.model_validate({"preset": "tiny", "family": family})
    return build_model(config, vocab_size=VOCABULARY, sequence_length=16, eos_id=0, seed=0)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    total = evaluate(Table(torch.zeros(VOCABULARY, VOCABULARY)), windows(17, 17, 17, 5))
    assert total.tokens == 3 * 16 + 4
    scored = score(total, text_tokens=56, text_bytes=56 * 4)
    assert scored.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert scored.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert scored.bits_per_byte == pytest.approx(math.log2(VOCABULARY) / 4, rel=1e-6)
    assert scored.tokens == 52


def test_a_case_by_hand() -> None:
    """Odds 1:3 for two tokens: p(1) = 3/4 and p(0) = 1/4 after any token."""
    table = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    total = evaluate(Table(table), [np.array([0, 1, 1, 0])])
    nats = -2 * math.log(3 / 4) - math.log(1 / 4)
    assert total.tokens == 3
    assert total.nats == pytest.approx(nats, rel=1e-6)
    scored = score(total, text_tokens=4, text_bytes=8)
    assert scored.perplexity == pytest.approx((64 / 9) ** (1 / 3), rel=1e-6)
    assert scored.bits_per_byte == pytest.approx(nats / 3 / math.log(2) / 2, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "mpt"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_the_batch_size_does_not_matter(family: str, batch_size: int) -> None:
    model, text = tiny(family), windows(17, 17, 17, 17, 17, 9)
    alone = evaluate(model, text, batch_size=1)
    total = evaluate(model, text, batch_size=batch_size)
    assert total.tokens == alone.tokens == 5 * 16 + 8
    assert total.nats == pytest.approx(alone.nats, rel=1e-6)


def test_it_is_the_mean_of_each_windows_own_loss() -> None:
    model, text = tiny().eval(), windows(17, 17, 9)
    with torch.inference_mode():
        nats = sum(
            float(model(input_ids=t, labels=t).loss) * (t.numel() - 1)
            for t in (torch.from_numpy(w).unsqueeze(0) for w in text)
        )
    assert evaluate(model, text).nats == pytest.approx(nats, rel=1e-5)


def test_equal_windows_share_a_batch_and_the_short_one_comes_last() -> None:
    model = Table(torch.zeros(VOCABULARY, VOCABULARY))
    evaluate(model, windows(9, 9, 9, 9, 9, 3), batch_size=2)
    assert model.shapes == [(2, 8), (2, 8), (1, 8), (1, 2)]


def test_windows_are_read_as_they_come() -> None:
    model, ahead = Table(torch.zeros(VOCABULARY, VOCABULARY)), []

    def stream() -> Iterator[np.ndarray]:
        for k, window in enumerate(windows(*[9] * 20)):
            ahead.append(k - 2 * len(model.shapes))
            yield window

    evaluate(model, stream(), batch_size=2)
    assert max(ahead) <= 3


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training: bool) -> None:
    model = Table(torch.zeros(VOCABULARY, VOCABULARY)).train(training)
    evaluate(model, windows(9))
    assert model.modes == {(False, True)}
    assert model.training is training


def test_the_mode_is_restored_after_an_error() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield windows(9)[0]
        raise OSError("gone")

    model = Table(torch.zeros(VOCABULARY, VOCABULARY)).train()
    with pytest.raises(OSError, match="gone"):
        evaluate(model, broken())
    assert model.training


def test_no_gradients_and_no_random_numbers_are_left() -> None:
    model, before = tiny(), torch.get_rng_state()
    evaluate(model, windows(17, 17))
    assert all(p.grad is None for p in model.parameters())
    assert torch.get_rng_state().equal(before)


def test_autocast_is_used_when_asked() -> None:
    model, text = tiny(), windows(17, 17)
    exact = evaluate(model, text)
    rounded = evaluate(model, text, autocast_dtype=torch.bfloat16)
    assert rounded.nats != exact.nats
    assert rounded.nats == pytest.approx(exact.nats, rel=1e-2)


def test_narrow_integers_are_fine() -> None:
    model, text = tiny(), windows(17)
    narrow = [window.astype(np.uint16) for window in text]
    assert evaluate(model, narrow) == evaluate(model, text)


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    model, text = tiny(), windows(17, 17, 17, 9)
    parts = evaluate(model, text[:2]) + evaluate(model, text[2:])
    whole = evaluate(model, text)
    assert parts.tokens == whole.tokens
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)


def test_no_windows_are_no_tokens() -> None:
    assert evaluate(tiny(), []) == LossSum(0.0, 0)


def test_perplexity_may_be_infinite_or_not_a_number() -> None:
    huge = score(LossSum(1e6, 10), text_tokens=11, text_bytes=20)
    assert huge.perplexity == math.inf
    assert math.isfinite(huge.bits_per_byte)
    assert math.isnan(score(LossSum(math.nan, 1), text_tokens=2, text_bytes=2).perplexity)


@pytest.mark.parametrize(("tokens", "text_tokens", "text_bytes"), [(0, 5, 5), (5, 0, 5), (5, 5, 0)])
def test_nothing_to_score(tokens: int, text_tokens: int, text_bytes: int) -> None:
    with pytest.raises(EmptySiloError, match="nothing to score"):
        score(LossSum(1.0, tokens), text_tokens=text_tokens, text_bytes=text_bytes)
