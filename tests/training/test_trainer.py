import numpy as np
import pytest
import torch

from photon.config import ComputeConfig, LocalConfig, ModelConfig
from photon.errors import DeviceError, ModelMismatchError, NonFiniteError
from photon.link import tensors_sha256
from photon.models import build_model
from photon.training import Schedule, Trainer, plan_compute


class CountingText:
    """Learnable text: token i + 1 follows token i."""

    def batch(self, start: int, count: int) -> np.ndarray:
        rows = np.arange(start, start + count)[:, None] * 7
        return (rows + np.arange(17)[None, :]) % 64


def trainer(*, micro_batch_size: int | None = None, **local) -> Trainer:
    config = LocalConfig(**{"batch_size": 8, "lr": 3e-3, **local})
    model = build_model(
        ModelConfig(preset="tiny"), vocab_size=64, sequence_length=16, eos_id=0, seed=3
    )
    plan = plan_compute(
        ComputeConfig(device="cpu", precision="fp32", threads=1, micro_batch_size=micro_batch_size)
    )
    return Trainer(model, config, Schedule("constant", 100), plan, log_every=4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_it_learns(optimizer):
    lr = {"adamw": 3e-3, "muon": 1e-2, "sgd": 0.3}[optimizer]
    result = trainer(optimizer=optimizer, lr=lr).fit(
        CountingText(), cursor=0, global_step=0, steps=30
    )
    assert result.last_loss < 0.7 * result.first_loss
    assert result.tokens == 30 * 8 * 16
    assert result.cursor == 240


def test_splitting_the_steps_changes_nothing():
    """fit(6) == fit(2) + fit(4), bit for bit: cursor and clock are all there is."""
    whole, parts = trainer(), trainer()
    whole.fit(CountingText(), cursor=0, global_step=0, steps=6)
    first = parts.fit(CountingText(), cursor=0, global_step=0, steps=2)
    parts.fit(CountingText(), cursor=first.cursor, global_step=2, steps=4)
    assert tensors_sha256(whole.weights()) == tensors_sha256(parts.weights())


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_gradients_equal_the_whole_batch(micro):
    whole, parts = (
        trainer(optimizer="sgd", lr=0.1),
        trainer(optimizer="sgd", lr=0.1, micro_batch_size=micro),
    )
    a = whole.fit(CountingText(), cursor=0, global_step=0, steps=3)
    b = parts.fit(CountingText(), cursor=0, global_step=0, steps=3)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    for mine, other in zip(whole.weights().values(), parts.weights().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_dropout_is_a_function_of_seed_and_step():
    def run(seed: int, caller_seed: int) -> str:
        torch.manual_seed(caller_seed)
        one = trainer()
        for module in one.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        one.fit(CountingText(), cursor=0, global_step=5, steps=2, seed=seed)
        return tensors_sha256(one.weights())

    assert run(1, 10) == run(1, 20)
    assert run(1, 10) != run(2, 10)


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    trainer().fit(CountingText(), cursor=0, global_step=0, steps=1)
    assert torch.equal(torch.rand(1), expected)


def test_clipping_bounds_the_step():
    steps = []
    for clip in (0.0, 1e-3):
        one = trainer(optimizer="sgd", lr=1.0, clip_norm=clip)
        before = {name: weight.clone() for name, weight in one.weights().items()}
        one.fit(CountingText(), cursor=0, global_step=0, steps=1)
        moved = sum(
            float((weight - before[name]).square().sum()) for name, weight in one.weights().items()
        )
        steps.append(moved**0.5)
    assert steps[1] == pytest.approx(1e-3, rel=1e-3)
    assert steps[0] > 10 * steps[1]


def test_a_diverged_loss_is_named():
    one = trainer()
    with torch.no_grad():
        next(iter(one.optimizer.parameters.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"nan at local step 1 \(global step 21\)"):
        one.fit(CountingText(), cursor=0, global_step=20, steps=5)


def test_progress_is_told_every_few_steps_and_at_the_end():
    told = []
    trainer().fit(CountingText(), cursor=0, global_step=10, steps=10, on_progress=told.append)
    assert [progress.step for progress in told] == [4, 8, 10]
    assert told[-1].global_step == 20
    assert all(progress.tokens_per_s > 0 and progress.gradient_norm > 0 for progress in told)


def test_weights_of_another_model_are_refused():
    one = trainer()
    weights = dict(one.weights())
    name = next(iter(weights))
    with pytest.raises(ModelMismatchError, match="shape"):
        one.load_weights({**weights, name: torch.zeros(1)})
    weights.pop(name)
    with pytest.raises(ModelMismatchError, match="differ in tensor"):
        one.load_weights(weights)


def test_a_device_that_is_not_here_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, so asking for it is no error")
    with pytest.raises(DeviceError, match=r'compute.device = "cuda" is not on this machine'):
        plan_compute(ComputeConfig(device="cuda"))


def test_cores_are_shared_among_processes():
    alone = plan_compute(ComputeConfig(device="cpu")).threads
    assert plan_compute(ComputeConfig(device="cpu"), processes=alone).threads == 1
    assert plan_compute(ComputeConfig(threads=3), processes=8).threads == 3
