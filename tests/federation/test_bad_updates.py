"""Updates that are not what they claim: each is refused by name, and nothing of it is merged."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from photon.compression import build_codec
from photon.engines.local import LocalEngine
from photon.engines.workers import WorkerEngine
from photon.errors import NonFiniteError
from photon.federation import FitTask, Node, Update
from photon.federation.tasks import update_header
from photon.link import Entry, plain_entries, write_parcel
from photon.runs import simulate, train
from photon.runs.nodes import CENTRALISED
from photon.telemetry import read_history
from photon.telemetry.events import RoundMerged, UpdateDropped
from photon.training import StepTimes


def answering(monkeypatch, changed):
    """Every update of the in-process engine is what `changed(task, update)` makes of it."""
    arrivals = LocalEngine.arrivals

    def others(self, timeout_s=None):
        return [
            (task, changed(task, answer) if isinstance(answer, Update) else answer)
            for task, answer in arrivals(self, timeout_s)
        ]

    monkeypatch.setattr(LocalEngine, "arrivals", others)


def flipped_byte(engine, task, state, receipt, ref):
    chunk = sorted(engine._exchange.rglob("chunks/*"))[-1]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 0x40
    chunk.write_bytes(data)
    return receipt, ref


def cut_short(engine, task, state, receipt, ref):
    chunk = sorted(engine._exchange.rglob("chunks/*"))[-1]
    chunk.write_bytes(chunk.read_bytes()[:-100])
    return receipt, ref


def replayed(engine, task, state, receipt, ref):
    """The manifest of an earlier round, with all its chunks there, and a receipt that fits."""
    return receipt, resent(engine, state, update_header(replace(task, round=task.round - 1), state))


def of_another_silo(engine, task, state, receipt, ref):
    return receipt, resent(engine, state, update_header(replace(task, silo="blue"), state))


def resent(engine, state, header):
    entries = plain_entries((name, torch.zeros_like(tensor)) for name, tensor in state.items())
    return write_parcel(engine._carrier, "forged", header, entries)


def of_another_model(engine, task, state, receipt, ref):
    other = {name: tensor[..., :-1] for name, tensor in state.items()}
    return receipt, resent(engine, other, update_header(task, other))


def not_a_number(engine, task, state, receipt, ref):
    named = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    next(iter(named.values())).view(-1)[7] = math.nan
    codec = build_codec("fp32")

    def entries():
        for name, tensor in named.items():
            parts = codec.encode(torch.zeros_like(tensor))
            yield Entry(name, tensor.shape, "fp32", {"values": parts["values"] + tensor.flatten()})

    return receipt, write_parcel(engine._carrier, "forged", update_header(task, state), entries())


def far_too_large(engine, task, state, receipt, ref):
    huge = plain_entries((name, tensor * 1e6) for name, tensor in state.items())
    return receipt, write_parcel(engine._carrier, "forged", update_header(task, state), huge)


#: By round: what happens to one silo's update, and what is said of it.
ATTACKS = {
    1: (flipped_byte, "sha256"),
    2: (cut_short, "bytes"),
    3: (replayed, "round is 2, expected 3"),
    4: (of_another_silo, "silo is 'blue', expected 'red'"),
    5: (of_another_model, "model is "),
    6: (not_a_number, "holds 1 NaN or infinite values"),
    7: (far_too_large, "exceeds federation.max_update_norm = 100"),
}


def test_nothing_wrong_is_ever_merged(three_silos, make_config, tmp_path, monkeypatch):
    fired = []
    answer = WorkerEngine._answer

    def attacked(self, job, said):
        task = job.task
        if isinstance(task, FitTask) and task.silo == "red" and task.round in ATTACKS:
            attack, _ = ATTACKS[task.round]
            fired.append(attack)
            said = attack(self, task, job.version.tensors, *said)
        answer(self, job, said)

    monkeypatch.setattr(WorkerEngine, "_answer", attacked)

    def configured(workers):
        return make_config(
            three_silos,
            workers,
            "federation.rounds=8",
            "federation.max_update_norm=100",
            "eval.every=0",
        )

    summary = simulate(configured("federation.workers=1"), run_dir=tmp_path / "run").summary
    assert fired == [attack for attack, _ in ATTACKS.values()]
    history = read_history(tmp_path / "run")
    dropped = {event.round: event for event in history.of(UpdateDropped)}
    assert set(dropped) == set(ATTACKS)
    for number, (attack, words) in ATTACKS.items():
        assert dropped[number].silo == "red"
        assert words in dropped[number].reason, (attack.__name__, dropped[number].reason)
    merged = {event.round: event.participants for event in history.of(RoundMerged)}
    assert all(merged[number] == ["blue", "green"] for number in ATTACKS)
    assert merged[8] == ["blue", "green", "red"]

    # And not a bit of them is in the weights: the same run in which that silo just fails.
    def failing(task, update):
        if task.silo != "red" or task.round not in ATTACKS:
            return update
        return replace(update, receipt=replace(update.receipt, failure="failed"))

    answering(monkeypatch, failing)
    calm = simulate(configured("federation.workers=0"), run_dir=tmp_path / "calm").summary
    assert summary["weights_sha256"] == calm["weights_sha256"]


@pytest.fixture
def infinite_after_the_last_step(monkeypatch):
    """No loss shows it: red's weights overflow in the last step of round 2."""
    fired = []
    train = Node._train

    def overflowing(self, task):
        result = train(self, task)
        if task.round == 2 and task.silo in ("red", CENTRALISED):
            fired.append(task.silo)
            with torch.no_grad():
                next(iter(self._trainer.optimizer.parameters.values())).view(-1)[0] = math.inf
        return result

    monkeypatch.setattr(Node, "_train", overflowing)
    return fired


@pytest.mark.parametrize("codec", ["fp32", "int8", "sign", "powersgd(rank=2)"])
def test_an_update_that_is_not_finite_costs_its_silo_with_every_codec(
    codec, three_silos, make_config, tmp_path, infinite_after_the_last_step
):
    config = make_config(
        three_silos, f'link.update_codec="{codec}"', "federation.rounds=2", "eval.every=0"
    )
    simulate(config, run_dir=tmp_path / "run")
    assert infinite_after_the_last_step == ["red"]
    history = read_history(tmp_path / "run")
    (dropped,) = history.of(UpdateDropped)
    assert (dropped.round, dropped.silo) == (2, "red")
    assert history.of(RoundMerged)[1].participants == ["blue", "green"]


def test_centralised_training_keeps_no_weights_that_are_not_finite(
    three_silos, make_config, tmp_path, infinite_after_the_last_step
):
    with pytest.raises(NonFiniteError, match="holds 1 NaN or infinite"):
        train(make_config(three_silos, "eval.every=0"), run_dir=tmp_path / "run")
    assert infinite_after_the_last_step == [CENTRALISED]
    assert max((tmp_path / "run/checkpoints").iterdir()).name == "round-000001"


#: What a receipt may say that would wreck sums, weights or summary.json.
FIGURES = [
    {"tokens": 0},
    {"tokens": 4 * 4 * 32 + 1},
    {"train_s": 1.7e308},
    {"train_s": -1.0},
    {"bytes_up": 2**80},
    {"loss": math.nan},
    {"left_out": math.inf},
    {"times": StepTimes(data_s=math.inf)},
]


def test_figures_that_no_task_has_cost_their_silo(three_silos, make_config, tmp_path, monkeypatch):
    def lying(task, update):
        if task.silo != "red":
            return update
        return replace(update, receipt=replace(update.receipt, **FIGURES[task.round - 1]))

    answering(monkeypatch, lying)
    rounds = len(FIGURES)
    config = make_config(
        three_silos, f"federation.rounds={rounds}", "local.steps=4", "eval.every=0"
    )
    summary = simulate(config, run_dir=tmp_path / "run").summary
    history = read_history(tmp_path / "run")
    dropped = history.of(UpdateDropped)
    assert [event.silo for event in dropped] == ["red"] * rounds
    assert all("its receipt says" in event.reason for event in dropped)
    assert summary["tokens"] == rounds * 2 * 4 * 4 * 32
    assert math.isfinite(json.loads((tmp_path / "run/summary.json").read_text())["local_train_s"])
