"""Tasks that end the trainer: counted, and refused in the end."""

from __future__ import annotations

import itertools

import pytest

from photon.federation import Node
from photon.silo.trainer import DEATHS


def test_a_task_that_ends_the_trainer_twice_in_the_same_way_is_refused(
    bench, aggregator, monkeypatch
):
    whole, calls = Node._fit, itertools.count(1)

    def broken(self, task, state, spending):
        raise RuntimeError(f"at address {next(calls):#x}")  # its words differ each time

    monkeypatch.setattr(Node, "_fit", broken)
    ask = aggregator.fit()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="at address"):
            bench.trainer.answer(ask, lambda: 4e9)
        bench.start()
    refused = bench.refusal(ask)
    assert refused.code == 60
    assert "ended 2 times by this task: RuntimeError: at address 0x2" in refused.message
    monkeypatch.setattr(Node, "_fit", whole)
    assert bench.refusal(ask).code == 60  # nobody knows what it would do now
    assert bench.answer(aggregator.fit(number=2)).fit.update is not None


def test_other_mistakes_are_counted_apart(bench, aggregator, monkeypatch):
    whole = Node._fit

    def first(self, task, state, spending):
        raise RuntimeError("one")

    def second(self, task, state, spending):
        raise MemoryError("another")

    ask = aggregator.fit()
    for broken, kind in ((first, RuntimeError), (second, MemoryError), (first, RuntimeError)):
        monkeypatch.setattr(Node, "_fit", broken)
        with pytest.raises(kind):
            bench.trainer.answer(ask, lambda: 4e9)
        bench.start()
    monkeypatch.setattr(Node, "_fit", whole)
    assert bench.answer(ask).fit.update is not None


def test_a_task_that_is_killed_again_and_again_is_refused(bench, aggregator, monkeypatch):
    """Nobody is left to say why: the process is gone at once."""
    whole = Node._fit

    class Killed(BaseException):
        pass

    def killed(self, task, state, spending):
        raise Killed

    monkeypatch.setattr(Node, "_fit", killed)
    ask = aggregator.fit()
    for _ in range(DEATHS):
        with pytest.raises(Killed):
            bench.trainer.answer(ask, lambda: 4e9)
        bench.start()
    for _ in range(2):
        refused = bench.refusal(ask)
        assert refused.code == 60
        assert f"killed {DEATHS} times during this task" in refused.message
    monkeypatch.setattr(Node, "_fit", whole)
    assert bench.answer(aggregator.fit(number=2)).fit.update is not None


def test_ends_in_good_order_are_not_counted(bench, aggregator, monkeypatch):
    whole = Node._fit

    class Stopped(BaseException):
        pass

    def stopped(self, task, state, spending):
        bench.trainer.note_stop()
        raise Stopped

    monkeypatch.setattr(Node, "_fit", stopped)
    ask = aggregator.fit()
    for _ in range(DEATHS):
        with pytest.raises(Stopped):
            bench.trainer.answer(ask, lambda: 4e9)
        bench.start()
    monkeypatch.setattr(Node, "_fit", whole)
    assert bench.answer(ask).fit.update is not None
