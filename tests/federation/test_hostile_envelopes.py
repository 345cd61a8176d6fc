"""Asks and Replies from outside: anything is read, or refused with what is wrong."""

from __future__ import annotations

import copy
import json
import time

import pytest
from envelope_documents import ASKS, REPLIES, RUN_ID, SITE, VALUES, ask, paths, put, reply
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from photon.errors import ConfigError, ProtocolError
from photon.federation.envelopes import (
    MOST_BYTES,
    PROTOCOL,
    Ask,
    Refusal,
    Reply,
    encoded,
    node_config,
    parse_ask,
    parse_reply,
)
from photon.link import Ref


def read(data):
    """Both readers take anything, quickly, and say no in one way."""
    for parse, kind in ((parse_ask, Ask), (parse_reply, Reply)):
        problem = ""
        started = time.process_time()
        try:
            assert isinstance(parse(data), kind)
        except ProtocolError as error:
            problem = error.message
        assert len(problem) < 1500, problem
        assert time.process_time() - started < 5


DOCUMENTS = [json.loads(encoded(document)) for document in (*ASKS, *REPLIES)]
PLACES = [(number, path) for number, tree in enumerate(DOCUMENTS) for path in paths(tree)]


@settings(max_examples=200)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_a_document_with_anything_anywhere_is_read_or_refused(place, value):
    number, path = place
    read(json.dumps(put(DOCUMENTS[number], path, value)).encode())


@settings(max_examples=80)
@given(place=st.sampled_from([one for one in PLACES if one[1]]), extra=st.text(max_size=12))
def test_a_document_without_a_key_or_with_another_is_read_or_refused(place, extra):
    number, path = place
    tree = copy.deepcopy(DOCUMENTS[number])
    here = tree
    for step in path[:-1]:
        here = here[step]
    value = here[path[-1]]
    del here[path[-1]]
    read(json.dumps(tree).encode())
    if isinstance(here, dict):
        here[extra] = value
        read(json.dumps(tree).encode())


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_bytes_are_refused(data):
    raw = bytearray(encoded(data.draw(st.sampled_from([*ASKS, *REPLIES]))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    read(bytes(raw))


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_garbage_is_refused(raw):
    read(raw)
    with pytest.raises(ProtocolError):
        parse_reply(raw)


DEEP = 100_000


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"protocol"',
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"protocol":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"protocol":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"protocol":3,"round":' + b"9" * 10_000 + b"}",
        b'{"protocol":' + b"9" * 4000 + b"}",
        b'{"protocol":3,"round":1e99999}',
        b'{"protocol":3,"silo":"\\ud800"}',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe\x00",
        b'{"protocol":3}' * 2,
        b"{" + b",".join(b'"k%d":1' % n for n in range(20_000)) + b',"protocol":1}',
        b'{"protocol":3,"run":{"silos":[' + b",".join([b'"?"'] * 100_000) + b"]}}",
    ],
    ids=range(18),
)
def test_what_is_no_document_is_refused(raw):
    for parse in (parse_ask, parse_reply):
        with pytest.raises(ProtocolError):
            parse(raw)


def test_a_config_of_any_depth_is_taken_or_refused():
    """[run.config] is the only part of an Ask without a shape of its own."""
    for depth in (10, 100, 250, 500, 900, 2_000, 50_000):
        nested = b"[" * depth + b"]" * depth
        raw = encoded(ask()).replace(b'"config":{', b'"config":{"deep":' + nested + b",")
        read(raw)
        if depth > 10:
            with pytest.raises(ProtocolError):
                parse_ask(raw)
        else:
            with pytest.raises(ConfigError, match="deep"):
                node_config(parse_ask(raw).run, SITE)


def test_nothing_is_read_beyond_the_longest():
    long = b'{"protocol":3,"x":"' + b"x" * MOST_BYTES + b'"}'
    started = time.process_time()
    with pytest.raises(ProtocolError, match=f"none has more than {MOST_BYTES}"):
        parse_ask(long)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("spoken", [0, 1, 2, 4, "3", None, [1], {"1": 1}, 1.5])
def test_another_protocol_is_named(spoken):
    tree = DOCUMENTS[0] | {"protocol": spoken}
    with pytest.raises(ProtocolError, match="the other side speaks protocol") as caught:
        parse_ask(json.dumps(tree).encode())
    assert str(PROTOCOL) in caught.value.message
    assert caught.value.hint is not None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_text_is_utf8_and_nothing_else(encoding):
    """What is signed goes into the log of rounds as text."""
    text = encoded(reply("refused", refused=Refusal(code=1, message="é"))).decode()
    raw = text.replace("\\u00e9", "é").encode(encoding)
    with pytest.raises(ProtocolError):
        parse_reply(raw)


@pytest.mark.parametrize(
    ("tree", "path", "value", "where"),
    [
        (0, ("silo",), "../red", "silo"),
        (0, ("silo",), "", "silo"),
        (0, ("kind",), "evaluate", "evaluate"),
        (0, ("evaluate",), {"round": 3}, "fit"),
        (0, ("within_s",), float("inf"), "within_s"),
        (0, ("within_s",), 31 * 86_400.0, "within_s"),
        (0, ("within_s",), 0.0, "within_s"),
        (0, ("within_s",), "3600", "within_s"),
        (0, ("run", "id"), RUN_ID.upper(), "run.id"),
        (0, ("run", "silos"), [], "run.silos"),
        (0, ("run", "silos", 1), 5, "run.silos.1"),
        (0, ("fit", "round"), True, "fit.round"),
        (0, ("fit", "round"), 0, "fit.round"),
        (0, ("fit", "steps"), 4.0, "fit.steps"),
        (0, ("fit", "more"), 1, "fit.more"),
        (0, ("state", "whole", "bytes"), 2**53, "state.whole.bytes"),
        (0, ("state", "sha256"), "3" * 63, "state.sha256"),
        (2, ("fit", "tokens"), -1, "fit.tokens"),
        (2, ("fit", "tokens"), 0, "no weight"),
        (2, ("fit", "train_s"), float("nan"), "fit.train_s"),
        (2, ("fit", "train_s"), 1.7e308, "fit.train_s"),
        (2, ("fit", "times", "data_s"), 1e300, "fit.times.data_s"),
        (2, ("fit", "communication_s"), 1e9, "fit.communication_s"),
        (2, ("fit", "loss"), float("nan"), "fit.loss"),
        (2, ("fit", "first_loss"), float("inf"), "fit.first_loss"),
        (2, ("fit", "last_loss"), 1e6, "fit.last_loss"),
        (2, ("fit", "loss"), -0.5, "fit.loss"),
        (2, ("fit", "mfu"), 1e9, "fit.mfu"),
        (2, ("fit", "left_out"), 1e300, "fit.left_out"),
        (2, ("fit", "peak_memory_bytes"), 2**51, "fit.peak_memory_bytes"),
        (2, ("fit", "bytes_down"), 2**51, "fit.bytes_down"),
        (2, ("fit", "bytes_up"), 1, "fit.bytes_up"),
        (3, ("evaluate", "loss"), float("inf"), "evaluate.loss"),
        (3, ("evaluate", "bits_per_byte"), float("nan"), "evaluate.bits_per_byte"),
        (3, ("evaluate", "perplexity"), 1.0, "evaluate.perplexity"),
        (3, ("evaluate", "tokens"), 0, "evaluate.tokens"),
        (3, ("evaluate", "eval_s"), 1e12, "evaluate.eval_s"),
        (4, ("refused", "message"), "a\x1b[2J", "refused.message"),
        (4, ("refused", "hint"), "two\nlines", "refused.hint"),
        (5, ("fit", "failure"), "a\u202eb", "fit.failure"),
        (2, ("photon_version",), "\x1b[2J", "photon_version"),
        (2, ("task",), "[/x]", "task"),
        (2, ("fit", "update", "key"), "a/../b", "fit.update.key"),
        (2, ("fit", "update", "payload_bytes"), 2**52, "fit.update.payload_bytes"),
        (2, ("fit", "times"), [0.0] * 4, "fit.times"),
        (2, ("fit", "times", "data_s"), "1", "fit.times.data_s"),
        (2, ("fit", "times", "idle_s"), 1.0, "fit.times.idle_s"),
        (2, ("fit", "idle"), 1.0, "fit.idle"),
        (0, ("state", "idle"), 1.0, "state.idle"),
        (2, ("fit", "state_lost"), 1, "fit.state_lost"),
        (2, ("fit", "update"), None, "fit"),
        (2, ("fit", "failure"), "and an update", "fit"),
        (2, ("refused",), {"code": 1, "message": ""}, "answer of its kind"),
        (2, ("kind",), "evaluate", "answer of its kind"),
        (4, ("refused", "code"), 256, "refused.code"),
        (4, ("refused", "message"), "x" * 4001, "refused.message"),
    ],
)
def test_what_is_wrong_is_named(tree, path, value, where):
    raw = json.dumps(put(DOCUMENTS[tree], path, value)).encode()
    with pytest.raises(ProtocolError) as caught:
        (parse_ask if tree < 2 else parse_reply)(raw)
    assert where in caught.value.message


def test_a_ref_is_bounded():
    for fields in ({"key": ""}, {"key": "k" * 513}, {"bytes": -1}, {"payload_bytes": 1.0}):
        with pytest.raises(ValueError, match="validation error"):
            TypeAdapter(Ref).validate_python(
                {"key": "k", "bytes": 1, "sha256": "1" * 64, "payload_bytes": 1} | fields
            )
