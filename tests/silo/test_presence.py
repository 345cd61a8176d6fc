"""Reports to the aggregator, and a desk that is down, slow, or says something."""

from __future__ import annotations

import threading
import time

import pytest

from photon.errors import KeyInUseError, UnreachableError
from photon.silo.presence import Reporter


class DeskOfTests:
    """Remembers what it was told; answers, or raises, what it is set to."""

    def __init__(self):
        self.told, self.answer, self.error = [], {"ok": True}, None
        self.gate = threading.Event()
        self.gate.set()

    def presence(self, presence):
        self.gate.wait()
        self.told.append(presence)
        if self.error is not None:
            raise self.error
        return self.answer


@pytest.fixture
def desk(monkeypatch):
    monkeypatch.setattr("photon.silo.presence._LEAST_GAP_S", 0.02)
    monkeypatch.setattr("photon.silo.presence._EVERY_S", 0.03)
    return DeskOfTests()


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_is_done_is_told_at_once_and_again_and_again(desk):
    reporter = Reporter(desk)
    eventually(lambda: desk.told)
    reporter.say("training", run="r", round=3, task="t", of=9)
    reporter.add(step=4, detail="loss 3.1")
    eventually(lambda: desk.told[-1].step == 4)
    last = desk.told[-1]
    assert (last.state, last.run, last.round, last.of, last.task) == ("training", "r", 3, 9, "t")
    count = len(desk.told)
    eventually(lambda: len(desk.told) > count + 2)
    assert len({presence.boot for presence in desk.told}) == 1
    assert last.boot != Reporter(None).now.boot


def test_changes_are_told_together(desk, monkeypatch):
    monkeypatch.setattr("photon.silo.presence._EVERY_S", 60.0)
    reporter = Reporter(desk)
    eventually(lambda: desk.told)
    for step in range(1000):
        reporter.say("training", step=step)
    eventually(lambda: desk.told[-1].step == 999)
    assert len(desk.told) < 50


def test_an_idle_node_speaks_as_seldom_as_the_desk_asks_and_a_busy_one_does_not(desk):
    desk.answer = {"ok": True, "next_s": 1e9}
    reporter = Reporter(desk)
    eventually(lambda: desk.told)
    time.sleep(0.3)
    assert len(desk.told) <= 2
    reporter.say("training", step=1)
    eventually(lambda: sum(one.state == "training" for one in desk.told) > 3)
    desk.answer = {"ok": True, "next_s": "soon"}  # no desk of ours
    reporter.say("idle")
    eventually(lambda: sum(one.state == "idle" for one in desk.told[-5:]) > 3)


@pytest.mark.parametrize("error", [UnreachableError("down"), ValueError("nonsense"), OSError()])
def test_a_desk_in_trouble_is_told_again(error, desk, caplog):
    desk.error = error
    reporter = Reporter(desk)
    eventually(lambda: len(desk.told) > 3)
    assert reporter.key_in_use is None
    desk.error = None
    with caplog.at_level("INFO"):
        count = len(desk.told)
        eventually(lambda: len(desk.told) > count + 1)
    assert sum("does not hear" in line.message for line in caplog.records) <= 1
    assert "hears of this node again" in caplog.text


def test_a_desk_that_hangs_holds_up_nobody(desk):
    desk.gate.clear()
    reporter = Reporter(desk)
    started = time.monotonic()
    for step in range(10_000):
        reporter.add(step=step)
    reporter.say("idle")
    assert time.monotonic() - started < 20
    reporter.stop(0.2)
    assert time.monotonic() - started < 30
    assert not desk.told
    desk.gate.set()
    eventually(lambda: desk.told and desk.told[-1].state == "stopping")


def test_work_that_goes_on_does_not_unsay_the_end(desk):
    reporter = Reporter(desk)
    reporter.stop(20)
    reporter.say("publishing", step=4, of=4)
    reporter.add(step=5)
    assert reporter.now.state == "stopping"
    assert desk.told[-1].state == "stopping"


def test_what_the_desk_says_is_heeded(desk):
    reporter = Reporter(desk)
    desk.answer = {"draining": True}
    eventually(lambda: reporter.draining)
    desk.error = KeyInUseError("another node runs with the key of red")
    eventually(lambda: reporter.key_in_use is not None)
    assert reporter.draining  # the last that was said
    desk.error, desk.answer = None, {"draining": False}
    eventually(lambda: not reporter.draining and reporter.key_in_use is None)


def test_details_are_short():
    reporter = Reporter(None)
    reporter.say("refused", detail="x" * 5000)
    assert len(reporter.now.detail) == 300
