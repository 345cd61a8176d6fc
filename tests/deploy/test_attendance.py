"""Who is here. A node that starts again is welcome; two nodes with one key are not."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.deploy.attendance import ALONE_S, Attendance
from photon.errors import KeyInUseError
from photon.membership.roster import Presence, Roster

NOW = 1_800_000_000.0


@pytest.fixture
def roster(tmp_path):
    with Roster(tmp_path / "members.sqlite") as roster:
        yield roster


@pytest.fixture
def desk(roster):
    made = Attendance(roster)
    made.start()
    yield made
    made.close()


def beat(desk, boot, at, name="lab"):
    """What the node hears: True, or that it is refused."""
    try:
        desk.seen(name, Presence("idle", boot=boot, detail=boot), now=NOW + at)
    except KeyInUseError:
        return False
    return True


def test_the_newest_word_counts(roster, desk):
    assert roster.presences() == {}
    for step in (1, 2):
        desk.seen("lab", Presence("training", "r", 3, step, 9, boot="a"), now=NOW + step)
    desk.close()
    assert roster.presences() == {"lab": (Presence("training", "r", 3, 2, 9, boot="a"), NOW + 2)}


def test_a_node_that_starts_again_is_welcome_at_once(desk):
    for start in range(20):  # killed and started every two seconds
        for second in (0, 1):
            assert beat(desk, f"boot-{start}", start * 2 + second)
    assert desk.now()["lab"][0].boot == "boot-19"


def test_of_two_with_one_key_the_later_one_is_refused(desk):
    heard = [(boot, beat(desk, boot, at)) for at in range(0, 60, 5) for boot in ("old", "new")]
    # It can't be told from a restart before the old one speaks again.
    assert heard[:4] == [("old", True), ("new", True), ("old", True), ("new", False)]
    assert {said for boot, said in heard if boot == "old"} == {True}
    assert not any(said for boot, said in heard[2:] if boot == "new")
    assert desk.now()["lab"][0].boot == "old"
    with pytest.raises(KeyInUseError, match=r"this one \(process 'new'\) came later") as caught:
        desk.seen("lab", Presence("idle", boot="new"), now=NOW + 60)
    assert "photon members rotate lab" in str(caught.value)


def test_the_other_one_takes_over_once_the_first_is_gone(desk):
    for at in (0, 5):
        beat(desk, "old", at)
        beat(desk, "new", at + 1)
    assert not beat(desk, "new", 10)
    assert not beat(desk, "new", 5 + ALONE_S - 1)
    assert beat(desk, "new", 5 + ALONE_S + 1)
    assert desk.now()["lab"][0].boot == "new"


def test_members_do_not_disturb_each_other(desk):
    for at in range(10):
        assert beat(desk, "a", at, "lab")
        assert beat(desk, "b", at, "bank")


def test_a_new_key_begins_anew(desk):
    for at in (0, 1):
        beat(desk, "thief", at)
        beat(desk, "owner", at + 0.5)
    assert not beat(desk, "owner", 2)
    desk.forget("lab")
    assert beat(desk, "owner", 3)
    assert beat(desk, "owner", 4)


def test_without_a_boot_nothing_is_compared(desk):
    assert all(beat(desk, boot, at) for at in range(3) for boot in ("", "a"))


def test_what_was_said_goes_on_with_the_next_desk(roster, desk):
    beat(desk, "old", 0)
    desk.close()
    again = Attendance(roster)
    assert again.now()["lab"][:2] == (Presence("idle", boot="old", detail="old"), NOW)
    assert beat(again, "new", 1)
    assert beat(again, "old", 2)
    assert not beat(again, "new", 3)
    again.close()


def test_a_thousand_words_are_a_few_writes(roster, desk, monkeypatch):
    writes, write = [], roster.all_seen
    monkeypatch.setattr(roster, "all_seen", lambda said: (writes.append(len(said)), write(said)))
    for number in range(1000):
        desk.seen(f"silo-{number}", Presence("idle"))
    desk.close()
    assert sum(writes) == len(roster.presences()) == 1000
    assert len(writes) < 100


def test_who_waits_for_a_question_is_here_and_who_has_one_speaks_for_itself(desk):
    for name, state in (("idle", "idle"), ("busy", "training")):
        desk.seen(name, Presence(state, boot="a"), now=NOW)
        desk.waits(name, "a")
    desk.waits("nobody", "a")
    found = desk.now()
    assert abs(found["idle"][1] - time.time()) < 60
    assert found["busy"][1] == NOW
    assert "nobody" not in found
    desk.seen("idle", Presence("idle", boot="b"), now=NOW)
    desk.waits("idle", "a")  # another process's
    assert desk.now()["idle"][1] == NOW


@settings(max_examples=40)
@given(beats=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=25))
def test_as_the_rule_says(tmp_path_factory, beats):
    """Against the rule in words: refused, if an older one spoke after this one's first word, and
    has not been silent since."""
    with Roster(tmp_path_factory.mktemp("presence") / "members.sqlite") as roster:
        desk = Attendance(roster)
        follows_the_rule(desk, beats)
        desk.close()


def follows_the_rule(desk, beats):
    first, last, at = {}, {}, 0
    for boot, pause in beats:
        at += pause
        for gone in [one for one in last if last[one] < at - ALONE_S]:
            del first[gone], last[gone]
        first.setdefault(boot, at)
        last[boot] = at
        older = any(first[one] < first[boot] < last[one] for one in last if one != boot)
        assert beat(desk, boot, at) == (not older)
