"""The process engine: n nodes in processes of their own, state and updates as files between them.

A worker is one node: one process, or several ranks that train together. One that dies or falls
silent is replaced whole, and its task is run again from the same start, so its result is the same.
Answers come as they are ready; whoever takes them in the order of tasks (`submitted`) gets weights
that do not depend on which worker was faster.
"""

from __future__ import annotations

import contextlib
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


@dataclass
class _Job:
    """A task on its way through the workers.

    Attributes:
        state: file of the version that it starts from.
        once: file of what travels once; None where nothing does.
        attempts: how often a worker was lost with it.
    """

    task: Task
    version: Version
    state: Path
    once: Path | None
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
        self._written: Version | None = None
        self._newest, self._files = exchange, 0
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
        if self._written is not version:
            self._files += 1
            path = self._exchange / f"state-{self._files}.safetensors"
            write_tensors(path, version.tensors, durable=False)
            self._written, self._newest = version, path
            self._remove_states()
        once = self._exchange / f"once-{version.once_sha256}.safetensors" if version.once else None
        if once is not None and not once.exists():
            write_tensors(once, version.once, durable=False)
        self._waiting.append(_Job(task, version, self._newest, once))
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

    def _remove_states(self) -> None:
        """Of versions that no task starts from any more."""
        jobs = [*self._waiting, *(worker.job for worker in self._workers if worker.job)]
        needed = {self._newest, *(job.state for job in jobs)}
        for path in self._exchange.glob("state-*.safetensors"):
            if path not in needed:
                path.unlink(missing_ok=True)

    def _dispatch(self) -> None:
        """Give every idle worker the next waiting task."""
        for worker in self._workers:
            if worker.job is None and self._waiting:
                worker.job = job = self._waiting.popleft()
                worker.heard_s, worker.step = time.monotonic(), 0
                with contextlib.suppress(OSError):  # a dead worker is noticed when listening
                    held = job.version.number, job.version.once_sha256
                    worker.pipe.send((job.task, job.state, job.once, *held))

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

    def _answer(self, job: _Job, answer: EvalReceipt | Receipt | tuple[Receipt, EntryFile]) -> None:
        task = job.task
        if task in self._cancelled:
            self._cancelled.remove(task)
            if isinstance(answer, tuple):
                answer[1].path.unlink(missing_ok=True)
        elif isinstance(answer, EvalReceipt):
            self._answered.append((task, answer))
        elif isinstance(answer, Receipt):  # no update: a failure
            self._answered.append((task, Update.none(answer)))
        else:
            assert isinstance(task, FitTask)
            receipt, file = answer
            let_go = partial(file.path.unlink, missing_ok=True)
            update = replace(Update.of(receipt, file.read()), let_go=let_go)
            self._answered.append((task, update))

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
                args=(settings, self._exchange, theirs),
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


def _work(settings: NodeSettings, exchange: Path, pipe: Connection, *, port: int) -> None:
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
        with contextlib.ExitStack() as opened:
            version, read, next_message = None, None, METER.phase("idle")(pipe.recv)
            while (message := next_message()) is not None:
                if message == _UNTOLD:
                    pipe.send(node.untold())
                    continue
                task, *files = message
                try:
                    if read != files:
                        opened.close()
                        version, read = _version(opened, *files), files
                    assert version is not None
                    answer = _answered(node, task, version, exchange)
                except PhotonError as error:
                    answer = error
                pipe.send(answer)
        node.close()


def _version(
    opened: contextlib.ExitStack, state: Path, once: Path | None, number: int, once_sha256: str
) -> Version:
    """A version in files, which stay open as long as `opened`."""
    tensors, first = (
        dict(opened.enter_context(TensorFile(path)).named_tensors()) if path is not None else {}
        for path in (state, once)
    )
    return Version(number, tensors, once=first, once_sha256=once_sha256)


def _answered(node: Node, task: Task, version: Version, exchange: Path) -> Any:
    if isinstance(task, EvalTask):
        return node.evaluate(task, version)
    update = node.fit(task, version)
    if update.receipt.failure is not None:
        return update.receipt
    started = time.perf_counter()
    file = EntryFile.write(exchange / f"update-{task.round}-{task.silo}", update.entries())
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
