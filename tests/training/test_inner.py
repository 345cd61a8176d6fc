import pytest
import torch
from torch import nn

from photon.config import LocalConfig, ModelConfig
from photon.errors import IncompatibleConfigError, ModelMismatchError
from photon.models import build_model
from photon.training import InnerOptimizer
from photon.training.muon import Muon, orthogonalise

CONFIGS = {
    "adamw": {"optimizer": "adamw"},
    "adamw8": {"optimizer": "adamw", "optimizer_bits": 8},
    "muon": {"optimizer": "muon"},
    "normuon": {"optimizer": "muon", "row_beta2": 0.9},
    "muon8": {"optimizer": "muon", "optimizer_bits": 8},
    "adopt": {"optimizer": "adopt"},
    "amsgrad": {"optimizer": "amsgrad"},
    "sgd": {"optimizer": "sgd"},
}


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
        a, b = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
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


@pytest.mark.parametrize("name", CONFIGS)
def test_state_survives_a_round_trip(name):
    """Saved and loaded mid-way, the trajectory is the same bit for bit."""
    config = LocalConfig(**CONFIGS[name], lr=1e-2, weight_decay=0.1)
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


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "sgd"])
def test_zero_state_equals_a_reset(name):
    config = LocalConfig(**CONFIGS[name], lr=1e-2)
    fresh, loaded = tiny(), tiny()
    one, two = InnerOptimizer(fresh, config), InnerOptimizer(loaded, config)
    two.load_state_tensors(two.initial_state(), steps_taken=0)
    take_steps(fresh, one, 2)
    take_steps(loaded, two, 2)
    for mine, his in zip(fresh.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, his)
    local = (".step", ".exp_avg_sq") if name == "amsgrad" else (".step",)
    assert {k for k in one.state_tensors() if not k.endswith(local)} == set(two.initial_state())
    assert set(one.averaged_state()) == set(two.initial_state())


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


@pytest.mark.parametrize("name", CONFIGS)
def test_only_matrices_that_no_pattern_spares_are_decayed(name):
    """With zero gradients nothing but decay moves a weight."""
    model = tiny()
    config = LocalConfig(
        **CONFIGS[name], lr=1e-2, weight_decay=0.5, no_decay=["*embed*", "*.0.self_attn.q_proj.*"]
    )
    optimizer = InnerOptimizer(model, config)
    before = {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}
    for _ in range(2):
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(1.0)
    spared = 0
    for name, parameter in optimizer.parameters.items():
        if parameter.ndim < 2 or "embed" in name or ".0.self_attn.q_proj." in name:
            assert torch.equal(parameter, before[name]), name
            spared += parameter.ndim >= 2
        else:
            torch.testing.assert_close(parameter.data, before[name] * (1 - 1e-2 * 0.5) ** 2)
    assert spared == 2


def test_a_pattern_that_names_nothing_is_refused():
    with pytest.raises(IncompatibleConfigError, match=r"'\*embd\*'") as caught:
        InnerOptimizer(tiny(), LocalConfig(no_decay=["*norm*", "*embd*"]))
    assert "model.embed_tokens.weight" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "sgd"])
def test_half_a_state_is_refused_by_name(name):
    """Each tensor of a matrix's state missing in turn; what may be missing is derived."""
    model = tiny()
    optimizer = InnerOptimizer(model, LocalConfig(**CONFIGS[name]))
    take_steps(model, optimizer, 1)
    state = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    matrix = "model.embed_tokens.weight"  # never Muon's, whose state is one tensor
    refused = []
    for key in [key for key in state if key.startswith(f"{matrix}.")]:
        rest = {other: tensor for other, tensor in state.items() if other != key}
        if name == "amsgrad" and key.endswith(".exp_avg_sq"):
            optimizer.load_state_tensors(rest)
            restarted = optimizer.state_tensors()
            assert torch.equal(restarted[key], state[f"{matrix}.max_exp_avg_sq"])
            continue
        with pytest.raises(ModelMismatchError, match=key.replace(".", r"\.")):
            optimizer.load_state_tensors(rest)
        assert not optimizer.state_tensors()
        refused.append(key.rpartition(".")[2])
    averaged = ["exp_avg", "max_exp_avg_sq"] if name == "amsgrad" else ["exp_avg", "exp_avg_sq"]
    assert sorted(refused) == averaged + ([] if name == "amsgrad" else ["step"])


def test_counters_follow_the_clock_that_is_given():
    optimizer = InnerOptimizer(tiny(), LocalConfig())
    with pytest.raises(ModelMismatchError, match=r"lacks .*\.step"):
        optimizer.load_state_tensors(optimizer.initial_state())
    optimizer.load_state_tensors(optimizer.initial_state(), steps_taken=7)
    counters = {k: v for k, v in optimizer.state_tensors().items() if k.endswith(".step")}
    assert len(counters) == len(optimizer.parameters)
    assert all(v.shape == () and v.dtype == torch.float32 and v == 7 for v in counters.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_loaded_state_is_a_copy(name):
    model = tiny()
    optimizer = InnerOptimizer(model, LocalConfig(**CONFIGS[name]))
    take_steps(model, optimizer, 2)
    state = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    kept = {key: tensor.clone() for key, tensor in state.items()}
    optimizer.load_state_tensors(state)
    take_steps(model, optimizer, 1)
    assert all(torch.equal(state[key], kept[key]) for key in kept)


@pytest.mark.parametrize(
    ("name", "beta2", "epsilon"),
    [("adamw", 0.95, 1e-8), ("muon", 0.95, 1e-8), ("adopt", 0.9999, 1e-6), ("amsgrad", 0.99, 1e-3)],
)
def test_unset_beta2_and_epsilon_are_those_of_the_docs(name, beta2, epsilon):
    default, given = tiny(), tiny()
    settings = {"optimizer": name, "lr": 1e-2}
    take_steps(default, InnerOptimizer(default, LocalConfig(**settings)), 3)
    explicit = LocalConfig(**settings, beta2=beta2, epsilon=epsilon)
    take_steps(given, InnerOptimizer(given, explicit), 3)
    for mine, other in zip(default.parameters(), given.parameters(), strict=True):
        assert torch.equal(mine, other)
    other = tiny()
    take_steps(other, InnerOptimizer(other, LocalConfig(**settings, beta2=0.5)), 3)
    assert any(
        not torch.equal(a, b) for a, b in zip(default.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_optimizer_learns(name):
    model = tiny()
    optimizer = InnerOptimizer(
        model, LocalConfig(**CONFIGS[name], lr=0.5 if name == "sgd" else 1e-2)
    )
    tokens = (torch.arange(16)[None, :] + torch.arange(4)[:, None]) % 7
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
