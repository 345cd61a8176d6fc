"""Members, invitations, tasks, events: what the file says after each change, and after a crash."""

import contextlib
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rotation import rotate

from photon.errors import (
    DiskFullError,
    InvitationError,
    MembershipError,
    PhotonError,
    ProtocolError,
    UnknownMemberError,
)
from photon.membership import journal
from photon.membership.records import OpenTask, SignedReply
from photon.membership.roster import Facts, Presence, Roster, roster_at

NOW = 1_800_000_000.0


def events_of(roster):
    return [(event.actor, event.what) for event in roster.journal.events()]


def test_an_invitation_makes_a_member(roster, keys, facts):
    token = roster.invite("lab", 3600, now=NOW)
    assert [(one.name, one.rotate, one.expires_at) for one in roster.invitations(now=NOW)] == [
        ("lab", False, NOW + 3600)
    ]
    member = roster.redeem(token, "lab", keys[0].public_pem, facts, now=NOW + 10)
    assert (member.name, member.status, member.facts) == ("lab", "active", facts)
    assert (member.public_key, member.fingerprint) == (keys[0].public_pem, keys[0].fingerprint)
    assert member.joined_at == NOW + 10
    assert roster.member("lab") == roster.active(keys[0].fingerprint) == member
    assert roster.members() == [member]
    assert roster.invitations(now=NOW) == []
    assert events_of(roster) == [("operator", "invited"), ("lab", "joined")]


def test_another_process_sees_it_at_once(roster, join):
    with Roster(roster.path) as other:
        join("lab")
        assert other.member("lab").status == "active"
        roster.suspend("lab")
        assert other.member("lab").status == "suspended"


def test_the_file_is_private(tmp_path, facts, keys):
    before = os.umask(0)
    try:
        with Roster(tmp_path / "home" / "members.sqlite") as roster:
            roster.invite("lab", 60)
            modes = [stat.S_IMODE(path.stat().st_mode) for path in roster.path.parent.iterdir()]
    finally:
        os.umask(before)
    assert modes == [0o600] * 9  # three files, each with a write-ahead log and its index
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700


def test_the_token_is_not_in_the_file(roster):
    token = roster.invite("lab", 60)
    roster.close()
    assert len(token) >= 43
    for path in roster.path.parent.iterdir():
        assert token.encode() not in path.read_bytes()


# --- refused invitations --------------------------------------------------------------------------


def refused(roster, *arguments, now=NOW):
    """The error of a redemption that must fail and leave no member."""
    before = roster.members()
    with pytest.raises(MembershipError) as caught:
        roster.redeem(*arguments, now=now)
    assert roster.members() == before
    return caught.value


def test_a_replayed_invitation_is_refused(roster, keys, facts):
    token = roster.invite("lab", 60, now=NOW)
    roster.redeem(token, "lab", keys[0].public_pem, facts, now=NOW)
    for key in keys[:2]:
        error = refused(roster, token, "lab", key.public_pem, facts)
        assert isinstance(error, InvitationError)
        assert error.message == "the invitation for lab was used at 2027-01-15 08:00 UTC"
    assert roster.member("lab").fingerprint == keys[0].fingerprint


def test_an_expired_token_is_refused(roster, keys, facts):
    token = roster.invite("lab", 60, now=NOW)
    error = refused(roster, token, "lab", keys[0].public_pem, facts, now=NOW + 60)
    assert "expired at 2027-01-15 08:01 UTC" in error.message
    assert roster.redeem(token, "lab", keys[0].public_pem, facts, now=NOW + 59.9)


def test_another_name_token_or_aggregator_is_refused(roster, keys, facts, tmp_path):
    token = roster.invite("lab", 60, now=NOW)
    pem = keys[0].public_pem
    assert "is for lab, not for bank" in refused(roster, token, "bank", pem, facts).message
    for wrong in ("", token[:-1], token + "x", "\ud800", "x" * 10_000):
        assert "no such invitation for lab" in refused(roster, wrong, "lab", pem, facts).message
    for name in ("\ud800", "../lab", "a b", ""):
        assert refused(roster, token, name, pem, facts).exit_code == 81
    with Roster(tmp_path / "other.sqlite") as other:
        refused(other, token, "lab", pem, facts)
    roster.redeem(token, "lab", pem, facts, now=NOW)


def test_a_newer_invitation_replaces_the_unused_one(roster, keys, facts):
    old = roster.invite("lab", 60, now=NOW)
    new = roster.invite("lab", 60, now=NOW + 1)
    error = refused(roster, old, "lab", keys[0].public_pem, facts, now=NOW + 2)
    assert "was replaced by a newer one" in error.message
    assert len(roster.invitations(now=NOW)) == 1
    roster.redeem(new, "lab", keys[0].public_pem, facts, now=NOW + 2)


def test_a_key_belongs_to_one_member(roster, join, keys, facts):
    join("lab", keys[0])
    token = roster.invite("bank", 60, now=NOW)
    error = refused(roster, token, "bank", keys[0].public_pem, facts)
    assert "is or was lab's" in error.message
    # The mistake did not cost the invitation.
    roster.redeem(token, "bank", keys[1].public_pem, facts, now=NOW)


def test_facts_that_make_no_sense_are_refused(roster, keys):
    token = roster.invite("lab", 60)
    good = ("d" * 64, "e" * 64, 1, "0.1.0")
    bad = [
        ("d" * 63, *good[1:]),
        (good[0], "E" * 64, *good[2:]),
        (*good[:2], -1, good[3]),
        (*good[:2], 2**53, good[3]),
        (*good[:3], ""),
        (*good[:3], "1\x1b[2J"),
        (None, *good[1:]),
    ]
    for values in bad:
        with pytest.raises(ValidationError, match="for Facts"):
            roster.redeem(token, "lab", keys[0].public_pem, Facts(*values))
    roster.redeem(token, "lab", keys[0].public_pem, Facts(*good))


def test_names_are_those_of_folders(roster):
    for name in ("", ".lab", "-lab", "a/b", "a b", "é", "x" * 101, "a\n"):
        with pytest.raises(MembershipError, match="no name for a member"):
            roster.invite(name, 60)
    for valid_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(MembershipError, match="can't be valid"):
            roster.invite("lab", valid_s)
    assert roster.journal.events() == []


# --- suspended, expelled, with a new key ----------------------------------------------------------


def test_suspended_and_reinstated(roster, join, keys):
    join("lab")
    roster.suspend("lab")
    assert roster.by_fingerprint(keys[0].fingerprint).status == "suspended"
    with pytest.raises(UnknownMemberError, match="lab is suspended"):
        roster.active_member("lab")
    with pytest.raises(UnknownMemberError, match="lab is suspended by the aggregator's operator"):
        roster.active(keys[0].fingerprint)
    roster.reinstate("lab")
    assert roster.active(keys[0].fingerprint).name == "lab"
    assert roster.active_member("lab") == roster.member("lab")
    roster.reinstate("lab")  # again: nothing to do, nothing to log
    assert [what for _, what in events_of(roster)][2:] == ["suspended", "reinstated"]


def test_expelled_for_good(roster, join, keys, facts):
    join("lab")
    roster.tasks.open(task("t"))
    letter = roster.letters.push("t", b"an ask")
    rotation = roster.invite("lab", 60, rotate=True)
    roster.expel("lab")
    with pytest.raises(UnknownMemberError, match="lab was expelled"):
        roster.active(keys[0].fingerprint)
    assert roster.tasks.open_for("lab") == []
    assert roster.letters.unanswered() == {}
    assert not roster.letters.answer("lab", letter, "too late")
    for change in (roster.reinstate, roster.suspend):
        with pytest.raises(UnknownMemberError, match="was expelled") as caught:
            change("lab")
        assert "photon invite lab" in str(caught.value)
    # Neither the invitation it had, nor its key, bring it back.
    with pytest.raises(InvitationError, match="was withdrawn"):
        roster.redeem(rotation, "lab", keys[1].public_pem, facts)
    with pytest.raises(UnknownMemberError, match="was expelled"):
        roster.invite("lab", 60, rotate=True)
    again = roster.invite("lab", 60)
    with pytest.raises(MembershipError, match="its own before"):
        roster.redeem(again, "lab", keys[0].public_pem, facts)
    assert roster.redeem(again, "lab", keys[1].public_pem, facts).status == "active"
    with pytest.raises(UnknownMemberError, match=r"was lab's until .*: the member was expelled"):
        roster.by_fingerprint(keys[0].fingerprint)


def test_an_invitation_can_be_withdrawn(roster, keys, facts):
    token = roster.invite("lab", 60)
    roster.expel("lab")
    with pytest.raises(InvitationError, match="for lab was withdrawn"):
        roster.redeem(token, "lab", keys[0].public_pem, facts)
    assert roster.members() == roster.invitations() == []
    with pytest.raises(UnknownMemberError):
        roster.expel("lab")


def test_an_invitation_ends_the_old_key(roster, join, keys, facts):
    join("lab", keys[0])
    with pytest.raises(MembershipError, match="lab is a member already") as caught:
        roster.invite("lab", 60)
    assert "photon members rotate lab" in str(caught.value)
    token = roster.invite("lab", 60, rotate=True)
    assert roster.active(keys[0].fingerprint).name == "lab"  # until it is redeemed
    other = Facts("c" * 64, "e" * 64, 5, "0.1.0")
    member = roster.redeem(token, "lab", keys[1].public_pem, other)
    assert (member.fingerprint, member.facts) == (keys[1].fingerprint, other)
    with pytest.raises(UnknownMemberError, match=r"was lab's until .* newer key"):
        roster.active(keys[0].fingerprint)
    # The old key is nobody's ever again.
    token = roster.invite("bank", 60)
    with pytest.raises(MembershipError, match="is or was lab's"):
        roster.redeem(token, "bank", keys[0].public_pem, facts)
    with pytest.raises(UnknownMemberError, match="no member 'nobody'"):
        roster.invite("nobody", 60, rotate=True)


def test_a_new_key_at_once(roster, join, keys):
    join("lab", keys[0])
    join("bank", keys[1])
    assert rotate(roster, "lab", keys[2].public_pem).fingerprint == keys[2].fingerprint
    for key in keys[:3]:  # the one it had, another member's, the one it has
        with pytest.raises(MembershipError, match="can't be lab's"):
            rotate(roster, "lab", key.public_pem)
    with pytest.raises(UnknownMemberError):
        roster.active(keys[0].fingerprint)
    with pytest.raises(UnknownMemberError):
        rotate(roster, "nobody", keys[3].public_pem)


def test_a_suspended_member_with_a_new_key_stays_suspended(roster, join, keys, facts):
    join("lab")
    roster.suspend("lab")
    token = roster.invite("lab", 60, rotate=True)
    assert roster.redeem(token, "lab", keys[1].public_pem, facts).status == "suspended"


def test_unknown_names(roster):
    for call in (
        roster.member,
        roster.active_member,
        roster.suspend,
        roster.reinstate,
        roster.expel,
    ):
        with pytest.raises(UnknownMemberError, match="there is no member 'nobody'"):
            call("nobody")
    with pytest.raises(ProtocolError, match="surrogate"):
        roster.member("\ud800")


# --- tasks ----------------------------------------------------------------------------------------


def task(task_id="r/fit/1/lab", silo="lab", round=1, run="r", **other):
    fields = {
        "kind": "fit",
        "opened_at": NOW,
        "until": NOW + 60,
        "most_bytes": 1000,
        "readable": ("r/global/", "r/silos/lab/"),
        "writable": ("r/silos/lab/",),
    } | other
    return OpenTask(id=task_id, run=run, round=round, silo=silo, **fields)


def reply(task_id="r/fit/1/lab", text=b'{"a": 1}\xff'):
    return SignedReply(task_id, text, "c2ln", "sha256:" + "1" * 64)


def test_a_task_is_open_until_it_is_closed(roster):
    roster.tasks.open(task())
    assert roster.tasks.open_for("lab") == [task()]
    assert roster.tasks.open_for("bank") == []
    assert roster.tasks.reply("r/fit/1/lab") is None
    roster.tasks.close("r/fit/1/lab", reply())
    assert roster.tasks.open_for("lab") == []
    assert roster.tasks.reply("r/fit/1/lab") == reply()
    assert roster.tasks.reply("nothing") is None


def test_a_reply_outlives_what_comes_after(roster):
    roster.tasks.open(task())
    roster.tasks.close("r/fit/1/lab", reply())
    roster.tasks.close("r/fit/1/lab", None)
    assert roster.tasks.reply("r/fit/1/lab") == reply()
    roster.tasks.open(task(until=NOW + 99))
    assert roster.tasks.reply("r/fit/1/lab") == reply()
    assert roster.tasks.open_for("lab")[0].until == NOW + 99
    roster.tasks.close("r/fit/1/lab", None)  # the round ended; a restart may want it still
    assert roster.tasks.reply("r/fit/1/lab") == reply()
    roster.tasks.open(task())
    roster.tasks.close("r/fit/1/lab", reply(text=b"newer"))
    assert roster.tasks.reply("r/fit/1/lab").text == b"newer"


def test_replies_of_a_round(roster):
    for silo in ("bank", "lab", "court"):
        roster.tasks.open(task(f"r/fit/1/{silo}", silo))
    for silo in ("lab", "bank"):
        roster.tasks.close(f"r/fit/1/{silo}", reply(f"r/fit/1/{silo}"))
    roster.tasks.close("r/fit/1/court", None)
    assert [one.task_id for one in roster.tasks.replies("r", 1)] == ["r/fit/1/bank", "r/fit/1/lab"]
    assert roster.tasks.replies("r", 2) == roster.tasks.replies("other", 1) == []


def test_who_was_asked_in_a_round(roster):
    for silo, kind in (("bank", "fit"), ("lab", "fit"), ("court", "evaluate")):
        roster.tasks.open(task(f"r/{kind}/1/{silo}", silo, kind=kind))
    roster.tasks.close("r/fit/1/lab", None)
    assert roster.tasks.asked("r", 1) == {"bank", "lab"}
    assert roster.tasks.asked("r", 2) == roster.tasks.asked("other", 1) == set()


def test_whose_key_it_was(roster, join, keys):
    join("lab", keys[0])
    rotate(roster, "lab", keys[1].public_pem)
    for key in keys[:2]:
        signer = roster.signer(key.fingerprint)
        assert (signer.name, signer.public_key, signer.data_sha256) == (
            "lab",
            key.public_pem,
            "d" * 64,
        )
    with pytest.raises(UnknownMemberError, match="never was a member's"):
        roster.signer(keys[2].fingerprint)


def test_old_tasks_are_forgotten(roster):
    for round_number in (1, 2, 3):
        roster.tasks.open(task(f"r/{round_number}", round=round_number))
    roster.tasks.open(task("other/1", run="other"))
    roster.tasks.prune("r", 3)
    assert [one.id for one in roster.tasks.open_for("lab")] == ["other/1", "r/3"]


# --- events, settings, the file -------------------------------------------------------------------


def test_refusals_are_bounded_and_take_no_change_out(roster, join, keys, monkeypatch):
    monkeypatch.setattr(journal, "_MOST_EVENTS", 10)
    join("lab", keys[0])
    changes = [event.what for event in roster.journal.events(100)]
    assert changes == ["invited", "joined"]
    for number in range(50):
        roster.journal.note("desk", "something", str(number), refusal=True)
    events = roster.journal.events(100)
    assert [event.what for event in events[:2]] == changes
    assert [event.detail for event in events[2:]] == [str(n) for n in range(40, 50)]
    roster.journal.note("desk", "something", "x" * 100_000)
    assert len(roster.journal.events(1)[0].detail) == 2000


def test_settings(roster):
    assert roster.setting("draining", False) is False
    roster.set_setting("draining", True)
    with Roster(roster.path) as other:
        assert other.setting("draining", False) is True


def test_what_was_said_outlives_the_process(tmp_path, keys, facts):
    path = tmp_path / "members.sqlite"
    with Roster(path) as roster:
        roster.redeem(roster.invite("lab", 60), "lab", keys[0].public_pem, facts)
        roster.tasks.open(task())
        roster.all_seen({"lab": (Presence("training", "r", 1, 3, 9, "r/fit/1/lab", "", "b"), NOW)})
        # As a crash leaves it: the files as they are, the write-ahead log not yet moved over.
        shutil.copytree(tmp_path, tmp_path / "crashed", ignore=shutil.ignore_patterns("crashed"))
    with Roster(tmp_path / "crashed" / "members.sqlite") as roster:
        assert (tmp_path / "crashed" / "members.sqlite-wal").exists()
        assert roster.member("lab").fingerprint == keys[0].fingerprint
        assert roster.tasks.open_for("lab") == [task()]
        presence, seen_at = roster.presences()["lab"]
        assert (presence.state, presence.step, presence.of, seen_at) == ("training", 3, 9, NOW)


def test_another_process_that_closes_takes_the_file_from_nobody(tmp_path):
    program = (
        "import sys; from photon.membership.roster import Roster\n"
        "with Roster(sys.argv[1]) as roster: roster.set_setting(sys.argv[2], True)"
    )
    path = tmp_path / "members.sqlite"
    with Roster(path) as one, Roster(path):
        for name in ("first", "second"):
            subprocess.run([sys.executable, "-c", program, str(path), name], check=True)
            assert one.setting(name) is True


def test_files_that_are_no_roster_are_refused(tmp_path):
    path = tmp_path / "members.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(MembershipError, match="can't use the roster"):
        Roster(path)
    with pytest.raises(MembershipError, match="can't open the roster"):
        Roster(tmp_path)
    path.unlink()
    Roster(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(MembershipError, match=r"members\.sqlite is of version 99"):
        Roster(path)
    with pytest.raises(MembershipError, match="no members yet") as caught:
        roster_at(tmp_path / "nowhere")
    assert "--home" in (caught.value.hint or "")
    assert not (tmp_path / "nowhere").exists()


def test_no_room_changes_nothing(roster, join):
    join("lab")
    with roster._file.changing() as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")

    def fill():
        for number in range(10_000):
            roster.journal.note("desk", str(number), "x" * 2000)

    with pytest.raises(DiskFullError, match="no room to write"):
        fill()
    assert roster.member("lab").status == "active"
    db.execute("PRAGMA max_page_count = 1000000")
    roster.suspend("lab")
    assert roster.member("lab").status == "suspended"


_TEXT = st.text(max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(token=_TEXT, name=_TEXT, pem=_TEXT, task_id=_TEXT, presence=_TEXT)
def test_nothing_from_outside_breaks_it(roster, keys, facts, token, name, pem, task_id, presence):
    for call in (
        lambda: roster.redeem(token, name, pem, facts),
        lambda: roster.redeem(token, name, keys[4].public_pem, facts),
        lambda: roster.by_fingerprint(token),
        lambda: roster.active(token),
        lambda: roster.tasks.close(task_id, None),
        lambda: roster.all_seen(
            {name: (Presence(presence, detail=presence, boot=presence), time.time())}
        ),
        lambda: roster.tasks.reply(task_id),
    ):
        with contextlib.suppress(PhotonError):
            assert call() is None
    assert roster.members() == []
