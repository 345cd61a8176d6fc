"""The audit log: what breaks it is found, whoever did it and however well it was covered up."""

import dataclasses
import errno
import hashlib
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rotation import rotate

from photon.errors import AuditError, DiskFullError, RunNotFoundError
from photon.membership.audit import (
    MEMBER,
    RESUMED,
    ROUND,
    AuditLog,
    DroppedSilo,
    MergedUpdate,
    ResumedRecord,
    RoundRecord,
)
from photon.membership.chain import BEGINNING
from photon.membership.signing import LOG, RECEIPT, sign_document
from photon.membership.verification import verify_audit

RUN = "a" * 32
STATE = "5" * 64
UPDATE = "f" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path, roster, join, keys):
    """A log in which lab and bank are members."""
    log = AuditLog(path)
    for name, key in (("lab", keys[0]), ("bank", keys[1])):
        log.append(MEMBER, roster.signer(join(name, key).fingerprint))
    return log


@pytest.fixture
def merged(keys, signed_reply):
    """merged("lab", 3): lab's part of round 3."""

    def merged(silo="lab", round=1, *, key=None, **reply):
        key = key or keys[("lab", "bank").index(silo)]
        return MergedUpdate.of(silo, UPDATE, 1000, signed_reply(key, silo, round, **reply))

    return merged


def finished(round, *merged, run=RUN, state=STATE, dropped=()):
    return RoundRecord(
        run=run, round=round, state_sha256=state, merged=list(merged), dropped=list(dropped)
    )


@pytest.fixture
def three_rounds(log, merged):
    for number in (1, 2, 3):
        log.append(ROUND, finished(number, merged("lab", number), merged("bank", number)))
    return log


def problems(path):
    return [text.partition(": ")[2] for text in verify_audit(path).problems]


def test_a_good_log(three_rounds, path, keys):
    report = verify_audit(path)
    assert report.problems == report.remarks == []
    assert (report.lines, report.rounds, report.updates, report.last_round) == (5, 3, 6, 3)
    assert report.members == {"lab": keys[0].fingerprint, "bank": keys[1].fingerprint}
    report.require_good()
    lines = path.read_bytes().splitlines()
    last = json.loads(lines[-1])
    assert last["previous"] == json.loads(lines[-2])["sha256"]
    assert report.head == three_rounds.head == last["sha256"]
    # What the sha256 is of, said once more by hand.
    del last["sha256"]
    text = json.dumps(last, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == report.head


def test_an_empty_log_is_good(path):
    AuditLog(path)
    assert verify_audit(path).problems == []
    with pytest.raises(RunNotFoundError, match="there is no"):
        verify_audit(path.parent / "nowhere")
    with pytest.raises(RunNotFoundError, match="there is no"):
        verify_audit(path.parent / "other.jsonl")


def test_it_goes_on_where_it_was(three_rounds, path, merged):
    again = AuditLog(path)
    assert again.last(ROUND)["round"] == 3
    assert again.last(RESUMED) is None
    again.append(ROUND, finished(4, merged(round=4)))
    # The first one sees what the second one wrote, and does not break the chain.
    assert three_rounds.last(ROUND)["round"] == 4
    three_rounds.append(ROUND, finished(5, merged(round=5)))
    assert verify_audit(path).rounds == 5


# --- lines changed, removed, added ----------------------------------------------------------------


def rewritten(path, change):
    """Change one line's record, and mend its own sha256 if `change` says so."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines = change(lines)
    path.write_bytes(b"".join(lines))


def canonical(record):
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def sealed(record):
    """A record with the sha256 that its content has."""
    bare = {name: value for name, value in record.items() if name != "sha256"}
    return canonical({**bare, "sha256": hashlib.sha256(canonical(bare)).hexdigest()}) + b"\n"


def test_a_changed_line_is_found(three_rounds, path):
    rewritten(
        path, lambda lines: [*lines[:3], lines[3].replace(STATE.encode(), b"6" * 64), *lines[4:]]
    )
    assert problems(path) == ["its sha256 is not that of its content"]
    with pytest.raises(AuditError, match="line 4: its sha256 is not that of its content"):
        verify_audit(path).require_good()
    with pytest.raises(AuditError, match="line 4: its sha256"):
        AuditLog(path)
    before = path.read_bytes()
    with pytest.raises(AuditError):
        AuditLog(path).append("more", {})
    assert path.read_bytes() == before


def test_a_changed_line_with_a_mended_hash_is_found(three_rounds, path):
    def change(lines):
        record = json.loads(lines[3])
        record["body"]["state_sha256"] = "6" * 64
        return [*lines[:3], sealed(record), *lines[4:]]

    rewritten(path, change)
    assert problems(path) == ["it does not follow the line before: lines were changed or lost"]
    assert "line 5" in verify_audit(path).problems[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: [*lines[:4], lines[3], *lines[4:]],
        lambda lines: lines[1:],
        lambda lines: [*lines[:2], b"words\n", *lines[2:]],
        lambda lines: [*lines[:2], b"\n", *lines[2:]],
        lambda lines: [*lines[:2], lines[2].replace(b'{"at"', b'{ "at"'), *lines[3:]],
        lambda lines: [*lines[:2], lines[2].replace(b'{"at"', b'{"n":9,"at"'), *lines[3:]],
        lambda lines: [*lines[:2], b'{"at":NaN}\n', *lines[2:]],
        lambda lines: [*lines[:2], b"[" * 100_000 + b"\n", *lines[2:]],
        lambda lines: [*lines[:2], b"1" * 10_000 + b"\n", *lines[2:]],
        lambda lines: [*lines[:2], b"\xff\xfe\n", *lines[2:]],
    ],
    ids=[
        "removed",
        "swapped",
        "doubled",
        "begun later",
        "words",
        "empty",
        "spaces",
        "a key twice",
        "NaN",
        "deep",
        "long number",
        "no text",
    ],
)
def test_lines_removed_moved_or_added_are_found(three_rounds, path, change):
    rewritten(path, change)
    assert verify_audit(path).problems
    with pytest.raises(AuditError):
        AuditLog(path)


def test_a_whole_chain_made_anew_still_lacks_the_signatures(three_rounds, path, merged, keys):
    """Whoever can write the file can make a good chain; not a silo's signature."""

    def change(lines):
        fresh, previous = [], "0" * 64
        for line in lines:
            record = json.loads(line)
            record["previous"] = previous
            if record["kind"] == ROUND and record["body"]["round"] == 2:
                record["body"]["merged"][0]["update"] = "e" * 64
                reply = record["body"]["merged"][0]["reply"]
                record["body"]["merged"][0]["reply"] = reply.replace(UPDATE, "e" * 64)
            fresh.append(sealed(record))
            previous = json.loads(fresh[-1])["sha256"]
        return fresh

    rewritten(path, change)
    assert problems(path) == ["the signature of lab does not hold"]


def test_lines_cut_off_the_end_are_found_by_a_head_or_a_checkpoint(three_rounds, path):
    head = three_rounds.head
    assert verify_audit(path, head=head).problems == []
    (path.parent / "checkpoints" / "round-000003").mkdir(parents=True)
    (path.parent / "checkpoints" / ".round-000004.partial").mkdir()
    assert verify_audit(path.parent).problems == []
    rewritten(path, lambda lines: lines[:-1])
    assert verify_audit(path).problems == []
    assert f"no line has the sha256 '{head}'" in verify_audit(path, head=head).problems[0]
    assert (
        "ends at round 2, but there is a checkpoint of round 3"
        in (verify_audit(path.parent).problems[0])
    )
    with pytest.raises(AuditError, match="bytes were cut off its end"):
        three_rounds.append("more", {})


def test_a_checkpoint_of_another_state_is_found(log, path, merged):
    files = {"global.safetensors": "1" * 64}
    for number in (1, 2):
        record = finished(number, merged(round=number)).model_dump()
        log.append(ROUND, record | {"state_sha256": None, "checkpoint": files})
        state = path.parent / f"checkpoints/round-{number:06d}/state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"format": 1, "files": files, "round": number}))
    assert verify_audit(path.parent).problems == []
    state.write_text(json.dumps({"files": {"global.safetensors": "2" * 64}}))
    (found,) = verify_audit(path.parent).problems
    assert found == f"{state} is not the state that the log tells of"
    log.append(RESUMED, ResumedRecord(run=RUN, round=2, checkpoint={"global.safetensors": "2"}))
    assert problems(path) == ["resumed from another state than the one after round 2"]


def test_a_torn_last_line_is_dropped_and_said(three_rounds, path):
    whole = path.read_bytes()
    for cut in (1, 50, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        report = verify_audit(path)
        assert report.problems == []
        assert "the last line is cut short" in report.remarks[0]
        log = AuditLog(path)
        assert log.last(ROUND)["round"] == 2
        assert log.last("torn")["bytes"] > 0
        report = verify_audit(path)
        assert report.problems == []
        assert "a line cut short was removed before it" in report.remarks[0]


def test_a_full_disk_leaves_the_log_as_it_was(three_rounds, path, merged, monkeypatch):
    before, sync = path.read_bytes(), os.fsync

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no room for the next line"):
        three_rounds.append(ROUND, finished(4, merged(round=4)))
    assert path.read_bytes() == before
    monkeypatch.setattr(os, "fsync", sync)
    three_rounds.append(ROUND, finished(4, merged(round=4)))
    assert verify_audit(path).problems == []


# --- what the records say -------------------------------------------------------------------------


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
    log.append(ROUND, finished(1, MergedUpdate.of("lab", UPDATE, 1000, signed)))
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
    assert log.last("note") == {"what": "anything", "nested": [1, {"a": None}]}
    assert problems(path) == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append("note", {"value": float("nan")})
    assert problems(path) == []


# --- fuzz -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_log(tmp_path_factory):
    """Bytes of a log of two rounds, made once."""
    from photon.membership.keys import NodeKey
    from photon.membership.records import SignedReply, Signer
    from photon.membership.signing import RECEIPT, sign_document

    folder = tmp_path_factory.mktemp("good")
    key = NodeKey.create(folder / "key")
    log = AuditLog(folder / "audit.jsonl")
    log.append(
        MEMBER,
        Signer("lab", key.fingerprint, key.public_pem),
    )
    for number in (1, 2):
        reply = {"kind": "fit", "run": RUN, "round": number, "silo": "lab"}
        text = canonical(reply | {"fit": {"update": {"sha256": UPDATE}, "tokens": 1000}})
        signed = SignedReply("t", text, sign_document(key, RECEIPT, text), key.fingerprint)
        log.append(ROUND, finished(number, MergedUpdate.of("lab", UPDATE, 1000, signed)))
    assert verify_audit(log.path).problems == []
    return log.path.read_bytes()


@given(data=st.data())
def test_no_flipped_bit_passes(good_log, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flipped.jsonl"
    raw = bytearray(good_log)
    place = data.draw(st.integers(0, len(raw) - 2))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    assert verify_audit(path).problems
    with pytest.raises(AuditError):
        AuditLog(path)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(kind=st.sampled_from([MEMBER, ROUND, RESUMED]), data=st.data())
def test_any_body_in_a_good_chain_is_judged(good_log, tmp_path_factory, kind, data):
    """An aggregator that lies can write any record; reading it must neither crash nor hang."""
    path = tmp_path_factory.getbasetemp() / "bodies.jsonl"
    path.write_bytes(good_log)
    records = [json.loads(line) for line in good_log.splitlines()]
    body = next((one["body"] for one in records if one["kind"] == kind), {"run": RUN, "round": 1})
    body = json.loads(json.dumps(body))
    for _ in range(data.draw(st.integers(1, 3))):
        here = body
        if kind == ROUND and data.draw(st.booleans()) and isinstance(body.get("merged"), list):
            here = (
                body["merged"][0]
                if body["merged"] and isinstance(body["merged"][0], dict)
                else body
            )
        here[data.draw(st.sampled_from([*sorted(here), "more"]))] = data.draw(_JSON)
    AuditLog(path).append(kind, body)
    report = verify_audit(path)
    assert report.lines == 4
    assert all(text.isprintable() for text in report.problems)
    assert dataclasses.asdict(report)
    json.dumps(report.members)
