"""Several small runs at a time, each in a process of its own on its share of the cores."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from photon.cli.bars import run_bars
from photon.cli.screen import console, view_of_run
from photon.config import RunConfig
from photon.errors import PhotonError, WorkerLostError
from photon.fork_server import fork_context
from photon.telemetry import Event, Listener

#: A run told to stop has this long to write down that it was.
_STOP_S = 20.0


@dataclass(frozen=True)
class Training:
    """A run: its folder, its run file, and whose text it reads, pooled; None: a federation's."""

    folder: Path
    config: RunConfig
    silos: tuple[str, ...] | None

    def go(self, listener: Listener | None) -> None:
        """Begin it, or go on where it stopped."""
        from photon.runs import resume, simulate, train

        if (self.folder / "run.json").exists():
            resume(self.folder, listener=listener)
        elif self.silos is None:
            simulate(self.config, run_dir=self.folder, listener=listener)
        else:
            train(self.config, silos=self.silos, run_dir=self.folder, listener=listener)


@dataclass(frozen=True)
class _Process:
    training: Training
    process: Any
    pipe: Connection


def at_once(config: RunConfig, runs: int) -> int:
    """Processes that train at a time: on a CPU one small model leaves all cores but one idle."""
    from photon.training import plan_compute
    from photon.training.device import cores

    on_cpu = plan_compute(config.compute).device.type == "cpu"
    return max(1, min(runs, cores())) if on_cpu else 1


def train_missing(trainings: Mapping[str, Training], processes: int, *, quiet: bool) -> None:
    """Whatever of these runs, by what a person calls each, is not finished; named as its folder."""
    from photon.runs import read_summary
    from photon.training import plan_compute

    left = {label: one for label, one in trainings.items() if read_summary(one.folder) is None}
    for label, each in left.items():
        tables: dict[str, Any] = {"run": {"name": each.folder.name}}
        if processes > 1:  # not by how many are left: the threads decide how sums round
            threads = plan_compute(each.config.compute, processes=processes).threads
            tables["compute"] = {"threads": threads}
        left[label] = replace(each, config=each.config.having(**tables))
    if processes == 1:
        for each in left.values():
            each.go(view_of_run(quiet=quiet))
        return
    with run_bars(console(), {} if quiet else dict(zip(left, left, strict=True))) as bars:
        listeners = {left[label].folder: bar for label, bar in bars.items()}
        train_side_by_side(list(left.values()), at_once=processes, listeners=listeners)


def train_side_by_side(
    trainings: Sequence[Training],
    *,
    at_once: int,
    listeners: Mapping[Path, Listener],
) -> None:
    """Do or take up each run, `at_once` of them at a time, in the order given.

    A run's result depends on its config alone (compute.threads included), not on what ran beside
    it. When one fails, and on Ctrl-C, the others stop as on Ctrl-C: each can be taken up again.

    Args:
        trainings: folders that hold a run already are taken up where they stopped.
        at_once: processes.
        listeners: by folder; told the events of that run, in this process.

    Raises:
        PhotonError: what the first run that failed raised.
        WorkerLostError: a run's process ended without a word.
    """
    context = fork_context()
    waiting = deque(trainings)
    running: list[_Process] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(context, waiting.popleft()))
            spoke = set(wait([each.pipe for each in running]))
            for each in [each for each in running if each.pipe in spoke]:
                if not _hear(each, listeners.get(each.training.folder)):
                    running.remove(each)
    finally:
        _stop(running)


def _start(context: Any, training: Training) -> _Process:
    ours, theirs = context.Pipe(duplex=False)
    # No daemon: it may start ranks of its own. `_stop` and `end_with_parent` see to its end.
    process = context.Process(target=_work, args=(training, theirs), name=training.folder.name)
    process.start()
    theirs.close()
    return _Process(training, process, ours)


def _hear(each: _Process, listener: Listener | None) -> bool:
    """Pass on what a run says; False once it is over."""
    try:
        message = each.pipe.recv()
    except EOFError:
        each.process.join()
        each.pipe.close()
        if each.process.exitcode:
            raise WorkerLostError(
                f"the process of {each.training.folder} ended with exit code "
                f"{each.process.exitcode}",
                hint="Call the same command again: it goes on with the run where it stopped.",
            ) from None
        return False
    if isinstance(message, PhotonError):
        raise message
    if listener is not None:
        listener.on_event(message)
    return True


def _stop(running: Sequence[_Process]) -> None:
    for each in running:
        each.pipe.close()  # none blocks on a pipe that nobody reads any more
        each.process.terminate()
    deadline = time.monotonic() + _STOP_S
    for each in running:
        each.process.join(max(0.1, deadline - time.monotonic()))
        each.process.kill()
        each.process.join()


@dataclass(frozen=True)
class _Told(Listener):
    """Sends a run's events to the process that shows them, which may be gone."""

    send: Callable[[Event], None]

    def on_event(self, event: Event) -> None:
        with contextlib.suppress(OSError):
            self.send(event)


def _work(training: Training, pipe: Connection) -> None:
    """A process of its own: one run, until it is over, told to stop or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's to hand on
    signal.signal(signal.SIGTERM, _interrupt)
    # Imports torch, which the command that starts these need not.
    from photon.engines.workers import end_with_parent

    end_with_parent()  # the run can be taken up again
    told = _Told(pipe.send)
    with contextlib.suppress(KeyboardInterrupt):  # also while an error is told
        try:
            training.go(told)
        except PhotonError as error:
            with contextlib.suppress(OSError):
                pipe.send(error)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
