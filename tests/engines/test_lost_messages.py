"""Silos elsewhere: what is lost on the way, silence, and the deadlines that end a wait."""

from __future__ import annotations

import time

import pytest
from remote_bench import RUN_ID, only_fails

from photon.engines.remote import messenger
from photon.engines.remote.errand import Errand
from photon.errors import SignatureError, StoreUnavailableError, UnreachableError
from photon.membership.refusals import refusing


def test_a_lost_message_is_asked_again(bench):
    bench.on("red", lambda silo, ask, times: "it got lost" if times == 1 else silo.answer(ask))
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert bench.wire.fired == ["red", "red"]
    assert (bench.wire.times("red"), bench.wire.times("blue")) == (2, 1)
    # The same question under the same name: a silo that has answered it answers it again.
    assert len({ask.task_id for ask in bench.wire.asked if ask.silo == "red"}) == 1


def test_a_silo_that_is_not_connected_yet_is_asked_when_it_is(bench):
    red = bench.silos["red"]
    bench.wire.silos = {name: silo for name, silo in bench.silos.items() if name != "red"}

    def connect(silo, ask, times):
        bench.wire.silos = bench.silos
        return silo.answer(ask)

    bench.on("blue", connect)
    assert bench.answers()["red"][1] == bench.federated.expected["red"]
    assert bench.wire.fired == ["blue"]
    assert red.name == "red"


def test_a_silo_that_is_idle_although_asked_is_asked_again(bench, monkeypatch):
    monkeypatch.setattr(messenger, "_IDLE_S", 0.3)
    bench.on("red", lambda silo, ask, times: None if times == 1 else silo.answer(ask))
    answers = bench.answers()
    assert answers["red"][1] == bench.federated.expected["red"]
    assert bench.wire.fired == ["red", "red"]


def test_a_silo_that_works_is_not_asked_again(bench, monkeypatch):
    monkeypatch.setattr(messenger, "_IDLE_S", 0.3)
    begun = []

    def slow(silo, ask, times):
        begun.append(time.time())
        bench.wire.quiet.add("red")
        return

    bench.on("red", slow)
    pull = bench.wire.pull

    def working(ids):
        if begun and time.time() - begun[0] < 2.5:
            bench.wire.be_here("red", state="training", step=1, task=bench.wire.asked[-1].task_id)
        elif begun:
            one = next(iter(ids))
            return {one: bench.silos["red"].answer(bench.wire.asked[2])}
        return pull(ids)

    bench.wire.pull = working
    assert [ask.silo for ask in bench.wire.asked] == []
    assert bench.answers()["red"][1] == bench.federated.expected["red"]
    assert time.time() - begun[0] > 2.5
    assert bench.wire.times("red") == 1


def test_a_silo_that_is_never_heard_of_fails_alone(make_bench):
    bench = make_bench("federation.silence_s=1.5")
    bench.wire.quiet.add("red")
    bench.on("red", lambda silo, ask, times: None)
    started = time.monotonic()
    answers = bench.answers()
    words = only_fails(answers, "red", UnreachableError, bench.federated.expected)
    assert "red has not been heard of for 1.5 s" in words
    assert 1.4 < time.monotonic() - started < 60
    assert bench.wire.fired == ["red"]


def test_the_time_of_a_round_ends(make_bench):
    bench = make_bench("federation.deadline_s=2")

    def never(silo, ask, times):
        bench.wire.quiet.add("red")
        bench.wire.be_here("red", state="training", task=ask.task_id)

    bench.on("red", never)
    words = only_fails(bench.answers(), "red", UnreachableError, bench.federated.expected)
    assert "red has not answered in the 2 s of round 1" in words
    assert bench.wire.fired == ["red"]
    # What it writes now is nobody's.
    assert bench.roster.tasks.open_for("red") == []


def test_a_silo_that_takes_no_step_is_left_out(make_bench):
    """Though it says all the time that it trains."""
    bench = make_bench("federation.stall_s=1.5")

    def stuck(silo, ask, times):
        bench.wire.quiet.add("red")
        bench.wire.be_here("red", state="training", task=ask.task_id, step=1, of=2)

    bench.on("red", stuck)
    words = only_fails(bench.answers(), "red", UnreachableError, bench.federated.expected)
    assert "red has been at local step 1 of 2 for 1.5 s" in words
    assert bench.wire.fired == ["red"]


def test_a_slow_silo_that_moves_on_is_waited_for(make_bench):
    bench = make_bench("federation.stall_s=1.5")
    begun, pull = [], bench.wire.pull

    def slow(silo, ask, times):
        begun.append((time.monotonic(), ask))
        bench.wire.quiet.add("red")

    def moving(ids):
        if begun:
            (began_s, ask), now_s = begun[0], time.monotonic()
            if now_s - began_s > 4:
                return {one: bench.silos["red"].answer(ask) for one in ids}
            step = int(now_s - began_s)
            bench.wire.be_here("red", state="training", step=step, of=9, task=ask.task_id)
        return pull(ids)

    bench.on("red", slow)
    bench.wire.pull = moving
    assert bench.answers()["red"][1] == bench.federated.expected["red"]


def test_nobody_is_waited_for_in_a_hot_loop(make_bench):
    """With answers here already, a silo that works is looked at a few times a second."""
    bench = make_bench("federation.deadline_s=6")
    bench.on("blue", lambda silo, ask, times: None)
    looks, pull = [], bench.wire.pull

    def counted(ids):
        looks.append(ids)
        return pull(ids)

    bench.wire.pull = counted
    only_fails(bench.answers(), "blue", UnreachableError, bench.federated.expected)
    assert 3 < len(looks) < 75


@pytest.mark.parametrize(("due_s", "pause_s"), [(30, 1.0), (0.7, 0.7), (-5, 0.0)])
def test_who_is_to_be_asked_again_is_not_waited_for_longer(due_s, pause_s, bench):
    now_s = time.time()
    over, asked, absent = (Errand(None) for _ in range(3))
    over.failure = UnreachableError("gone")
    asked.letter = "on its way"
    absent.next_s = now_s + due_s
    found = bench.engine._messenger.pause_s([over, asked, absent])
    assert found == pytest.approx(pause_s, abs=0.02)


@pytest.mark.parametrize(
    "trouble", [StoreUnavailableError("no way to the store"), SignatureError("changed on its way")]
)
def test_trouble_on_the_way_to_a_silo_is_asked_about_again(trouble, bench):
    def refuses(silo, ask, times):
        return silo.answer(ask) if times > 1 else silo.trainer._refuse(ask, trouble)

    bench.on("red", refuses)
    assert bench.answers()["red"][1] == bench.federated.expected["red"]
    assert bench.wire.fired == ["red", "red"]
    assert not refusing(bench.roster, RUN_ID)
