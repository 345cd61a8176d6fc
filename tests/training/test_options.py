"""Speed and memory options: they change neither the maths nor, over hundreds of rounds, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from photon.config import ComputeConfig, LocalConfig, ModelConfig
from photon.link import tensors_sha256
from photon.models import build_model
from photon.training import Schedule, Trainer, plan_compute


class Text:
    """Learnable text in documents of five tokens."""

    def batch(self, start: int, count: int) -> np.ndarray:
        rows = np.arange(start, start + count)[:, None] * 7
        return (rows + np.arange(17)[None, :]) % 64

    def document_ids(self, start: int, count: int) -> np.ndarray:
        return np.repeat((np.arange(17) // 5)[None].astype(np.int32), count, axis=0)


def train(*, compute=None, family="llama", steps=4, **local):
    model = build_model(
        ModelConfig(preset="tiny", family=family),
        vocab_size=64,
        sequence_length=16,
        eos_id=0,
        seed=3,
    )
    options = {"device": "cpu", "precision": "fp32", "threads": 1, **(compute or {})}
    trainer = Trainer(
        model,
        LocalConfig(**{"batch_size": 8, "lr": 3e-3, **local}),
        Schedule("constant", 100),
        plan_compute(ComputeConfig(**options)),
    )
    result = trainer.fit(Text(), cursor=0, global_step=0, steps=steps)
    return trainer, result


@pytest.mark.parametrize("family", ["llama", "mpt"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(kind, family):
    plain, _ = train(family=family)
    again, _ = train(family=family, compute={"activation_checkpointing": kind})
    assert tensors_sha256(plain.weights()) == tensors_sha256(again.weights())


def held_for_backward(kind: str) -> int:
    """Bytes that a forward pass saves for its backward pass."""
    trainer, _ = train(compute={"activation_checkpointing": kind}, steps=1)
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.from_numpy(Text().batch(0, 8))
    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.model(input_ids=tokens, use_cache=False)
    return sum(seen.values())


def test_recomputation_holds_less():
    none, full = held_for_backward("none"), held_for_backward("full")
    assert full < 0.8 * none


def test_bf16_keeps_fp32_weights_and_state_and_learns():
    trainer, result = train(compute={"precision": "bf16"}, steps=12)
    assert {weight.dtype for weight in trainer.weights().values()} == {torch.float32}
    assert {tensor.dtype for tensor in trainer.optimizer.state_tensors().values()} == {
        torch.float32
    }
    assert result.last_loss < result.first_loss
    exact, _ = train(steps=12)
    assert tensors_sha256(trainer.weights()) != tensors_sha256(exact.weights())


def test_document_masks_and_z_loss_reach_the_gradients():
    plain, _ = train(steps=1)
    masked, _ = train(steps=1, document_mask=True)
    steadied, result = train(steps=1, z_loss=1e-2)
    hashes = {tensors_sha256(each.weights()) for each in (plain, masked, steadied)}
    assert len(hashes) == 3
    assert result.loss == pytest.approx(train(steps=1)[1].loss, rel=1e-6)


def test_where_the_time_went_adds_up():
    _, result = train(steps=6)
    times = result.times
    split_s = times.data_s + times.forward_s + times.backward_s + times.optimizer_s
    assert 0 < times.forward_s < result.train_s
    assert 0 < times.backward_s < result.train_s
    assert 0.5 * result.train_s < split_s <= result.train_s
    assert result.communication_s is None
    assert result.peak_memory_bytes > 10_000_000


def test_prefetching_reads_each_batch_once_in_order():
    asked = []

    class Noted(Text):
        def batch(self, start: int, count: int) -> np.ndarray:
            asked.append((start, count))
            return super().batch(start, count)

    model = build_model(
        ModelConfig(preset="tiny"), vocab_size=64, sequence_length=16, eos_id=0, seed=3
    )
    plan = plan_compute(ComputeConfig(device="cpu", precision="fp32", threads=1))
    trainer = Trainer(model, LocalConfig(batch_size=8), Schedule("constant", 9), plan)
    trainer.fit(Noted(), cursor=40, global_step=0, steps=3)
    assert asked == [(40, 8), (48, 8), (56, 8)]


@pytest.mark.slow
def test_two_hundred_rounds_leak_nothing_and_compile_once(run_ranks):
    """tau = 2, three virtual clients, one trainer: RSS within 2%, no block compiled again."""
    (told,) = run_ranks("many_rounds", 1, {}, timeout_s=450)
    assert told["rounds"] == 200
    assert told["compiled_first_round"] > 0
    assert told["compiled_later"] == 0
    assert told["rss_end"] <= 1.02 * told["rss_after_warm_up"]
    assert told["last_loss"] < told["first_loss"]


# torch's own tracer looks at .grad of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("scope", ["on", "whole"])
def test_compiled_models_train_the_same(scope):
    """aot_eager traces and partitions as inductor does, and keeps the kernels."""
    plain, _ = train()
    compiled, _ = train(compute={"compile": scope, "compile_backend": "aot_eager"})
    for name, weight in plain.weights().items():
        torch.testing.assert_close(compiled.weights()[name], weight, rtol=1e-4, atol=1e-6)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
