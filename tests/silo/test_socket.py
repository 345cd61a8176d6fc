"""Questions and answers over a real Unix socket: who waits for what, and what is no question."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import struct
import threading
import time
from dataclasses import replace

import pytest

from photon.errors import ProtocolError, RunBusyError, UnknownMemberError, WorkerLostError
from photon.federation.envelopes import MOST_BYTES, encoded, parse_ask
from photon.membership.keys import NodeKey
from photon.membership.records import SignedReply
from photon.silo.__main__ import _run
from photon.silo.policy import Membership
from photon.silo.service import Listener, only_trainer
from photon.silo.socket import (
    MOST_FRAME_BYTES,
    answer_of,
    ask_trainer,
    bytes_of,
    connected,
    frame,
    refusal_of,
    unframe,
)

REPLY = SignedReply("", b"what was signed", "c2lnbmF0dXJl", "sha256:" + "a" * 64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trainer.sock"


@pytest.fixture
def listener(path):
    return Listener(path, parse_ask, lambda raw, error: refusal_of(error))


class Asking(threading.Thread):
    """Someone who asks, in a thread; `answer` is what came, or the error."""

    def __init__(self, path, ask, within_s=3600.0):
        super().__init__(daemon=True)
        self._arguments = (path, ask, within_s)
        self.answer = None
        self.start()

    def run(self):
        path, ask, within_s = self._arguments
        try:
            self.answer = ask_trainer(path, ask, within_s=within_s)
        except Exception as error:
            self.answer = error

    def result(self):
        self.join(10)
        assert not self.is_alive()
        return self.answer


def waiters(listener):
    return sum(len(question.waiting) for question in listener._open.values())


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_question_is_heard_and_answered(listener, path, aggregator):
    ask = aggregator.fit()
    asking = Asking(path, encoded(ask))
    question = listener.next()
    assert question.ask == ask
    listener.settle(question, answer_of(REPLY))
    assert asking.result() == REPLY


def test_only_this_user_may_ask(listener, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_same_ask_waits_for_the_same_answer(listener, path, aggregator):
    ask = aggregator.fit()
    asking = [Asking(path, encoded(ask)) for _ in range(4)]
    question = listener.next()
    eventually(lambda: waiters(listener) == 4)
    listener.settle(question, answer_of(REPLY))
    assert [one.result() for one in asking] == [REPLY] * 4
    # Asked once more, it is a question again: the trainer has the answer on disk.
    late = Asking(path, encoded(ask))
    listener.settle(listener.next(), answer_of(REPLY))
    assert late.result() == REPLY


def test_the_same_question_in_another_ask_is_waited_for_as_long_and_answered_next(
    listener, path, aggregator
):
    """A later deadline, a state that lies elsewhere: a Reply names the Ask that it answers."""
    ask = aggregator.fit(within_s=1000.0)
    first = Asking(path, encoded(ask))
    question = listener.next()
    assert 900 < question.left_s() <= 1000
    whole = replace(ask.state.whole, key="elsewhere/state.json")
    state = replace(ask.state, whole=whole)
    second = Asking(path, encoded(ask.model_copy(update={"within_s": 9000.0, "state": state})))
    eventually(lambda: question.left_s() > 8000)
    listener.settle(question, answer_of(REPLY))
    assert first.result() == REPLY
    after = listener.next()
    assert after.ask.sha256 != ask.sha256
    listener.settle(after, answer_of(replace(REPLY, text=b"of the other")))
    assert second.result().text == b"of the other"


def test_other_questions_wait_their_turn(listener, path, aggregator):
    asks = [aggregator.fit(number=number) for number in (1, 2)] + [aggregator.evaluation()]
    asking = []
    for ask in asks:
        asking.append(Asking(path, encoded(ask)))
        eventually(lambda: waiters(listener) == len(asking))
    for number, ask in enumerate(asks):
        question = listener.next()
        assert question.ask == ask
        reply = SignedReply("", bytes([number]), "cw==", "f")
        listener.settle(question, answer_of(reply))
        assert asking[number].result() == reply


def test_who_hangs_up_is_forgotten_and_the_work_goes_on(listener, path, aggregator):
    with connected(path) as one:
        one.sendall(frame({"ask": base64.b64encode(encoded(aggregator.fit())).decode()}))
        question = listener.next()
        assert waiters(listener) == 1
    eventually(lambda: waiters(listener) == 0)
    listener.settle(question, answer_of(REPLY))
    again = Asking(path, encoded(aggregator.fit()))
    listener.settle(listener.next(), answer_of(REPLY))
    assert again.result() == REPLY


def test_an_answer_larger_than_a_sockets_buffer_arrives(listener, path, aggregator):
    asking = Asking(path, encoded(aggregator.fit()))
    large = SignedReply("", os.urandom(1_000_000), "cw==", "f")
    listener.settle(listener.next(), answer_of(large))
    assert asking.result() == large


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">I", MOST_FRAME_BYTES + 1),
        struct.pack(">I", 3) + b"{]}",
        struct.pack(">I", 2) + b"[]",
        frame({}),
        frame({"ask": 3}),
        frame({"ask": "not base64!"}),
        frame({"ask": base64.b64encode(b"no ask").decode()}),
        frame({"ask": base64.b64encode(b'{"protocol": 3}').decode()}),
    ],
)
def test_what_is_no_question_is_told_so(sent, listener, path):
    with connected(path) as one:
        one.sendall(sent)
        one.settimeout(5)
        received = bytearray()
        while unframe(received) is None:
            received += one.recv(4096)
        assert unframe(received)["error"]["code"] == 86
        assert one.recv(1) == b""  # and that was all


def test_half_a_question_does_not_hold_up_the_others(listener, path, aggregator, monkeypatch):
    monkeypatch.setattr("photon.silo.service._PROMPT_S", 1.0)
    with connected(path) as slow, connected(path) as silent:
        slow.sendall(frame({"ask": ""})[:3])
        asking = Asking(path, encoded(aggregator.fit()))
        listener.settle(listener.next(), answer_of(REPLY))
        assert asking.result() == REPLY
        for one in (slow, silent):
            one.settimeout(10)
            assert one.recv(1) == b""


def test_only_so_many_connections(listener, path, monkeypatch):
    monkeypatch.setattr("photon.silo.service._MOST_CONNECTIONS", 2)
    with connected(path) as first, connected(path) as second, connected(path) as third:
        third.settimeout(5)
        assert third.recv(1) == b""
        for one in (first, second):
            one.settimeout(0.1)
            with pytest.raises(TimeoutError):
                one.recv(1)


def test_a_socket_that_a_dead_trainer_left_is_replaced(path, aggregator):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = Listener(path, parse_ask, lambda raw, error: refusal_of(error))
    asking = Asking(path, encoded(aggregator.fit()))
    listener.settle(listener.next(), answer_of(REPLY))
    assert asking.result() == REPLY


def test_a_home_may_lie_deep(tmp_path, aggregator):
    """Longer than the system's addresses of sockets."""
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    listener = Listener(folder / "trainer.sock", parse_ask, lambda raw, error: refusal_of(error))
    asking = Asking(folder / "trainer.sock", encoded(aggregator.fit()))
    listener.settle(listener.next(), answer_of(REPLY))
    assert asking.result() == REPLY


def test_a_home_has_one_trainer(tmp_path):
    with (
        only_trainer(tmp_path),
        pytest.raises(RunBusyError, match="another trainer is working in"),
        only_trainer(tmp_path),
    ):
        pass
    with only_trainer(tmp_path):  # gone with its process, and with this block
        pass


def test_a_second_trainer_touches_nothing_and_tells_nobody(tmp_path, monkeypatch):
    """It would remove what the first is writing, and look like a second node with its key."""
    key = NodeKey.create(tmp_path / "node.key")
    membership = Membership("red", "127.0.0.1:1", "sha256:" + "0" * 64, key.public_pem)
    (tmp_path / "membership.json").write_text(json.dumps(vars(membership)))
    (tmp_path / "node.toml").write_text('data.path = "nowhere"\n')
    partial = tmp_path / "nodes" / "run" / "red" / ".round-1.partial"
    partial.parent.mkdir(parents=True)
    partial.write_text("half of a state")
    told = []
    monkeypatch.setattr("photon.silo.__main__.outside", lambda *_: told.append("the desk"))
    with only_trainer(tmp_path), pytest.raises(RunBusyError, match="another trainer is working"):
        _run(tmp_path, tmp_path / "node.toml", behind_gateway=False)
    assert told == []
    assert partial.exists()


# --- the asking side -----------------------------------------------------------------------------


class Deaf(threading.Thread):
    """A trainer that dies with the question in its hands, so many times; then it answers."""

    def __init__(self, path, deaths):
        super().__init__(daemon=True)
        self.path, self.deaths, self.questions = path, deaths, []
        self.start()

    def run(self):
        while True:
            self.path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(self.path))
                server.listen()
                caller, _ = server.accept()
                with caller:
                    received = bytearray()
                    while (record := unframe(received)) is None:
                        received += caller.recv(4096)
                    self.questions.append(bytes_of(record, "ask"))
                    if len(self.questions) > self.deaths:
                        caller.sendall(frame(answer_of(REPLY)))
                        return
                    caller.sendall(frame(answer_of(REPLY))[:-1])  # all but the last byte


def test_a_trainer_that_dies_is_asked_again(path):
    deaf = Deaf(path, deaths=3)
    assert ask_trainer(path, b"the question", within_s=20) == REPLY
    assert deaf.questions == [b"the question"] * 4


def test_a_trainer_that_starts_later_is_waited_for(path):
    asking = Asking(path, b"early", within_s=20)
    time.sleep(0.5)
    Deaf(path, deaths=0)
    assert asking.result() == REPLY


def test_nobody_waits_for_ever(path):
    started = time.monotonic()
    with pytest.raises(WorkerLostError, match="FileNotFoundError"):
        ask_trainer(path, b"", within_s=0.7)
    assert time.monotonic() - started < 30
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(WorkerLostError, match="timed out"):
            ask_trainer(path, b"", within_s=0.5)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ({"error": {"code": 82, "message": "who?", "hint": "ask"}}, UnknownMemberError, "who"),
        ({"error": {"code": None}}, Exception, "None"),
        ({"reply": 3}, ProtocolError, "signature"),
        ({"reply": "?", "signature": "", "fingerprint": ""}, ProtocolError, "base64"),
        ({}, ProtocolError, "signature"),
    ],
)
def test_an_answer_that_is_none_is_an_error(answer, kind, words, path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        asking = Asking(path, b"")
        caller, _ = server.accept()
        with caller:
            caller.sendall(frame(answer))
            error = asking.result()
    assert isinstance(error, kind)
    assert words in str(error)


def test_a_question_of_any_size_that_is_allowed_fits(aggregator):
    frame({"ask": base64.b64encode(bytes(MOST_BYTES)).decode()})
    with pytest.raises(ProtocolError, match=r"none has more than"):
        frame({"ask": "x" * MOST_FRAME_BYTES})
    assert json.loads(encoded(aggregator.fit()))["kind"] == "fit"
