"""What a site answers: what a node in one process gives, kept, sent again; or why there is none."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import shutil
import threading
import time

import pytest

from photon.errors import (
    KeyInUseError,
    MembershipError,
    PhotonError,
    ProtocolError,
    SignatureError,
    StoreUnavailableError,
)
from photon.federation import Node
from photon.federation.broadcast import Inbox
from photon.federation.envelopes import encoded, parse_reply, sealed
from photon.membership.keys import NodeKey
from photon.membership.signing import RECEIPT, sign_document, verify_document
from photon.silo.policy import read_membership
from photon.silo.service import Listener
from photon.silo.socket import answer_of, ask_trainer
from photon.silo.trainer import DEATHS
from photon.store.contract import FolderStore, Store, unpaced
from photon.store.transfer import Transfer
from photon.version import photon_version

#: A kept inner state, error feedback, encoded broadcasts.
WHOLE_LIFE = (
    "federation.optimizer_state=keep",
    'link.update_codec="int8"',
    'link.broadcast_codec="int8"',
)


@pytest.fixture
def fits(monkeypatch):
    """Tasks that reach a node."""
    seen = []
    fit = Node.fit

    def counted(self, task, state):
        seen.append(task)
        return fit(self, task, state)

    monkeypatch.setattr(Node, "fit", counted)
    return seen


def keys_of(store):
    return [key for key, _ in store.keys()]  # noqa: SIM118 - not a mapping


def own_keys(store):
    return [key for key in keys_of(store) if "/silos/" in key]


def test_an_answer_is_what_a_node_in_this_process_gives(bench, aggregator, tmp_path):
    ask = aggregator.fit()
    receipt, ref = aggregator.expected(aggregator.node(tmp_path / "alone"), ask)
    reply = bench.answer(ask)
    assert reply.fit.update == ref
    for field in ("tokens", "loss", "first_loss", "last_loss"):
        assert getattr(reply.fit, field) == getattr(receipt, field), field
    assert reply.fit.receipt(1, "red").bytes_up == ref.wire_bytes == receipt.bytes_up
    # As received, whatever the aggregator reckons with.
    assert reply.fit.bytes_down == ask.state.whole.wire_bytes
    assert reply.data == aggregator.data.sha256
    assert ref.key in own_keys(bench.store)
    assert all(key.startswith(f"{ask.run.id}/silos/red/") for key in own_keys(bench.store))
    assert bench.reporter.now.state == "idle"


def test_the_wait_for_the_state_is_part_of_loading(bench, aggregator, monkeypatch):
    receive = Inbox.receive

    def slowly(self, ref):
        time.sleep(0.5)
        return receive(self, ref)

    monkeypatch.setattr(Inbox, "receive", slowly)
    assert bench.answer(aggregator.fit()).fit.load_s >= 0.5


@pytest.mark.parametrize("recipe", [WHOLE_LIFE, ("federation.optimizer_state=average",)])
def test_rounds_go_on_from_what_the_silo_keeps(recipe, make_aggregator, make_bench, tmp_path):
    """Over three rounds and a restart, against one node that lives through all of them."""
    aggregator = make_aggregator(*recipe)
    bench = make_bench(aggregator)
    alone = aggregator.node(tmp_path / "alone")
    node_round, received = None, []
    for number in (1, 2, 3):
        ask = aggregator.fit(number=number, node_round=node_round)
        receipt, ref = aggregator.expected(alone, ask)
        if number == 3:
            # Restarted, it holds no state that an outer update could go on top of.
            aggregator.ref = aggregator.publish()
            bench.start()
            ask = aggregator.fit(number=number, node_round=node_round)
        reply = bench.answer(ask)
        assert reply.fit.update == ref, number
        assert reply.fit.left_out == receipt.left_out
        received.append(reply.fit.bytes_down)
        node_round = number
        aggregator.move()
    if recipe is WHOLE_LIFE:
        assert received[1] < received[0] / 3  # the outer update only
        assert received[2] == received[0]
    kept = sorted(path.name for path in (bench.home / "nodes" / ask.run.id).glob("red/round-*"))
    assert kept == (["round-000002", "round-000003"] if recipe is WHOLE_LIFE else [])


def test_asked_again_it_gives_the_same_answer_without_training(bench, aggregator, fits):
    ask = aggregator.fit()
    first = bench.trainer.answer(ask, lambda: math.inf)
    bench.start()  # also another process
    assert bench.trainer.answer(ask, lambda: math.inf) == first
    # The same question in another Ask, as a restarted aggregator asks it: its answer says so.
    other = ask.model_copy(update={"within_s": 7000.0, "log_head": "9" * 64})
    again = bench.answer(other)
    assert again.fit == parse_reply(first.text).fit
    assert (again.ask, again.log_head) == (other.sha256, "9" * 64)
    assert len(fits) == 1


def test_what_the_store_lost_is_sent_again(bench, aggregator, fits):
    ask = aggregator.fit()
    first = bench.answer(ask)
    mine = own_keys(bench.store)
    bench.store.delete(mine)
    assert not own_keys(bench.store)
    assert bench.answer(ask) == first
    assert own_keys(bench.store) == mine
    assert len(fits) == 1


def test_another_question_under_the_same_name_is_another_task(bench, aggregator, fits):
    """An aggregator that went back to an older checkpoint."""
    first = bench.answer(aggregator.fit())
    aggregator.move()
    second = bench.answer(aggregator.fit())
    assert second.task == first.task
    assert second.fit.update.sha256 != first.fit.update.sha256
    assert len(fits) == 2


def test_a_kept_answer_that_the_disk_lost_is_made_again(bench, aggregator, fits):
    ask = aggregator.fit()
    first = bench.answer(ask)
    (chunk,) = (bench.home / "answers").rglob("chunks/*")
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    bench.store.delete(own_keys(bench.store))
    second = bench.answer(ask)
    assert second.fit.update == first.fit.update
    assert len(fits) == 2


def test_evaluation_scores_the_silos_own_text(bench, aggregator, tmp_path):
    ask = aggregator.evaluation()
    expected = aggregator.score(aggregator.node(tmp_path / "alone"), "red")
    reply = bench.answer(ask)
    assert reply.evaluate.loss == expected.loss
    assert reply.evaluate.tokens == expected.tokens
    assert bench.answer(ask) == reply  # kept, the seconds that it took and all
    assert not own_keys(bench.store)


def test_a_silo_may_be_called_otherwise_in_its_folder(make_aggregator, make_bench, one_silo):
    """One silo in the folder is this site's, whatever its name; of several it must be told."""
    aggregator = make_aggregator(data=one_silo)
    aggregator.run = aggregator.run.model_copy(update={"silos": ["hospital"]})
    bench = make_bench(aggregator, name="hospital")
    reply = bench.answer(aggregator.fit("hospital"))
    assert reply.fit.tokens > 0
    scored = bench.answer(aggregator.evaluation("hospital"))
    assert scored.evaluate.tokens > 0


def test_the_node_file_says_which_silo(aggregator, make_bench):
    aggregator.run = aggregator.run.model_copy(update={"silos": ["hospital", "blue"]})
    bench = make_bench(aggregator, name="hospital")
    refused = bench.refusal(aggregator.fit("hospital"))
    assert refused.code == 22
    assert "data.silo" in refused.hint
    bench.node = bench.node.model_copy(
        update={"data": bench.node.data.model_copy(update={"silo": "blue"})}
    )
    bench.start()
    assert bench.answer(aggregator.fit("hospital")).fit.tokens > 0


def overflow(aggregator, factor, part=""):
    """Another state, so large that arithmetic with it ends in infinities."""
    for name in [name for name in aggregator.state if part in name]:
        aggregator.state[name] = aggregator.state[name] * factor
    aggregator.number += 1
    aggregator.ref = aggregator.publish()


def test_a_loss_that_is_not_finite_is_a_failure_and_kept(bench, aggregator, fits):
    overflow(aggregator, 1e30)
    ask = aggregator.fit()
    reply = bench.answer(ask)
    assert reply.fit.update is None
    assert "the loss became" in reply.fit.failure
    assert reply.fit.failure_code == 61
    assert reply.fit.bytes_down > 0
    assert bench.answer(ask) == reply
    assert len(fits) == 1
    assert not own_keys(bench.store)
    # It goes on with the next task as if nothing had been.
    overflow(aggregator, 1e-30)
    assert bench.answer(aggregator.fit(number=2)).fit.update is not None


def test_a_score_that_is_not_finite_is_refused(bench, aggregator):
    overflow(aggregator, 1e38, "proj")
    refused = bench.refusal(aggregator.evaluation())
    assert refused.code == 61
    assert "held-out text of red is nan" in refused.message


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_an_update_that_is_not_finite_is_a_failure(codec, make_aggregator, make_bench, fits):
    """The loss of the last step was fine, what came of it is not."""
    aggregator = make_aggregator(
        "local.steps=1",
        "local.optimizer=sgd",
        "local.lr=1e38",
        "local.clip_norm=0",
        f'link.update_codec="{codec}"',
        "federation.rounds=1",
    )
    bench = make_bench(aggregator)
    overflow(aggregator, 30.0)
    reply = bench.answer(aggregator.fit())
    assert reply.fit is not None, reply.refused
    assert reply.fit.failure_code == 61
    assert "can't encode" in reply.fit.failure
    assert bench.answer(aggregator.fit()) == reply
    assert len(fits) == 1


def test_a_new_run_gets_a_new_node(make_aggregator, make_bench, tmp_path):
    one = make_aggregator()
    two = make_aggregator("local.optimizer=muon", "local.lr=1e-2", run_id="f" * 32)
    bench = make_bench(one)
    for aggregator, number in ((one, 1), (two, 1), (one, 2)):
        folder = tmp_path / f"alone-{aggregator.run.id}-{number}"
        ask = aggregator.fit(number=number)
        _, ref = aggregator.expected(aggregator.node(folder), ask)
        assert bench.answer(ask).fit.update == ref
    told = json.loads((bench.home / "run.json").read_text())
    assert (told["id"], told["silos"]) == (one.run.id, ["blue", "green", "red"])


def test_only_so_many_answers_are_kept(make_bench, aggregator, fits):
    bench = make_bench(aggregator, "disk.keep_answers=2")
    for number in (1, 2, 3):
        bench.answer(aggregator.fit(number=number))
        bench.answer(aggregator.evaluation(number=number))
    folder = bench.home / "answers" / aggregator.run.id
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["evaluate-000002", "evaluate-000003", "fit-000002", "fit-000003"]
    bench.answer(aggregator.fit(number=2))
    assert len(fits) == 3


def test_states_of_old_runs_do_not_pile_up(bench, make_aggregator):
    for digit in "23456":
        aggregator = make_aggregator(run_id=digit * 32)
        bench.answer(aggregator.fit())
        time.sleep(0.01)  # folders are told apart by their times
    kept = sorted(path.name[0] for path in (bench.home / "nodes").iterdir())
    assert kept == ["3", "4", "5", "6"]


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"photon_version": "9.9.9"}, 86, "9.9.9"),
        ({"run": {"silos": ["blue", "green"]}}, 86, "not among the run's silos"),
        ({"run": {"model": "0" * 64}}, 31, "fingerprint"),
        ({"run": {"tokenizer": "0" * 64}}, 25, "tokenizer"),
        ({"run": {"vocab_size": 301}}, 25, "vocabulary size"),
        ({"run": {"eos_id": 7}}, 25, "end-of-text"),
        ({"run": {"config": {"model": {"preset": "tiny"}, "compute": {}}}}, 86, "dictates"),
        ({"run": {"config": {"model": {"preset": "huge"}}}}, 12, "huge"),
        ({"run": {"config": {"modell": {}}}}, 11, "modell"),
    ],
)
def test_what_does_not_match_is_refused(fields, code, words, bench, aggregator, changed, fits):
    refused = bench.refusal(changed(aggregator.fit(), **fields))
    assert refused.code == code
    assert words in refused.message
    assert not fits
    assert bench.reporter.now.state == "refused"
    assert bench.reporter.now.task == ""  # it does not work on it
    assert bench.answer(aggregator.fit()).fit.update is not None


def test_a_task_for_another_silo_is_refused(bench, aggregator):
    signed = bench.trainer.answer(aggregator.fit("blue"), lambda: 4e9)
    assert "a task for silo 'blue' reached 'red'" in parse_reply(signed.text).refused.message


def test_a_patch_release_is_the_same_photon(bench, aggregator, changed):
    major, minor = photon_version().split(".")[:2]
    ask = changed(aggregator.fit(), photon_version=f"{major}.{minor}.99")
    assert bench.answer(ask).fit is not None


def test_policy_is_asked_before_anything_is_read(make_bench, aggregator, fits):
    bench = make_bench(aggregator, 'policy.runs=["med-*"]')
    refused = bench.refusal(aggregator.fit())
    assert refused.code == 85
    assert "policy.runs" in refused.message
    assert not (bench.home / "nodes").exists()
    assert not (bench.home / "answers").exists()


def test_policy_is_asked_for_kept_answers_too(make_bench, aggregator):
    bench = make_bench(aggregator)
    bench.answer(aggregator.fit())
    policy = bench.node.policy.model_copy(update={"peers": ["green"]})
    bench.node = bench.node.model_copy(update={"policy": policy})
    bench.start()
    assert bench.refusal(aggregator.fit()).code == 85


def test_too_large_a_model_is_refused_before_it_has_weights(make_bench, aggregator):
    bench = make_bench(aggregator, "policy.max_parameters=1000")
    refused = bench.refusal(aggregator.fit())
    assert refused.code == 85
    assert "policy.max_parameters allows 1,000" in refused.message


def test_data_that_changed_is_refused(three_silos, make_bench, aggregator, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(three_silos, copy)
    bench = make_bench(aggregator)
    data = bench.node.data.model_copy(update={"path": str(copy)})
    bench.node = bench.node.model_copy(update={"data": data})
    bench.start()
    bench.answer(aggregator.fit())
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    refused = bench.refusal(aggregator.fit(number=2))
    assert refused.code == 97
    record = json.loads((bench.home / "membership.json").read_text())
    record["data_sha256"] = aggregator.data.sha256  # what was registered, after a restart
    (bench.home / "membership.json").write_text(json.dumps(record))
    bench.start()
    assert bench.refusal(aggregator.fit(number=2)).code == 97


def test_a_flipped_bit_in_the_text_is_found(three_silos, make_bench, aggregator, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(three_silos, copy)
    bench = make_bench(aggregator)
    data = bench.node.data.model_copy(update={"path": str(copy)})
    bench.node = bench.node.model_copy(update={"data": data})
    bench.start()
    shard = max((copy / "silos/red").rglob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[50] ^= 1
    shard.write_bytes(content)
    refused = bench.refusal(aggregator.fit())
    assert refused.code == 24


def test_missing_data_is_said_and_can_be_put_right(three_silos, make_bench, aggregator, tmp_path):
    bench = make_bench(aggregator)
    data = bench.node.data.model_copy(update={"path": str(tmp_path / "later")})
    bench.node = bench.node.model_copy(update={"data": data})
    bench.start()
    assert bench.refusal(aggregator.fit()).code == 21
    shutil.copytree(three_silos, tmp_path / "later")
    assert bench.answer(aggregator.fit()).fit is not None


def test_no_room_is_said_before_training(make_bench, aggregator, fits):
    bench = make_bench(aggregator, "disk.min_free_gib=1e9")
    refused = bench.refusal(aggregator.fit())
    assert refused.code == 51
    assert "disk.min_free_gib" in refused.message
    assert not fits


def test_a_state_that_is_gone_or_broken_is_refused(bench, aggregator, fits):
    ask = aggregator.fit()
    chunk = next(key for key in keys_of(bench.store) if "/chunks/" in key)
    whole = bench.store.get(chunk, max_bytes=1 << 30)
    bench.store.delete([chunk])
    assert bench.refusal(ask).code == 72
    bench.store.put(chunk, bytes(len(whole)))
    assert bench.refusal(ask).code == 73
    bench.store.delete([chunk])
    bench.store.put(chunk, whole)
    assert not fits
    assert bench.answer(ask).fit.update is not None


def test_a_site_that_lost_its_kept_state_goes_on_and_says_so(make_aggregator, make_bench, tmp_path):
    aggregator = make_aggregator(*WHOLE_LIFE, "federation.rounds=9")
    bench = make_bench(aggregator)
    ask = aggregator.fit(number=2, node_round=1)
    answer = bench.answer(ask).fit
    assert answer.state_lost
    # Its text goes on where the aggregator says it was, its optimizer and feedback start afresh.
    fresh = ask.model_copy(update={"fit": ask.fit.model_copy(update={"node_round": None})})
    assert answer.update == aggregator.expected(aggregator.node(tmp_path), fresh)[1]
    assert not bench.answer(aggregator.fit(number=3, node_round=2)).fit.state_lost


def test_draining_takes_no_new_task_but_gives_what_is_done(bench, aggregator):
    done = bench.answer(aggregator.fit())
    bench.reporter.draining = True
    assert "draining" in bench.refusal(aggregator.fit(number=2)).message
    assert bench.answer(aggregator.fit()) == done
    bench.reporter.draining = False
    assert bench.answer(aggregator.fit(number=2)).fit is not None


def test_it_is_told_which_task_is_worked_on(bench, aggregator, monkeypatch):
    told, say = [], bench.reporter.say

    def say_and_note(state, **what):
        say(state, **what)
        told.append((bench.reporter.now.state, bench.reporter.now.task))

    monkeypatch.setattr(bench.reporter, "say", say_and_note)
    ask = aggregator.fit()
    assert bench.answer(ask).fit is not None
    assert ("training", ask.task_id) in told
    assert {task for state, task in told if state != "idle"} == {ask.task_id}
    assert told[-1] == ("idle", "")


def test_a_copied_key_stops_the_later_node(bench, aggregator):
    bench.reporter.key_in_use = KeyInUseError("another node runs with the key of red")
    assert bench.refusal(aggregator.fit()).code == 96


def test_a_task_that_came_too_late_is_not_begun(bench, aggregator, fits):
    refused = bench.refusal(aggregator.fit(), left_s=-5)
    assert "5 s ago" in refused.message
    assert not fits


# --- what is no Ask ----------------------------------------------------------------------------


def signed_refusal(bench, raw):
    answer = bench.trainer.refuse_unread(raw, PhotonError("it makes no sense"))
    if "error" in answer:
        return answer["error"]
    text = base64.b64decode(answer["reply"])
    verify_document(bench.key.public_pem, RECEIPT, text, answer["signature"])
    return parse_reply(text)


def test_what_can_be_told_of_a_broken_ask_is_signed(bench, aggregator):
    record = json.loads(encoded(aggregator.fit()))

    def around(text) -> bytes:
        return json.dumps({"protocol": 3, "ask": text, "signature": "none"}).encode()

    text = json.dumps(record | {"protocol": 3})
    reply = signed_refusal(bench, around(text))
    assert reply.task == aggregator.fit().task_id
    assert reply.refused.message == "it makes no sense"
    # What the aggregator asked has another sha256: nobody's words refuse that.
    assert reply.ask == hashlib.sha256(text.encode()).hexdigest() != aggregator.fit().sha256
    assert "code" in signed_refusal(bench, around(json.dumps(record | {"silo": "blue"})))
    for raw in ("", "[]", "{}", '{"kind": []}', '{"kind": "fit", "fit": 3}', "\ud800"):
        assert signed_refusal(bench, around(raw))["message"] == "it makes no sense"
    for raw in (b"", b"\xff", b"[]", b"{}", json.dumps(record).encode()):
        assert signed_refusal(bench, raw)["message"] == "it makes no sense"
    record["run"]["id"] = "../../etc"
    assert "code" in signed_refusal(bench, around(json.dumps(record)))


# --- who asks ----------------------------------------------------------------------------------


def test_only_the_aggregators_own_ask_is_read(bench, aggregator, tmp_path):
    """Nothing of it can be changed by who carries it: not the recipe, the company, nor the time."""
    key = NodeKey.load(tmp_path / "aggregator.key")
    ask = aggregator.fit()
    message = sealed(ask, key)
    assert bench.trainer.read(message) == ask
    record = json.loads(message)
    inner = json.loads(record["ask"])
    for change in (
        {"run": inner["run"] | {"silos": ["red"]}},
        {"run": inner["run"] | {"config": inner["run"]["config"] | {"local": {"lr": 9.0}}}},
        {"fit": inner["fit"] | {"steps": 1}},
        {"state": inner["state"] | {"sha256": "f" * 64}},
        {"within_s": 2.0},
        {"log_head": "f" * 64},
    ):
        text = json.dumps(inner | change, sort_keys=True, separators=(",", ":"))
        with pytest.raises(SignatureError):
            bench.trainer.read(json.dumps(record | {"ask": text}).encode())
    with pytest.raises(SignatureError):  # another key's, this node's own among them
        bench.trainer.read(sealed(ask, bench.key))
    # A signature for another purpose is none.
    other = sign_document(key, RECEIPT, encoded(ask))
    with pytest.raises(SignatureError):
        bench.trainer.read(json.dumps(record | {"signature": other}).encode())


def test_a_clock_that_is_years_off_changes_nothing(bench, aggregator, monkeypatch, tmp_path):
    """Neither is everything too late, nor is anything waited for without end."""
    ask = aggregator.fit(within_s=50.0)
    now_s = time.time()
    for off_s in (-1e8, 1e8):
        monkeypatch.setattr(time, "time", lambda off_s=off_s: now_s + off_s)
        path = tmp_path / f"{off_s:g}.sock"
        listener = Listener(path, bench.trainer.read, bench.trainer.refuse_unread)
        answers = []

        def courier(path=path, answers=answers):
            message = sealed(ask, NodeKey.load(tmp_path / "aggregator.key"))
            answers.append(ask_trainer(path, message, within_s=50.0))

        asking = threading.Thread(target=courier)
        asking.start()
        question = listener.next()
        assert 0 < question.left_s() <= 50
        listener.settle(question, answer_of(bench.trainer.answer(question.ask, question.left_s)))
        asking.join()
        assert parse_reply(answers[0].text).fit is not None


def test_an_older_protocol_is_refused_in_clear_words(bench, aggregator):
    record = json.loads(encoded(aggregator.fit())) | {"protocol": 1}
    with pytest.raises(ProtocolError, match="speaks protocol '1', this Photon speaks 3") as caught:
        bench.trainer.read(json.dumps(record).encode())
    assert "same version" in caught.value.hint


def test_a_node_that_joined_before_there_were_keys_is_told_what_to_do(bench):
    path = bench.home / "membership.json"
    record = json.loads(path.read_text())
    del record["aggregator_key"]
    path.write_text(json.dumps(record))
    with pytest.raises(MembershipError, match="it has no key of the aggregator's") as caught:
        read_membership(bench.home).require_key()
    assert "photon members rotate red" in caught.value.hint


# --- stores that come and go -------------------------------------------------------------------


class Unsteady(Store):
    """A folder that can't be reached for as many requests as `down` says."""

    def __init__(self, below: FolderStore) -> None:
        self.below, self.down, self.refused = below, 0, 0
        self.got, self.breaks_at = [], None

    def _reach(self) -> None:
        if self.down:
            self.down -= 1
            self.refused += 1
            raise StoreUnavailableError("the store is down")

    def put(self, key, data, *, pace=unpaced):
        self._reach()
        self.below.put(key, data, pace=pace)

    def get(self, key, *, max_bytes, pace=unpaced):
        self._reach()
        self.got.append(key)
        if key == self.breaks_at:
            self.breaks_at = None
            raise StoreUnavailableError("the line broke")
        return self.below.get(key, max_bytes=max_bytes, pace=pace)

    def size(self, key):
        self._reach()
        return self.below.size(key)

    def keys(self, prefix=""):
        return self.below.keys(prefix)

    def delete(self, keys):
        self.below.delete(keys)

    def __str__(self):
        return "an unsteady store"


def unsteady(bench, monkeypatch, *, streams=8):
    bench.store = Unsteady(bench.store)
    bench.trainer._carriers = lambda _: Transfer(bench.store, streams=streams, attempts=1)
    monkeypatch.setattr("photon.silo.trainer._FIRST_PAUSE_S", 0.01)
    return bench.store


def test_an_outage_is_waited_for_both_ways(bench, aggregator, monkeypatch, fits):
    store = unsteady(bench, monkeypatch)
    store.down = 3
    send = bench.trainer._send

    def outage_then_send(ask):
        if store.refused == 3:
            store.down = 3
        send(ask)

    bench.trainer._send = outage_then_send
    reply = bench.answer(aggregator.fit())
    assert store.refused >= 6
    assert reply.fit.update.key in keys_of(store)
    assert len(fits) == 1


def test_what_arrived_before_an_outage_is_not_fetched_again(
    make_aggregator, make_bench, monkeypatch
):
    aggregator = make_aggregator("federation.optimizer_state=average")
    bench = make_bench(aggregator)
    chunks = sorted(key for key in keys_of(bench.store) if "/chunks/" in key)
    assert len(chunks) > 1
    store = unsteady(bench, monkeypatch, streams=1)
    ask = aggregator.fit()
    whole = ask.state.whole
    manifest = json.loads(bytes(store.get(whole.key, max_bytes=whole.bytes)))
    last = manifest["chunks"][-1]["sha256"]
    store.breaks_at, store.got = next(key for key in chunks if key.endswith(last)), []
    reply = bench.answer(ask)
    assert store.breaks_at is None  # it broke
    assert {store.got.count(key) for key in chunks if not key.endswith(last)} == {1}
    assert reply.fit.bytes_down == whole.wire_bytes
    assert not (bench.home / "incoming").exists()


def test_an_outage_longer_than_the_deadline_is_a_refusal_and_loses_nothing(
    bench, aggregator, monkeypatch, fits
):
    store = unsteady(bench, monkeypatch)
    send, ends = bench.trainer._send, [math.inf]

    def outage(ask):
        store.down = 10**6
        ends[0] = min(ends[0], time.monotonic() + 3)
        send(ask)

    bench.trainer._send = outage
    ask = aggregator.fit()
    refused = parse_reply(
        bench.trainer.answer(ask, lambda: ends[0] - time.monotonic()).text
    ).refused
    assert refused.code == 71
    assert store.refused > 3
    store.down = 0
    bench.start()
    assert bench.answer(ask).fit.update is not None
    assert len(fits) == 1  # what was trained was kept


# --- mistakes of our own -------------------------------------------------------------------------


def test_a_task_that_ends_the_trainer_twice_in_the_same_way_is_refused(
    bench, aggregator, monkeypatch
):
    whole, calls = Node._fit, itertools.count(1)

    def broken(self, task, state):
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

    def first(self, task, state):
        raise RuntimeError("one")

    def second(self, task, state):
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

    def killed(self, task, state):
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

    def stopped(self, task, state):
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
