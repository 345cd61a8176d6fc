"""Perplexity against cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config

from photon.config import ModelConfig
from photon.data import Window
from photon.errors import EmptySiloError
from photon.evaluation import LossSum, evaluate_loss, score
from photon.models import HeadLoss, build_model, sequences_at_once

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


def window(tokens: np.ndarray, documents: np.ndarray | None = None, unknown: int = 0) -> Window:
    """Four bytes a token."""
    return Window(tokens, documents, 4 * (len(tokens) - 1), unknown)


def windows(*lengths: int, seed: int = 0) -> list[Window]:
    generator = np.random.default_rng(seed)
    return [window(generator.integers(0, VOCABULARY, n, dtype=np.int64)) for n in lengths]


def evaluate(model: torch.nn.Module, text: Any, **changes: Any) -> LossSum:
    return evaluate_loss(model, text, **{"device": "cpu", "batch_size": 4, **changes})


def tiny(family: str = "llama") -> torch.nn.Module:
    config = ModelConfig.model_validate({"preset": "tiny", "family": family})
    return build_model(config, vocab_size=VOCABULARY, sequence_length=16, eos_id=0, seed=0)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    total = evaluate(Table(torch.zeros(VOCABULARY, VOCABULARY)), windows(17, 17, 17, 5))
    assert total.tokens == 3 * 16 + 4
    scored = score(total)
    assert scored.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert scored.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert scored.bits_per_byte == pytest.approx(math.log2(VOCABULARY) / 4, rel=1e-6)
    assert scored.tokens == 52


def test_a_case_by_hand() -> None:
    """Odds 1:3 for two tokens: p(1) = 3/4 and p(0) = 1/4 after any token."""
    table = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    total = evaluate(Table(table), [window(np.array([0, 1, 1, 0]))])
    nats = -2 * math.log(3 / 4) - math.log(1 / 4)
    assert total.tokens == 3
    assert total.nats == pytest.approx(nats, rel=1e-6)
    scored = score(total)
    assert scored.perplexity == pytest.approx((64 / 9) ** (1 / 3), rel=1e-6)
    assert scored.bits_per_byte == pytest.approx(nats / math.log(2) / 12, rel=1e-6)


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
            for t in (torch.from_numpy(w.tokens).unsqueeze(0) for w in text)
        )
    assert evaluate(model, text).nats == pytest.approx(nats, rel=1e-5)


def test_equal_windows_share_a_batch_and_the_short_one_comes_last() -> None:
    model = Table(torch.zeros(VOCABULARY, VOCABULARY))
    evaluate(model, windows(9, 9, 9, 9, 9, 3), batch_size=2)
    assert model.shapes == [(2, 8), (2, 8), (1, 8), (1, 2)]


def test_windows_are_read_as_they_come() -> None:
    model, ahead = Table(torch.zeros(VOCABULARY, VOCABULARY)), []

    def stream() -> Iterator[Window]:
        for k, one in enumerate(windows(*[9] * 20)):
            ahead.append(k - 2 * len(model.shapes))
            yield one

    evaluate(model, stream(), batch_size=2)
    assert max(ahead) <= 3


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training: bool) -> None:
    model = Table(torch.zeros(VOCABULARY, VOCABULARY)).train(training)
    evaluate(model, windows(9))
    assert model.modes == {(False, True)}
    assert model.training is training


def test_the_mode_is_restored_after_an_error() -> None:
    def broken() -> Iterator[Window]:
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
    narrow = [window(one.tokens.astype(np.uint16)) for one in text]
    assert evaluate(model, narrow) == evaluate(model, text)


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    model, text = tiny(), windows(17, 17, 17, 9)
    parts = evaluate(model, text[:2]) + evaluate(model, text[2:])
    whole = evaluate(model, text)
    assert parts.tokens == whole.tokens
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)


def test_no_windows_are_no_tokens() -> None:
    assert evaluate(tiny(), []) == LossSum(0.0, 0, 0, 0)


def test_perplexity_may_be_infinite_or_not_a_number() -> None:
    huge = score(LossSum(1e6, 10, 20, 0))
    assert huge.perplexity == math.inf
    assert huge.bits_per_byte == pytest.approx(1e6 / math.log(2) / 20)
    assert math.isnan(score(LossSum(math.nan, 1, 2, 0)).perplexity)


def test_text_that_is_mostly_unknown_has_no_bits_per_byte() -> None:
    """Its unknown tokens are easy to predict, and nobody knows what they stood for."""
    text = [window(np.array([0, 1, 1, 0, 1] * 4), unknown=unknown) for unknown in (0, 1, 2)]
    table = Table(torch.zeros(2, 2))
    assert score(evaluate(table, text[:2])).bits_per_byte == pytest.approx(1 / 4)
    assert score(evaluate(table, text[2:])).bits_per_byte is None
    assert score(LossSum(3.0, 3, 0, 0)).bits_per_byte is None


def test_nothing_to_score() -> None:
    with pytest.raises(EmptySiloError, match="nothing to score"):
        score(LossSum(0.0, 0, 5, 0))


def test_documents_are_scored_apart_where_windows_tell_them() -> None:
    """As training with local.document_mask: each as if it stood alone."""
    model, text = tiny(), windows(17)[0].tokens
    ids = np.array([0] * 6 + [1] * 11)
    together = evaluate(model, [window(text)])
    apart = evaluate(model, [window(text, ids)])
    alone = evaluate(model, [window(text[:7])]).nats  # the end of the first predicts the second
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(text[6:-1])[None]).logits[0]
        alone += float(
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(text[7:]), reduction="sum")
        )
    assert apart.nats == pytest.approx(alone, rel=1e-5)
    assert apart.nats != pytest.approx(together.nats, rel=1e-3)


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_the_loss_is_taken_without_whole_logits(autocast_dtype: torch.dtype | None) -> None:
    """Nor are gradients made, though weights want some."""
    model, text = tiny(), windows(*[21] * 8, 9)
    plain = evaluate(model, text, autocast_dtype=autocast_dtype)
    head = HeadLoss.of(model, rows=5)
    with Made() as made:
        total = evaluate(model, text, head=head, autocast_dtype=autocast_dtype, batch_size=8)
    assert total.nats == pytest.approx(plain.nats, rel=1e-3 if autocast_dtype else 1e-6)
    assert (total.tokens, total.bytes) == (plain.tokens, plain.bytes)
    width = model.get_parameter("model.embed_tokens.weight").shape[1]
    assert made.rows(VOCABULARY) - {width} == {5, 3}  # 20 x 8 and 8 predictions
    assert torch.ops.aten.scatter_add_.default not in made.operators


def test_a_model_that_makes_its_logits_whole_has_them_upcast_by_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = Table(torch.randn(VOCABULARY, VOCABULARY).bfloat16()), windows(*[9] * 8)
    plain = evaluate(Table(model.table.data.float()), text)
    monkeypatch.setattr("photon.models.loss.rows_at_once", lambda *_: 7)
    with Made() as made:
        total = evaluate(model, text, batch_size=8)
    assert total.nats == pytest.approx(plain.nats, rel=1e-6)
    assert made.rows(VOCABULARY, torch.float32) == {7, 1}  # 64 predictions


def test_a_model_that_makes_its_logits_whole_takes_few_sequences_at_once() -> None:
    assert sequences_at_once(tiny(), 1024) is None
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=50_000, n_embd=8, n_layer=1, n_head=1)
    )
    assert sequences_at_once(gpt2, 64) == 20  # 12.8 MB each, 256 MiB in all
    assert sequences_at_once(gpt2, 100_000) == 1


class Made(TorchDispatchMode):
    """Notes operators, and the shape and dtype of all that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[Any] = set()
        self.tensors: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(func)
        given = func(*args, **(kwargs or {}))
        for one in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(one, torch.Tensor):
                self.tensors.add((tuple(one.shape), one.dtype))
        return given

    def rows(self, width: int, dtype: torch.dtype | None = None) -> set[int]:
        """Of tensors that wide."""
        return {
            math.prod(shape[:-1])
            for shape, kind in self.tensors
            if shape and shape[-1] == width and dtype in (None, kind)
        }
