"""Asks and Replies: each field there and back."""

from __future__ import annotations

import hashlib
import json

import pytest
from envelope_documents import ASKS, RECEIPT, REPLIES, SCORE, STATE, UPDATE, WHOLE, ask, reply

from photon.errors import ProtocolError
from photon.evaluation.perplexity import perplexity
from photon.federation.envelopes import Refusal, encoded, parse_ask, parse_reply
from photon.federation.tasks import FitTask, StateRef

TASK = FitTask("a run", 4, "red", 12, 4, 2)


@pytest.mark.parametrize("document", ASKS, ids=["fit", "evaluate"])
def test_an_ask_arrives_as_it_was(document):
    assert parse_ask(encoded(document)) == document
    assert encoded(parse_ask(encoded(document))) == encoded(document)


@pytest.mark.parametrize("document", REPLIES, ids=["fit", "evaluate", "refused", "failed"])
def test_a_reply_arrives_as_it_was(document):
    assert parse_reply(encoded(document)) == document
    assert encoded(parse_reply(encoded(document))) == encoded(document)


def test_nothing_of_a_task_is_lost():
    found = parse_ask(encoded(ask("fit")))
    assert found.fit_task("a run") == TASK
    assert found.state == STATE
    scored = parse_ask(encoded(ask("evaluate")))
    assert (scored.round, scored.silo) == (3, "red")


def test_an_ask_is_called_by_the_text_that_was_signed():
    """Another version may not write a field that this one fills in with its default."""
    record = json.loads(encoded(ask("fit")))
    del record["fit"]["cursor"]
    text = json.dumps(record).encode()
    found = parse_ask(text)
    assert found == parse_ask(text)
    assert found.fit_task("a run") == TASK
    assert found.sha256 == hashlib.sha256(text).hexdigest() != ask("fit").sha256
    assert parse_ask(encoded(ask("fit"))).sha256 == ask("fit").sha256


def test_nothing_of_a_receipt_is_lost():
    found = parse_reply(encoded(reply("fit")))
    assert found.fit is not None
    assert found.fit.receipt(4, "red") == RECEIPT
    assert found.fit.update is not None
    assert found.fit.update == WHOLE
    scored = parse_reply(encoded(reply("evaluate")))
    assert scored.evaluate is not None
    assert scored.evaluate.receipt("red") == SCORE
    assert SCORE.perplexity == perplexity(5.5)


def test_a_state_without_an_update_and_one_without_a_whole_arrive():
    for state in (
        StateRef(0, "3" * 64, WHOLE),
        StateRef(3, "3" * 64, None, UPDATE, "4" * 64),
    ):
        found = parse_ask(encoded(ask(state=state)))
        assert found.state == state


def test_a_refusal_of_any_length_can_be_sent():
    refusal = Refusal.of(ProtocolError("x" * 50_000, hint="y" * 50_000))
    found = parse_reply(encoded(reply("refused", refused=refusal)))
    assert found.refused is not None
    assert (len(found.refused.message), found.refused.code) == (4000, ProtocolError.exit_code)


def test_a_reply_answers_its_question_only():
    question, answer = ask("fit"), reply("fit")
    assert answer.task == question.task_id
    answer.require_answer_to(question)
    for name, value in {
        "run": "f" * 32,
        "kind": "evaluate",
        "silo": "blue",
        "round": 5,
        "task": "another",
        "state": "f" * 64,
        "log_head": "f" * 64,
        "ask": "f" * 64,
    }.items():
        with pytest.raises(ProtocolError, match=f"red answered {name} "):
            answer.model_copy(update={name: value}).require_answer_to(question)
