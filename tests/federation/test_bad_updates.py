"""Updates that are not what they claim: each is refused by name, and nothing of it is merged."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from photon.engines.local import LocalEngine
from photon.errors import NonFiniteError, QuorumLostError
from photon.federation import Node, Update
from photon.federation.tasks import update_header
from photon.link import Entry, Expected, Parcel, plain_entries, write_parcel
from photon.runs import simulate, train
from photon.runs.nodes import CENTRALISED
from photon.store.contract import FolderStore
from photon.store.transfer import Transfer
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


class Sent:
    """An update as a silo elsewhere sends it: a parcel in a store, which may be tampered with."""

    def __init__(self, folder, task, state):
        self.folder, self.task, self.state = folder, task, state
        self._carrier = Transfer(FolderStore(folder, durable=False), streams=1)

    def send(self, header=None, entries=None):
        """All zeros, by default: with this header or those entries in place of the right ones."""
        zeros = plain_entries((name, torch.zeros_like(one)) for name, one in self.state.items())
        header = header or update_header(self.task, self.state)
        return write_parcel(self._carrier, "sent", header, entries or zeros)

    def received(self, receipt, ref):
        shapes = {name: tensor.shape for name, tensor in self.state.items()}
        expected = Expected(update_header(self.task, self.state), shapes, frozenset({"fp32"}))
        return Update(receipt, lambda: Parcel(self._carrier, ref, expected).tensors())


def flipped_byte(sent):
    ref = sent.send()
    chunk = sorted(sent.folder.rglob("chunks/*"))[-1]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 0x40
    chunk.write_bytes(data)
    return ref


def cut_short(sent):
    ref = sent.send()
    chunk = sorted(sent.folder.rglob("chunks/*"))[-1]
    chunk.write_bytes(chunk.read_bytes()[:-100])
    return ref


def replayed(sent):
    """The manifest of an earlier round, with all its chunks there, and a receipt that fits."""
    return sent.send(update_header(replace(sent.task, round=sent.task.round - 1), sent.state))


def of_another_silo(sent):
    return sent.send(update_header(replace(sent.task, silo="blue"), sent.state))


def of_another_model(sent):
    other = {name: tensor[..., :-1] for name, tensor in sent.state.items()}
    return sent.send(update_header(sent.task, other), plain_entries(other.items()))


def not_a_number(sent):
    named = {name: torch.zeros_like(tensor) for name, tensor in sent.state.items()}
    next(iter(named.values())).view(-1)[7] = math.nan

    def entries():
        for name, tensor in named.items():
            yield Entry(name, tensor.shape, "fp32", {"values": tensor.flatten()})

    return sent.send(entries=entries())


def far_too_large(sent):
    return sent.send(entries=plain_entries((name, one * 1e6) for name, one in sent.state.items()))


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
    fired, states = [], {}
    submit = LocalEngine.submit
    monkeypatch.setattr(
        LocalEngine,
        "submit",
        lambda self, task, version: (
            states.update({task: version.tensors}) or submit(self, task, version)
        ),
    )

    def attacked(task, update):
        if task.silo != "red" or task.round not in ATTACKS:
            return update
        attack, _ = ATTACKS[task.round]
        fired.append(attack)
        sent = Sent(tmp_path / f"store-{task.round}", task, states[task])
        return sent.received(update.receipt, attack(sent))

    config = make_config(
        three_silos, "federation.rounds=8", "federation.max_update_norm=100", "eval.every=0"
    )
    with monkeypatch.context() as patch:
        answering(patch, attacked)
        summary = simulate(config, run_dir=tmp_path / "run").summary
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
    calm = simulate(config, run_dir=tmp_path / "calm").summary
    assert summary["weights_sha256"] == calm["weights_sha256"]


@pytest.fixture
def infinite_after_the_last_step(monkeypatch):
    """No loss shows it: red's weights overflow in the last step of round 2."""
    fired = []
    train = Node._train

    def overflowing(self, task, spending):
        result = train(self, task, spending)
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


def test_each_reason_has_its_silo_s_name(five_silos, make_config, tmp_path, monkeypatch):
    """Once: also where a name is as the reason's first letters are."""
    why = {"e": "epsilon spent", "c": "c is gone", "d": "d: its policy refuses"}

    def lost(task, update):
        return Update.none(replace(update.receipt, failure=why.get(task.silo, "it failed")))

    answering(monkeypatch, lost)
    run = make_config(five_silos, "local.steps=1", "eval.every=0", "eval.max_tokens=300")
    with pytest.raises(QuorumLostError) as caught:
        simulate(run, run_dir=tmp_path / "run")
    told = caught.value.message.partition("dropped: ")[2]
    named = ["a: it failed", "b: it failed", "c is gone", "d: its policy refuses"]
    assert told.split("; ") == [*named, "e: epsilon spent"]
    dropped = {one.silo: one.reason for one in read_history(tmp_path / "run").of(UpdateDropped)}
    assert dropped == dict.fromkeys("ab", "it failed") | why | {"d": "its policy refuses"}
