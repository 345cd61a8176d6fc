"""The audit log's chain: lines changed, lost or added are found, however well covered up."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os

import pytest
from audit_rounds import RUN, STATE, UPDATE, canonical, finished, last, merged_update, problems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon.errors import AuditError, DiskFullError, RunNotFoundError
from photon.membership.audit import MEMBER, RESUMED, ROUND, AuditLog, ResumedRecord
from photon.membership.verification import verify_audit


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
    assert last(again, ROUND)["round"] == 3
    assert last(again, RESUMED) is None
    again.append(ROUND, finished(4, merged(round=4)))
    # The first one sees what the second one wrote, and does not break the chain.
    assert last(three_rounds, ROUND)["round"] == 4
    three_rounds.append(ROUND, finished(5, merged(round=5)))
    assert verify_audit(path).rounds == 5


# --- lines changed, removed, added ----------------------------------------------------------------


def rewritten(path, change):
    """Change one line's record, and mend its own sha256 if `change` says so."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines = change(lines)
    path.write_bytes(b"".join(lines))


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
            del record["root"]  # as logs of earlier versions
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
        assert last(log, ROUND)["round"] == 2
        assert last(log, "torn")["bytes"] > 0
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
        log.append(ROUND, finished(number, merged_update("lab", UPDATE, 1000, signed)))
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
