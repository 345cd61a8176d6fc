"""What silos keep: on disk always, in memory up to a bound."""

from __future__ import annotations

import shutil

import pytest
import torch

from photon.config import ComputeConfig, LocalConfig, ModelConfig
from photon.errors import CheckpointCorruptError
from photon.federation.node_state import NodeStates, prune_node_states, read_node_state
from photon.models import build_model
from photon.training import Schedule, Trainer, plan_compute


@pytest.fixture(scope="module")
def trainer():
    model = build_model(
        ModelConfig(preset="tiny"), vocab_size=64, sequence_length=16, eos_id=0, seed=3
    )
    plan = plan_compute(ComputeConfig(device="cpu", precision="fp32", threads=1))
    return Trainer(model, LocalConfig(batch_size=4), Schedule("constant", 9), plan)


def state_of(trainer, value):
    name, parameter = next(iter(trainer.optimizer.parameters.items()))
    return {
        f"{name}.exp_avg": torch.full(parameter.shape, float(value)),
        f"{name}.step": torch.tensor(float(value)),
    }


def assert_is(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


def test_a_saved_state_comes_back_from_disk(trainer, tmp_path):
    states = NodeStates(tmp_path, trainer, cache_bytes=0)
    states.save("red", 1, state_of(trainer, 1))
    states.save("blue", 1, state_of(trainer, 2))
    states.settle()
    assert_is(states.load("red", 1), state_of(trainer, 1))
    assert_is(read_node_state(tmp_path, "blue", 1), state_of(trainer, 2))
    with pytest.raises(CheckpointCorruptError, match="silo red after round 7"):
        states.load("red", 7)


def test_memory_holds_the_newest_states_up_to_its_bound(trainer, tmp_path):
    one = sum(tensor.nbytes for tensor in state_of(trainer, 0).values())
    states = NodeStates(tmp_path, trainer, cache_bytes=2 * one)
    for number, silo in enumerate(["red", "blue", "green"], start=1):
        states.save(silo, 1, state_of(trainer, number))
    states.settle()
    shutil.rmtree(tmp_path)  # so that what is read now comes from memory
    assert_is(states.load("green", 1), state_of(trainer, 3))
    assert_is(states.load("blue", 1), state_of(trainer, 2))
    with pytest.raises(CheckpointCorruptError):  # the oldest had to go
        states.load("red", 1)


def test_memory_is_not_shared_with_what_trains_on(trainer, tmp_path):
    states = NodeStates(tmp_path, trainer, cache_bytes=2**30)
    mine = state_of(trainer, 1)
    states.save("red", 1, mine)
    for tensor in mine.values():
        tensor.zero_()
    loaded = states.load("red", 1)
    assert_is(loaded, state_of(trainer, 1))
    for tensor in loaded.values():
        tensor.zero_()
    assert_is(states.load("red", 1), state_of(trainer, 1))
    # A silo's older state makes way for its newer one.
    states.save("red", 2, state_of(trainer, 5))
    states.settle()
    shutil.rmtree(tmp_path)
    assert_is(states.load("red", 2), state_of(trainer, 5))
    with pytest.raises(CheckpointCorruptError):
        states.load("red", 1)


def test_pruning_keeps_what_checkpoints_name(trainer, tmp_path):
    states = NodeStates(tmp_path, trainer, cache_bytes=0)
    for number in (1, 2, 3):
        states.save("red", number, state_of(trainer, number))
        states.save("blue", number, state_of(trainer, number))
    states.settle()
    prune_node_states(tmp_path, {"red": {2, 3}, "blue": {3}})
    left = sorted(f"{path.parent.name} {path.name}" for path in tmp_path.glob("*/round-*"))
    assert left == ["blue round-000003", "red round-000002", "red round-000003"]
