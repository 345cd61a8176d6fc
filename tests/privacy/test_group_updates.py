"""A group whose own update is clipped and noised, and nothing of its members'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from photon.data import open_data
from photon.engines.local import LocalEngine
from photon.federation import FitTask, Node, NodeSettings
from photon.federation.engine import Version
from photon.federation.group import Group
from photon.federation.layout import initial_model
from photon.federation.private import Purse
from photon.federation.sampling import FixedFleet
from photon.federation.tasks import WEIGHTS
from photon.models import trainable_parameters
from photon.privacy import SECRET_FILE
from photon.privacy.epsilon import epsilon
from photon.runs import simulate
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished

SHORT = ("eval.every=0", "eval.max_tokens=300", "eval.per_silo=false", "federation.rounds=2")
Z, DELTA = 30.0, 1e-6
OWN = f'{{mechanism="client", clip_norm=0.5, noise_multiplier={Z}, delta={DELTA}}}'
#: So little that no weight moves: a group's update is noise alone, from whatever state.
STILL = ("local.lr=1e-30", "local.weight_decay=0", "local.steps=2")


def own(name, *silos):
    listed = ", ".join(f'"{one}"' for one in silos)
    return f"federation.children.{name}={{silos=[{listed}], update_privacy={OWN}}}"


def test_epsilon_is_told_of_the_group_s_update_alone(three_silos, make_config, tmp_path):
    config = make_config(three_silos, *SHORT, own("west", "red", "green"), own("east", "blue"))
    summary = simulate(config, run_dir=tmp_path / "run").summary
    told = read_history(tmp_path / "run").of(LocalFinished)
    found = {(one.silo, one.round): one.epsilon for one in told}
    for number in (1, 2):
        cost = epsilon(number / Z**2, DELTA)
        assert found["west", number] == found["east", number] == pytest.approx(cost)
        assert {found[silo, number] for silo in ("red", "green", "blue")} == {None}
    cost = pytest.approx(epsilon(2 / Z**2, DELTA))
    assert summary["epsilon"] == {"value": cost, "delta": DELTA, "unit": "client"}
    ledgers = list((tmp_path / "run" / "nodes").glob("ledger-*.json"))
    assert len(ledgers) == 2  # of the two groups, and of no silo
    assert (tmp_path / "run" / "nodes" / SECRET_FILE).exists()


def test_a_run_with_anybody_outside_promises_nothing_of_all(three_silos, make_config, tmp_path):
    config = make_config(three_silos, *SHORT, own("west", "red", "green"))
    assert "epsilon" not in simulate(config, run_dir=tmp_path / "run").summary


@pytest.fixture
def make_group(three_silos, make_config, tmp_path):
    """A group of "red" and "green", in this process or (`served`) as in one of its own."""
    nodes = []

    def make(*overrides, name="west", served=False, purse=None):
        config = make_config(three_silos, *STILL, own(name, "red", "green"), *overrides)
        node = Node(NodeSettings(config, tmp_path / "nodes"), lambda _: None)
        nodes.append(node)
        told = (lambda *_: None) if served else None
        fleet, engine = FixedFleet({"red": 1, "green": 1}), LocalEngine(node)
        group = Group(name, config, fleet, engine, tmp_path / "nodes", lambda _: None, (), told)
        group.purse = purse or group.purse
        return group

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def state(three_silos, make_config):
    model = initial_model(make_config(three_silos), open_data(three_silos))
    return {WEIGHTS + name: one.detach() for name, one in trainable_parameters(model).items()}


def task_of(name="west", **fields):
    return replace(FitTask("test", 1, name, 0, 2, None), **fields)


def fit(group, state, task=None):
    update = group.fit(task or task_of(), Version(0, state))
    assert update.receipt.failure is None
    return {name: tensor.clone() for name, tensor in update.tensors()}


def alike(one, other):
    """Largest correlation of two updates' large tensors."""
    pairs = [
        torch.stack([tensor.flatten(), other[name].flatten()])
        for name, tensor in one.items()
        if tensor.numel() > 500
    ]
    return max(float(torch.corrcoef(pair)[0, 1].abs()) for pair in pairs)


def test_the_same_question_has_the_same_noise_and_no_other_question_has(make_group, state):
    """Members' updates are nothing here, so answers would be the same but for the noise."""
    first = fit(make_group(), state)
    assert max(tensor.abs().max() for tensor in first.values()) > 1
    again = fit(make_group(), state)  # by another process
    assert all(torch.equal(first[name], again[name]) for name in first)
    moved = {name: tensor + 1e-3 for name, tensor in state.items()}
    others = {
        "another state": fit(make_group(), moved),
        "another run file": fit(make_group("local.beta2=0.9"), state),
        "another clock": fit(make_group(), state, task_of(global_step=2)),
        "another place in the text": fit(make_group(), state, task_of(cursor=4)),
    }
    for what, other in others.items():
        assert alike(first, other) < 0.3, what


def test_a_served_group_pays_under_any_name(make_group, state, tmp_path):
    """As a silo's text does: an account that moves along with it is gone on with."""
    most = epsilon(1 / Z**2, 1e-6) * 1.001

    def spend(name, run):
        purse = Purse(tmp_path / "privacy", run, most)
        group = make_group(name=name, served=True, purse=purse)
        return group.fit(task_of(name), Version(0, state)).receipt

    assert spend("west", "one").failure is None
    assert spend("west", "one").failure is None  # asked again
    refused = spend("occident", "two").failure
    assert "epsilon spent" in refused
    assert "policy.max_epsilon, over all runs" in refused


def test_groups_of_one_run_have_an_account_each(make_group, state, tmp_path):
    for name in ("west", "east"):
        fit(make_group(name=name), state, task_of(name))
    assert len(list((tmp_path / "nodes").glob("ledger-*.json"))) == 2
