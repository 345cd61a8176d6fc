"""The process engine: n nodes in processes of their own, state and updates as files between them.

A worker that dies or falls silent is replaced and its task is run again from the same start, so
its result is the same. Answers are handed over in the order of tasks, so the merged weights do not
depend on which worker was faster.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from photon.errors import PhotonError, WorkerLostError
from photon.federation import EvalReceipt, EvalTask, FitTask, Node, NodeSettings, Receipt, Update
from photon.federation.tasks import GlobalState
from photon.link import TensorFile, write_tensors
from photon.telemetry import Event
from photon.telemetry.events import WorkerLost

Task = FitTask | EvalTask

#: How often one task is tried before its silo is dropped from the round.
ATTEMPTS = 3

#: A new process may take so long to import PyTorch and build its model before silence counts.
STARTUP_S = 120.0

#: A worker's first message: it is up.
_READY = "ready"


@dataclass
class _Worker:
    """A process, the pipe to it, what it does and when it last spoke."""

    index: int
    process: Any
    pipe: Connection
    position: int | None = None
    heard_s: float = 0.0
    ready: bool = False


@dataclass
class _Batch:
    """Tasks on their way: which wait, how often each was tried, and answers not yet handed over."""

    tasks: Sequence[Task]
    state_path: Path
    waiting: deque[int]
    attempts: list[int]
    answers: dict[int, Any] = field(default_factory=dict)


class WorkerEngine:
    """Serves tasks with `settings.processes` worker processes.

    Args:
        settings: for the nodes; `worker` is set per process.
        exchange: folder for state and updates in flight; removed at the end.
        on_event: told of local progress and lost workers.
    """

    def __init__(
        self, settings: NodeSettings, exchange: Path, on_event: Callable[[Event], None]
    ) -> None:
        self.processes = settings.processes
        self._settings = settings
        self._silence_s = settings.config.federation.silence_s
        self._exchange = exchange
        self._on_event = on_event
        # Spawned, not forked: a fork copies locks of running thread pools in whatever state.
        self._context = multiprocessing.get_context("spawn")
        shutil.rmtree(exchange, ignore_errors=True)
        exchange.mkdir(parents=True)
        self._workers = [self._start(index) for index in range(settings.processes)]

    @property
    def process_ids(self) -> list[int]:
        """Ids of the worker processes alive now."""
        return [worker.process.pid for worker in self._workers]

    def fit(self, tasks: Sequence[FitTask], state: GlobalState) -> Iterator[Update]:
        for answer in self._serve(tasks, state):
            if isinstance(answer, Receipt):  # no update: a failure
                yield Update(answer, lambda: iter(()))
                continue
            receipt, path = answer
            with TensorFile(path) as file:
                yield Update(receipt, file.named_tensors)
            path.unlink(missing_ok=True)

    def evaluate(self, tasks: Sequence[EvalTask], state: GlobalState) -> Iterator[EvalReceipt]:
        for task, answer in zip(tasks, self._serve(tasks, state), strict=True):
            if isinstance(answer, Receipt):
                raise WorkerLostError(
                    f"evaluation of {task.silo or 'the global held-out set'} failed: "
                    f"{answer.failure}"
                )
            yield answer

    def close(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError, BrokenPipeError):
                worker.pipe.send(None)
        for worker in self._workers:
            worker.process.join(timeout=2.0)
            self._end(worker)
        self._workers = []
        shutil.rmtree(self._exchange, ignore_errors=True)

    def _serve(self, tasks: Sequence[Task], state: GlobalState) -> Iterator[Any]:
        """Answers in task order, while later tasks are being worked on."""
        state_path = self._exchange / "state.safetensors"
        write_tensors(state_path, state, durable=False)
        batch = _Batch(tasks, state_path, deque(range(len(tasks))), [0] * len(tasks))
        for position in range(len(tasks)):
            while position not in batch.answers:
                self._dispatch(batch)
                self._hear(batch)
            self._dispatch(batch)
            yield batch.answers.pop(position)

    def _dispatch(self, batch: _Batch) -> None:
        """Give every idle worker the next waiting task."""
        for worker in self._workers:
            if worker.position is None and batch.waiting:
                worker.position = batch.waiting.popleft()
                worker.heard_s = time.monotonic()
                with contextlib.suppress(OSError):  # a dead worker is noticed when listening
                    worker.pipe.send((batch.tasks[worker.position], batch.state_path))

    def _hear(self, batch: _Batch) -> None:
        """Wait until a busy worker speaks, dies, or has been silent for too long."""
        busy = [worker for worker in self._workers if worker.position is not None]
        deadlines = [worker.heard_s + self._patience_s(worker) for worker in busy]
        left_s = max(0.0, min(deadlines) - time.monotonic())
        spoke = set(wait([worker.pipe for worker in busy], timeout=left_s + 0.01))
        for worker, deadline in zip(busy, deadlines, strict=True):
            if worker.pipe in spoke:
                self._read(worker, batch)
            elif time.monotonic() > deadline:
                silence = f"no step and no answer for {self._patience_s(worker):g} s"
                self._lose(worker, silence, batch)

    def _patience_s(self, worker: _Worker) -> float:
        return self._silence_s if worker.ready else max(self._silence_s, STARTUP_S)

    def _read(self, worker: _Worker, batch: _Batch) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5.0)
            code = worker.process.exitcode
            self._lose(worker, f"its process ended with exit code {code}", batch)
            return
        worker.heard_s = time.monotonic()
        if message == _READY:
            worker.ready = True
        elif isinstance(message, Event):
            self._on_event(message)
        elif isinstance(message, PhotonError):
            raise message
        else:
            assert worker.position is not None
            batch.answers[worker.position] = message
            worker.position = None

    def _lose(self, worker: _Worker, reason: str, batch: _Batch) -> None:
        """Replace a worker and put its task back, at most ATTEMPTS times."""
        position = worker.position
        assert position is not None
        task = batch.tasks[position]
        silo = task.silo or ""
        self._on_event(WorkerLost(round=task.round, silo=silo, worker=worker.index, reason=reason))
        self._end(worker)
        self._workers[self._workers.index(worker)] = self._start(worker.index)
        batch.attempts[position] += 1
        if batch.attempts[position] < ATTEMPTS:
            batch.waiting.appendleft(position)
        else:
            failure = f"its worker was lost {ATTEMPTS} times; the last time {reason}"
            batch.answers[position] = Receipt(task.round, silo, failure=failure)

    def _start(self, index: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        settings = replace(self._settings, worker=index)
        process = self._context.Process(
            target=_work,
            args=(settings, self._exchange, theirs),
            name=f"photon-worker-{index}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Worker(index, process, ours)

    @staticmethod
    def _end(worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


def _work(settings: NodeSettings, exchange: Path, pipe: Connection) -> None:
    """A worker process: one node, answering tasks until told to stop or left alone."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the aggregator's to handle
    # The aggregator being gone is no error of this process.
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionResetError):
        try:
            node = Node(settings, pipe.send)
        except PhotonError as error:
            pipe.send(error)
            return
        pipe.send(_READY)
        while (message := pipe.recv()) is not None:
            task, state_path = message
            try:
                with TensorFile(state_path) as file:
                    answer = _answer(node, task, file, exchange)
            except PhotonError as error:
                answer = error
            pipe.send(answer)


def _answer(node: Node, task: Task, state: TensorFile, exchange: Path) -> Any:
    tensors = dict(state.named_tensors())
    if isinstance(task, EvalTask):
        return next(iter(node.evaluate([task], tensors)))
    update = node.fit(task, tensors)
    if update.receipt.failure is not None:
        return update.receipt
    started = time.perf_counter()
    path = exchange / f"update-{task.round}-{task.silo}.safetensors"
    write_tensors(path, dict(update.tensors()), durable=False)
    publish_s = update.receipt.publish_s + time.perf_counter() - started
    return replace(update.receipt, publish_s=publish_s), path


def _die_with_parent() -> None:
    """End this process when the aggregator is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
