"""Silos elsewhere: the aggregator's side starts again, and members come and go."""

from __future__ import annotations

import time

import pytest
from remote_bench import RUN_ID, calm_of, only_fails
from rotation import rotate

from photon.errors import UnknownMemberError
from photon.federation import fitted
from photon.federation.merging import Merging
from photon.membership.keys import NodeKey


def test_a_new_engine_takes_the_answers_that_are_here(bench):
    going = fitted(bench.engine, bench.federated.tasks(), calm_of(bench))
    assert next(going).receipt.silo == "blue"
    while len(bench.roster.tasks.replies(RUN_ID, 1)) < 3:
        bench.engine._messenger.turn([])
        next(going)
    asked = len(bench.wire.asked)
    bench.engine = bench.new_engine()  # as a process that was killed leaves it
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert len(bench.wire.asked) == asked == 3
    going.close()


def test_a_new_engine_asks_only_who_has_not_answered(bench):
    bench.on("red", lambda silo, ask, times: None if times == 1 else silo.answer(ask))
    going = fitted(bench.engine, bench.federated.tasks(), calm_of(bench))
    assert [next(going).receipt.silo, next(going).receipt.silo] == ["blue", "green"]
    bench.engine = bench.new_engine()
    assert bench.answers()["red"][1] == bench.federated.expected["red"]
    assert [ask.silo for ask in bench.wire.asked[3:]] == ["red"]
    going.close()


def test_an_answer_of_a_key_that_was_replaced_is_asked_for_again(bench, tmp_path):
    bench.answers()
    new = NodeKey.create(tmp_path / "new.key")
    rotate(bench.roster, "red", new.public_pem)
    bench.engine = bench.new_engine()
    bench.on("red", lambda silo, ask, times: silo.sign(silo.answer(ask).text, new))
    assert bench.answers()["red"][1] == bench.federated.expected["red"]
    assert bench.wire.fired == ["red"]
    assert {one.fingerprint for one in bench.roster.tasks.replies(RUN_ID, 1)} >= {new.fingerprint}


@pytest.mark.parametrize("end", ["expel", "suspend"])
def test_who_is_expelled_before_answering_is_out_at_once(end, bench):
    def ending(silo, ask, times):
        getattr(bench.roster, end)("red")
        bench.wire.quiet.add("red")

    bench.on("red", ending)
    started = time.monotonic()
    words = only_fails(bench.answers(), "red", UnknownMemberError, bench.federated.expected)
    assert "red" in words
    assert bench.wire.fired == ["red"]
    assert time.monotonic() - started < 20  # and not federation.silence_s


def test_who_is_expelled_after_answering_is_not_merged(bench):
    """Its answer waits for its turn behind one that comes later."""

    def ending(silo, ask, times):
        assert bench.roster.tasks.reply(f"{RUN_ID}/fit/1/red") is not None
        bench.roster.expel("red")
        bench.wire.quiet.add("red")
        return silo.answer(ask)

    bench.on("blue", ending)
    merging = Merging(bench.config.federation)
    refused = {
        update.receipt.silo: merging.offer(update, bench.federated.state, 1.0).refused
        for update in fitted(bench.engine, bench.federated.tasks(), calm_of(bench))
    }
    assert refused == {"blue": None, "green": None, "red": refused["red"]}
    assert "red" in refused["red"]
    assert bench.wire.fired == ["blue"]


def test_who_is_no_member_is_not_asked(bench):
    bench.roster.suspend("red")
    only_fails(bench.answers(), "red", UnknownMemberError, bench.federated.expected)
    assert bench.wire.times("red") == 0
