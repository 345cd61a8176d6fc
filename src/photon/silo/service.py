"""The trainer as a service: one task at a time, asked for over a Unix socket (photon.silo.socket).

A thread listens, so that a question is heard while another is worked on; it waits its turn. The
same question, asked again, waits for the same answer. Killed at any moment, the trainer starts
again from what is on disk (photon.silo.answers).
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.errors import PhotonError, RunBusyError
from photon.federation.envelopes import Ask
from photon.silo.presence import Reporter
from photon.silo.socket import (
    SOCKET_FILE,
    answer_of,
    frame,
    question_of,
    short_address,
    unframe,
)
from photon.silo.trainer import SiloTrainer
from photon.store.disk import held_alone

log = logging.getLogger(__name__)

_LOCK_FILE = "trainer.lock"

#: The shim has one connection for each task under way; more than so many is a mistake somewhere.
_MOST_CONNECTIONS = 64

#: Within so many seconds a question must have come, and an answer must have gone.
_PROMPT_S = 30.0

#: The last report, that this node ends, may take so long.
_LAST_WORDS_S = 1.0


def serve(home: Path, trainer: SiloTrainer, reporter: Reporter) -> None:
    """Answer questions until the process ends.

    Args:
        home: of the node; `only_trainer` holds it.

    Raises:
        Exception: what ended it while it worked on a task; the task was not answered.
    """
    listener = Listener(home / SOCKET_FILE, trainer.read, trainer.refuse_unread)
    log.info("listening at %s", home / SOCKET_FILE)
    reporter.say("idle")
    while True:
        question = listener.next()
        reply = trainer.answer(question.ask, question.left_s)
        listener.settle(question, answer_of(reply))


@dataclass(eq=False)
class Question:
    """What was asked, and who waits for the answer.

    Attributes:
        until: the latest of those given by all who asked the same; this process's clock that
            never goes back, as the aggregator's is another.
    """

    key: str
    ask: Ask
    until: float
    waiting: list[_Connection] = field(default_factory=list)

    def left_s(self) -> float:
        """How long the answer is waited for still."""
        return self.until - time.monotonic()


@dataclass(eq=False)
class _Connection:
    """Attributes:
    deadline: for what must be prompt; None while the trainer works.
    """

    socket: socket.socket
    deadline: float | None
    received: bytearray = field(default_factory=bytearray)
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    question: Question | None = None


class Listener:
    """Hears questions in a thread of its own, and hands them over one by one.

    Args:
        path: of the socket, which only this user may open.
        read: the question in its bytes, if it is the aggregator's; else a PhotonError.
        unread: the answer to what is no question: its bytes, and what is wrong with them.

    Raises:
        OSError: the socket can't be made.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[bytes], Ask],
        unread: Callable[[bytes, PhotonError], Mapping[str, Any]],
    ) -> None:
        self._question_in = read
        self._unread = unread
        self._lock = threading.Lock()
        self._open: dict[str, Question] = {}
        self._todo: queue.SimpleQueue[Question] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Question, Mapping[str, Any]]] = queue.SimpleQueue()
        self._connections: set[_Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._server = _listening(path)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._server, selectors.EVENT_READ)
        threading.Thread(target=self._listen, name="photon-listener", daemon=True).start()

    def next(self) -> Question:
        """The next question; waits for one."""
        return self._todo.get()

    def settle(self, question: Question, answer: Mapping[str, Any]) -> None:
        """Give all who asked the answer."""
        with self._lock:
            del self._open[question.key]
        self._done.put((question, answer))
        self._waker.send(b"\0")

    def _listen(self) -> None:
        try:
            while True:
                prompt = any(one.deadline is not None for one in self._connections)
                for key, events in self._selector.select(1.0 if prompt else None):
                    if key.fileobj is self._server:
                        self._accept()
                    elif key.fileobj is self._woken:
                        self._hand_out()
                    else:
                        with self._dropping_if_broken(key.data):
                            self._move(key.data, events)
                now = time.monotonic()
                for one in [one for one in self._connections if one.deadline is not None]:
                    if one.deadline is not None and one.deadline < now:
                        self._drop(one)
        except BaseException:
            # Deaf, this process is of no use; another takes its place.
            traceback.print_exc()
            os._exit(1)

    def _accept(self) -> None:
        try:
            caller, _ = self._server.accept()
        except OSError:  # it has hung up already, or there are too many files open
            return
        if len(self._connections) >= _MOST_CONNECTIONS:
            log.warning("more than %d connections; one is refused", _MOST_CONNECTIONS)
            caller.close()
            return
        caller.setblocking(False)
        one = _Connection(caller, time.monotonic() + _PROMPT_S)
        self._connections.add(one)
        self._selector.register(caller, selectors.EVENT_READ, one)

    def _move(self, one: _Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            one.unsent = one.unsent[one.socket.send(one.unsent) :]
            if not one.unsent:
                self._drop(one)
            return
        some = one.socket.recv(1 << 16)
        if not some or one.deadline is None:  # it hung up, or speaks when it should listen
            self._drop(one)
            return
        one.received += some
        self._read(one)

    def _read(self, one: _Connection) -> None:
        raw = b""
        try:
            record = unframe(one.received)
            if record is None:
                return
            raw = question_of(record)
            ask = self._question_in(raw)
        except PhotonError as error:
            self._answer(one, self._unread(raw, error))
            return
        one.received, one.deadline = bytearray(), None
        key, same = ask.sha256, ask.question_sha256
        until = time.monotonic() + ask.within_s
        with self._lock:
            question = self._open.get(key)
            known = question is not None
            if question is None:
                question = self._open[key] = Question(key, ask, until)
            # Asked anew by an aggregator that was restarted, what is worked on is still wanted; the
            # new Ask is answered after it, from disk, as a Reply names the Ask that it answers.
            for each in self._open.values():
                if each.ask.question_sha256 == same:
                    each.until = max(each.until, until)
            question.waiting.append(one)
            one.question = question
        if not known:
            self._todo.put(question)

    def _hand_out(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while True:
            try:
                question, answer = self._done.get_nowait()
            except queue.Empty:
                return
            for one in list(question.waiting):
                self._answer(one, answer)

    def _answer(self, one: _Connection, answer: Mapping[str, Any]) -> None:
        one.unsent = memoryview(frame(answer))
        one.deadline = time.monotonic() + _PROMPT_S
        self._selector.modify(one.socket, selectors.EVENT_WRITE, one)

    def _drop(self, one: _Connection) -> None:
        if one not in self._connections:
            return
        self._connections.remove(one)
        if one.question is not None:
            with self._lock:
                one.question.waiting.remove(one)
        self._selector.unregister(one.socket)
        one.socket.close()

    @contextlib.contextmanager
    def _dropping_if_broken(self, one: _Connection) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            pass
        except OSError:
            self._drop(one)


def end_on_signals(last_words: Callable[[], None]) -> None:
    """End this process with code 0, soon after SIGTERM or SIGINT, whatever it is at.

    Nothing is finished and nothing needs to be: what is on disk is whole at any moment. A step of
    training may take minutes, so the signal is acted on in a thread, not between two lines of
    Python.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch(end: socket.socket, _kept_open: socket.socket) -> None:
        while True:
            for number in end.recv(64):
                if number in (signal.SIGTERM, signal.SIGINT):
                    log.info("%s: ending", signal.Signals(number).name)
                    last = threading.Thread(target=last_words, daemon=True)
                    last.start()
                    last.join(2 * _LAST_WORDS_S)
                    os._exit(0)

    arguments = (ours, theirs)
    threading.Thread(target=watch, args=arguments, name="photon-signals", daemon=True).start()
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)


def say_goodbye(home: Path, reporter: Reporter) -> None:
    """What is done when the process is told to end."""
    (home / SOCKET_FILE).unlink(missing_ok=True)
    reporter.stop(_LAST_WORDS_S)


def _listening(path: Path) -> socket.socket:
    """A socket that only this user may open; it takes the place of one that a dead trainer left."""
    partial = path.with_name(f".{os.getpid()}.sock")
    partial.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_address(partial) as address:
        server.bind(address)
    partial.chmod(0o600)
    server.listen(_MOST_CONNECTIONS)
    server.setblocking(False)
    partial.replace(path)
    return server


def only_trainer(home: Path) -> AbstractContextManager[None]:
    """Hold a node's home, before anything in it is touched, or anybody told that it is here.

    Raises (on entry):
        RunBusyError: another trainer does.
    """
    return held_alone(
        home / _LOCK_FILE,
        RunBusyError(
            f"another trainer is working in {home}",
            hint="It may be ending; the next attempt will show. Each node has a home of its own.",
        ),
    )
