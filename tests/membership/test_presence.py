"""Who is here. A node that starts again is welcome; two nodes with one key are not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rotation import rotate

from photon.errors import KeyInUseError
from photon.membership.keys import NodeKey
from photon.membership.roster import ALONE_S, Facts, Presence, Roster

NOW = 1_800_000_000.0


def beat(roster, boot, at, name="lab"):
    """What the node hears: True, or that it is refused."""
    try:
        roster.seen(name, Presence("idle", boot=boot, detail=boot), now=NOW + at)
    except KeyInUseError:
        return False
    return True


def test_the_newest_word_counts(roster, join):
    join("lab")
    assert roster.presences() == {}
    for step in (1, 2):
        roster.seen("lab", Presence("training", "r", 3, step, 9, boot="a"), now=NOW + step)
    assert roster.presences() == {"lab": (Presence("training", "r", 3, 2, 9, boot="a"), NOW + 2)}


def test_a_node_that_starts_again_is_welcome_at_once(roster, join):
    join("lab")
    for start in range(20):  # killed and started every two seconds
        for second in (0, 1):
            assert beat(roster, f"boot-{start}", start * 2 + second)
    assert roster.presences()["lab"][0].boot == "boot-19"
    assert [event.what for event in roster.journal.events()] == ["invited", "joined"]


def test_of_two_with_one_key_the_later_one_is_refused(roster, join):
    join("lab")
    heard = [(boot, beat(roster, boot, at)) for at in range(0, 60, 5) for boot in ("old", "new")]
    # It can't be told from a restart before the old one speaks again.
    assert heard[:4] == [("old", True), ("new", True), ("old", True), ("new", False)]
    assert {said for boot, said in heard if boot == "old"} == {True}
    assert not any(said for boot, said in heard[2:] if boot == "new")
    assert roster.presences()["lab"][0].boot == "old"
    with pytest.raises(KeyInUseError, match=r"this one \(process 'new'\) came later") as caught:
        roster.seen("lab", Presence("idle", boot="new"), now=NOW + 60)
    assert "photon members rotate lab" in str(caught.value)
    last = roster.journal.events()[-1]
    assert (last.actor, last.what, last.times) == ("lab", "two nodes with one key", 12)


def test_the_other_one_takes_over_once_the_first_is_gone(roster, join):
    join("lab")
    for at in (0, 5):
        beat(roster, "old", at)
        beat(roster, "new", at + 1)
    assert not beat(roster, "new", 10)
    assert not beat(roster, "new", 5 + ALONE_S - 1)
    assert beat(roster, "new", 5 + ALONE_S + 1)
    assert roster.presences()["lab"][0].boot == "new"


def test_members_do_not_disturb_each_other(roster, join, keys):
    join("lab", keys[0])
    join("bank", keys[1])
    for at in range(10):
        assert beat(roster, "a", at, "lab")
        assert beat(roster, "b", at, "bank")


def test_a_new_key_begins_anew(roster, join, keys):
    join("lab", keys[0])
    for at in (0, 1):
        beat(roster, "thief", at)
        beat(roster, "owner", at + 0.5)
    assert not beat(roster, "owner", 2)
    rotate(roster, "lab", keys[1].public_pem)
    assert beat(roster, "owner", 3)
    assert beat(roster, "owner", 4)


def test_without_a_boot_nothing_is_compared(roster, join):
    join("lab")
    assert all(beat(roster, boot, at) for at in range(3) for boot in ("", "a"))


@pytest.fixture(scope="module")
def one_member(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presence")
    with Roster(folder / "members.sqlite") as roster:
        pem = NodeKey.create(folder / "key").public_pem
        facts = Facts("d" * 64, "e" * 64, 1, "0.1.0")
        roster.redeem(roster.invite("lab", 60), "lab", pem, facts)
        yield roster


@settings(max_examples=40)
@given(beats=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=25))
def test_as_the_rule_says(one_member, beats):
    """Against the rule in words: refused, if an older one spoke after this one's first word, and
    has not been silent since."""
    with one_member._file.changing() as db:
        db.execute("DELETE FROM boots")
    first, last, at = {}, {}, 0
    for boot, pause in beats:
        at += pause
        for gone in [one for one in last if last[one] < at - ALONE_S]:
            del first[gone], last[gone]
        first.setdefault(boot, at)
        last[boot] = at
        older = any(first[one] < first[boot] < last[one] for one in last if one != boot)
        assert beat(one_member, boot, at) == (not older)
