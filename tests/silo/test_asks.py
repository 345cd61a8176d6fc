"""What is no Ask of the aggregator's: never read, and told apart by a signed refusal."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time

import pytest

from photon.errors import MembershipError, PhotonError, ProtocolError, SignatureError
from photon.federation.envelopes import encoded, parse_reply, sealed
from photon.membership.keys import NodeKey
from photon.membership.signing import RECEIPT, sign_document, verify_document
from photon.silo.policy import read_membership
from photon.silo.service import Listener
from photon.silo.socket import answer_of, ask_trainer


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
