"""Silos elsewhere: the engine contract, and everything that may go wrong between the two sides."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace

import pytest
import torch
from remote_bench import RUN_ID, Bench, Federated
from rotation import rotate
from scores import scored

from photon.engines.remote import Depot, errand, messenger
from photon.engines.remote.errand import Errand
from photon.errors import (
    ChunkCorruptError,
    ManifestError,
    NonFiniteError,
    ObjectMissingError,
    PolicyError,
    ProtocolError,
    SignatureError,
    StoreUnavailableError,
    UnknownMemberError,
    UnreachableError,
)
from photon.federation import EvalTask, fitted
from photon.federation.envelopes import (
    encoded,
    parse_ask,
    parse_reply,
)
from photon.federation.merging import Merging
from photon.federation.tasks import update_header
from photon.link import plain_entries, tensors_sha256, write_parcel
from photon.membership.keys import NodeKey
from photon.membership.records import SignedReply
from photon.membership.refusals import refusing
from photon.membership.roster import Presence
from photon.store.transfer import Transfer
from photon.telemetry.events import LocalProgress, Notice


def hashes(engine, tasks, version):
    return {
        update.receipt.silo: tensors_sha256({k: v.clone() for k, v in update.tensors()})
        for update in fitted(engine, tasks, version)
    }


@pytest.fixture(scope="module")
def calm(three_silos, make_config, tmp_path_factory):
    """Silos that have done round 1: asked again they answer from their disks."""
    config = make_config(three_silos, "local.steps=2", "run.log_every=1")
    federated = Federated(config, tmp_path_factory.mktemp("calm"))
    federated.expected = hashes(federated.local, federated.tasks(), federated.version)
    yield federated
    federated.local.close()


@pytest.fixture
def remake(make_config):
    return lambda data, *more: make_config(data, "local.steps=2", "run.log_every=1", *more)


@pytest.fixture
def make_bench(calm, tmp_path, remake, monkeypatch):
    # The first pause of a task that is asked again stays as it is: one second.
    monkeypatch.setattr(errand, "_LAST_PAUSE_S", 0.05)
    made = []

    def make(*overrides: str) -> Bench:
        made.append(Bench(calm, tmp_path, *overrides, remake=remake))
        return made[-1]

    yield make
    for bench in made:
        bench.roster.close()


@pytest.fixture
def bench(make_bench):
    return make_bench()


def only_fails(answers, silo, kind, expected):
    """The failure of a silo, where the others gave what they always give."""
    receipt, digest = answers.pop(silo)
    assert receipt.failure is not None
    assert digest is None
    assert receipt.failure_code == kind.exit_code, receipt.failure
    assert {name: found for name, (_, found) in answers.items()} == {
        name: found for name, found in expected.items() if name != silo
    }
    assert all(one.failure is None for one, _ in answers.values())
    return receipt.failure


# --- the contract ----------------------------------------------------------------------------


#: Norms come to a node once; each silo's embedding (and so its head) never leaves it.
PARTS = ('parts.frozen=["*norm*"]', 'parts.personal=["model.embed*"]')


@pytest.mark.parametrize(
    "link", [(), ('link.update_codec="int8"',), ('link.broadcast_codec="int8"',), PARTS]
)
def test_the_same_bits_as_in_one_process(link, three_silos, make_config, tmp_path):
    config = make_config(three_silos, "local.steps=2", *link)
    federated = Federated(config, tmp_path)
    bench = Bench(federated, tmp_path)
    expected, node_round = [], None
    for number in (1, 2):
        tasks = federated.tasks(number, node_round)
        alone = {}
        for update in fitted(federated.local, tasks, federated.version):
            tensors = {name: tensor.clone() for name, tensor in update.tensors()}
            alone[update.receipt.silo] = (update.receipt, tensors_sha256(tensors))
        seen = bench.answers(tasks)
        assert list(seen) == [task.silo for task in tasks]  # the wire gives the last one first
        expected.append((alone, seen))
        node_round = number
        federated.move(number)
    for alone, seen in expected:
        for silo, (receipt, digest) in alone.items():
            found, found_digest = seen[silo]
            assert found_digest == digest
            for name in ("round", "silo", "tokens", "loss", "bytes_up", "left_out", "failure"):
                assert getattr(found, name) == getattr(receipt, name), name
            assert found.train_s > 0
    first, second = (seen["red"][0].bytes_down for _, seen in expected)
    if link == ('link.broadcast_codec="int8"',):
        assert 0 < second < first / 3  # the outer update only
    if link == PARTS:
        embedding = 4 * federated.once["model.embed_tokens.weight"].numel()
        assert 0 < second < first - embedding
        tasks = [EvalTask(2, silo, 2) for silo in sorted(bench.silos)]
        here, there = (
            [score.loss for score in scored(engine, tasks, federated.version)]
            for engine in (federated.local, bench.engine)
        )
        assert here == there
        assert len(set(here)) == 3
        begun = [replace(task, node_round=None) for task in tasks]
        assert here != [one.loss for one in scored(federated.local, begun, federated.version)]
    assert not list((tmp_path / "arrivals").iterdir())
    assert bench.roster.tasks.open_for("red") == []
    bench.roster.close()
    federated.local.close()


def test_every_set_is_scored(bench):
    names = [None, *sorted(bench.silos)]
    tasks = [EvalTask(0, name) for name in names]
    expected = {score.silo: score for score in scored(bench.federated.local, tasks, calm_of(bench))}
    scores = list(scored(bench.engine, tasks, calm_of(bench)))
    assert [score.silo for score in scores] == names
    for score in scores:
        assert score.loss == expected[score.silo].loss
        assert score.tokens == expected[score.silo].tokens
    assert bench.roster.tasks.open_for("red") == []


def test_a_silo_that_scores_nothing_is_named_and_the_rest_counts(bench):
    bench.silos["green"].start('policy.runs=["another"]')
    try:
        tasks = [EvalTask(0, name) for name in sorted(bench.silos)]
        scores = list(scored(bench.engine, tasks, calm_of(bench)))
    finally:
        bench.silos["green"].start()
    assert [score.silo for score in scores] == ["blue", "red"]
    (notice,) = [event for event in bench.told if isinstance(event, Notice)]
    assert notice.silo == "green"
    assert "policy.runs" in notice.text


def test_the_state_is_left_alone(bench):
    before = tensors_sha256(calm_of(bench).tensors)
    bench.answers()
    assert tensors_sha256(calm_of(bench).tensors) == before


def calm_of(bench):
    return bench.federated.version


def test_a_diverged_silo_answers_with_its_failure(calm, tmp_path):
    kept, bench = dict(calm.state), None
    name = next(iter(calm.state))
    calm.state[name] = torch.full_like(kept[name], 3e38)
    try:
        bench = Bench(calm, tmp_path)
        ((receipt, digest),) = bench.answers(calm.tasks()[-1:]).values()
        assert "loss became nan" in receipt.failure
        assert receipt.failure_code == NonFiniteError.exit_code
        assert digest is None
    finally:
        calm.state = kept
        if bench is not None:
            bench.roster.close()


def test_progress_is_what_silos_tell(bench):
    def steps(silo, ask, times):
        figures = {"loss": 5.5, "lr": 1e-3, "gradient_norm": None, "tokens_per_s": 900.0}
        # Nothing of a silo that has not said how a step went, and nothing twice.
        for said in ({}, figures, figures):
            doing = {"state": "training", "round": 1, "step": 1, "of": 2, "task": ask.task_id}
            bench.wire.be_here(silo.name, **doing, **said)
            seen = bench.roster.presences()[silo.name]
            bench.engine._messenger._watch(Errand(ask), seen, time.time())
        # Beyond the task's steps there are none, and none comes again.
        for step in (2**52, 1, 2**51):
            bench.wire.be_here(silo.name, **doing | {"step": step}, **figures)
            seen = bench.roster.presences()[silo.name]
            bench.engine._messenger._watch(Errand(ask), seen, time.time())
        return silo.answer(ask)

    bench.on("red", steps)
    bench.answers()
    event, last = [event for event in bench.told if isinstance(event, LocalProgress)]
    assert (event.silo, event.round, event.step, event.global_step) == ("red", 1, 1, 1)
    assert (event.loss, event.lr, event.gradient_norm, event.tokens_per_s) == (5.5, 1e-3, None, 900)
    assert (last.step, last.global_step) == (2, 2)


# --- lost on the way -------------------------------------------------------------------------


def test_steps_of_another_round_are_not_told(bench):
    def claiming(silo, ask, times):
        for number, step in ((1, 0), (2, 1), (0, 1)):
            said = Presence("training", round=number, step=step, task=ask.task_id, loss=5.5)
            bench.engine._messenger._progress(ask, said)
        return silo.answer(ask)

    bench.on("red", claiming)
    bench.answers()
    assert bench.wire.fired == ["red"]
    assert not [event for event in bench.told if isinstance(event, LocalProgress)]


def test_a_spool_is_closed_to_others(bench):
    assert (bench.folder / "arrivals").stat().st_mode & 0o077 == 0


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


# --- answers that are none -------------------------------------------------------------------


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


def test_a_refusal_has_the_silos_own_words_and_code(bench):
    bench.silos["red"].start("policy.max_local_steps=1")
    try:
        words = only_fails(bench.answers(), "red", PolicyError, bench.federated.expected)
    finally:
        bench.silos["red"].start()
    assert "red: this site's policy refuses the run: a task takes 2 local steps" in words
    assert "policy.max_local_steps allows 1" in words
    assert bench.wire.times("red") == 1
    assert any(event.what == "refused" for event in bench.roster.journal.events())


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


# --- updates in the store --------------------------------------------------------------------


def chunks_of(bench, silo):
    return [key for key, _ in bench.store.keys(f"{RUN_ID}/silos/{silo}/chunks")]


def damage(bench, silo):
    """Other bytes of the same length, as a failing disk leaves them."""
    for key in chunks_of(bench, silo):
        bench.store._objects[key] = bytes(len(bench.store._objects[key]))


def test_a_damaged_chunk_is_sent_again(bench):
    def damaged_once(silo, ask, times):
        answer = silo.answer(ask)
        if times == 1:
            damage(bench, "red")
        return answer

    bench.on("red", damaged_once)
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert bench.wire.fired == ["red", "red"]


def test_a_chunk_that_is_always_damaged_fails_its_silo_by_name(bench):
    open_when_asked = []

    def damaged(silo, ask, times):
        open_when_asked.append([task.id for task in bench.roster.tasks.open_for("red")])
        answer = silo.answer(ask)
        damage(bench, "red")
        return answer

    bench.on("red", damaged)
    words = only_fails(bench.answers(), "red", ChunkCorruptError, bench.federated.expected)
    assert f"{RUN_ID}/silos/red/chunks/" in words
    # Each time the silo was let write again.
    assert open_when_asked == [[f"{RUN_ID}/fit/1/red"]] * 3


def test_an_update_that_is_not_in_the_store_fails_its_silo(bench):
    def missing(silo, ask, times):
        answer = silo.answer(ask)
        bench.store.delete(chunks_of(bench, "red"))
        return answer

    bench.on("red", missing)
    only_fails(bench.answers(), "red", ObjectMissingError, bench.federated.expected)
    assert bench.wire.fired == ["red"] * 3


def test_a_store_that_is_away_is_waited_for(bench, monkeypatch):
    """Longer than a silo's own faults would be."""
    away, fetch = [], Depot.fetch

    def without_store(self, task, ref, state):
        if task.silo == "red" and len(away) < 5:
            away.append(task)
            raise StoreUnavailableError("the store is away")
        return fetch(self, task, ref, state)

    monkeypatch.setattr(Depot, "fetch", without_store)
    assert bench.answers()["red"][1] == bench.federated.expected["red"]
    assert len(away) == 5


def test_an_update_is_read_again_from_the_store_when_the_spool_is_gone(bench):
    """A merging rule reads again what it has added, where a later one turns out bad."""
    kept = list(fitted(bench.engine, bench.federated.tasks(), calm_of(bench)))
    assert not list((bench.folder / "arrivals").iterdir())
    again = {
        one.receipt.silo: tensors_sha256({k: v.clone() for k, v in one.tensors()}) for one in kept
    }
    assert again == bench.federated.expected


def test_an_update_that_is_here_needs_no_store(bench):
    for update in fitted(bench.engine, bench.federated.tasks(), calm_of(bench)):
        objects = dict(bench.store._objects)
        bench.store._objects.clear()
        found = tensors_sha256({k: v.clone() for k, v in update.tensors()})
        assert found == bench.federated.expected[update.receipt.silo]
        bench.store._objects |= objects


def test_one_that_is_slow_keeps_nobody_elses_update_from_coming(five_silos, remake, tmp_path):
    """The first to be merged answers when the updates of all others are on their way here."""
    federated = Federated(remake(five_silos), tmp_path / "federated")
    bench = Bench(federated, tmp_path)
    slow, *others = sorted(federated.silos)
    seen = []

    def answers_last(silo, ask, times):
        until = time.monotonic() + 30
        while len(seen) < len(others) and time.monotonic() < until:
            seen[:] = (bench.folder / "arrivals").iterdir()
            time.sleep(0.01)
        return silo.answer(ask)

    bench.on(slow, answers_last)
    answers = bench.answers()
    assert bench.wire.fired == [slow]
    assert len(seen) == len(others)
    expected = hashes(federated.local, federated.tasks(), federated.version)
    assert list(answers) == list(expected) == [slow, *others]
    assert {name: digest for name, (_, digest) in answers.items()} == expected
    federated.local.close()
    bench.roster.close()


def test_updates_that_wait_take_no_more_of_the_disk_than_there_is_room(bench, monkeypatch):
    fetch, waiting = Depot.fetch, []

    def counted(self, task, ref, state):
        waiting.append(len(list((bench.folder / "arrivals").iterdir())))
        return fetch(self, task, ref, state)

    monkeypatch.setattr(Depot, "fetch", counted)
    monkeypatch.setattr(Depot, "free_bytes", lambda self: 0)
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert waiting == [0, 0, 0]


def test_a_later_update_that_can_not_be_had_is_asked_for_before_its_turn(bench):
    """What is damaged is sent again while the first to be merged still works."""
    first, *_, last = sorted(bench.silos)

    def damaged_once(silo, ask, times):
        if silo.name == first and bench.wire.times(last) < 2:
            bench.wire._waiting[f"message-{bench.wire.asked.index(ask) + 1}"] = ask
            return None
        answer = silo.answer(ask)
        if silo.name == last and times == 1:
            damage(bench, last)
        return answer

    bench.wire.fault = damaged_once
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert bench.wire.times(last) == 2
    assert bench.wire.times(first) == 1


@pytest.mark.parametrize(
    "junk", [b"[]", b"\xff", b'{"chunks": 5}', b'{"chunks": [{"sha256": {}}]}', b"[" * 5000]
)
def test_what_a_silo_leaves_in_its_folder_stops_nobody(junk, bench):
    """It is removed from the store, whatever it is and is called; what was accepted stays."""
    key = f"{RUN_ID}/silos/red/update/round-000001/x.json"
    bench.store.put(key, junk)
    for name in ("update/round-000000/x.json", "update/round-999999999/z.json", "junk", "chunks/a"):
        bench.store.put(f"{RUN_ID}/silos/red/{name}", junk)
    bench.config = bench.config.model_copy(
        update={"serve": bench.config.serve.model_copy(update={"keep_rounds": 1})}
    )
    bench.engine = bench.new_engine()
    tasks = bench.federated.tasks()
    assert {name: found for name, (_, found) in bench.answers(tasks).items()} == (
        bench.federated.expected
    )
    named = [parse_reply(reply.text).fit for reply in bench.roster.tasks.replies(RUN_ID, 1)]
    kept = {fit.update.key for fit in named if fit is not None and fit.update is not None}
    assert len(kept) == 3
    left = {name for name, _ in bench.store.keys(f"{RUN_ID}/silos") if "/chunks/" not in name}
    assert left == kept
    assert all(receipt.failure is None for receipt, _ in bench.answers(tasks).values())


# --- this side starts again, and members come and go -----------------------------------------


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


def test_a_task_may_be_written_to_under_the_silos_own_folder_only(bench):
    seen = {}

    def look(silo, ask, times):
        (seen["task"],) = bench.roster.tasks.open_for("red")
        return silo.answer(ask)

    bench.on("red", look)
    bench.answers()
    task = seen["task"]
    own = f"{RUN_ID}/silos/red"
    assert task.writable == (
        f"{own}/chunks/{{sha256}}",
        f"{own}/update/round-000001/red-{{sha256:.16}}.json",
    )
    chunks, state = task.readable
    assert chunks == f"{RUN_ID}/global/chunks/"
    assert state.startswith(f"{RUN_ID}/global/state/round-000000/")
    written = [key for key, _ in bench.store.keys(own)]
    allowed = [template.partition("{")[0] for template in task.writable]
    assert written
    assert all(any(key.startswith(one) for one in allowed) for key in written)
    values = sum(tensor.numel() for tensor in calm_of(bench).tensors.values())
    assert task.most_bytes > 4 * values
    assert bench.roster.tasks.open_for("red") == []
