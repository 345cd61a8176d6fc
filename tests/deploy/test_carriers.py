"""What carries questions to a site's trainer, and its answers back: the desk, and Flower.

`make flower` runs Flower's part, with a SuperLink and two SuperNodes.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bridged import Bridged, needs_flower
from mailbox_place import ASK, RUN, Place, Trainer, answer

from photon.errors import ProtocolError
from photon.membership.keys import NodeKey
from photon.membership.roster import RUN_SETTING
from photon.silo import courier as courier_module
from photon.silo.courier import Courier
from photon.silo.socket import SOCKET_FILE, answer_of, refusal_of

SILOS = ("blue", "red")
#: Flower starts a process for each question; the first takes twenty seconds.
WITHIN_S = 120.0


class Carrier:
    """A mailbox, two sites, and something between; trainers of the sites come and go."""

    def __init__(self, folder: Path, ends: contextlib.ExitStack, flower: bool) -> None:
        self.place = Place(folder)
        ends.callback(self.place.close)
        self.place.loop.set_setting(RUN_SETTING, str(folder / "run"))
        self.homes = {silo: folder / silo for silo in SILOS}
        self.trainers: list[Trainer] = []
        self.number = 0
        for silo, home in self.homes.items():
            home.mkdir()
            self.place.member(silo)
            shutil.copy(folder / f"{silo}.key", home / "node.key")
            if not flower:
                client = self.place.client(silo)
                Courier(client, home / SOCKET_FILE, "one", lambda _: None).start()
        self.flower = ends.enter_context(Bridged(folder, folder, self.homes)) if flower else None

    def trainer(self, silo: str, says: Callable[[bytes], dict[str, Any] | None]) -> Trainer:
        self.trainers.append(Trainer(self.homes[silo] / SOCKET_FILE, says))
        return self.trainers[-1]

    def ask(self, silo: str, message: bytes = ASK) -> str:
        self.number += 1
        return self.place.ask(silo, message, number=self.number, until_s=600)

    def asked_last(self, silo: str) -> str:
        """The task's id."""
        return f"{RUN}/fit/{self.number}/{silo}"

    def answers(self, letter: str) -> object:
        return self.place.took(letter, within_s=WITHIN_S)

    def kill(self) -> None:
        """What carries dies, and is started again."""
        if self.flower is not None:
            self.flower.end(signal.SIGKILL)
            self.flower.begin()
        else:
            assert self.place.desk is not None
            self.place.desk.stop()
            self.place.start(self.place.port)


FLOWER = pytest.param("flower", marks=[pytest.mark.flower, needs_flower])


@pytest.fixture(scope="module", params=["desk", FLOWER])
def carrier_of_all(request: pytest.FixtureRequest) -> Iterator[Carrier]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="photon-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as ends,
    ):
        patch.setattr(courier_module, "_FIRST_PAUSE_S", 0.05)
        patch.setattr(courier_module, "_AGAIN_S", 0.05)
        yield Carrier(Path(folder), ends, request.param == "flower")


@pytest.fixture
def carrier(carrier_of_all: Carrier) -> Iterator[Carrier]:
    yield carrier_of_all
    for trainer in carrier_of_all.trainers:
        trainer.end()
    carrier_of_all.trainers.clear()


class Held:
    """Says what it is told to, once it is let go."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()

    def __call__(self, ask: bytes) -> dict[str, Any]:
        self.asked.set()
        assert self.go.wait(2 * WITHIN_S)
        return answer_of(answer(ask + b" answered"))


def test_questions_reach_their_silo_and_its_answers_come_back(carrier: Carrier) -> None:
    says = lambda ask: answer_of(answer(ask + b" answered"))  # noqa: E731
    trainers = {silo: carrier.trainer(silo, says) for silo in SILOS}
    asked = {silo: [b"%d" % n + bytes(range(256)) * 1000 for n in (1, 2)] for silo in SILOS}
    for round in (0, 1):
        letters = {silo: carrier.ask(silo, asked[silo][round] + silo.encode()) for silo in SILOS}
        for silo, letter in letters.items():
            expected = asked[silo][round] + silo.encode() + b" answered"
            assert carrier.answers(letter) == answer(expected)
    for silo, trainer in trainers.items():
        assert trainer.asked == [one + silo.encode() for one in asked[silo]]


def test_a_trainer_that_dies_over_a_question_is_asked_again(carrier: Carrier) -> None:
    trainer = carrier.trainer(
        "blue", lambda _: None if len(trainer.asked) < 3 else answer_of(answer())
    )
    assert carrier.answers(carrier.ask("blue")) == answer()
    assert trainer.asked == [ASK] * 3


def test_why_a_trainer_says_nothing_comes_as_words(carrier: Carrier) -> None:
    carrier.trainer("blue", lambda _: refusal_of(ProtocolError("no Ask at all \x1b[31m")))
    assert carrier.answers(carrier.ask("blue")) == "no Ask at all  [31m"


def test_a_question_that_is_sent_again_is_answered_as_the_newest(carrier: Carrier) -> None:
    carrier.trainer("blue", held := Held())
    first = carrier.ask("blue")
    assert held.asked.wait(WITHIN_S)
    second = carrier.place.loop.letters.push(carrier.asked_last("blue"), ASK)
    held.go.set()
    assert carrier.answers(second) == answer(ASK + b" answered")
    assert carrier.place.loop.letters.pull([first]) == {}


def test_an_answer_that_nobody_wants_any_more_is_dropped(carrier: Carrier) -> None:
    carrier.trainer("blue", held := Held())
    first = carrier.ask("blue", b"first")
    assert held.asked.wait(WITHIN_S)
    carrier.place.loop.tasks.close(carrier.asked_last("blue"), None)
    held.go.set()
    assert carrier.answers(carrier.ask("blue", b"second")) == answer(b"second answered")
    assert carrier.place.loop.letters.pull([first]) == {}


def test_who_is_suspended_is_asked_when_it_is_let_in_again(carrier: Carrier) -> None:
    trainer = carrier.trainer("blue", lambda _: answer_of(answer()))
    carrier.trainer("red", lambda _: answer_of(answer()))
    carrier.place.loop.suspend("blue")
    letter = carrier.ask("blue")
    assert carrier.answers(carrier.ask("red")) == answer()  # blue's would have been as quick
    assert trainer.asked == []
    carrier.place.loop.reinstate("blue")
    assert carrier.answers(letter) == answer()


def test_what_is_under_way_when_the_carrier_dies_is_answered(carrier: Carrier) -> None:
    carrier.trainer("blue", held := Held())
    letter = carrier.ask("blue")
    assert held.asked.wait(WITHIN_S)
    carrier.kill()
    held.go.set()
    assert carrier.answers(letter) == answer(ASK + b" answered")


@pytest.mark.parametrize("carrier_of_all", [FLOWER], indirect=True)
def test_a_flower_node_that_is_no_members_gets_no_question(carrier: Carrier) -> None:
    assert carrier.flower is not None
    strange = carrier.homes["blue"].with_name("strange")
    strange.mkdir()
    NodeKey.create(strange / "node.key")
    trainer = carrier.trainer("blue", lambda _: answer_of(answer()))
    carrier.homes["strange"] = strange
    carrier.flower.join("strange", strange)
    stranger = carrier.trainer("strange", lambda _: answer_of(answer()))
    carrier.flower.await_log("strange", "Sending: query.seat")  # its proof, which is none
    assert carrier.answers(carrier.ask("blue")) == answer()
    assert (trainer.asked, stranger.asked) == ([ASK], [])
