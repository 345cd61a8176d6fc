"""The audit log's records: what contradicts a signed answer, or the rounds before, is found."""

from __future__ import annotations

import json

import pytest
from audit_rounds import RUN, STATE, UPDATE, canonical, finished, last, merged_update, problems
from rotation import rotate

from photon.membership.audit import (
    MEMBER,
    RESUMED,
    ROUND,
    AuditLog,
    DroppedSilo,
    ResumedRecord,
)
from photon.membership.chain import BEGINNING
from photon.membership.signing import LOG, RECEIPT, sign_document
from photon.membership.verification import verify_audit


def test_an_unsigned_or_foreign_update_is_found(log, path, merged, keys, signed_reply):
    good = merged("lab")
    log.append(ROUND, finished(1, good.model_copy(update={"signature": ""})))
    # Signed by another member, under its own key or under lab's name.
    log.append(ROUND, finished(2, merged("lab", 2, key=keys[1])))
    stolen = merged("lab", 3, key=keys[1])
    log.append(ROUND, finished(3, stolen.model_copy(update={"fingerprint": keys[0].fingerprint})))
    log.append(ROUND, finished(4, merged("lab", 4, key=keys[3])))
    assert problems(path) == [
        "the signature of lab does not hold",
        f"no key {keys[1].fingerprint} of lab is recorded before this round",
        "the signature of lab does not hold",
        f"no key {keys[3].fingerprint} of lab is recorded before this round",
    ]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"round": 7}, "lab signed round 7, but 1 is what was counted"),
        ({"run": "b" * 32}, "lab signed run 'bbb"),
        ({"silo": "bank"}, "lab signed silo 'bank', but 'lab'"),
        ({"update": "e" * 64}, "lab signed update 'eee"),
        ({"tokens": 999}, "lab signed tokens 999, but 1000"),
        ({"tokens": 1000.0}, "no answer to a training task"),
        ({"kind": "evaluate"}, "lab signed kind 'evaluate', but 'fit'"),
        ({"fit": None}, "the reply of lab is no answer to a training task"),
        ({"fit": {"update": None, "tokens": 1000}}, "no answer to a training task"),
        ({"data": "c" * 64}, "lab trained on other data than it registered"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_signed_reply_to_another_question_is_found(log, path, keys, signed_reply, reply, words):
    fields = {"silo": "lab", "round": 1} | reply
    signed = signed_reply(keys[0], **fields)
    log.append(ROUND, finished(1, merged_update("lab", UPDATE, 1000, signed)))
    (found,) = problems(path)
    assert words in found


def test_hash_and_tokens_may_be_left_to_the_reply(log, path, keys, signed_reply):
    """As the aggregator writes it: what was signed says both."""
    for number, reply in ((1, {}), (2, {"update": None}), (3, {"tokens": "many"})):
        signed = signed_reply(keys[0], "lab", number, **reply)
        part = {"silo": "lab", "reply": signed.text.decode(), "signature": signed.signature}
        part["fingerprint"] = signed.fingerprint
        log.append(ROUND, {"run": RUN, "round": number, "merged": [part], "dropped": []})
    assert problems(path) == ["the reply of lab is no answer to a training task"] * 2


def test_a_replayed_receipt_is_found(three_rounds, path, merged):
    three_rounds.append(ROUND, finished(4, merged("lab", 3)))
    assert problems(path) == ["lab signed round 3, but 4 is what was counted"]


def test_an_update_that_counts_twice_is_found(log, path, merged):
    log.append(ROUND, finished(1, merged("lab"), merged("bank"), merged("lab")))
    assert problems(path) == ["an update of lab counts twice in round 1"]
    log.append(ROUND, finished(1, merged("bank")))
    assert problems(path)[1:] == [
        "round 1 where round 2 must follow",
        "round 1 was merged before",
    ]


def test_rounds_go_up_by_one(log, path, merged):
    for number in (1, 2, 4):
        log.append(ROUND, finished(number, merged(round=number)))
    assert problems(path) == ["round 4 where round 3 must follow"]


def test_a_restart_may_take_rounds_back(three_rounds, path, merged):
    three_rounds.append(RESUMED, ResumedRecord(run=RUN, round=1, state_sha256=STATE))
    for number in (2, 3, 4):
        three_rounds.append(ROUND, finished(number, merged("lab", number)))
    report = verify_audit(path)
    assert report.problems == []
    assert [text.partition(": ")[2] for text in report.remarks] == [
        "round 2 was taken back by a restart",
        "round 3 was taken back by a restart",
    ]
    assert (report.rounds, report.updates, report.last_round) == (4, 5, 4)


def test_a_restart_can_not_jump_ahead_or_change_the_state(three_rounds, path, merged):
    three_rounds.append(RESUMED, ResumedRecord(run=RUN, round=7))
    assert problems(path) == ["resumed after round 7, but the log ends at round 3"]
    three_rounds.append(RESUMED, ResumedRecord(run=RUN, round=2, state_sha256="6" * 64))
    assert problems(path)[1:] == ["resumed from another state than the one after round 2"]


def test_a_log_may_begin_with_a_restart(log, path, merged):
    """A run that was simulated at first, or another machine that takes over without the log."""
    log.append(RESUMED, ResumedRecord(run=RUN, round=5, state_sha256=STATE))
    log.append(ROUND, finished(6, merged(round=6)))
    assert problems(path) == []


def test_two_runs_in_one_log_do_not_disturb_each_other(three_rounds, path, merged):
    other = "b" * 32
    three_rounds.append(ROUND, finished(1, merged("lab", 1, run=other), run=other))
    report = verify_audit(path)
    assert (report.problems, report.rounds, report.last_round) == ([], 4, 3)


def test_a_member_with_a_new_key(log, path, roster, join, keys, merged):
    rotate(roster, "lab", keys[2].public_pem)
    # An answer given before the key was replaced counts; whose key it was is known still.
    assert roster.signer(keys[0].fingerprint).name == "lab"
    log.append(ROUND, finished(1, merged("lab"), merged("bank")))
    log.append(MEMBER, roster.signer(keys[2].fingerprint))
    log.append(ROUND, finished(2, merged("lab", 2, key=keys[2]), merged("bank", 2)))
    report = verify_audit(path)
    assert report.problems == []
    assert report.members["lab"] == keys[2].fingerprint


def test_a_key_with_another_fingerprint_is_found(path, keys):
    log = AuditLog(path)
    log.append(MEMBER, {"name": "lab", "fingerprint": "sha256:0", "public_key": keys[0].public_pem})
    log.append(MEMBER, {"name": "bank", "fingerprint": "sha256:0", "public_key": "words"})
    log.append(MEMBER, {"name": "\x1b[2J", "fingerprint": "sha256:0", "public_key": "words"})
    log.append(ROUND, {"round": "x"})
    found = problems(path)
    assert found[0] == f"the key of lab has another fingerprint: {keys[0].fingerprint}"
    assert found[1].startswith("bank: no public key in PEM")
    assert found[2].startswith("no record of a member: name")
    assert found[3].startswith("no record of a round")
    assert all(text.isprintable() for text in found)


# --- one state a round, and the log's own signatures ----------------------------------------------

OTHER = "6" * 64


def test_two_states_in_one_round_are_found(log, path, merged):
    """An aggregator that gives one silo a state of its own learns more of it than a mean says."""
    lab, bank = merged("lab", state=STATE), merged("bank", state=OTHER)
    log.append(ROUND, finished(1, lab, bank))
    (found,) = problems(path)
    assert found.startswith(f"bank signed that it trained from state {OTHER[:12]}..., not from")
    assert STATE[:12] in found


def test_a_round_starts_from_the_state_that_the_last_one_led_to(log, path, merged):
    log.append(ROUND, finished(1, merged("lab", 1, state=OTHER), state=STATE))
    log.append(ROUND, finished(2, merged("lab", 2, state=STATE), state=OTHER))
    assert problems(path) == []
    log.append(ROUND, finished(3, merged("lab", 3, state=STATE)))
    (found,) = problems(path)
    assert found.startswith(f"lab signed that it trained from state {STATE[:12]}..., not from")
    assert OTHER[:12] in found


def test_a_restart_goes_on_from_the_state_that_it_says(log, path, merged):
    for number in (1, 2):
        log.append(ROUND, finished(number, merged("lab", number, state=STATE), state=STATE))
    log.append(RESUMED, ResumedRecord(run=RUN, round=1, state_sha256=STATE))
    log.append(ROUND, finished(2, merged("lab", 2, state=OTHER)))
    (found,) = problems(path)
    assert found.startswith(f"lab signed that it trained from state {OTHER[:12]}...")


def test_a_head_that_was_never_the_logs_is_found(log, path, merged):
    """The silos were told of another log than this one."""
    log.append(ROUND, finished(1, merged("lab", 1, log_head=BEGINNING)))
    told = log.head
    log.append(ROUND, finished(2, merged("lab", 2, log_head=told)))
    # Also an older one: the loop was restarted, and the answer is from before.
    log.append(ROUND, finished(3, merged("lab", 3, log_head=told)))
    assert problems(path) == []
    log.append(ROUND, finished(4, merged("lab", 4, log_head="f" * 64)))
    (found,) = problems(path)
    assert "lab was told that the log's head is" in found
    assert "never was" in found


def test_a_log_is_signed_line_by_line(path, keys, merged, roster, join):
    log = AuditLog(path, keys[4])
    log.append(MEMBER, roster.signer(join("lab", keys[0]).fingerprint))
    AuditLog(path, keys[4]).append(ROUND, finished(1, merged("lab")))
    report = verify_audit(path)
    assert (report.problems, report.lines) == ([], 3)
    assert report.aggregator == keys[4].fingerprint
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for change in (
        {"signature": lines[0]["signature"]},  # of another line
        {"signature": sign_document(keys[3], LOG, lines[2]["sha256"].encode())},
        {"signature": sign_document(keys[4], RECEIPT, lines[2]["sha256"].encode())},
        {"signature": ""},
        {},
    ):
        bare = {name: value for name, value in lines[2].items() if name != "signature"}
        path.write_bytes(b"".join(canonical(one) + b"\n" for one in (*lines[:2], bare | change)))
        assert problems(path) == ["the aggregator's signature does not hold"]


def test_another_key_that_signs_from_here_on_is_said(path, keys):
    AuditLog(path, keys[3]).append("note", {})
    AuditLog(path, keys[4]).append("note", {})
    report = verify_audit(path)
    assert report.problems == []
    assert "from here on another key signs the log" in report.remarks[0]
    assert report.aggregator == keys[4].fingerprint


def test_merged_and_dropped_at_once_is_found(log, path, merged):
    dropped = [DroppedSilo(silo="lab", reason="late"), DroppedSilo(silo="bank", reason="late")]
    log.append(ROUND, finished(1, merged("lab"), dropped=dropped))
    assert problems(path) == ["lab is both merged and dropped"]


def test_words_of_ones_own_are_welcome(log, path):
    log.append("note", {"what": "anything", "nested": [1, {"a": None}]})
    assert last(log, "note") == {"what": "anything", "nested": [1, {"a": None}]}
    assert problems(path) == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append("note", {"value": float("nan")})
    assert problems(path) == []
