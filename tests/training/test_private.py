"""DP-SGD: what a sequence can move, and the noise that hides it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from photon.config import ComputeConfig, LocalConfig, ModelConfig
from photon.errors import DoesNotFitError, IncompatibleConfigError, NonFiniteError
from photon.models import build_model, training_loss
from photon.models.loss import positions_in_documents
from photon.training import InnerOptimizer, PrivateSteps, Schedule, Trainer, plan_compute
from photon.training.private import ClippedSum
from photon.training.strategy import Strategy

WORDS, LENGTH, BATCH = 61, 16, 6
FAMILIES = ["llama", "mpt", "qwen3", "gpt2"]
WIDE = PrivateSteps(1e9, 0.0, b"", ())
NOISED = PrivateSteps(0.5, 1.0, bytes(32), ("run", 1, "red"))


class Text:
    """Learnable: in a row, tokens are a fixed number apart."""

    def batch(self, start: int, count: int) -> np.ndarray:
        rows = np.arange(start, start + count)[:, None]
        return (rows * 7 + np.arange(LENGTH + 1)[None, :] * (1 + rows % 3)) % (WORDS - 1)

    def document_ids(self, start: int, count: int) -> np.ndarray:
        cut = 3 + np.arange(start, start + count)[:, None] % 9
        return (np.arange(LENGTH + 1)[None, :] >= cut).astype(np.int32)


def model_of(family: str = "llama") -> torch.nn.Module:
    if family in ("llama", "mpt"):
        preset = ModelConfig.model_validate({"preset": "mini", "family": family})
        return build_model(preset, vocab_size=WORDS, sequence_length=LENGTH, eos_id=0, seed=3)
    config = {
        "qwen3": Qwen3Config(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False,
        ),
        "gpt2": GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        ),
    }[family]  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).train()


def trainer(family: str = "llama", *, compute: dict | None = None, **local) -> Trainer:
    config = LocalConfig(**{"batch_size": BATCH, "lr": 3e-3, "clip_norm": 0.0, **local})
    plan = plan_compute(
        ComputeConfig(device="cpu", threads=1, **{"precision": "fp32", **(compute or {})})
    )
    return Trainer(model_of(family), config, Schedule("constant", 100), plan, log_every=4)


def fit(one: Trainer, private: PrivateSteps | None, steps: int = 1, **options):
    options = {"cursor": 0, "global_step": 0, **options}
    return one.fit(Text(), steps=steps, private=private, **options)


def gradients(one: Trainer, private: PrivateSteps | None, **options) -> dict[str, torch.Tensor]:
    """What the optimizer is given at a step, which is then not taken."""
    found: dict[str, torch.Tensor] = {}

    def note(_: float) -> None:
        found.update({name: p.grad.clone() for name, p in one.optimizer.parameters.items()})

    step, one.optimizer.step = one.optimizer.step, note
    fit(one, private, **options)
    one.optimizer.step = step
    return found


def norm_of(tensors) -> float:
    return math.sqrt(math.fsum(float(one.double().square().sum()) for one in tensors))


def alone(model: torch.nn.Module, *, documents: bool, z_loss: float = 0.0):
    """Each sequence's gradient by itself: whole logits, fp64, backward, no code of ours."""
    model = copy.deepcopy(model).double()
    if hasattr(model.get_output_embeddings(), "forward"):
        vars(model.get_output_embeddings()).pop("forward", None)  # HeadLoss put one there
    tokens = torch.from_numpy(Text().batch(0, BATCH))
    ids = torch.from_numpy(Text().document_ids(0, BATCH))
    for row, own in zip(tokens.split(1), ids.split(1), strict=True):
        model.zero_grad()
        more = {"position_ids": positions_in_documents(own[:, :-1])} if documents else {}
        logits = model(input_ids=row[:, :-1], use_cache=False, **more).logits[0]
        loss = functional.cross_entropy(logits, row[0, 1:])
        (loss + z_loss * logits.logsumexp(-1).square().mean()).backward()
        yield {name: one.grad.clone() for name, one in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_single_sequences(family):
    documents = family != "mpt"  # which has no document masks
    one = trainer(family, document_mask=documents, z_loss=1e-2)
    singles = list(alone(one.model, documents=documents, z_loss=1e-2))
    norms = [norm_of(each.values()) for each in singles]
    clip = float(np.median(norms))
    assert min(norms) < clip < max(norms)
    found = gradients(one, replace(WIDE, clip_norm=clip))
    for name, gradient in found.items():
        shares = [min(1.0, clip / norm) for norm in norms]
        expected = sum(s * each[name] for s, each in zip(shares, singles, strict=True)) / BATCH
        assert norm_of([gradient - expected]) < 1e-5 * norm_of([expected]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clip_norm", [0.3, 1e9])
def test_a_sequence_moves_the_sum_by_c_at_most(family, clip_norm):
    model = model_of(family)
    parameters = dict(model.named_parameters())
    rows = torch.from_numpy(Text().batch(0, BATCH)).split(1)

    def summed(without: int | None) -> list[torch.Tensor]:
        sums = ClippedSum(parameters, clip_norm)
        for number, row in enumerate(rows):
            if number != without:
                sums.add(*training_loss(model, row))
        return [parameter.grad for parameter in parameters.values()]

    whole = summed(None)
    for number in range(BATCH):
        moved = norm_of(a - b for a, b in zip(whole, summed(number), strict=True))
        assert 0 < moved <= clip_norm * (1 + 1e-5)
        if clip_norm < 1:  # each is longer
            assert moved == pytest.approx(clip_norm, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_without_clip_and_noise_it_is_plain_training(optimizer):
    recipe = {"optimizer": optimizer, "clip_norm": 1.0, "lr": 1e-2}
    plain, private = trainer(**recipe), trainer(**recipe)
    a, b = fit(plain, None, 8), fit(private, WIDE, 8)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert (a.tokens, a.cursor) == (b.tokens, b.cursor)
    assert b.micro_batch_size == 1
    start = trainer().weights()
    ended, other = plain.weights(), private.weights()
    moved = norm_of(ended[name] - start[name] for name in ended)
    assert norm_of(ended[name] - other[name] for name in ended) < 1e-3 * moved


# torch's own tracer looks at .grad of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "compute",
    [
        {"micro_batch_size": 2},
        {"compile": "on", "compile_backend": "aot_eager"},
        {"activation_checkpointing": "full"},
    ],
    ids=lambda one: next(iter(one)),
)
def test_how_it_is_computed_does_not_matter(compute):
    plain, other = (gradients(trainer(compute=made), WIDE) for made in ({}, compute))
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7)


def test_bf16_is_close():
    plain = gradients(trainer(), WIDE)
    rough = gradients(trainer(compute={"precision": "bf16"}), WIDE)
    apart = norm_of(plain[name] - rough[name] for name in plain)
    assert 0 < apart < 0.03 * norm_of(plain.values())


def noise_of(one: Trainer, private: PrivateSteps, **options) -> dict[str, torch.Tensor]:
    """In standard deviations that were promised."""
    noised = gradients(one, private, **options)
    clean = gradients(one, replace(private, noise_multiplier=0.0), **options)
    scale = BATCH / (private.clip_norm * private.noise_multiplier)
    return {name: scale * (noised[name] - clean[name]).double().flatten() for name in noised}


def test_the_noise_is_gaussian_of_the_promised_size():
    one = trainer()
    by_name = noise_of(one, NOISED)
    noise = torch.cat(list(by_name.values()))
    within = 4 / math.sqrt(noise.numel())
    assert noise.numel() > 9e4
    assert abs(noise.mean()) < within
    assert abs(noise.square().mean() - 1) < within * math.sqrt(2)
    assert abs(noise.pow(4).mean() - 3) < within * math.sqrt(96)
    for bound, share in ((1.0, 0.31731), (2.0, 0.0455), (3.0, 0.0027)):
        assert abs((noise.abs() > bound).double().mean() - share) < within * math.sqrt(share)
    # Independent: along a tensor, between tensors, and from one step to the next.
    assert abs((noise[1:] * noise[:-1]).mean()) < within
    alike = [each for name, each in by_name.items() if "layers.0.mlp" in name]
    assert len(alike) == 3
    for first, second in zip(alike, [*alike[1:], alike[0]], strict=True):
        assert abs((first * second).mean()) < 4 / math.sqrt(len(first))
    later = torch.cat(list(noise_of(one, NOISED, global_step=1).values()))
    assert abs((noise * later).mean()) < within


def test_the_same_sums_have_the_same_noise_and_others_never():
    """Or the difference of two answers were without noise."""
    one = trainer()
    once = gradients(one, NOISED)
    again = gradients(trainer(), NOISED)
    assert all(torch.equal(once[name], again[name]) for name in once)
    noise = torch.cat(list(noise_of(one, NOISED).values()))
    others = {
        "another secret": (replace(NOISED, secret=bytes(31) + b"1"), {}),
        "another silo": (replace(NOISED, context=("run", 1, "blue")), {}),
        "another step": (NOISED, {"global_step": 1}),
        "another text": (NOISED, {"cursor": 1}),
        "another C": (replace(NOISED, clip_norm=0.50001), {}),
        "another z": (replace(NOISED, noise_multiplier=1.00001), {}),
    }
    for which, (private, options) in others.items():
        other = torch.cat(list(noise_of(one, private, **options).values()))
        assert abs((noise * other).mean()) < 4 / math.sqrt(noise.numel()), which
    with torch.no_grad():  # another state, by a hair
        next(iter(one.model.parameters()))[0, 0] += 1e-3
    other = torch.cat(list(noise_of(one, NOISED).values()))
    assert abs((noise * other).mean()) < 4 / math.sqrt(noise.numel())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_steps_after_the_noise(optimizer):
    one = trainer(optimizer=optimizer)
    given = gradients(one, NOISED)
    model = model_of()
    own = InnerOptimizer(model, one._config)
    for name, parameter in own.parameters.items():
        parameter.grad = given[name]
    own.step(1.0)
    fit(one, NOISED)
    for name, parameter in own.parameters.items():
        assert torch.equal(one.weights()[name], parameter), name


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("muon", 2e-2)])
def test_it_learns_under_a_little_noise(optimizer, lr):
    result = fit(trainer(optimizer=optimizer, lr=lr), replace(NOISED, noise_multiplier=1e-3), 40)
    assert result.last_loss < 0.7 * result.first_loss


def test_splitting_the_steps_changes_nothing():
    whole, parts = trainer(), trainer()
    fit(whole, NOISED, 4)
    fit(parts, NOISED, 1)
    fit(parts, NOISED, 3, cursor=BATCH, global_step=1)
    for name, weight in whole.weights().items():
        assert torch.equal(parts.weights()[name], weight)


def test_sequences_draw_dropout_of_their_own():
    class Same(Text):
        def batch(self, start: int, count: int) -> np.ndarray:
            return np.repeat(super().batch(0, 1), count, axis=0)

    model = trainer("gpt2")
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    norms = []
    keep = ClippedSum.add

    def note(self, objective, loss):
        norms.append(float(loss.detach()))
        keep(self, objective, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClippedSum, "add", note)
        for _ in range(2):
            model.fit(Same(), cursor=0, global_step=0, steps=1, private=WIDE, seed=5)
            model.load_weights({n: p.detach() for n, p in model_of("gpt2").named_parameters()})
    assert len(set(norms[:BATCH])) == BATCH
    assert norms[BATCH:] == norms[:BATCH]


def test_a_sequence_without_a_finite_gradient_counts_as_nothing(monkeypatch):
    model = model_of()
    parameters = dict(model.named_parameters())
    found = []
    for spoilt in (math.nan, math.inf, None):
        sums = ClippedSum(parameters, 0.5)
        for number, row in enumerate(torch.from_numpy(Text().batch(0, BATCH)).split(1)):
            objective, loss = training_loss(model, row)
            if number != 2:
                sums.add(objective, loss)
            elif spoilt is not None:
                sums.add(objective * spoilt, loss * spoilt)
        found.append([sums.loss, *(parameter.grad for parameter in parameters.values())])
    for other in found[:2]:
        assert all(map(torch.equal, other, found[2]))
    assert norm_of(found[2]) > 0
    # Nor do nodes give up where all are so: it would tell of the text. The weights are fine.
    one = trainer()
    monkeypatch.setattr(
        "photon.training.trainer.training_loss",
        lambda *args, **options: (
            [each * math.inf for each in training_loss(*args, **options)]
            if torch.is_grad_enabled()
            else training_loss(*args, **options)
        ),
    )
    assert fit(one, NOISED).loss == 0


def test_a_token_that_the_weights_forbid_is_not_told_of():
    """Its loss is infinite, its gradient is not: an aggregator could ask whether it is there."""
    one = trainer("gpt2")
    head = torch.nn.Linear(32, WORDS)
    one.model.set_output_embeddings(head)
    tokens = torch.from_numpy(Text().batch(0, BATCH))
    with torch.no_grad():
        head.bias[19] = -math.inf  # not among the first, which are the made-up ones
    losses = [training_loss(one.model, row)[1].detach() for row in tokens.split(1)]
    assert len({math.isfinite(loss) for loss in losses}) == 2
    assert math.isfinite(fit(one, WIDE).loss)


def test_weights_that_give_no_loss_are_named():
    one = trainer()
    with torch.no_grad():
        next(iter(one.optimizer.parameters.values())).fill_(math.nan)
    with pytest.raises(NonFiniteError, match="made-up tokens became nan by global step 23"):
        fit(one, NOISED, 3, global_step=20)


def test_two_ranks_clip_their_shares_and_draw_one_noise(run_ranks):
    def cases(strategy: str) -> list[dict]:
        steps = {"clip_norm": 0.5, "secret": 32 * "s", "context": ["run"]}
        return [
            {
                "strategy": strategy,
                "machines": 1,
                "steps": 3,
                "local": {"optimizer": optimizer, "document_mask": True},
                "private": {**steps, "noise_multiplier": z},
            }
            for optimizer in ("adamw", "muon")
            for z in (0.0, 0.1)
        ]

    alone = run_ranks("equality", 1, cases("single"))[0]
    first, second = run_ranks("equality", 2, cases("ddp"))
    assert first == second
    for number, (one, two) in enumerate(zip(alone, first, strict=True)):
        assert two["tokens"] == one["tokens"]
        near = 2e-2 if number % 2 else 2e-4  # sums that differ in a last digit have other noise
        assert two["norms"] == pytest.approx(one["norms"], rel=near)
        assert two["losses"] == pytest.approx(one["losses"], rel=near)


def test_cut_weights_are_refused():
    one = trainer()
    one.placed.strategy = Strategy("fsdp", "")
    with pytest.raises(IncompatibleConfigError, match=r'compute.strategy = "fsdp"') as caught:
        fit(one, NOISED)
    assert '"ddp"' in str(caught.value.hint)


def test_too_little_memory_for_a_sequence_is_said_at_once(monkeypatch):
    tried = []

    def fail(*_, **__):
        tried.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("photon.training.trainer.training_loss", fail)
    with pytest.raises(DoesNotFitError, match="one sequence at a time") as caught:
        fit(trainer(), NOISED)
    assert len(tried) == 1
    assert "fsdp" not in str(caught.value.hint)
