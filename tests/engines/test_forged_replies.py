"""Silos elsewhere: answers that are not the silo's own, or can not be true."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from remote_bench import RUN_ID, calm_of, only_fails
from scores import scored

from photon.errors import ManifestError, ProtocolError, SignatureError
from photon.federation import EvalTask
from photon.federation.envelopes import encoded, parse_ask, parse_reply
from photon.federation.tasks import update_header
from photon.link import plain_entries, write_parcel
from photon.membership.keys import NodeKey
from photon.membership.records import SignedReply
from photon.store.transfer import Transfer
from photon.telemetry.events import Notice


def another_key(silo, ask, key):
    return silo.sign(silo.answer(ask).text, key)


def with_its_fingerprint(silo, ask, key):
    forged = silo.sign(silo.answer(ask).text, key)
    return SignedReply("", forged.text, forged.signature, silo.key.fingerprint)


def changed_text(silo, ask, key):
    good = silo.answer(ask)
    text = good.text.replace(b'"loss":', b'"loss":1')
    assert text != good.text
    return SignedReply("", text, good.signature, good.fingerprint)


def no_reply(silo, ask, key):
    return silo.sign(b"{}")


def not_utf8(silo, ask, key):
    return silo.sign(silo.answer(ask).text.decode().encode("utf-16"))


def of(**fields):
    """An answer of the silo's own, signed, with other fields."""

    def answer(silo, ask, key):
        reply = parse_reply(silo.answer(ask).text)
        return silo.sign(reply.model_copy(update=fields))

    return answer


def for_another_round(silo, ask, key):
    reply = parse_reply(silo.answer(ask).text)
    task = ask.task_id.replace("/1/", "/2/")
    return silo.sign(reply.model_copy(update={"round": 2, "task": task}))


def outside_its_folder(silo, ask, key):
    """Another silo's update, under the own name."""
    reply = parse_reply(silo.answer(ask).text)
    theirs = reply.fit.update.key.replace("/silos/red/", "/silos/blue/")
    update = replace(reply.fit.update, key=theirs)
    fit = replace(reply.fit, update=update)
    return silo.sign(reply.model_copy(update={"fit": fit}))


def lying(**figures):
    """A training's answer with other figures."""

    def answer(silo, ask, key):
        record = json.loads(silo.answer(ask).text)
        record["fit"] |= figures
        return silo.sign(json.dumps(record).encode())

    return answer


def larger_than_allowed(silo, ask, key):
    reply = parse_reply(silo.answer(ask).text)
    update = replace(reply.fit.update, payload_bytes=2**50)
    return lying(update=asdict(update))(silo, ask, key)


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (outside_its_folder, "its own are under"),
        # Weighed by its tokens, it would be all of the mean.
        (lying(tokens=10**9), "answered tokens = 1000000000; what it was asked has at most"),
        (lying(bytes_down=2**50), "answered bytes_down"),
        (lying(micro_batch_size=2**30), "answered micro_batch_size"),
        (larger_than_allowed, "answered bytes of its update"),
    ],
)
def test_figures_that_contradict_the_question_cost_the_silo_its_update(forge, words, bench):
    """Its own answer to this very Ask: asked again, it would say the same."""
    bench.on("red", lambda silo, ask, times: forge(silo, ask, None))
    failure = only_fails(bench.answers(), "red", ProtocolError, bench.federated.expected)
    assert words in failure
    assert bench.wire.fired == ["red"]
    assert bench.roster.tasks.reply(f"{RUN_ID}/fit/1/red") is None


@pytest.mark.parametrize(
    "figures",
    [
        {"train_s": 1.7e308},
        {"train_s": math.inf},
        {"loss": math.nan},
        {"last_loss": 1e300},
        {"tokens": 0},
        {"times": [0.0, 0.0, 0.0, math.inf]},
        {"peak_memory_bytes": 2**60},
        {"energy": {"how": "measured", "training_j": math.inf}},
        {"energy": {"how": "measured", "idle_j": 2e15}},
        {"energy": {"how": "guessed", "idle_j": 1.0}},
        {"energy": {"how": "measured", "of_mine_j": 1.0}},
    ],
)
def test_figures_that_nothing_can_have_cost_the_silo_its_update(figures, bench):
    """What would end a run when it is summed, saved or shown is not even read."""
    bench.on("red", lambda silo, ask, times: lying(**figures)(silo, ask, None))
    failure = only_fails(bench.answers(), "red", ProtocolError, bench.federated.expected)
    assert f"fit.{next(iter(figures))}" in failure or "no weight" in failure
    assert bench.roster.tasks.reply(f"{RUN_ID}/fit/1/red") is None


def test_scores_that_contradict_the_question_are_left_out(make_bench):
    bench = make_bench("eval.max_tokens=100000")

    def lying_scores(silo, ask, times):
        reply = parse_reply(silo.answer(ask).text)
        told = replace(reply.evaluate, tokens=100_001)
        return silo.sign(reply.model_copy(update={"evaluate": told}))

    bench.on("red", lying_scores)
    tasks = [EvalTask(1, silo) for silo in sorted(bench.silos)]
    scores = list(scored(bench.engine, tasks, calm_of(bench)))
    assert [score.silo for score in scores] == ["blue", "green"]
    (told,) = [event.text for event in bench.told if isinstance(event, Notice)]
    assert "answered tokens = 100001; what it was asked has at most 100000" in told


@pytest.mark.parametrize("poison", ["figures", "another ask", "no ask"])
def test_a_poisoned_answer_that_was_kept_stops_nobody_after_a_restart(poison, bench):
    """As an older Photon, or a damaged disk, may have left it in the roster."""
    bench.answers()
    kept = bench.roster.tasks.reply(f"{RUN_ID}/fit/1/red")
    red = bench.silos["red"]
    if poison == "figures":
        record = json.loads(kept.text)
        record["fit"] |= {"train_s": 1.7e308, "tokens": 0}
        kept = replace(red.sign(json.dumps(record).encode()), ask=kept.ask)
    elif poison == "another ask":
        asked = parse_ask(kept.ask)
        other = asked.model_copy(update={"fit": asked.fit.model_copy(update={"steps": 1})})
        kept = replace(kept, ask=encoded(other))
    else:
        kept = replace(kept, ask=b"")
    bench.roster.tasks.close(f"{RUN_ID}/fit/1/red", kept)
    bench.engine = bench.new_engine()
    asked = len(bench.wire.asked)
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert [ask.silo for ask in bench.wire.asked[asked:]] == ["red"]


@pytest.mark.parametrize(
    ("forge", "kind", "words"),
    [
        (another_key, SignatureError, "not with its own"),
        (with_its_fingerprint, SignatureError, ""),
        (changed_text, SignatureError, ""),
        (no_reply, ProtocolError, "protocol"),
        (not_utf8, ProtocolError, "no Reply"),
        (for_another_round, ProtocolError, "red answered round 2; 1 was asked for"),
        (of(run="f" * 32), ProtocolError, "answered run"),
        (of(silo="blue"), ProtocolError, "answered silo 'blue'"),
        (of(state="f" * 64), ProtocolError, "answered state"),
        (of(task=f"{RUN_ID}/fit/9/red"), ProtocolError, "answered task"),
        (of(ask="f" * 64), ProtocolError, "answered ask"),
        (of(log_head="f" * 64), ProtocolError, "answered log_head"),
    ],
)
def test_what_is_not_the_silos_answer_is_refused(forge, kind, words, bench, tmp_path):
    stranger = NodeKey.create(tmp_path / "stranger.key")
    bench.on("red", lambda silo, ask, times: forge(silo, ask, stranger))
    failure = only_fails(bench.answers(), "red", kind, bench.federated.expected)
    assert words in failure
    assert bench.wire.fired == ["red"] * 3
    refused = [event for event in bench.roster.journal.events() if event.what == "reply refused"]
    assert sum(event.times for event in refused) == 3
    assert refused[-1].actor == "red"
    # Nothing of it is kept for the record of the round.
    assert [reply.fingerprint for reply in bench.roster.tasks.replies(RUN_ID, 1)] == [
        bench.silos[name].key.fingerprint for name in ("blue", "green")
    ]


def test_a_forged_answer_does_not_keep_the_true_one_out(bench, tmp_path):
    stranger = NodeKey.create(tmp_path / "stranger.key")

    def first_forged(silo, ask, times):
        return another_key(silo, ask, stranger) if times == 1 else silo.answer(ask)

    bench.on("red", first_forged)
    assert bench.answers()["red"][1] == bench.federated.expected["red"]
    assert bench.wire.fired == ["red", "red"]


def test_another_members_signature_is_not_the_silos(bench):
    bench.on("red", lambda silo, ask, times: another_key(silo, ask, bench.silos["blue"].key))
    only_fails(bench.answers(), "red", SignatureError, bench.federated.expected)
    assert bench.wire.fired == ["red"] * 3


@pytest.mark.parametrize("lie", ["another model", "this model's name", "nothing"])
def test_an_update_of_another_shape_is_never_read(lie, bench):
    """Signed, in its own folder, whole: but not of this model."""

    def wrong(silo, ask, times):
        task, state = ask.fit_task("test"), calm_of(bench).tensors
        if lie == "nothing":
            other = {}
        else:
            other = {name: tensor[..., :1].contiguous() for name, tensor in state.items()}
        header = update_header(task, other if lie == "another model" else state)
        ref = write_parcel(
            Transfer(bench.store), f"{RUN_ID}/silos/red", header, plain_entries(other.items())
        )
        reply = parse_reply(silo.answer(ask).text)
        fit = replace(reply.fit, update=ref)
        return silo.sign(reply.model_copy(update={"fit": fit}))

    bench.on("red", wrong)
    only_fails(bench.answers(), "red", ManifestError, bench.federated.expected)
    assert bench.wire.fired == ["red"]
