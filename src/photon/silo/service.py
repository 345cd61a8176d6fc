"""The trainer as a service: one task at a time, asked for over a Unix socket (photon.silo.socket).

A thread listens, so that a question is heard while another is worked on; it waits its turn. The
same question, asked again, waits for the same answer. Killed at any moment, the trainer starts
again from what is on disk (photon.silo.answers).
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.energy.meter import METER
from photon.errors import PhotonError, RunBusyError
from photon.federation.envelopes import Ask
from photon.silo.presence import Reporter
from photon.silo.socket import (
    SOCKET_FILE,
    answer_of,
    bytes_of,
    frame,
    short_address,
    unframe,
)
from photon.silo.trainer import SiloTrainer
from photon.store.disk import held_alone

log = logging.getLogger(__name__)

_LOCK_FILE = "trainer.lock"

#: The courier has one connection for each task under way; more than so many is a mistake somewhere.
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
    listener = Listener(home / SOCKET_FILE, trainer.read, trainer.refuse_unread, reporter.figures)
    log.info("listening at %s", home / SOCKET_FILE)
    reporter.say("idle")
    while True:
        with METER.phase("idle"):
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

    ask: Ask
    until: float
    waiting: list[_Connection] = field(default_factory=list)

    def left_s(self) -> float:
        """How long the answer is waited for still."""
        return self.until - time.monotonic()


class Listener:
    """Hears questions in a thread of its own, and hands them over one by one.

    Args:
        path: of the socket, which only this user may open.
        read: the question in its bytes, if it is the aggregator's; else a PhotonError.
        unread: the answer to what is no question: its bytes, and what is wrong with them.
        figures: what this node does, for its own /metrics.

    Raises:
        OSError: the socket can't be made.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[bytes], Ask],
        unread: Callable[[bytes, PhotonError], Mapping[str, Any]],
        figures: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.read = read
        self.unread = unread
        self.figures = figures
        self.connections: set[_Connection] = set()
        self._open: dict[str, Question] = {}
        self._todo: queue.SimpleQueue[Question] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, context: _unexpected(context.get("exception")))
        server = self._loop.create_unix_server(
            lambda: _Connection(self), sock=_listening(path), backlog=_MOST_CONNECTIONS
        )
        self._loop.run_until_complete(server)
        threading.Thread(target=self._listen, name="photon-listener", daemon=True).start()

    def next(self) -> Question:
        """The next question; waits for one."""
        return self._todo.get()

    def settle(self, question: Question, answer: Mapping[str, Any]) -> None:
        """Give all who asked the answer."""
        self._loop.call_soon_threadsafe(self._hand_out, question, answer)

    def heard(self, ask: Ask, who: _Connection) -> Question:
        """A question, in the listening thread; the same that is open already, if there is one."""
        key, same = ask.sha256, ask.question_sha256
        until = time.monotonic() + ask.within_s
        question = self._open.get(key)
        if question is None:
            question = self._open[key] = Question(ask, until)
            self._todo.put(question)
        # Asked anew by an aggregator that was restarted, what is worked on is still wanted; the
        # new Ask is answered after it, from disk, as a Reply names the Ask that it answers.
        for each in self._open.values():
            if each.ask.question_sha256 == same:
                each.until = max(each.until, until)
        question.waiting.append(who)
        return question

    def _hand_out(self, question: Question, answer: Mapping[str, Any]) -> None:
        del self._open[question.ask.sha256]
        for one in question.waiting:
            one.answer(answer)

    def _listen(self) -> None:
        try:
            self._loop.run_forever()
        except BaseException as error:
            _unexpected(error)


def _unexpected(error: BaseException | None) -> None:
    if not isinstance(error, OSError):  # of one connection, or too many files are open
        # Deaf, this process is of no use; another takes its place.
        traceback.print_exception(error)
        os._exit(1)


class _Connection(asyncio.Protocol):
    """One who asks. All but the trainer's work must be prompt."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._received = bytearray()
        self._question: Question | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._hurry()
        if len(self._listener.connections) >= _MOST_CONNECTIONS:
            log.warning("more than %d connections; one is refused", _MOST_CONNECTIONS)
            transport.abort()
        else:
            self._listener.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._question is not None:  # it speaks when it should listen
            self._transport.abort()
            return
        self._received += data
        raw = b""
        try:
            record = unframe(self._received)
            if record is None:
                return
            if "figures" in record:
                self.answer(self._listener.figures())
                return
            raw = bytes_of(record, "ask")
            ask = self._listener.read(raw)
        except PhotonError as error:
            self.answer(self._listener.unread(raw, error))
            return
        self._deadline.cancel()
        self._received.clear()
        self._question = self._listener.heard(ask, self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._listener.connections.discard(self)
        if self._question is not None:
            self._question.waiting.remove(self)

    def answer(self, answer: Mapping[str, Any]) -> None:
        self._deadline.cancel()
        self._hurry()
        self._transport.write(frame(answer))
        self._transport.close()  # once all is sent

    def _hurry(self) -> None:
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(_PROMPT_S, self._transport.abort)


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
