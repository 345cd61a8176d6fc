"""Questions to silos and their answers, through a real desk: what is lost, repeated, or refused.

What every carrier of them must do: tests/deploy/test_carriers.py.

The roster is opened twice, as the federation's loop and the desk do; nodes are clients over HTTP.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mailbox_place import ASK, AT_ONCE_S, POLL_S, RUN, Place, Trainer, answer

from photon.deploy.desk import Desk, DeskLimits
from photon.errors import (
    AccessRefusedError,
    KeyInUseError,
    PhotonError,
    UnknownMemberError,
    UnreachableError,
)
from photon.membership.signing import sign_request
from photon.silo import courier as courier_module
from photon.silo.courier import Courier
from photon.silo.socket import answer_of
from photon.store.presign import S3Presigner


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_question_and_its_answer_are_seen_at_once(place: Place) -> None:
    blue = place.member("blue")
    waits = []
    for number in range(1, 6):
        poll = place.poll(blue)
        asked_s = time.monotonic()
        letter = place.ask("blue", number=number)
        found = poll.result(AT_ONCE_S)
        assert found is not None
        assert (found.id, found.message) == (letter, ASK)
        assert 50 < found.left_s <= 60
        threading.Timer(0.2, blue.reply, ("one", letter, answer())).start()
        assert place.took(letter) == answer()
        waits.append(time.monotonic() - asked_s - 0.2)
    # Four looks of 20 ms, four commits and two requests; sums of seconds where somebody polls.
    assert min(waits) < 0.5, waits


def test_a_poll_ends_after_its_time_and_nothing_is_no_error(place: Place) -> None:
    blue = place.member("blue")
    began_s = time.monotonic()
    assert blue.task("one", ()) is None
    assert POLL_S - 0.1 < time.monotonic() - began_s < POLL_S + 5


def test_a_poll_that_was_cut_costs_nothing(place: Place) -> None:
    blue = place.member("blue")
    with place.cut_poll("blue"):
        time.sleep(0.3)
    letter = place.ask("blue")  # taken by the poll that is no more, and by nobody
    for _ in range(3):  # a node that dies each time
        found = blue.task("one", ())
        assert found is not None
        assert found.id == letter
    # One that holds it is not given it again.
    assert not place.poll(blue, letter).done()


def test_a_node_that_is_gone_waits_no_more(tmp_path: Path) -> None:
    """Its poll would go on saying that it is here, and keep the next one with its key out."""
    place = Place(tmp_path, poll_s=300)
    place.member("blue")
    with place.cut_poll("blue"):
        until(lambda: place.waiting() == 1)
    until(lambda: place.waiting() == 0)
    place.close()


def test_several_questions_come_one_after_another(place: Place) -> None:
    blue, have = place.member("blue"), set()
    letters = {place.ask("blue", number=number) for number in (1, 2, 3)}
    while have != letters:
        found = blue.task("one", have)
        assert found is not None
        assert found.id not in have
        have.add(found.id)


def test_an_answer_that_is_sent_twice_counts_once(place: Place) -> None:
    blue, letter = place.member("blue"), place.ask("blue")
    blue.reply("one", letter, answer())
    blue.reply("one", letter, answer(b"another"))
    blue.reply("one", letter, "or words")
    assert place.took(letter) == answer()
    assert place.loop.letters.pull([letter]) == {}
    with pytest.raises(AccessRefusedError, match="is not asked"):
        blue.reply("one", letter, answer())


def test_words_come_as_words(place: Place) -> None:
    blue, letter = place.member("blue"), place.ask("blue")
    blue.reply("one", letter, "x" * 5000 + "\x1b[31m")
    assert place.took(letter) == "x" * 1000


def test_a_question_and_its_answer_are_its_silos_own(place: Place) -> None:
    blue, red = place.member("blue"), place.member("red")
    letter = place.ask("blue")
    assert not place.poll(red).done()
    with pytest.raises(AccessRefusedError, match=r"red is not asked"):
        red.reply("one", letter, answer(b"red's"))
    assert place.loop.letters.pull([letter]) == {}
    blue.reply("one", letter, answer())
    assert place.took(letter) == answer()


def test_what_is_closed_or_asked_anew_or_late_is_neither_given_nor_taken(place: Place) -> None:
    blue = place.member("blue")
    first = place.ask("blue")
    second = place.loop.letters.push(f"{RUN}/fit/1/blue", ASK)
    found = blue.task("one", (first,))
    assert found is not None
    assert found.id == second
    with pytest.raises(AccessRefusedError):
        blue.reply("one", first, answer())
    place.loop.tasks.close(f"{RUN}/fit/1/blue", None)
    late = place.ask("blue", number=2, until_s=-1)
    pruned = place.ask("blue", number=3)
    place.loop.tasks.prune(RUN, 4)
    assert not place.poll(blue).done()
    for letter in (second, pruned):
        with pytest.raises(AccessRefusedError):
            blue.reply("one", letter, answer())
    assert place.loop.letters.pull([first, second, late, pruned]) == {}
    # A letter needs an open task.
    place.loop.letters.push(f"{RUN}/fit/1/blue", ASK)
    assert "blue" not in place.loop.letters.unanswered()


@pytest.mark.parametrize("how", ["suspend", "expel"])
def test_who_may_not_take_part_any_more_is_told_while_it_waits(place: Place, how: str) -> None:
    blue = place.member("blue")
    letter = place.ask("blue")
    poll = place.poll(blue, letter)
    getattr(place.loop, how)("blue")
    with pytest.raises(UnknownMemberError):
        poll.result(AT_ONCE_S)
    for call in (lambda: blue.task("one", ()), lambda: blue.reply("one", letter, answer())):
        with pytest.raises(UnknownMemberError):
            call()
    assert place.loop.letters.pull([letter]) == {}


def test_of_two_nodes_with_one_key_the_newer_gets_no_question_and_answers_none(
    place: Place,
) -> None:
    blue = place.member("blue")
    letter = place.ask("blue")
    assert blue.task("old", ()) is not None
    assert blue.task("new", ()) is not None  # it can't be told from a restart
    assert blue.task("old", ()) is not None
    with pytest.raises(KeyInUseError):
        blue.task("new", ())
    with pytest.raises(KeyInUseError):
        blue.reply("new", letter, answer(b"new"))
    blue.reply("old", letter, answer())
    assert place.took(letter) == answer()


def test_a_flood_of_polls_holds_two_places_and_keeps_nobody_waiting(place: Place) -> None:
    blue, red = place.member("blue"), place.member("red")
    flood = [place.poll(blue) for _ in range(8)]
    for one in flood[:-2]:
        assert one.result(AT_ONCE_S) is None  # the oldest ones are most likely cut
    assert place.desk is not None
    assert {name: len(held) for name, held in place.desk.polls._held.items()} == {"blue": 2}
    poll = place.poll(red)
    letter = place.ask("red")
    found = poll.result(AT_ONCE_S)
    assert found is not None
    assert found.id == letter
    letter = place.ask("blue")
    for one in flood[-2:]:
        found = one.result(AT_ONCE_S)
        assert found is not None
        assert found.id == letter
    assert place.desk.polls._held == {}


def test_too_many_requests_of_one_member_are_turned_away(place: Place) -> None:
    assert place.desk is not None
    place.desk.stop()
    signer = S3Presigner("https://s", "b", region="r", access_key_id="a", secret="s")
    place.desk = Desk(place.others, signer, limits=DeskLimits(requests_per_minute=5, poll_s=0.01))
    place.desk.start()
    place.port = place.desk.port
    blue = place.member("blue")
    for _ in range(5):
        assert blue.task("one", ()) is None
    with pytest.raises(UnreachableError, match="too many requests of blue"):
        blue.task("one", ())


BAD = [
    ("task", b"{}", 400),
    ("task", b'{"boot": "one", "have": ["../../x"]}', 400),
    ("task", json.dumps({"boot": "one", "have": ["0" * 32] * 65}).encode(), 400),
    ("task", b'{"boot": "one", "wait_s": 1e9}', 400),
    ("task", b"x" * (33 << 10), 413),
    ("reply", b'{"boot": "one", "letter": "%s"}' % (b"0" * 32), 400),
    ("reply", b'{"boot": "one", "letter": "%s", "words": "a"}' % (b"0" * 32), 403),
    ("reply", b'{"boot": "one", "letter": "%s", "words": "%s"}' % (b"0" * 32, b"w" * 1001), 400),
    (
        "reply",
        b'{"boot": "one", "letter": "%s", "answer": {"text": "%s", "signature": "AA==", '
        b'"fingerprint": "me"}}' % (b"0" * 32, b"AAAA"),
        400,
    ),
    ("reply", b"x" * (1409 << 10), 413),
]


@pytest.mark.parametrize(("what", "body", "status"), BAD)
def test_what_is_none_is_refused(place: Place, what: str, body: bytes, status: int) -> None:
    place.member("blue")
    path = f"/photon/v2/{what}"
    url = f"http://127.0.0.1:{place.port}{path}"
    headers = sign_request(place.keys["blue"], "POST", path, body, now=time.time())
    assert httpx2.post(url, content=body, headers=headers, trust_env=False).status_code == status
    # Who does not sign gets no further than that; nor who says again what was said.
    assert httpx2.post(url, content=body, trust_env=False).status_code in (401, 413)
    again = httpx2.post(url, content=body, headers=headers, trust_env=False)
    assert again.status_code in (401, 413)


def test_an_answer_that_is_announced_as_too_long_is_refused_before_it_is_read(
    place: Place,
) -> None:
    head = b"POST /photon/v2/reply HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    for length in (5 << 20, 10**15):
        with socket.create_connection(("127.0.0.1", place.port), timeout=10) as line:
            line.sendall(head % length)
            assert line.recv(100).startswith(b"HTTP/1.1 413 ")


# --- the courier ---


@pytest.fixture
def courier(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a courier of blue's and a trainer that says something."""
    monkeypatch.setattr(courier_module, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(courier_module, "_AGAIN_S", 0.05)
    place.member("blue")
    trainers = []
    lines: list[str] = []

    def make(says: Callable[[bytes], dict[str, Any] | None]) -> Trainer:
        # The path of a Unix socket is short.
        path = Path(f"/tmp/photon-{threading.get_native_id()}-{time.monotonic_ns()}.sock")
        trainers.append((Trainer(path, says), path))
        Courier(place.client("blue"), path, "one", lines.append).start()
        trainers[-1][0].lines = lines  # type: ignore[attr-defined]
        return trainers[-1][0]

    yield make
    for trainer, path in trainers:
        trainer.end()
        path.unlink(missing_ok=True)


def test_a_desk_that_is_away_is_waited_for_with_the_answer(place: Place, courier) -> None:
    gone, back = threading.Event(), threading.Event()

    def says(_: bytes) -> dict[str, Any]:
        gone.set()
        assert back.wait(20)
        return answer_of(answer())

    trainer = courier(says)
    letter = place.ask("blue")
    assert gone.wait(20)
    assert place.desk is not None
    began_s = time.monotonic()
    place.desk.stop()  # while it holds a poll
    assert time.monotonic() - began_s < AT_ONCE_S
    back.set()
    time.sleep(0.5)
    place.start(place.port)
    assert place.took(letter) == answer()
    assert trainer.asked == [ASK]
    assert place.took(place.ask("blue", number=2)) == answer()
    assert any("can't be reached" in line for line in trainer.lines)
    assert "the aggregator answers again" in trainer.lines


def test_all_errors_of_the_desk_are_photons(place: Place) -> None:
    """The courier catches those."""
    blue = place.member("blue")
    assert place.desk is not None
    place.desk.stop()
    with pytest.raises(PhotonError):
        blue.task("one", ())
    with pytest.raises(PhotonError):
        blue.reply("one", "0" * 32, answer())
