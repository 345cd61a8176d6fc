"""Asks and Replies: each field there and back, what comes from outside, what a run dictates."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from photon.config import load_run_config
from photon.errors import ConfigError, ProtocolError
from photon.evaluation.perplexity import perplexity
from photon.federation.envelopes import (
    MOST_BYTES,
    PROTOCOL,
    Ask,
    EvalAnswer,
    EvalPart,
    FitAnswer,
    FitPart,
    Refusal,
    Reply,
    RunPart,
    dictated,
    encoded,
    node_config,
    parse_ask,
    parse_reply,
)
from photon.federation.tasks import EvalReceipt, FitTask, Receipt, StateRef
from photon.link import Ref
from photon.training import StepTimes

RUN_ID = "0123456789abcdef" * 2
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
SITE = {"data": {"path": "/its/own"}, "compute": {"threads": 3}}

WHOLE = Ref("run/global/state/round-000003/x.json", 500, "1" * 64, 4_000)
UPDATE = Ref("run/global/outer_update/round-000003/x.json", 400, "2" * 64, 1_000)
STATE = StateRef(3, "3" * 64, WHOLE, UPDATE, "4" * 64)
TASK = FitTask("a run", 4, "red", 12, 4, 2)
RECEIPT = Receipt(
    4,
    "red",
    tokens=512,
    loss=5.5,
    first_loss=5.75,
    last_loss=5.25,
    bytes_down=4_500,
    bytes_up=WHOLE.wire_bytes,
    train_s=1.5,
    load_s=0.25,
    publish_s=0.125,
    times=StepTimes(0.1, 0.2, 0.3, 0.4),
    communication_s=0.5,
    mfu=0.375,
    peak_memory_bytes=1 << 30,
    micro_batch_size=4,
    left_out=0.01,
)
SCORE = EvalReceipt(
    "red", loss=5.5, bits_per_byte=2.25, tokens=1_990, eval_s=0.75, bytes_down=4_500
)


def run_part(config=None, **fields):
    plain = {
        "id": RUN_ID,
        "silos": ["blue", "red"],
        "config": {"run": {"name": "a run"}, "data": {}} if config is None else config,
        "model": "5" * 64,
        "tokenizer": "6" * 64,
        "vocab_size": 300,
        "eos_id": 0,
    }
    return RunPart(**plain | fields)


def ask(kind="fit", **fields):
    part = {
        "fit": FitPart(round=4, global_step=12, steps=4, node_round=2),
        "evaluate": EvalPart(round=3),
    }[kind]
    plain = {
        "photon_version": "0.1.0",
        "kind": kind,
        "silo": "red",
        "run": run_part(),
        "state": STATE,
        "log_head": "8" * 64,
        "within_s": 3600.5,
        kind: part,
    }
    return Ask(**plain | fields)


def reply(kind="fit", **fields):
    part = {
        "fit": {"fit": FitAnswer.of(RECEIPT, WHOLE)},
        "evaluate": {"evaluate": EvalAnswer.of(SCORE)},
        "refused": {"refused": Refusal(code=85, message="policy.runs allows none", hint="Ask.")},
    }[kind]
    plain = {
        "photon_version": "0.1.0",
        "kind": "evaluate" if kind == "evaluate" else "fit",
        "silo": "red",
        "ask": ask(kind).sha256 if kind != "refused" else ask().sha256,
        "log_head": "8" * 64,
        "run": RUN_ID,
        "round": 3 if kind == "evaluate" else 4,
        "task": f"{RUN_ID}/fit/4/red",
        "state": "3" * 64,
        "data": "7" * 64,
    }
    return Reply(**plain | part | fields)


ASKS = [ask("fit"), ask("evaluate")]
REPLIES = [
    reply("fit"),
    reply("evaluate"),
    reply("refused"),
    reply(fit=FitAnswer(failure="its loss became nan", failure_code=61, failure_hint="Lower lr.")),
]


# --- there and back --------------------------------------------------------------------------


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


# --- from outside ----------------------------------------------------------------------------


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


def paths(tree, at=()):
    """All places in a document."""
    yield at
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from paths(value, (*at, key))
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from paths(value, (*at, place))


def put(tree, path, value):
    """A copy with another value at a place."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    here = tree
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = value
    return tree


DOCUMENTS = [json.loads(encoded(document)) for document in (*ASKS, *REPLIES)]
PLACES = [(number, path) for number, tree in enumerate(DOCUMENTS) for path in paths(tree)]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**53, 2**64, 10**400, 1e308, float("inf"), float("nan")])
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["\ud800", "\x00", "../..", "/etc/passwd", "a" * 5000, "1", "fit"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


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


# --- what a run dictates ---------------------------------------------------------------------


@pytest.fixture
def config(make_config):
    return make_config(
        Path("/aggregators/own"),
        "compute.threads=7",
        'serve.silos=["red"]',
        "train.batch_size=64",
        "federation.silence_s=5",
        'link.update_codec="int8"',
    )


def test_the_aggregators_own_is_not_sent(config):
    tree = dictated(config)
    assert not {"compute", "serve", "train"} & set(tree)
    assert "path" not in tree["data"]
    assert "/aggregators/own" not in json.dumps(tree)


def test_a_site_takes_the_maths_of_the_run_and_its_own_machine(config):
    found = node_config(run_part(dictated(config)), SITE)
    assert found.data.path == "/its/own"
    assert found.compute.threads == 3
    assert found.serve.silos == []
    for table in ("run", "model", "federation", "local", "outer", "link", "eval"):
        assert getattr(found, table) == getattr(config, table), table
    assert dictated(found) == dictated(config)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("compute",), {"threads": 64}, "compute"),
        (("compute",), {}, "compute"),
        (("serve",), {"home": "/"}, "serve"),
        (("train",), {"batch_size": 1}, "train"),
        (("plugins",), {}, "plugins"),
        (("data", "path"), "/etc", "data.path"),
        (("data",), [], "data.path"),
        (("data",), "x", "data.path"),
    ],
)
def test_a_run_can_not_dictate_what_is_the_sites(path, value, words, config):
    run = run_part(put(dictated(config), path, value))
    with pytest.raises(ProtocolError, match="which is the site's to decide") as caught:
        node_config(run, SITE)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("local", "steps"), "many"),
        (("local", "unknown"), 1),
        (("nonsense",), {"a": 1}),
        (("federation",), 5),
        (("model",), None),
    ],
)
def test_a_run_that_is_none_is_refused_as_a_run_file(path, value, config):
    with pytest.raises(ConfigError):
        node_config(run_part(put(dictated(config), path, value)), SITE)


@settings(max_examples=60)
@given(data=st.data(), value=VALUES)
def test_any_config_is_a_run_file_or_none(data, value):
    tree = dictated(load_run_config(RECIPES[0]))
    places = [path for path in paths(tree) if path]
    run = run_part(put(tree, data.draw(st.sampled_from(places)), value))
    try:
        found = node_config(run, SITE)
    except (ConfigError, ProtocolError):
        return
    assert found.data.path == "/its/own"
    assert found.compute.threads == 3


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_keeps_its_maths_on_a_site(recipe):
    config = load_run_config(recipe)
    question = ask(run=run_part(dictated(config)))
    found = node_config(parse_ask(encoded(question)).run, SITE)
    assert dictated(found) == dictated(config)
    for table in type(config).model_fields:
        if table not in ("compute", "serve", "train", "data"):
            assert getattr(found, table) == getattr(config, table), table
    assert found.data == config.data.model_copy(update={"path": "/its/own"})
