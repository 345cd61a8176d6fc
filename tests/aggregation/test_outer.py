"""Outer optimizers: signs, formulas, golden trajectories, state."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from photon.aggregation import BUILTIN_OUTER, OuterOptimizer, build_outer_optimizer
from photon.config import OuterConfig
from photon.config.outer import OUTER_NAMES
from photon.errors import IncompatibleConfigError, ModelMismatchError, PluginError

GOLDEN = Path(__file__).parent / "golden" / "outer.json"
ROUNDS = 6
#: Learning rates that suit the quadratic below; everything else is the config's default.
CONFIGS = {
    "fedavg": OuterConfig(name="fedavg", lr=0.7),
    "fedavgm": OuterConfig(name="fedavgm", lr=0.3, momentum=0.8),
    "nesterov": OuterConfig(name="nesterov", lr=0.7, momentum=0.7),
    "delayed_nesterov": OuterConfig(name="delayed_nesterov", lr=0.7, momentum=0.5, delay=2),
    "fedadam": OuterConfig(name="fedadam", lr=0.1),
    "fedyogi": OuterConfig(name="fedyogi", lr=0.1),
    "fedadagrad": OuterConfig(name="fedadagrad", lr=0.5),
}
every_outer = pytest.mark.parametrize("name", OUTER_NAMES)


def start() -> dict[str, torch.Tensor]:
    return {"w": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.tensor(0.5)}


def gradient(round_number: int) -> dict[str, torch.Tensor]:
    """Pseudo-gradients that change size and sign, from exact fp32 values."""
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    sign = -1.0 if round_number % 3 == 2 else 1.0
    return {
        "w": sign * (base - 2) / (8 * (round_number + 1)),
        "b": torch.tensor(sign * 0.25 * (round_number + 1)),
    }


def trajectory(outer: OuterOptimizer, rounds: int = ROUNDS) -> list[dict[str, list[float]]]:
    theta = start()
    path = []
    for r in range(rounds):
        outer.step(theta, gradient(r), r + 1)
        path.append({n: [float(x) for x in t.flatten()] for n, t in theta.items()})
    return path


def test_the_registry_is_what_the_config_accepts() -> None:
    assert tuple(BUILTIN_OUTER) == OUTER_NAMES == tuple(CONFIGS)


@every_outer
def test_golden_trajectory(name: str) -> None:
    """A change of these numbers changes every run: PHOTON_REGENERATE_GOLDEN=1 if meant."""
    found = trajectory(build_outer_optimizer(CONFIGS[name]))
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("PHOTON_REGENERATE_GOLDEN") == "1":
        golden[name] = found
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert set(golden) == set(OUTER_NAMES) or os.environ.get("PHOTON_REGENERATE_GOLDEN") == "1"
    for now, then in zip(found, golden[name], strict=True):
        for key in then:
            assert now[key] == pytest.approx(then[key], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "sgd"),
    [
        ("fedavg", {"lr": 0.7}),
        ("fedavgm", {"lr": 0.3, "momentum": 0.8}),
        ("nesterov", {"lr": 0.7, "momentum": 0.7, "nesterov": True}),
    ],
)
def test_the_momentum_family_is_torchs_sgd(name: str, sgd: dict) -> None:
    theta = {n: torch.nn.Parameter(t) for n, t in start().items()}
    reference = torch.optim.SGD(theta.values(), **sgd)
    ours = trajectory(build_outer_optimizer(CONFIGS[name]))
    for r, found in enumerate(ours):
        for n, d in gradient(r).items():
            theta[n].grad = d
        reference.step()
        for n, t in theta.items():
            assert found[n] == pytest.approx(t.detach().flatten().tolist(), rel=1e-5, abs=1e-6)


_SECOND_MOMENTS: dict[str, Callable] = {
    "fedadam": lambda v, d, b2: b2 * v + (1 - b2) * d**2,
    "fedyogi": lambda v, d, b2: v - (1 - b2) * d**2 * np.sign(v - d**2),
    "fedadagrad": lambda v, d, b2: v + d**2,
}


@pytest.mark.parametrize("name", list(_SECOND_MOMENTS))
def test_the_adaptive_family_is_reddis_algorithm_2(name: str) -> None:
    """In numpy fp64, with the paper's Delta = theta_local - theta_global and its plus sign."""
    c = CONFIGS[name]
    x = {n: t.double().numpy().copy() for n, t in start().items()}
    m = {n: np.zeros_like(a) for n, a in x.items()}
    v = {n: np.full_like(a, c.epsilon**2) for n, a in x.items()}
    for r, found in enumerate(trajectory(build_outer_optimizer(c))):
        for n, d in gradient(r).items():
            delta = -d.double().numpy()
            m[n] = c.beta1 * m[n] + (1 - c.beta1) * delta
            v[n] = _SECOND_MOMENTS[name](v[n], delta, c.beta2)
            x[n] = x[n] + c.lr * m[n] / (np.sqrt(v[n]) + c.epsilon)
            np.testing.assert_allclose(found[n], np.ravel(x[n]), rtol=1e-4, atol=1e-5)


def quadratic(outer: OuterOptimizer, sign: float, rounds: int = 150) -> tuple[float, float]:
    """Loss |theta - target|^2 / 2 before and after; a silo's two steps of gradient descent."""
    theta = {"w": torch.full((4,), 20.0)}
    target = torch.tensor([1.0, -2.0, 3.0, 0.0])
    before = float((theta["w"] - target).square().sum() / 2)
    for _ in range(rounds):
        local = theta["w"].clone()
        for _ in range(2):
            local -= 0.1 * (local - target)
        outer.step(theta, {"w": sign * (theta["w"] - local)})
    return before, float((theta["w"] - target).square().sum() / 2)


@every_outer
def test_it_descends_a_quadratic_from_far_away(name: str) -> None:
    lr = {"fedadam": 0.5, "fedyogi": 0.5, "fedadagrad": 4.0}.get(name, CONFIGS[name].lr)
    config = CONFIGS[name].model_copy(update={"lr": lr})
    before, after = quadratic(build_outer_optimizer(config), sign=1.0)
    assert after < before / 100


@every_outer
def test_the_wrong_sign_ascends(name: str) -> None:
    before, after = quadratic(build_outer_optimizer(CONFIGS[name]), sign=-1.0, rounds=20)
    assert after > before


@every_outer
def test_state_round_trips_in_mid_trajectory(name: str) -> None:
    whole, first = build_outer_optimizer(CONFIGS[name]), build_outer_optimizer(CONFIGS[name])
    one, two = start(), start()
    for r in range(3):
        whole.step(one, gradient(r), r + 1)
        first.step(two, gradient(r), r + 1)
    saved = {key: t.clone() for key, t in first.state_tensors().items()}
    second = build_outer_optimizer(CONFIGS[name])
    second.load_state_tensors(saved)
    for tensor in saved.values():
        tensor.fill_(torch.nan)  # the optimizer keeps its own copy
    for r in range(3, 6):
        whole.step(one, gradient(r), r + 1)
        second.step(two, gradient(r), r + 1)
    assert all(one[n].equal(two[n]) for n in one)
    ends = second.state_tensors()
    assert all(t.equal(ends[key]) for key, t in whole.state_tensors().items())
    assert list(ends) == list(whole.state_tensors())


@every_outer
def test_state_has_the_parameters_shapes_and_fp32(name: str) -> None:
    outer = build_outer_optimizer(CONFIGS[name])
    assert outer.state_tensors() == {}
    outer.step(start(), gradient(0))
    state = outer.state_tensors()
    slots = BUILTIN_OUTER[name].slots
    assert set(state) == {f"{slot}/{n}" for slot in slots for n in start()}
    for key, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == start()[key.partition("/")[2]].shape


@every_outer
def test_the_state_before_the_first_step_round_trips(name: str) -> None:
    outer = build_outer_optimizer(CONFIGS[name])
    outer.load_state_tensors({})
    assert trajectory(outer) == trajectory(build_outer_optimizer(CONFIGS[name]))


@every_outer
def test_the_pseudo_gradient_is_not_changed(name: str) -> None:
    d = gradient(0)
    build_outer_optimizer(CONFIGS[name]).step(start(), d)
    assert all(d[n].equal(t) for n, t in gradient(0).items())


@pytest.mark.parametrize(
    "tensors",
    [
        {"momentum/w": torch.zeros(2, 3)},
        {"m/w": torch.zeros(2, 3)},
        {"w": torch.zeros(2, 3)},
        {"m/w": torch.zeros(2, 3), "v/w": torch.zeros(2, 3), "v/b": torch.zeros(())},
        {"m/w": torch.zeros(2, 3), "v/w": torch.zeros(2, 3, dtype=torch.float64)},
    ],
)
def test_another_kinds_state_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelMismatchError):
        build_outer_optimizer(CONFIGS["fedadam"]).load_state_tensors(tensors)


def test_fedavg_refuses_any_state() -> None:
    with pytest.raises(ModelMismatchError, match="momentum/w"):
        build_outer_optimizer(CONFIGS["fedavg"]).load_state_tensors({"momentum/w": torch.ones(1)})


def test_another_models_state_is_refused_at_the_next_step() -> None:
    outer = build_outer_optimizer(CONFIGS["nesterov"])
    outer.load_state_tensors({"momentum/other": torch.zeros(2)})
    theta = start()
    with pytest.raises(ModelMismatchError, match="unknown 'other'"):
        outer.step(theta, gradient(0))
    outer = build_outer_optimizer(CONFIGS["nesterov"])
    outer.load_state_tensors({"momentum/w": torch.zeros(3, 2), "momentum/b": torch.zeros(())})
    with pytest.raises(ModelMismatchError, match="shape"):
        outer.step(theta, gradient(0))
    assert all(theta[n].equal(t) for n, t in start().items())


def test_loading_other_names_over_known_ones_keeps_the_old_state() -> None:
    outer = build_outer_optimizer(CONFIGS["nesterov"])
    outer.step(start(), gradient(0))
    with pytest.raises(ModelMismatchError):
        outer.load_state_tensors({"momentum/other": torch.zeros(2)})
    assert set(outer.state_tensors()) == {"momentum/w", "momentum/b"}


@pytest.mark.parametrize(
    "d",
    [
        {"w": torch.ones(2, 3)},
        {"w": torch.ones(2, 3), "b": torch.ones(()), "c": torch.ones(())},
        {"w": torch.ones(3), "b": torch.ones(())},
        {"w": torch.ones(2, 3), "b": torch.ones(3)},
    ],
)
def test_a_pseudo_gradient_of_another_model_moves_nothing(d: dict[str, torch.Tensor]) -> None:
    outer, theta = build_outer_optimizer(CONFIGS["nesterov"]), start()
    with pytest.raises(ModelMismatchError):
        outer.step(theta, d)
    assert all(theta[n].equal(t) for n, t in start().items())
    assert outer.state_tensors() == {}


def test_options_are_refused_by_a_built_in() -> None:
    config = OuterConfig(name="fedavg", options={"dampening": 0.1})
    with pytest.raises(IncompatibleConfigError, match="dampening"):
        build_outer_optimizer(config)


def test_an_unknown_optimizer_is_a_plugin_error() -> None:
    config = OuterConfig().model_copy(update={"name": "sophia"})
    with pytest.raises(PluginError, match="sophia"):
        build_outer_optimizer(config)


@every_outer
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_a_default_moves_a_model_about_as_far_as_its_silos_went(name: str, size: float) -> None:
    """Five rounds of the sizes that pseudo-gradients of language models have."""
    outer, theta = build_outer_optimizer(OuterConfig(name=name)), {"w": torch.zeros(1)}
    for _ in range(5):
        outer.step(theta, {"w": torch.full((1,), size)})
    assert 0.2 < float(-theta["w"]) / (5 * size) < 5
