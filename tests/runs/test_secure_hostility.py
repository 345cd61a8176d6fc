"""One hostile member under secure aggregation, and what it costs a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from served_in_process import SMALL, Served

from photon.federation.envelopes import Reply, parse_reply
from photon.federation.tasks import update_header
from photon.link import Entry, plain_entries, write_parcel
from photon.secure.documents import Dealt, read
from photon.secure.member import Party, Seal
from photon.store.transfer import Transfer
from photon.telemetry import read_history
from photon.telemetry.events import RoundMerged, RoundStarted, UpdateDropped

HOSTILE = "c"
SECURE = (*SMALL, "privacy.secure_aggregation=true", "serve.min_silos=5", "eval.per_silo=false")


@pytest.fixture
def make_run(make_config, five_silos, tmp_path):
    def make(rounds):
        config = make_config(five_silos, *SECURE, f"federation.rounds={rounds}")
        return Served(config, tmp_path, names=tuple("abcde"))

    return make


def merged(run):
    """By round, whose updates are in its sum."""
    return {
        one.round: "".join(one.participants) for one in read_history(run.folder).of(RoundMerged)
    }


def dropped(run, number):
    found = [one for one in read_history(run.folder).of(UpdateDropped) if one.round == number]
    return {one.silo: one.reason for one in found}


def test_who_spoils_sums_is_found_by_leaving_halves_out(make_run, monkeypatch):
    """Its words are random, and nobody sees them: two rounds are lost."""
    fired, encode = [], Seal.encode

    def noise(self, name, tensor):
        parts, said = encode(self, name, tensor)
        if self._party.name == HOSTILE:
            fired.append(name)
            parts = {one: torch.randint_like(part, 0, 16) for one, part in parts.items()}
        return parts, said

    monkeypatch.setattr(Seal, "encode", noise)
    run = make_run(7)
    result = run.go_on()
    assert fired
    assert merged(run) == {3: "abe", 4: "abde", 5: "abde", 6: "abde", 7: "abde"}
    assert result.summary["rounds"] == 7
    assert [one.round for one in read_history(run.folder).of(RoundStarted)] == [*range(1, 8)]
    assert dropped(run, 1).keys() == set("abcde")
    assert "beyond what 5 honest updates come to" in dropped(run, 1)["a"]
    assert dropped(run, 7) == {HOSTILE: "may have spoiled the sum of an earlier round"}
    report = run.audit()  # and the log has it
    assert (report.rounds, report.updates, report.last_round) == (7, 19, 7)


def test_who_deals_shares_of_nothing_is_named(make_run, monkeypatch):
    """It spoils what others need of it: its own mask stays on. They go on without it."""
    answer, fired = Party.answer, []

    def lying(self, phase, text):
        told = answer(self, phase, text)
        if (self.name, phase) != (HOSTILE, "share"):
            return told
        fired.append(phase)
        dealt = read(told, Dealt, self.name)
        return dealt.model_copy(update={"own": "0" * 64, "text": None}).model_dump_json()

    monkeypatch.setattr(Party, "answer", lying)
    run = make_run(3)
    run.go_on()
    assert fired == ["share"]
    assert merged(run) == {2: "abde", 3: "abde"}
    assert "c dealt shares that do not give its secret" in dropped(run, 1)["a"]


@pytest.mark.parametrize("phase", ["advertise", "share", "unmask"])
def test_lies_in_a_phase_cost_the_liar_alone(phase, make_run):
    """Another's name, another round's document, and what is none."""
    run = make_run(4)
    first = {}

    def lying(silo, ask, times):
        answer = silo.answer(ask)
        if (silo.name, ask.kind) != (HOSTILE, phase):
            return answer
        reply = parse_reply(answer.text)
        first.setdefault(phase, reply.secure)
        lies = {1: reply.secure, 2: first[phase], 3: "{}", 4: reply.secure.replace("a", "b")}
        lie = reply.model_copy(update={"secure": lies[ask.round]})
        return silo.sign(Reply.model_validate(lie.model_dump()))

    run.wire.fault = lying
    run.go_on()
    told = merged(run)
    assert told.keys() == {1, 2, 3, 4}
    assert told[1] == "abcde"
    assert {told[2], told[3]} == {"abcde" if phase == "unmask" else "abde"}


@pytest.mark.parametrize("how", ["plain", "short", "more"])
def test_an_update_that_can_not_be_read_costs_its_silo_alone(how, make_run):
    run = make_run(2)
    fired = []

    def lying(silo, ask, times):
        answer = silo.answer(ask)
        if not ask.fit or silo.name != HOSTILE or ask.round != 2:
            return answer
        fired.append(how)
        reply = parse_reply(answer.text)
        shapes = shapes_of(run)
        entries = {
            "plain": plain_entries((name, torch.zeros(shape)) for name, shape in shapes.items()),
            "short": ring(shapes, {"bits0": 8, "bits8": 4}, -1),
            "more": ring(shapes, {"bits0": 8, "bits8": 4, "bits12": 1}, 0),
        }[how]
        task = ask.fit_task("test")
        place = f"{ask.run.id}/silos/{silo.name}"
        ref = write_parcel(Transfer(silo.store), place, update_header(task, shapes), entries)
        lie = reply.model_copy(update={"fit": replace(reply.fit, update=ref)})
        return silo.sign(Reply.model_validate(lie.model_dump()))

    run.wire.fault = lying
    run.go_on()
    assert fired
    assert merged(run) == {1: "abcde", 2: "abde"}
    assert dropped(run, 2).keys() == {HOSTILE}


def shapes_of(run):
    from photon.runs import load_weights

    model, _ = load_weights(run.folder)
    return {f"weights/{name}": one.shape for name, one in model.named_parameters()}


def ring(shapes, planes, more):
    """The highest words of so many bits, in so many bytes more than they take."""
    for name, shape in shapes.items():
        sizes = {one: more - (-shape.numel() * wide // 8) for one, wide in planes.items()}
        parts = {one: torch.full((size,), 255, dtype=torch.uint8) for one, size in sizes.items()}
        yield Entry(name, shape, f"ring(bits={sum(planes.values())})", parts)
