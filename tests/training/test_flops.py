"""The stated count against what PyTorch's own counter sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from photon.config import ModelConfig
from photon.models import build_skeleton, training_loss
from photon.training.flops import FlopCount, count_flops

VOCABULARY, LENGTH = 512, 256


def skeleton(family="llama", preset="tiny"):
    return build_skeleton(
        ModelConfig(preset=preset, family=family),
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        eos_id=0,
        # Explicit products, which the counter sees in full: flash kernels recompute in backward.
        attention="eager",
    )


def measured_per_token(model, batch=2):
    # Whatever numbers the memory holds: only shapes are counted.
    model = model.to_empty(device="cpu")
    tokens = torch.zeros(batch, LENGTH + 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        training_loss(model, tokens)[0].backward()
    return counter.get_total_flops() / (batch * LENGTH)


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_the_count_is_what_forward_and_backward_multiply(family):
    model = skeleton(family)
    stated = count_flops(model, LENGTH).per_token
    # Norm weights (under 0.2% of N) multiply no matrix; nothing else may differ.
    assert measured_per_token(model) == pytest.approx(stated, rel=0.005)


def test_attention_is_twelve_layers_width_length():
    count = count_flops(skeleton(), LENGTH)
    attention = 12 * 4 * 128 * LENGTH
    assert count.per_token == 6 * count.trained_weights + attention


def test_heads_may_be_wider_than_the_model():
    model = skeleton()
    model.config.head_dim = 64
    assert count_flops(model, LENGTH).attention_width == 4 * 64


def test_the_head_counts_and_the_embedding_does_not_tied_or_not():
    tied = skeleton()
    whole = sum(parameter.numel() for parameter in tied.parameters())
    assert count_flops(tied, LENGTH).trained_weights == whole
    untied = skeleton()
    untied.lm_head.weight = torch.nn.Parameter(torch.empty(VOCABULARY, 128, device="meta"))
    assert count_flops(untied, LENGTH).trained_weights == whole


def test_frozen_weights_cost_two_thirds():
    model = skeleton()
    every = count_flops(model, LENGTH)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    count = count_flops(model, LENGTH)
    assert count.trained_weights == VOCABULARY * 128
    assert count.trained_weights + count.frozen_weights == every.trained_weights
    weights = 6 * count.trained_weights + 4 * count.frozen_weights
    assert count.per_token - weights == every.per_token - 6 * every.trained_weights


def test_of_experts_only_the_chosen_count():
    model = skeleton()
    before = count_flops(model, LENGTH).trained_weights
    block = model.model.layers[0]
    block.experts = torch.nn.ParameterList([torch.empty(8, 10, 10, device="meta")])
    model.config.num_local_experts, model.config.num_experts_per_tok = 8, 2
    assert count_flops(model, LENGTH).trained_weights == before + 200


def test_it_explains_its_conventions():
    words = FlopCount(100, 10, 2, 8, 16).explain()
    assert "6 x 100" in words
    assert "4 x 10 frozen" in words
    assert "input embedding" in words
    assert "causal" in words
    assert f"{6 * 100 + 4 * 10 + 12 * 2 * 8 * 16:,}" in words
