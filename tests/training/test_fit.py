"""Strategy and micro-batch from estimates, and what happens where there is none."""

from __future__ import annotations

import pytest

from photon.config import ModelConfig, parse_run_config
from photon.errors import DoesNotFitError
from photon.models import build_skeleton
from photon.training import Ranks, Seat, fit, plan_compute, plan_fit

GIB = 2**30


def config_of(*overrides, **local):
    tree = {
        "model": {"preset": "75m"},
        "data": {"path": "none", "sequence_length": 256},
        "local": {"batch_size": 32, **local},
    }
    return parse_run_config(tree, ["compute.device=cpu", *overrides])


@pytest.fixture(scope="module")
def model():
    preset = ModelConfig(preset="75m")
    return build_skeleton(preset, vocab_size=8192, sequence_length=256, eos_id=0)


def planned(monkeypatch, model, config, seat, memory_gib, **more):
    monkeypatch.setattr(fit, "memory_of", lambda device: (memory_gib * GIB, memory_gib * GIB))
    return plan_fit(model, config, plan_compute(config.compute), seat, **more)


def test_a_large_device_takes_all_at_once(monkeypatch, model):
    found = planned(monkeypatch, model, config_of(), Seat(), 1000)
    assert (found.strategy.name, found.micro_batch.size) == ("single", 32)


def test_a_small_one_takes_what_the_estimate_allows(monkeypatch, model):
    found = planned(monkeypatch, model, config_of(), Seat(), 2)
    size = found.micro_batch.size
    assert 1 < size < 32
    assert found.estimate(model, size).total_bytes <= 2 * GIB
    assert found.estimate(model, 2 * size).total_bytes > 2 * GIB


def test_nodes_and_ranks_share_main_memory(monkeypatch, model):
    alone = planned(monkeypatch, model, config_of(), Seat(), 4)
    beside = planned(monkeypatch, model, config_of(), Seat(), 4, share_of=2)
    assert beside.micro_batch.size < alone.micro_batch.size


@pytest.mark.parametrize(("memory_gib", "strategy"), [(64, "ddp"), (4, "fsdp"), (2, "")])
def test_auto_cuts_what_a_device_cannot_hold(monkeypatch, model, memory_gib, strategy):
    if not strategy:  # half a GiB for each rank: not even cut
        with pytest.raises(DoesNotFitError, match="with fsdp"):
            planned(monkeypatch, model, config_of(), Seat(0, 0, 4, 4), memory_gib)
        return
    found = planned(monkeypatch, model, config_of(), Seat(0, 0, 4, 4), memory_gib)
    assert found.strategy.name == strategy
    assert found.micro_batch.size <= 8  # a quarter of the batch each


def test_what_cannot_fit_is_refused_with_figures_and_remedies(monkeypatch, model):
    with pytest.raises(DoesNotFitError, match=r"needs 1\.\d GB .* 1\.1 GB are there") as caught:
        planned(monkeypatch, model, config_of(), Seat(), 1)
    assert 'compute.strategy = "fsdp" on' in str(caught.value.hint)


def test_an_asked_size_is_tried_as_asked(monkeypatch, model):
    config = config_of("compute.micro_batch_size=16")
    assert planned(monkeypatch, model, config, Seat(), 4).micro_batch.size == 16


def test_a_model_that_cannot_be_traced_may_train_all_the_same(monkeypatch, model):
    def refuse(*_, **__):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(fit, "largest_micro_batch", refuse)
    assert planned(monkeypatch, model, config_of(), Seat(), 4).micro_batch.size == 32


class Poorest(Ranks):
    """Ranks of which another has less memory than this one."""

    def least(self, number: int) -> int:
        return min(number, 2 * GIB)


def test_ranks_go_by_the_least_memory_among_them(monkeypatch, model):
    """Or some would copy the model, others cut it, and all wait for each other."""
    mine = planned(monkeypatch, model, config_of(), Seat(), 64, ranks=Poorest(Seat()))
    theirs = planned(monkeypatch, model, config_of(), Seat(), 2, ranks=Poorest(Seat()))
    assert mine.micro_batch.size == theirs.micro_batch.size == 8


def test_private_steps_take_sequences_one_by_one_and_are_never_cut(monkeypatch, model):
    """Beside their sum is each one's gradient, whole on every rank."""
    private = config_of(
        "privacy.mechanism=dp_sgd", "privacy.clip_norm=1", "privacy.noise_multiplier=1"
    )
    plain = planned(monkeypatch, model, config_of("compute.micro_batch_size=1"), Seat(), 64)
    found = planned(monkeypatch, model, private, Seat(), 64)
    assert (found.strategy.name, found.micro_batch.size) == ("single", 1)
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    more = [one.estimate(model, 1).parts["gradients"] for one in (plain, found)]
    assert more[1] - more[0] == gradients
    assert planned(monkeypatch, model, private, Seat(0, 0, 4, 4), 16).strategy.name == "ddp"
    with pytest.raises(DoesNotFitError, match="with ddp") as caught:
        planned(monkeypatch, model, private, Seat(0, 0, 4, 4), 4)
    assert "fsdp" not in str(caught.value.hint)
