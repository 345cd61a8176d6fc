"""The loss by rows is the plain loss: value, gradients, z-loss, autocast, frozen parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from photon.config import ModelConfig
from photon.models import HeadLoss, build_model, rows_at_once, training_loss
from photon.models.head_loss import PLAIN_HEADS, head_loss

ROWS, WIDTH, VOCABULARY = 37, 16, 203


def plain_loss(hidden, weight, targets, z_loss):
    logits = functional.linear(hidden, weight).float()
    loss = functional.cross_entropy(logits, targets)
    return loss + z_loss * torch.logsumexp(logits, -1).square().mean(), loss


def operands(scale=1.0):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, WIDTH, generator=generator) * scale
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("rows", [1, 10, 37, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradients_are_the_plain_loss_s(rows, z_loss):
    found, expected = [], []
    for into, loss in ((found, head_loss), (expected, plain_loss)):
        hidden, weight, targets = operands()
        options = {"rows": rows} if loss is head_loss else {}
        objective, cross_entropy = loss(hidden, weight, targets, z_loss=z_loss, **options)
        (3 * objective).backward()  # a share of a batch scales the objective
        into += [objective.detach(), cross_entropy.detach(), hidden.grad, weight.grad]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_bad_guess_costs_much_but_not_infinity():
    hidden, weight, targets = operands(scale=100.0)
    objective, _ = head_loss(hidden, weight, targets, rows=8)
    assert objective > 110  # exp(-110) is 0 in fp32
    torch.testing.assert_close(objective, plain_loss(hidden, weight, targets, 0.0)[0])


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    hidden, weight, targets = operands()
    with torch.autocast("cpu", torch.bfloat16):
        objective, _ = head_loss(hidden, weight, targets, rows=8)
        expected, _ = plain_loss(hidden, weight, targets, 0.0)
    assert objective.dtype == torch.float32
    torch.testing.assert_close(objective, expected, rtol=1e-4, atol=0)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    objective.backward()
    for given, gradient in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert given.dtype == torch.float32
        assert float((given - gradient).norm() / gradient.norm()) < 0.01


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, targets = operands()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    objective, _ = head_loss(hidden, weight, targets, z_loss=0.1, rows=8)
    expected = plain_loss(hidden, weight, targets, 0.1)[0]
    torch.testing.assert_close(objective, expected)
    assert objective.requires_grad == (frozen != "both")
    if frozen != "both":
        objective.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")


def test_a_second_backward_is_refused_not_wrong():
    hidden, weight, targets = operands()
    objective, _ = head_loss(hidden, weight, targets)
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        objective.backward()


def test_wide_vocabularies_are_taken_by_fewer_rows():
    assert rows_at_once(2048, "cpu") > rows_at_once(4096, "cpu") >= rows_at_once(10**6, "cpu") > 0


def tiny(**more):
    return build_model(
        ModelConfig.model_validate({"preset": "tiny", **more}),
        vocab_size=61,
        sequence_length=16,
        eos_id=0,
        seed=1,
    )


def of_type(kind):
    """A model of another architecture, as `init = "pretrained"` may bring."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **heads))


@pytest.mark.parametrize("kind", sorted(PLAIN_HEADS))
def test_inside_a_model(kind):
    """The same losses and gradients; without targets the model still gives logits."""
    if kind in ("llama", "mpt"):
        plain, scored = tiny(family=kind), tiny(family=kind)
    else:
        plain, scored = of_type(kind), of_type(kind)
    head = HeadLoss.of(scored)
    assert head is not None
    tokens = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(2))
    expected = training_loss(plain, tokens, z_loss=1e-3)
    found = training_loss(scored, tokens, z_loss=1e-3, head=head)
    torch.testing.assert_close(found, expected)
    expected[0].backward()
    found[0].backward()
    for (name, one), other in zip(scored.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)
    logits = scored(input_ids=tokens).logits
    assert logits.shape == (3, 17, 61)
    assert set(scored.state_dict()) == set(plain.state_dict())


def test_other_heads_take_the_plain_loss():
    model = tiny()
    model.config.model_type = "gemma2"  # caps its logits
    assert HeadLoss.of(model) is None
    model = tiny()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(61))
    assert HeadLoss.of(model) is None
