"""A drain or a stop is heeded while silos are waited for, with the result of one between rounds."""

from __future__ import annotations

import threading
import time

import pytest

from photon.membership.roster import Presence
from photon.telemetry import read_history
from photon.telemetry.events import RoundStarted, RunStopped


def when_waiting(run, word):
    """Ask a run to end once it waits for silos; gives what the wait says of itself."""
    found = []

    def ask():
        until = time.monotonic() + 60
        while time.monotonic() < until:
            waiting = run.roster.setting("waiting")
            if waiting:
                found.append((time.monotonic(), waiting))
                run.roster.set_setting(word, True)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, found


def leave(run, *names):
    for name in names:
        with run.telling:
            run.wire.quiet.add(name)
            run.roster.all_seen({name: (Presence("stopping", boot=name), time.time())})


@pytest.mark.parametrize("word", ["draining", "stopping"])
def test_before_the_first_round(word, make_served):
    run = make_served()
    leave(run, "red")
    thread, found = when_waiting(run, word)
    result = run.go_on()
    ended_s = time.monotonic()
    thread.join()
    ((asked_s, waiting),) = found
    assert ended_s - asked_s < 30  # and not serve.gather_s, a day
    assert (waiting["for_silos"], waiting["round"]) == (3, 1)
    assert waiting["here"] == ["blue", "green"]
    assert waiting["until"] > time.time() + 80_000
    assert result.summary == {}
    assert run.roster.setting("waiting") is None
    assert run.wire.asked == []
    assert (run.audit().lines, run.audit().rounds) == (1, 0)  # with which key it is signed


def test_between_rounds_and_on_again(make_served, calm):
    run = make_served()

    def leaving(silo, ask, times):
        answer = silo.answer(ask)
        if ask.round == 1 and ask.fit and silo.name == "blue":  # it is asked last
            leave(run, "red")
            run.wire.fired.append("red left")
        return answer

    run.wire.fault = leaving
    thread, found = when_waiting(run, "draining")
    result = run.go_on()
    thread.join()
    assert run.wire.fired == ["red left"]
    ((_, waiting),) = found
    assert (waiting["for_silos"], waiting["round"], waiting["here"]) == (3, 2, ["blue", "green"])
    assert result.summary == {}
    (stopped,) = read_history(run.folder).of(RunStopped)
    assert (stopped.round, stopped.reason) == (1, "drained")
    assert [event.round for event in read_history(run.folder).of(RoundStarted)] == [1]
    assert run.roster.setting("waiting") is None
    assert run.audit().rounds == 1
    run.roster.set_setting("draining", False)
    run.wire.quiet.clear()
    assert run.go_on().summary["weights_sha256"] == calm["weights_sha256"]
    assert run.audit().rounds == 3


def test_a_fleet_that_is_here_is_not_kept_from_its_round(fleet, roster):
    """Where nobody is waited for, it is the loop that heeds a drain."""
    assert sorted(fleet(ending=lambda: True).drawn_from(1).tokens) == ["blue", "green", "red"]
    assert fleet("serve.min_silos=4", ending=lambda: True).drawn_from(2) is None
    assert fleet("serve.min_silos=4", ending=lambda: True).expected(2) is None
    assert roster.setting("waiting") is None


def test_words_of_a_wait_that_was_killed_are_taken_back(fleet, roster):
    roster.set_setting("waiting", {"for_silos": 3, "here": [], "until": 0.0})
    fleet().drawn_from(1)
    assert roster.setting("waiting") is None
