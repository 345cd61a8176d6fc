"""The process engine: n nodes in processes of their own, state and updates as files between them.

A worker is one node: one process, or several ranks that train together. One that dies or falls
silent is replaced whole, and its task is run again from the same start, so its result is the same.
Answers come as they are ready; whoever takes them in the order of tasks (`submitted`) gets weights
that do not depend on which worker was faster.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from photon.energy.account import Spent
from photon.energy.meter import METER
from photon.errors import PhotonError, RankLostError, WorkerLostError
from photon.federation import (
    Answer,
    EvalReceipt,
    EvalTask,
    FitTask,
    Node,
    NodeSettings,
    Receipt,
    SecureReceipt,
    SecureTask,
    Task,
    Update,
    Version,
)
from photon.fork_server import fork_context
from photon.freed_memory import share_freed_memory
from photon.link import EntryFile, TensorFile, write_tensors
from photon.telemetry import Event
from photon.telemetry.events import LocalProgress, WorkerLost
from photon.training import Seat

#: How often one task is tried before its silo is dropped from the round.
ATTEMPTS = 3

#: A new process may take so long to import PyTorch and build its model before silence counts.
STARTUP_S = 120.0

#: A worker's first message: it is up.
_READY = "ready"

#: A question to idle workers: what they used since their last answers.
_UNTOLD = "untold"

#: When one rank is lost the others complain at once; the dead one shows within this time.
_POST_MORTEM_S = 2.0


@dataclass(frozen=True)
class _Rank:
    """A process and the pipe to it."""

    process: Any
    pipe: Connection


@dataclass(frozen=True)
class _Written:
    """A version as workers get it.

    Attributes:
        serial: no other version of this engine has it; numbers of groups' versions are their own.
        once: file of what travels once; None where nothing does.
    """

    serial: int
    number: int
    file: EntryFile
    once: Path | None
    once_sha256: str

    def read(self) -> Version:
        """The version, in place."""
        tensors = {entry.name: entry.decoded() for entry in self.file.read()}
        once = dict(TensorFile(self.once).named_tensors()) if self.once is not None else {}
        return Version(self.number, tensors, once=once, once_sha256=self.once_sha256)


@dataclass
class _Job:
    """A task on its way through the workers.

    Attributes:
        written: the version that it starts from.
        update: file for what comes of it, once a worker has it.
        attempts: how often a worker was lost with it.
    """

    task: Task
    written: _Written
    update: Path | None = None
    attempts: int = 0


@dataclass
class _Worker:
    """A node's processes, what it does and when it last spoke. Rank 0 takes tasks and answers."""

    index: int
    ranks: list[_Rank]
    job: _Job | None = None
    heard_s: float = 0.0
    ready: bool = False
    step: int = 0

    @property
    def pipe(self) -> Connection:
        return self.ranks[0].pipe

    def end(self) -> None:
        for rank in self.ranks:
            rank.process.kill()
        for rank in self.ranks:
            rank.process.join()
            rank.pipe.close()


class WorkerEngine:
    """Serves tasks with `settings.processes` worker processes.

    Args:
        settings: for the nodes; `worker` and `seat` are set per process.
        exchange: folder for state and updates in flight; removed at the end.
        on_event: told of local progress and lost workers.
        ranks: processes of each node.
    """

    def __init__(
        self,
        settings: NodeSettings,
        exchange: Path,
        on_event: Callable[[Event], None],
        *,
        ranks: int = 1,
    ) -> None:
        self.processes = settings.processes
        self._settings = settings
        self._silence_s = settings.config.federation.silence_s
        self._exchange = exchange
        self._on_event = on_event
        self._ranks = ranks
        share_freed_memory()  # no node trains in this process
        self._context = fork_context()
        shutil.rmtree(exchange, ignore_errors=True)
        exchange.mkdir(parents=True)
        self._waiting: deque[_Job] = deque()
        self._answered: list[tuple[Task, Answer]] = []
        self._cancelled: set[Task] = set()
        self._version: Version | None = None
        self._written: list[_Written] = []  # the newest last
        self._numbers, self._spare = itertools.count(), list[Path]()
        self._workers = [self._start(index) for index in range(settings.processes)]

    @property
    def process_ids(self) -> list[int]:
        """Ids of the worker processes alive now: each worker's ranks in order."""
        return [rank.process.pid for worker in self._workers for rank in worker.ranks]

    def untold(self) -> list[Spent]:
        """What idle workers used since their last answers: they waited, most of all."""
        idle = [worker for worker in self._workers if worker.job is None and worker.ready]
        with contextlib.suppress(OSError, EOFError):  # one is dead, which matters no more
            for worker in idle:
                worker.pipe.send(_UNTOLD)
            return [worker.pipe.recv() for worker in idle]
        return []

    @property
    def now_s(self) -> float:
        return time.monotonic()

    def submit(self, task: Task, version: Version) -> None:
        """Queue a task; its version is written once for all that start from it."""
        if self._version is not version:
            self._write(version)
        self._waiting.append(_Job(task, self._written[-1]))
        # Scores first; a sort leaves those alike in their order.
        self._waiting = deque(sorted(self._waiting, key=lambda job: isinstance(job.task, FitTask)))
        self._dispatch()

    def arrivals(self, timeout_s: float | None = None) -> list[tuple[Task, Answer]]:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._answered and any(worker.job for worker in self._workers):
            left_s = None if until is None else until - time.monotonic()
            if left_s is not None and left_s <= 0:
                break
            self._hear(left_s)
            self._dispatch()
        answered, self._answered = self._answered, []
        return answered

    def cancel(self, task: Task) -> str:
        self._waiting = deque(job for job in self._waiting if job.task != task)
        for worker in self._workers:
            if worker.job is not None and worker.job.task == task:
                self._cancelled.add(task)
        return ""

    def settle(self) -> None:
        """Nothing to wait for: workers answer when what they keep is on disk."""

    def close(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError, BrokenPipeError):
                worker.pipe.send(None)
        for worker in self._workers:
            for rank in worker.ranks:
                rank.process.join(timeout=2.0)
            worker.end()
        self._workers = []
        shutil.rmtree(self._exchange, ignore_errors=True)

    def _write(self, version: Version) -> None:
        """Write a version, over one that no task starts from any more."""
        jobs = [*self._waiting, *(worker.job for worker in self._workers if worker.job)]
        needed = {job.written.serial for job in jobs}
        self._spare += [one.file.path for one in self._written if one.serial not in needed]
        self._written = [one for one in self._written if one.serial in needed]
        file = EntryFile.of_plain(self._free(), version.tensors.items())
        once = self._exchange / f"once-{version.once_sha256}.safetensors" if version.once else None
        if once is not None and not once.exists():
            write_tensors(once, version.once, durable=False)
        held = version.number, file, once, version.once_sha256
        self._written.append(_Written(next(self._numbers), *held))
        self._version = version

    def _free(self) -> Path:
        """A file that nobody reads any more, or a new one."""
        return self._spare.pop() if self._spare else self._exchange / str(next(self._numbers))

    def _dispatch(self) -> None:
        """Give every idle worker the next waiting task."""
        for worker in self._workers:
            if worker.job is None and self._waiting:
                worker.job = job = self._waiting.popleft()
                job.update = job.update or self._free()
                worker.heard_s, worker.step = time.monotonic(), 0
                with contextlib.suppress(OSError):  # a dead worker is noticed when listening
                    worker.pipe.send((job.task, job.written, job.update))

    def _hear(self, most_s: float | None) -> None:
        """Wait until a busy worker speaks, dies, or has been silent for too long."""
        busy = [worker for worker in self._workers if worker.job is not None]
        deadlines = [worker.heard_s + self._patience_s(worker) for worker in busy]
        left_s = max(0.0, min(deadlines) - time.monotonic()) + 0.01
        pipes = [rank.pipe for worker in busy for rank in worker.ranks]
        with METER.phase("idle"):
            spoke = set(wait(pipes, timeout=left_s if most_s is None else min(left_s, most_s)))
        for worker, deadline in zip(busy, deadlines, strict=True):
            talking = next((rank for rank in worker.ranks if rank.pipe in spoke), None)
            if talking is not None:
                self._read(worker, talking)
            elif time.monotonic() > deadline:
                silence = f"no step and no answer for {self._patience_s(worker):g} s"
                self._lose(worker, silence)

    def _patience_s(self, worker: _Worker) -> float:
        return self._silence_s if worker.ready else max(self._silence_s, STARTUP_S)

    def _read(self, worker: _Worker, rank: _Rank) -> None:
        try:
            message = rank.pipe.recv()
        except (EOFError, OSError):
            self._lose(worker, _post_mortem(worker))
            return
        worker.heard_s = time.monotonic()
        if message == _READY:
            worker.ready = True
        elif isinstance(message, Event):
            if isinstance(message, LocalProgress):
                worker.step = message.step
            self._on_event(message)
        elif isinstance(message, RankLostError):
            self._lose(worker, _post_mortem(worker, message))
        elif isinstance(message, PhotonError):
            raise message
        else:
            job, worker.job = worker.job, None
            assert job is not None
            self._answer(job, message)

    def _answer(
        self, job: _Job, answer: EvalReceipt | SecureReceipt | Receipt | tuple[Receipt, EntryFile]
    ) -> None:
        task = job.task
        assert job.update is not None
        let_go = partial(self._spare.append, job.update)
        if task not in self._cancelled and isinstance(answer, tuple):
            receipt, file = answer
            self._answered.append((task, replace(Update.of(receipt, file.read()), let_go=let_go)))
            return
        let_go()
        if task in self._cancelled:
            self._cancelled.remove(task)
        elif isinstance(answer, EvalReceipt | SecureReceipt):
            self._answered.append((task, answer))
        elif isinstance(answer, Receipt):  # no update: a failure
            self._answered.append((task, Update.none(answer)))

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Replace a worker and put its task back, at most ATTEMPTS times."""
        job, worker.job = worker.job, None
        assert job is not None
        task, silo = job.task, job.task.silo or ""
        self._on_event(WorkerLost(round=task.round, silo=silo, worker=worker.index, reason=reason))
        worker.end()
        self._workers[self._workers.index(worker)] = self._start(worker.index)
        job.attempts += 1
        if job.attempts < ATTEMPTS:
            self._waiting.appendleft(job)
            return
        failure = f"its worker was lost {ATTEMPTS} times; the last time {reason}"
        if isinstance(task, EvalTask):
            raise WorkerLostError(
                f"evaluation of {task.silo or 'the global held-out set'} failed: {failure}"
            )
        if isinstance(task, SecureTask):
            self._answer(job, SecureReceipt(failure=failure))
            return
        code = WorkerLostError.exit_code if self._ranks == 1 else RankLostError.exit_code
        self._answer(job, Receipt(task.round, silo, failure=failure, failure_code=code))

    def _start(self, index: int) -> _Worker:
        port = _free_port() if self._ranks > 1 else 0
        started = []
        for number in range(self._ranks):
            ours, theirs = self._context.Pipe()
            local = index * self._ranks + number  # every worker takes devices of its own
            seat = Seat(number, local, self._ranks, self._ranks)
            settings = replace(self._settings, worker=index, seat=seat, apart=True)
            process = self._context.Process(
                target=_work,
                args=(settings, theirs),
                kwargs={"port": port},
                name=f"photon-worker-{index}-rank-{number}",
                daemon=True,
            )
            process.start()
            theirs.close()
            started.append(_Rank(process, ours))
        return _Worker(index, started)


def _post_mortem(worker: _Worker, complaint: RankLostError | None = None) -> str:
    """Which rank of a worker ended, how, and after which step; or what a rank complained of."""
    ended = wait([rank.process.sentinel for rank in worker.ranks], timeout=_POST_MORTEM_S)
    for rank in worker.ranks:
        if rank.process.sentinel in ended:  # its files are closed, its exit code comes a bit later
            rank.process.join(timeout=_POST_MORTEM_S)
    where = f"after local step {worker.step}" if worker.step else "before its first reported step"
    for number, rank in enumerate(worker.ranks):
        code = rank.process.exitcode
        if code is not None:
            who = f"rank {number}" if len(worker.ranks) > 1 else "its process"
            return f"{who} ended with exit code {code} {where}"
    return complaint.message if complaint is not None else f"its pipe broke {where}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _work(settings: NodeSettings, pipe: Connection, *, port: int) -> None:
    """A worker process: a rank of one node, at work until told to stop or left alone."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the aggregator's to handle
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # The aggregator being gone is no error of this process.
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionResetError):
        try:
            node = Node(settings, pipe.send)
            if settings.seat.rank:
                node.follow()
                return
        except PhotonError as error:
            pipe.send(error)
            pipe.recv()  # until the aggregator has read it, and ends this process
            return
        pipe.send(_READY)
        version, read, next_message = None, None, METER.phase("idle")(pipe.recv)
        while (message := next_message()) is not None:
            if message == _UNTOLD:
                pipe.send(node.untold())
                continue
            task, written, path = message
            try:
                if written != read:
                    version, read = written.read(), written
                assert version is not None
                answer = _answered(node, task, version, path)
            except PhotonError as error:
                answer = error
            pipe.send(answer)
        node.close()


def _answered(node: Node, task: Task, version: Version, path: Path) -> Any:
    if isinstance(task, EvalTask):
        return node.evaluate(task, version)
    if isinstance(task, SecureTask):
        return node.agree(task)
    update = node.fit(task, version)
    if update.receipt.failure is not None:
        return update.receipt
    started = time.perf_counter()
    if update.packed is None:
        file = EntryFile.of_plain(path, update.tensors())
    else:
        file = EntryFile.write(path, update.packed)
    node.settle()
    publish_s = update.receipt.publish_s + time.perf_counter() - started
    return replace(update.receipt, publish_s=publish_s), file


def end_with_parent() -> None:
    """End this process when the one that started it is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
