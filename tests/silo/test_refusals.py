"""What a site refuses, before it trains, and what puts it right."""

from __future__ import annotations

import json
import shutil

import pytest
from kept_state import WHOLE_LIFE, keys_of

from photon.errors import KeyInUseError
from photon.federation.envelopes import parse_reply
from photon.version import photon_version


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
