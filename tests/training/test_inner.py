import pytest
import torch
from torch import nn

from photon.config import LocalConfig, ModelConfig
from photon.errors import ModelMismatchError
from photon.models import build_model
from photon.training import InnerOptimizer
from photon.training.muon import Fp32Muon, orthogonalise


def tiny():
    torch.set_num_threads(1)
    return build_model(
        ModelConfig(preset="tiny"), vocab_size=64, sequence_length=16, eos_id=0, seed=3
    )


def take_steps(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(1.0)
        optimizer.zero_grad()


def test_fp32_muon_takes_torchs_steps():
    """Same maths as torch.optim.Muon; they differ by torch's bf16 rounding only."""
    torch.manual_seed(0)
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    for rule in ("match_rms_adamw", "original", None):
        settings = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": rule}
        a, b = Fp32Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
        for _ in range(3):
            for mine, other in zip(ours, theirs, strict=True):
                mine.grad = torch.randn_like(mine)
                other.grad = mine.grad.clone()
            a.step()
            b.step()
        for mine, other in zip(ours, theirs, strict=True):
            moved = 3 * 1e-2 * 0.2 * 24**0.5
            assert float((mine - other).detach().abs().max()) < 0.05 * moved
            assert torch.equal(a.state[mine]["momentum_buffer"], b.state[other]["momentum_buffer"])
            other.data.copy_(mine.data)


def test_orthogonalised_singular_values_are_near_one():
    torch.manual_seed(1)
    for shape in [(3, 32, 20), (3, 20, 32)]:
        out = orthogonalise(torch.randn(shape), (3.4445, -4.7750, 2.0315), 5, 1e-7)
        values = torch.linalg.svdvals(out)
        assert 0.3 < float(values.min()) <= float(values.max()) < 1.6


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_state_survives_a_round_trip(name):
    """Saved and loaded mid-way, the trajectory is the same bit for bit."""
    config = LocalConfig(optimizer=name, lr=1e-2, weight_decay=0.1)
    straight = tiny()
    one = InnerOptimizer(straight, config)
    take_steps(straight, one, 3, seed=1)
    saved = {key: tensor.clone() for key, tensor in one.state_tensors().items()}
    other = tiny()
    two = InnerOptimizer(other, config)
    with torch.no_grad():
        for mine, his in zip(other.parameters(), straight.parameters(), strict=True):
            mine.copy_(his)
    two.load_state_tensors(saved)
    take_steps(straight, one, 2, seed=2)
    take_steps(other, two, 2, seed=2)
    for mine, his in zip(other.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, his)
    assert (name == "sgd") == (not saved)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_zero_state_equals_a_reset(name):
    config = LocalConfig(optimizer=name, lr=1e-2)
    fresh, loaded = tiny(), tiny()
    one, two = InnerOptimizer(fresh, config), InnerOptimizer(loaded, config)
    two.load_state_tensors(two.initial_state(), steps_taken=0)
    take_steps(fresh, one, 2)
    take_steps(loaded, two, 2)
    for mine, his in zip(fresh.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, his)
    assert {k for k in one.state_tensors() if not k.endswith(".step")} == set(two.initial_state())


def test_a_reset_forgets():
    model = tiny()
    optimizer = InnerOptimizer(model, LocalConfig(optimizer="muon"))
    take_steps(model, optimizer, 1)
    assert optimizer.state_tensors()
    optimizer.load_state_tensors({})
    assert not optimizer.state_tensors()


def test_foreign_state_is_refused():
    optimizer = InnerOptimizer(tiny(), LocalConfig())
    with pytest.raises(ModelMismatchError, match=r"nothing\.exp_avg"):
        optimizer.load_state_tensors({"nothing.exp_avg": torch.zeros(3)})
    name = next(name for name, value in optimizer.parameters.items() if value.ndim == 2)
    with pytest.raises(ModelMismatchError, match="shape"):
        optimizer.load_state_tensors({f"{name}.exp_avg": torch.zeros(3)})


def test_vectors_are_not_decayed():
    model = tiny()
    optimizer = InnerOptimizer(model, LocalConfig(lr=1e-1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    for name, parameter in optimizer.parameters.items():
        assert torch.equal(parameter, before[name]) == (parameter.ndim < 2), name
